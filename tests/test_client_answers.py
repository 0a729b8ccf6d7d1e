"""Requests for an answer's form and for several answers, by both protocols; the server is scripted."""

from __future__ import annotations

import json

import pytest
from wicore_client import Alternative, Client, ServerError
from wicore_client.cli import main
from wicore_client.results import Response

from tests.fake_triton import USAGE, words

pytest_plugins = ["tests.client_fixtures"]

ENTRY = {"token_id": 7, "token": "a", "logprob": -0.5, "top": []}


@pytest.fixture(params=["grpc", "http"])
def client(request, server):
    with Client(f"{request.param}://127.0.0.1:{server.ports[request.param]}") as client:
        yield client


def test_the_form_of_an_answer_travels_as_it_was_asked_for(client, server):
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    client.generate("Hi", grammar={"json_schema": schema}, logit_bias={5: -100, 6: 1.5}, n=2, min_tokens=3)
    assert json.loads(server.requests[-1].sampling_parameters) == {
        "grammar": {"json_schema": schema},
        "logit_bias": {"5": -100, "6": 1.5},
        "n": 2,
        "min_tokens": 3,
    }


def whole(request):
    """Two answers as the server gives them: in pieces to who streams, or all in the last response."""
    rest = [("", []), ("", [])] if request.stream else [("one", [1, 2]), ("two", [3])]
    answers = [
        {"index": i, "text": text, "token_ids": tokens, "finish_reason": reason}
        for i, ((text, tokens), reason) in enumerate(zip(rest, ("stop", "length"), strict=True))
    ]
    if request.stream:
        yield Response("o", (1,), index=0)
        yield Response("two", (3,), index=1, logprobs=json.dumps({"tokens": [ENTRY]}))
        yield Response("ne", (2,), index=0)
    else:
        answers[1]["logprobs"] = {"tokens": [ENTRY]}
    text, tokens = ("", ()) if request.stream else ("one", (1, 2))
    yield Response(text, tokens, "stop", usage=USAGE, answers=json.dumps(answers))


@pytest.mark.parametrize("streamed", [False, True])
def test_several_answers_are_told_apart(client, server, streamed):
    server.script = whole
    completion = client.stream("Hi", n=2).completion() if streamed else client.generate("Hi", n=2)
    first, second = completion.answers
    assert first == Alternative(0, "one", (1, 2), "stop")
    assert (second.text, second.token_ids, second.finish_reason) == ("two", (3,), "length")
    assert [entry.logprob for entry in second.logprobs] == [-0.5]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("one", (1, 2), "stop")


def test_chunks_say_whose_they_are(client, server):
    server.script = whole
    chunks = [(chunk.index, chunk.text) for chunk in client.stream("Hi", n=2)]
    assert chunks == [(0, "o"), (1, "two"), (0, "ne"), (0, "")]


def test_one_answer_has_no_others(client):
    assert client.generate("Hi").answers == ()


def test_answers_that_cannot_be_read_are_an_error(client, server):
    server.script = lambda _: iter([Response("x", (1,), "stop", usage=USAGE, answers='[{"index": 0}]')])
    with pytest.raises(ServerError, match="one version"):
        client.generate("Hi", n=2)


def test_the_command_line_takes_a_schema_from_a_file(server, tmp_path, capsys):
    server.script = words('{"a": 1}')
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    url = f"127.0.0.1:{server.ports['grpc']}"
    assert main(["chat", "Hi", "--url", url, "--json-schema", str(tmp_path / "schema.json")]) == 0
    assert json.loads(server.requests[-1].sampling_parameters) == {"grammar": {"json_schema": {"type": "object"}}}
    assert '{"a": 1}' in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read"), ("{", "is not JSON")])
def test_a_schema_that_cannot_be_read_is_said_before_anybody_is_asked(server, tmp_path, capsys, content, said):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    assert main(["chat", "Hi", "--url", f"127.0.0.1:{server.ports['grpc']}", "--json-schema", str(path)]) == 1
    assert said in capsys.readouterr().err
    assert not server.requests
