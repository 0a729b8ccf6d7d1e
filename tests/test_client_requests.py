"""The client against a scripted server: four clients (gRPC and HTTP, sync and async), one behaviour."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest
from PIL import Image
from wicore_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    RetryPolicy,
    ServerError,
    Unavailable,
    WicoreClientError,
)
from wicore_client.results import Response

from tests.fake_triton import USAGE, Disconnect, Failure, FakeTriton, words

QUICK = RetryPolicy(attempts=3, initial_delay=0.01, max_delay=0.5)
LOGPROBS = {
    "tokens": [{"token_id": 1, "token": "a", "logprob": -0.5, "top": [{"token_id": 2, "token": "b", "logprob": -1.0}]}],
    "prompt": [None, {"token_id": 3, "token": "c", "logprob": -2.0, "top": []}],
}


class Blocking:
    """An AsyncClient with Client's face, so that the same tests run on both."""

    def __init__(self, *args, **settings):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client = AsyncClient(*args, **settings)

    def wait(self, awaitable):
        async def run():
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def generate(self, *args, **options):
        return self.wait(self.client.generate(*args, **options))

    def health(self):
        return self.wait(self.client.health())

    def statistics(self):
        return self.wait(self.client.statistics())

    def cancel(self, request_id):
        async def cancel():
            return self.client.cancel(request_id)

        return self.wait(cancel())

    def stream(self, *args, **options):
        return BlockingStream(self, self.client.stream(*args, **options))

    def close(self):
        self.wait(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class BlockingStream:
    def __init__(self, owner, stream):
        self.owner, self.inner = owner, stream

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self.owner.wait(self.inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.owner.wait(self.inner.aclose())

    def completion(self):
        return self.owner.wait(self.inner.completion())

    def cancel(self):
        self.owner.loop.call_soon_threadsafe(self.inner.cancel)

    @property
    def text(self):
        return self.inner.text


@pytest.fixture
def server() -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        yield fake


@pytest.fixture(params=["grpc", "http", "grpc-async", "http-async"])
def connect(request, server):
    """Makes a client of the fake server."""
    protocol, _, flavour = request.param.partition("-")
    with contextlib.ExitStack() as stack:

        def make(*, port=None, **settings):
            settings = {"retry": QUICK, "metrics_port": server.ports["http"]} | settings
            url = f"127.0.0.1:{port or server.ports[protocol]}"
            client = (Blocking if flavour else Client)(url, protocol, **settings)
            stack.callback(client.close)
            return client

        yield make


def never(request):
    """A script that says one word and then waits for the client to leave."""
    yield Response(text_output="one", token_ids=(1,))
    request.wait()


def silent(request):
    """A script that says nothing."""
    request.wait()
    yield from ()


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


def test_a_timeout_ends_the_request_on_both_sides(connect, server):
    client = connect()
    for script, partial in ((silent, ""), (never, "one")):
        server.script = script
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="timeout") as caught:
            client.stream("Hi", timeout=1.0).completion()
        assert 0.95 < time.monotonic() - started < 5
        assert caught.value.partial_text == partial
    assert server.wait_until_gone(2)
    assert [json.loads(r.sampling_parameters) for r in server.requests] == [{"deadline_ms": 1000}] * 2


def test_leaving_the_with_block_cancels(connect, server):
    server.script = never
    with connect().stream("Hi") as stream:
        assert next(stream).text == "one"
    assert server.wait_until_gone()
    assert list(stream) == []


def once(condition, action) -> threading.Thread:
    """A thread that acts a moment after a condition has become true, when whoever asks is waiting."""

    def wait() -> None:
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.2)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_cancel_wakes_whoever_waits(connect, server):
    for asked, (script, partial) in enumerate(((silent, ""), (never, "one")), start=1):
        server.script = script
        stream = connect().stream("Hi")
        cancelling = once(
            lambda stream=stream, asked=asked, partial=partial: (
                len(server.requests) == asked and stream.text == partial
            ),
            stream.cancel,
        )
        with pytest.raises(Cancelled, match="by the client") as caught:
            stream.completion()
        cancelling.join()
        assert caught.value.partial_text == partial
        with pytest.raises(Cancelled):
            stream.completion()
    assert server.wait_until_gone(2)


def test_cancel_by_request_id_ends_a_generate(connect, server):
    server.script = silent
    client = connect()
    cancelling = once(lambda: server.requests, lambda: client.cancel("mine"))
    with pytest.raises(Cancelled):
        client.generate("Hi", request_id="mine")
    cancelling.join()
    assert server.wait_until_gone()
    assert not client.cancel("mine")


def test_a_cancel_spares_its_neighbours(connect, server):
    go = threading.Event()

    def script(_):
        yield Response("first", (1,))
        go.wait(5)
        yield Response(" last", (2,), finish_reason="stop", usage=USAGE)

    server.script = script
    client = connect()
    streams = [client.stream(f"{number}") for number in range(8)]
    assert [next(stream).text for stream in streams] == ["first"] * 8
    for stream in streams[::2]:
        stream.cancel()
    assert server.wait_until_gone(4)
    go.set()
    assert [stream.completion().text for stream in streams[1::2]] == ["first last"] * 4


def test_a_broken_connection_is_an_error_with_the_partial_answer(connect, server):
    def script(_):
        yield Response("half", (1,))
        time.sleep(0.1)
        raise Disconnect

    server.script = script
    with pytest.raises(ConnectionFailed, match="broke before the answer was whole") as caught:
        connect().stream("Hi").completion()
    assert caught.value.sent
    assert caught.value.partial_text == "half"
    assert len(server.requests) == 1


def test_a_stream_without_a_last_response_is_an_error(connect, server):
    server.script = lambda _: iter([Response("half", (1,))])
    with pytest.raises(ConnectionFailed, match="without a last response"):
        connect().stream("Hi").completion()


def test_busy_is_tried_again_until_it_works(connect, server):
    def script(request):
        if len(server.requests) < 3:
            raise Failure("unavailable", "the queue is full (64 requests); retry after 0.02 s")
        return words("at last")(request)

    server.script = lambda request: (yield from script(request))
    client = connect()
    assert client.generate("Hi").text == "at last"
    server.requests.clear()
    assert client.stream("Hi").completion().text == "at last"
    assert len(server.requests) == 3


def test_retries_are_bounded_and_can_be_switched_off(connect, server):
    def busy(_):
        raise Failure("unavailable", "the queue is full; retry after 0.01 s")
        yield

    server.script = busy
    for retry, attempts in ((QUICK, 3), (None, 1)):
        server.requests.clear()
        with pytest.raises(Unavailable) as caught:
            connect(retry=retry).generate("Hi")
        assert caught.value.retry_after == 0.01
        assert len(server.requests) == attempts


def test_nothing_is_tried_again_after_the_first_token_or_for_a_bad_request(connect, server):
    def late(_):
        yield Response("half", (1,))
        yield Response("", (), finish_reason="error", error_code="unavailable", error_message="draining")

    def bad(_):
        raise Failure("invalid_argument", "no")
        yield

    for script in (late, bad):
        server.requests.clear()
        server.script = script
        with pytest.raises(WicoreClientError):
            connect().stream("Hi").completion()
        assert len(server.requests) == 1


def test_no_server_is_a_readable_error_after_a_few_attempts(connect):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = connect(port=unused.getsockname()[1])
        started = time.monotonic()
        for ask in (lambda: client.generate("Hi"), client.health, client.statistics):
            with pytest.raises(ConnectionFailed, match=r"no server at 127\.0\.0\.1:.*refused.*start it") as caught:
                ask()
            assert not caught.value.sent
        assert time.monotonic() - started < 10


def test_a_server_that_comes_up_meanwhile_is_found(connect, server):
    """The client is made and asks before anyone listens on its port."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    client = connect(port=port, retry=RetryPolicy(attempts=20, initial_delay=0.1, max_delay=0.2))
    relay = threading.Timer(0.3, _forward, (port, server))
    relay.start()
    assert client.generate("Hi").text == "Hello, world"


def _forward(port: int, server: FakeTriton) -> None:
    """Listens on `port` and hands each connection on to the fake server that speaks its protocol."""
    listener = socket.create_server(("127.0.0.1", port))

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve():
        while True:
            inward, _ = listener.accept()
            protocol = "grpc" if inward.recv(3, socket.MSG_PEEK) == b"PRI" else "http"
            outward = socket.create_connection(("127.0.0.1", server.ports[protocol]))
            for ends in ((inward, outward), (outward, inward)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


def test_the_wrong_protocol_is_a_readable_error(server):
    protocols: tuple[Literal["grpc", "http"], ...] = ("grpc", "http")
    for protocol, other in zip(protocols, reversed(protocols), strict=True):
        with (
            Client(f"127.0.0.1:{server.ports[other]}", protocol, retry=None) as client,
            pytest.raises(WicoreClientError, match=r"127\.0\.0\.1"),
        ):
            client.generate("Hi", timeout=5)


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


def test_breaking_out_of_the_loop_cancels(server):
    server.script = never
    for protocol in ("grpc", "http"):
        with Client(f"127.0.0.1:{server.ports[protocol]}", protocol) as client:
            for _ in client.stream("Hi"):
                break
            assert server.wait_until_gone()
        server.requests.clear()


def test_breaking_out_of_the_loop_cancels_async(server):
    server.script = never

    async def run(protocol):
        async with AsyncClient(f"127.0.0.1:{server.ports[protocol]}", protocol) as client:
            async for _ in client.stream("Hi"):
                break
            assert await asyncio.to_thread(server.wait_until_gone)

    for protocol in ("grpc", "http"):
        asyncio.run(run(protocol))
        server.requests.clear()


def test_cancelling_the_task_cancels_the_request(server):
    server.script = never

    async def run(protocol):
        async with AsyncClient(f"127.0.0.1:{server.ports[protocol]}", protocol) as client:
            asking = asyncio.create_task(client.stream("Hi").completion())
            while not server.requests:
                await asyncio.sleep(0.005)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await asyncio.to_thread(server.wait_until_gone)

    for protocol in ("grpc", "http"):
        asyncio.run(run(protocol))
        server.requests.clear()


def test_one_client_serves_many_threads(connect):
    client = connect()
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.generate("Hi").text)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["Hello, world"] * 16


def test_ctrl_c_where_grpc_holds_a_lock_spares_the_next_request(server):
    """Raised there, KeyboardInterrupt would leave the lock taken, and the client without answers for ever."""

    def interrupted(action, moment):
        def watch(frame, event, _):
            if event == "return" and frame.f_code is threading.Condition.__enter__.__code__ and next(countdown) == 0:
                signal.raise_signal(signal.SIGINT)

        countdown = itertools.count(moment, -1)
        sys.setprofile(watch)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(f"127.0.0.1:{server.ports['grpc']}"))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, before)
        for action in (lambda: client.generate("Hi"), client.health):
            moment = 0
            while interrupted(action, moment):
                after = threading.Thread(target=client.generate, args=("Hi",), daemon=True)
                after.start()
                after.join(10)
                assert not after.is_alive(), f"no answer after Ctrl-C with lock {moment} held"
                moment += 1
            assert moment > 5
