"""The backend against a gRPC server that speaks Triton's protocol and misbehaves on demand."""

import asyncio
import json
import struct
from contextlib import asynccontextmanager

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from wicore_backend.gateway import triton_wire
from wicore_backend.gateway.backend import Delta, GenerationRequest, Usage
from wicore_backend.gateway.errors import ApiError, InvalidRequestError
from wicore_backend.gateway.settings import GatewaySettings
from wicore_backend.gateway.triton_backend import TritonBackend

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1, "queue_ms": 0.5, "ttft_ms": 1, "total_ms": 2}


def answer(**outputs):
    """A response of the wire: texts, `token_ids` and `index`."""
    message = pb.ModelStreamInferResponse()
    for name, value in outputs.items():
        if name in ("token_ids", "index"):
            values = value if isinstance(value, tuple) else (value,)
            datatype, shape, raw = "INT32", len(values), struct.pack(f"<{len(values)}i", *values)
        else:
            text = (value if isinstance(value, str) else json.dumps(value)).encode()
            datatype, shape, raw = "BYTES", 1, struct.pack("<I", len(text)) + text
        tensor = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=[shape])
        message.infer_response.outputs.append(tensor)
        message.infer_response.raw_output_contents.append(raw)
    return message


WHOLE = (answer(text_output="Hel", token_ids=(1,)), answer(text_output="lo", finish_reason="stop", usage=USAGE))


class Script(GRPCInferenceServiceServicer):  # type: ignore[misc] # gRPC's code has no types
    """Answers with what stands in it: messages, a number of seconds to wait, a status to end with."""

    def __init__(self, *steps) -> None:
        self.steps = steps
        self.requests: list = []
        self.metadata: list = []
        self.cancelled = 0
        self.closed = 0
        self.closing_s = 0.0
        """What it takes to close a stream after the last step; a cancel that comes meanwhile is too early."""
        self.sent = 0

    async def ModelStreamInfer(self, requests, context):  # noqa: N802
        async for request in requests:
            self.requests.append(request)
            break
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            for step in self.steps:
                if isinstance(step, int | float):
                    await asyncio.sleep(step)
                elif isinstance(step, tuple):
                    await context.abort(*step)
                else:
                    self.sent += 1
                    yield step
            await asyncio.sleep(self.closing_s)
            self.closed += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def RepositoryIndex(self, _request, _context):  # noqa: N802
        entry = pb.RepositoryIndexResponse.ModelIndex(name="wicore", version="1", state="READY")
        return pb.RepositoryIndexResponse(models=[entry])


@asynccontextmanager
async def serving(script, port=0):
    server = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(script, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(port, **settings):
    backend = TritonBackend(GatewaySettings(triton_url=f"127.0.0.1:{port}", triton_metrics_url=None, **settings))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def asked(**fields) -> GenerationRequest:
    return GenerationRequest(**{"id": "r", "model": "wicore", "prompt": "Hi", **fields})


def run(script, request=None, **settings):
    """The deltas of one request to `script`, or the error."""

    async def scenario():
        async with serving(script) as port, connected(port, **settings) as backend:
            return [delta async for delta in backend.generate(request or asked())]

    return asyncio.run(scenario())


def fails(script, **settings) -> ApiError:
    with pytest.raises(ApiError) as caught:
        run(script, **settings)
    return caught.value


def inputs_of(message) -> dict[str, bytes]:
    return dict(zip((tensor.name for tensor in message.inputs), message.raw_input_contents, strict=True))


def test_an_answer_comes_delta_by_delta_and_empty_responses_say_nothing():
    deltas = run(Script(WHOLE[0], answer(), WHOLE[1]))
    assert deltas == [Delta(0, "Hel", (1,)), Delta(0, "lo", (), None, "stop", Usage(**USAGE))]


def test_a_request_is_written_in_the_terms_of_the_wire():
    script = Script(*WHOLE)
    run(script, asked(raw=True, options={"max_tokens": 3}, images=(b"ab", b"c"), metadata=(("traceparent", "00-1"),)))
    given = inputs_of(script.requests[0])
    assert given["text_input"][4:] == b"Hi"
    assert json.loads(given["sampling_parameters"][4:]) == {"max_tokens": 3, "raw": True}
    assert given["images"] == b"\2\0\0\0ab\1\0\0\0c"
    assert given["stream"] == b"\1"
    assert script.metadata[0]["traceparent"] == "00-1"
    assert "triton_grpc_error" not in script.metadata[0], "tritonserver 2.51 crashes in it"
    message = triton_wire.encode(asked(prompt=[{"role": "user", "content": "吗"}], stream=False))
    assert json.loads(inputs_of(message)["messages"][4:])[0]["content"] == "吗"
    message = triton_wire.encode(asked(prompt=[1, 2], options={"n": 2}))
    assert inputs_of(message)["input_ids"] == struct.pack("<2i", 1, 2)
    assert json.loads(inputs_of(message)["request"][4:]) == {"n": 2, "stream": True}


def test_text_that_is_no_unicode_is_refused():
    for prompt in ("\ud800", [{"role": "user", "content": "\ud800"}]):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            triton_wire.encode(asked(prompt=prompt))


def test_several_answers_are_told_apart_to_their_ends():
    def entry(index, text):
        return {"index": index, "text": text, "token_ids": [4], "finish_reason": "length"}

    last = answer(finish_reason="length", usage=USAGE, answers=[entry(0, "."), entry(1, "!")])
    script = Script(answer(index=1, text_output="b", token_ids=(2,)), last)
    deltas = run(script, asked(options={"n": 2}))
    assert [(d.index, d.text, d.finish_reason, d.usage is not None) for d in deltas] == [
        (1, "b", None, False),
        (0, ".", "length", False),
        (1, "!", "length", True),
    ]


@pytest.mark.parametrize(
    ("text", "status", "code", "retry"),
    [
        ("[invalid_argument] temperature = 9", 400, "invalid_value", None),
        ("in ensemble 'wicore', [unavailable] the queue is full; retry after 2.5 s", 503, "overloaded", "3"),
        ("[unavailable] draining", 503, "overloaded", "1"),
        ("[deadline_exceeded] too late", 504, "deadline_exceeded", None),
        ("[cancelled] gone", 499, "cancelled", None),
        ("[internal] broken", 500, "internal", None),
        ("Segmentation fault", 500, "internal", None),
    ],
)
def test_codes_of_the_engine_become_statuses_whichever_way_they_come(text, status, code, retry):
    code_, _, rest = text.rpartition("[")[2].partition("] ")
    ways = [Script(pb.ModelStreamInferResponse(error_message=text)), Script((grpc.StatusCode.INTERNAL, text))]
    if rest:
        ways.append(Script(WHOLE[0], answer(finish_reason="error", usage=USAGE, error_code=code_, error_message=rest)))
    for script in ways:
        error = fails(script)
        assert (error.status, error.code, error.headers.get("Retry-After")) == (status, code, retry)


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Script(), 503, "backend_unavailable"),
        (Script(WHOLE[0]), 503, "backend_unavailable"),
        (Script((grpc.StatusCode.UNAVAILABLE, "Socket closed")), 503, "backend_unavailable"),
        (Script((grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input")), 400, "invalid_value"),
        (Script((grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'wicore' is not found")), 503, None),
        (Script((grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max")), 413, "request_too_large"),
        (Script(answer(finish_reason="deadline", usage=USAGE)), 500, "internal"),
    ],
)
def test_a_stream_that_breaks_is_an_error_and_never_an_answer(script, status, code):
    error = fails(script)
    assert error.status == status
    assert code is None or error.code == code
    assert status != 503 or error.retry_after_s


def test_a_model_that_is_not_there_is_waited_for():
    error = fails(Script(pb.ModelStreamInferResponse(error_message="Request for unknown model: 'wicore' is not found")))
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "model_unavailable", "5")


def test_a_server_that_falls_silent_is_given_up():
    error = fails(Script(WHOLE[0], 60), first_response_timeout_s=0.2)
    assert (error.status, error.code) == (504, "deadline_exceeded")


def test_closing_an_answer_or_cancelling_who_waits_for_it_cancels_the_call():
    async def scenario() -> None:
        script = Script(WHOLE[0], 60)
        async with serving(script) as port, connected(port) as backend:
            deltas = backend.generate(asked())
            await anext(deltas)
            await deltas.aclose()
            await _until(lambda: script.cancelled == 1)
            deltas = backend.generate(asked())
            await anext(deltas)
            waiting = asyncio.create_task(anext(deltas))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await _until(lambda: script.cancelled == 2)

    asyncio.run(scenario())


LEAVE = {
    "when the answer is whole": lambda deltas: deltas.aclose(),
    "when there is nothing more": lambda deltas: anext(deltas, None),
}


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_the_server_closes_the_stream_after_an_answer_however_soon_its_reader_leaves(leave):
    """Triton keeps a request, and so its model, whose stream is cancelled while it closes it."""

    async def scenario() -> None:
        script = Script(*WHOLE)
        script.closing_s = 0.1
        async with serving(script) as port, connected(port) as backend:
            deltas = backend.generate(asked())
            while (await anext(deltas)).usage is None:
                pass
            leaving = asyncio.create_task(leave(deltas))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
            backend.end_requests()
        assert (script.closed, script.cancelled) == (1, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "last",
    [
        pb.ModelStreamInferResponse(error_message="[unavailable] full"),
        answer(finish_reason="error", usage=USAGE, error_code="internal", error_message="out of luck"),
    ],
    ids=["before the first token", "after it"],
)
def test_the_server_closes_the_stream_after_an_error_too(last):
    script = Script(WHOLE[0], last)
    script.closing_s = 0.1
    fails(script)
    assert (script.closed, script.cancelled) == (1, 0)


def test_requests_that_are_ended_from_inside_say_why():
    async def scenario() -> None:
        async with serving(Script(WHOLE[0], 60)) as port, connected(port) as backend:
            deltas = backend.generate(asked())
            await anext(deltas)
            asyncio.get_running_loop().call_later(0.05, backend.end_requests)
            with pytest.raises(ApiError, match="shutting down"):
                await anext(deltas)

    asyncio.run(scenario())


def test_a_server_that_comes_back_is_found_by_itself():
    async def scenario() -> None:
        script = Script(*WHOLE)
        async with serving(script) as port, connected(port) as backend:
            assert [d async for d in backend.generate(asked())]
            assert (await backend.readiness()).ready
            kept = port
        async with connected(kept) as backend:
            readiness = await backend.readiness()
            assert not readiness.ready
            assert "cannot be reached" in readiness.reason
            with pytest.raises(ApiError) as caught:
                await anext(backend.generate(asked()))
            assert (caught.value.status, caught.value.code) == (503, "backend_unavailable")
            async with serving(script, kept):
                async with asyncio.timeout(5):
                    while not (await backend.readiness()).ready:
                        await asyncio.sleep(0.05)
                assert [d async for d in backend.generate(asked())]

    asyncio.run(scenario())


def test_where_the_server_is_stands_in_the_log_and_in_no_answer(caplog):
    async def scenario() -> list[str]:
        async with serving(Script()) as port:
            pass
        async with connected(port) as gone:
            with pytest.raises(ApiError) as unreachable:
                await anext(gone.generate(asked()))
            readiness = await gone.readiness()
        assert f"127.0.0.1:{port}" in caplog.text
        said = [unreachable.value.message, readiness.reason]
        for step in (
            60,
            (grpc.StatusCode.UNAVAILABLE, "ipv4:127.0.0.1:8001: Failed to connect"),
            (grpc.StatusCode.CANCELLED, "127.0.0.1 ended it"),
            (grpc.StatusCode.INTERNAL, "at 127.0.0.1"),
        ):
            async with serving(Script(step)) as port, connected(port, first_response_timeout_s=0.2) as backend:
                with pytest.raises(ApiError) as caught:
                    await anext(backend.generate(asked()))
                said.append(caught.value.message)
        return said

    for message in asyncio.run(scenario()):
        assert "127.0.0.1" not in message
        assert "server" in message


def test_an_engine_in_trouble_is_not_ready():
    class Ill(Script):
        async def RepositoryIndex(self, _request, _context):  # noqa: N802
            entries = [("wicore", "READY", ""), ("wicore_health_7_1", "UNAVAILABLE", "recovering")]
            models = [pb.RepositoryIndexResponse.ModelIndex(name=n, state=s, reason=r) for n, s, r in entries]
            return pb.RepositoryIndexResponse(models=models)

    async def scenario() -> None:
        async with serving(Ill()) as port, connected(port) as backend:
            readiness = await backend.readiness()
            assert not readiness.ready
            assert "recovering" in readiness.reason

    asyncio.run(scenario())


def test_a_reader_that_stops_holds_up_the_server():
    async def scenario() -> None:
        large = answer(text_output="x" * 100_000, token_ids=(1,))
        script = Script(*[large] * 2000, WHOLE[1])
        async with serving(script) as port, connected(port) as backend:
            deltas = backend.generate(asked())
            await anext(deltas)
            sent = -1
            while sent != script.sent:
                sent = script.sent
                assert sent < 1000
                await asyncio.sleep(0.5)
            await deltas.aclose()

    asyncio.run(scenario())


async def _until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_server_that_is_away_is_one_line_in_the_log_however_often_it_is_asked(caplog):
    async def ask():
        backend = TritonBackend(GatewaySettings(triton_url="127.0.0.1:1"))
        await backend.start()
        try:
            for _ in range(5):
                assert not (await backend.readiness()).ready
                with pytest.raises(ApiError):
                    await backend.status()
        finally:
            await backend.close()

    with caplog.at_level("WARNING", logger="wicore_backend.gateway"):
        asyncio.run(ask())
    said = [record.getMessage() for record in caplog.records if "127.0.0.1:1" in record.getMessage()]
    assert len(said) == 1
    assert "unavailable" in said[0]
