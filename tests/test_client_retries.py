"""What is tried again and what is not, connections that break, and servers that are not there."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Literal

import pytest
from wicore_client import Client, ConnectionFailed, RetryPolicy, Unavailable, WicoreClientError
from wicore_client.results import Response

from tests.client_kit import QUICK
from tests.fake_triton import Disconnect, Failure, FakeTriton, words

pytest_plugins = ["tests.client_fixtures"]


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
