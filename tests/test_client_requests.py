"""The client against a scripted server: what it asks, and what it makes of answers, errors, health and statistics."""

from __future__ import annotations

import contextlib
import io
import json
import threading

import pytest
from PIL import Image
from wicore_client import Cancelled, DeadlineExceeded, InvalidArgument, ServerError, Unavailable, WicoreClientError
from wicore_client.results import Response

from tests.fake_triton import USAGE, Failure, words

pytest_plugins = ["tests.client_fixtures"]

LOGPROBS = {
    "tokens": [{"token_id": 1, "token": "a", "logprob": -0.5, "top": [{"token_id": 2, "token": "b", "logprob": -1.0}]}],
    "prompt": [None, {"token_id": 3, "token": "c", "logprob": -2.0, "top": []}],
}


def test_generate_returns_the_whole_answer(connect, server):
    completion = connect().generate("Hi")
    assert (completion.text, completion.token_ids) == ("Hello, world", (1, 2, 3))
    assert (completion.finish_reason, completion.usage.prompt_tokens, completion.usage.ttft_ms) == ("stop", 5, 2.0)
    assert not server.requests[0].stream


def test_stream_yields_chunks_as_they_come_and_the_last_has_reason_and_usage(connect, server):
    heard = threading.Event()

    def script(_):
        yield Response(text_output="a", token_ids=(1,))
        assert heard.wait(5), "the first chunk was held back until the second"
        yield Response(text_output="b", token_ids=(2, 3), finish_reason="length", usage=USAGE)

    server.script = script
    stream = connect().stream("Hi")
    first = next(stream)
    heard.set()
    second = next(stream)
    assert (first.text, first.token_ids, first.finish_reason, first.usage) == ("a", (1,), None, None)
    assert (second.text, second.token_ids, second.finish_reason) == ("b", (2, 3), "length")
    assert second.usage is not None
    assert list(stream) == []
    assert stream.completion().text == "ab"


def test_a_request_carries_prompt_images_and_options(connect, server, tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(b"from a file")
    picture = Image.new("RGB", (3, 2), "red")
    connect().generate("看", images=[b"bytes", path, str(path), picture], max_tokens=7, stop="x", seed=None)
    (request,) = server.requests
    assert (request.model, request.text_input, request.messages) == ("wicore", "看", None)
    assert json.loads(request.sampling_parameters) == {"max_tokens": 7, "stop": "x"}
    assert request.images[:3] == [b"bytes", b"from a file", b"from a file"]
    assert Image.open(io.BytesIO(request.images[3])).getpixel((1, 1)) == (255, 0, 0)


def test_a_conversation_travels_as_messages(connect, server):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "什么?"}]}]
    connect().generate(messages, images=[b"1"], request_id="mine")
    (request,) = server.requests
    assert json.loads(request.messages) == messages
    assert (request.text_input, request.sampling_parameters, request.id) == (None, None, "mine")


def test_logprobs_are_typed(connect, server):
    final = Response("a", (1,), "stop", usage=USAGE, logprobs=json.dumps(LOGPROBS))
    server.script = lambda _: iter([final])
    completion = connect().generate("Hi", logprobs=1, prompt_logprobs=0)
    (token,) = completion.logprobs
    assert (token.token, token.logprob, token.top[0].token_id) == ("a", -0.5, 2)
    assert completion.prompt_logprobs[0] is None
    assert completion.prompt_logprobs[1].logprob == -2.0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_argument", InvalidArgument),
        ("unavailable", Unavailable),
        ("cancelled", Cancelled),
        ("internal", ServerError),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_has_one_type_before_and_after_the_first_token(connect, server, code, kind, stream):
    def before(_):
        raise Failure(code, "top_k is -1")
        yield

    def after(request):
        if request.stream:
            yield Response(text_output="par", token_ids=(1,))
        text = "tial" if request.stream else "partial"
        yield Response(text, (2,), finish_reason="error", error_code=code, error_message="top_k is -1")

    client = connect(retry=None)
    for script, partial in ((before, ""), (after, "partial")):
        server.script = script
        with pytest.raises(WicoreClientError, match="top_k is -1") as caught:
            client.stream("Hi").completion() if stream else client.generate("Hi")
        assert str(caught.value) == "top_k is -1"
        assert type(caught.value) is kind
        assert caught.value.code == code
        assert caught.value.partial_text == partial
    server.script = words("fine")
    assert client.generate("Hi").text == "fine"


@pytest.mark.parametrize("connect", ["grpc", "grpc-async"], indirect=True)
def test_the_server_closes_the_stream_after_an_answer_and_after_an_error(connect, server):
    """Triton keeps a request, and so its model, whose stream the client cancels while it closes it."""

    def refused(_):
        raise Failure("unavailable", "full")
        yield

    def failed(_):
        yield Response("", (), finish_reason="error", error_code="internal", error_message="out of luck")

    client = connect(retry=None)
    server.closing_s = 0.1
    for script, error in ((words("fine"), None), (refused, Unavailable), (failed, ServerError)):
        server.script = script
        with pytest.raises(error) if error else contextlib.nullcontext():
            client.generate("Hi")
    assert len(server.requests) == 3
    assert not server.wait_until_gone(seconds=0.3)


def test_a_deadline_on_the_server_keeps_the_partial_answer(connect, server):
    def script(_):
        yield Response("some", (1,))
        yield Response("", (), finish_reason="deadline", error_code="deadline_exceeded", error_message="after 50 ms")

    server.script = script
    with pytest.raises(DeadlineExceeded, match="after 50 ms") as caught:
        connect().stream("Hi", deadline_ms=50).completion()
    assert (caught.value.partial_text, caught.value.partial_token_ids) == ("some", (1,))


def test_one_client_serves_many_threads(connect):
    client = connect()
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.generate("Hi").text)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["Hello, world"] * 16


def test_health_tells_server_and_models(connect, server):
    client = connect()
    health = client.health()
    assert (health.live, health.ready, health.server) == (True, True, "triton 2.51.0")
    assert [(m.name, m.version, m.ready) for m in health.models] == [("wicore", "1", True)]
    server.model_state = "UNAVAILABLE"
    assert not client.health().ready


def test_statistics_has_tritons_counts_and_wicores_metrics(connect):
    statistics = connect().statistics()
    (model,) = statistics.models
    assert (model.name, model.succeeded, model.failed, model.executions) == ("wicore", 8, 2, 10)
    assert (model.queue_ms, model.compute_ms) == (2.0, 10.0)
    assert [(m.name, m.labels, m.value) for m in statistics.metrics] == [
        ("wicore_requests_total", {"model": "wicore_gemma3", "outcome": 'stop "a"'}, 7.0),
        ("wicore_blocks_used", {}, 3.5),
    ]
    assert connect(metrics_port=None).statistics().metrics == ()
