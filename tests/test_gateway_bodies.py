"""Bodies made of a million mistakes, and of text that is none, cost nobody anything and are named."""

import re
import time
from json import loads

import pytest

from tests.gateway_kit import CHAT, ScriptedBackend, gateway

MANY = 100_000
USER = {"role": "user", "content": "hi"}


def chat(**fields):
    return "/v1/chat/completions", CHAT | fields


def timed(action):
    """What it gives, and the CPU time that it took."""
    began = time.process_time()
    return action(), time.process_time() - began


def problems(answer):
    """How many the server looked at."""
    found = re.search(r"\(and (\d+) more\)", answer.json()["error"]["message"])
    return 1 + int(found[1]) if found else 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        chat(messages=[{"role": "user", "content": [1] * MANY}]),
        chat(messages=[{"role": "user", "content": [1] * 4000}] * 25),
        chat(messages=[{"role": "assistant", "content": "", "tool_calls": [1] * MANY}, USER]),
        chat(messages=[{"role": "user", "content": "hi", **{f"x{i}": 1 for i in range(MANY)}}]),
        chat(logit_bias={str(i): "x" for i in range(MANY)}),
        chat(metadata={str(i): 1 for i in range(MANY)}),
        chat(**{f"x{i}": 1 for i in range(MANY)}),
        ("/v1/completions", {"model": "wicore", "prompt": [""] * MANY}),
        ("/v1/completions", {"model": "wicore", "prompt": [["x"] * 5000] * 20}),
        ("/v1/responses", {"model": "wicore", "input": [{"role": "user", "content": [1] * MANY}]}),
        ("/v1/responses", {"model": "wicore", "input": [1] * 4000}),
        ("/v1/responses", {"model": "wicore", "input": "hi", "include": ["x"] * MANY}),
        ("/v1/inference", {"prompt": "hi", "images": [1] * MANY}),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_of_many_mistakes_few_are_looked_at(path, body):
    with gateway() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert problems(answer) < 100


@pytest.mark.parametrize(
    ("path", "name", "part"),
    [("/v1/chat/completions", "messages", "text"), ("/v1/responses", "input", "input_text")],
)
def test_all_messages_together_have_so_many_parts_and_no_more(path, name, part):
    backend = ScriptedBackend()
    parts = [{"type": part, "text": "a"}] * 1024
    with gateway(backend) as client:
        for messages, status in ((4, 200), (5, 400)):
            body = {"model": "wicore", name: [{"role": "user", "content": parts}] * messages}
            answer = client.post(path, json=body)
            assert answer.status_code == status
    assert answer.json()["error"]["param"] == name
    assert len(backend.requests) == 1


def test_an_unknown_name_is_named_among_many():
    path, body = chat(**{f"x{i}": 1 for i in range(200)})
    with gateway() as client:
        assert client.post(path, json=body).json()["error"]["param"] == "x0"


@pytest.mark.parametrize(
    "field",
    [
        '"tools": [{"type": "function", "\\ud800": 1}]',
        '"tools": [{"type": "function", "function": {"name": "f", "\\ud800": 1}}]',
        '"response_format": {"type": "text", "\\ud800": 1}',
        '"response_format": {"type": "json_schema", "json_schema": {"\\ud800": 1}}',
        '"response_format": {"type": "\\ud800"}',
        '"tools": [{"type": "\\ud800"}]',
        '"tool_choice": {"type": "\\ud800"}',
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(field):
    body = f'{{"model": "wicore", "messages": [{{"role": "user", "content": "hi"}}], {field}}}'
    with gateway() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "\xff"}', "is not UTF-8"),
        (b"[" * 50_000, "nested too deeply; flatten it"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "digits"),
        (b"", "the body is missing"),
        (b"7", "Input should be an object"),
    ],
    ids=["not UTF-8", "deep", "digits", "empty", "number"],
)
def test_a_body_that_cannot_be_read_is_told_why(body, said):
    with gateway() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert "sys." not in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] is None


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/completions", {"prompt": [1, 2**40]}, "prompt[1]", "less than 2147483648"),
        ("/v1/completions", {"prompt": [[1], [2, "x"]]}, "prompt[1][1]", "a valid integer"),
        ("/v1/completions", {"prompt": ["a", ""]}, "prompt[1]", "at least 1 character"),
        (*chat(stop=["x"] * 5000), "stop", "at most 16 items"),
        (*chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "missing"),
        (*chat(messages=[{"role": "user", "content": [{"type": "dance"}]}]), "messages[0].content[0]", "'image_url'"),
        ("/v1/responses", {"input": [1]}, "input[0]", "function_call_output"),
    ],
)
def test_of_a_value_with_several_forms_the_part_that_is_wrong_is_named(path, body, param, said):
    with gateway() as client:
        error = client.post(path, json={"model": "wicore"} | body).json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_a_field_that_a_form_has_twice_is_refused():
    with gateway() as client:
        answer = client.post("/v1/inference/upload", data={"prompt": ["one", "two"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "\xff"])
def test_a_malformed_origin_is_refused_as_a_foreign_one(origin):
    with gateway() as client:
        answer = client.get("/health", headers={"Origin": origin.encode("latin-1")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")


def test_a_model_whose_name_has_a_slash_can_be_asked_for():
    with gateway(aliases=("google/gemma-3-4b-it",)) as client:
        assert client.get("/v1/models/google/gemma-3-4b-it").json()["id"] == "google/gemma-3-4b-it"
        assert client.get("/v1/models/google%2Fgemma-3-4b-it").json()["id"] == "google/gemma-3-4b-it"
        assert client.get("/v1/models/google/other").json()["error"]["code"] == "model_not_found"


def test_a_body_of_millions_of_values_is_not_parsed_and_one_long_text_is():
    backend = ScriptedBackend()
    with gateway(backend) as client:
        json = {"content-type": "application/json"}
        tiny = b'{"x": [' + b"[]," * 3_000_000 + b"1]}"
        answer, answered = timed(lambda: client.post("/v1/chat/completions", content=tiny, headers=json))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        _, parsed = timed(lambda: loads(b"[" + b"[]," * 300_000 + b"1]"))
        assert answered < 10 * parsed
        long = {"messages": [{"role": "user", "content": "a, " * 1_000_000}]}
        assert client.post("/v1/chat/completions", json=CHAT | long).status_code == 200
