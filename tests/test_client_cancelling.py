"""Requests that are given up, on both sides: timeouts, cancels, loops and tasks that are left, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import threading
import time

import pytest
from wicore_client import AsyncClient, Cancelled, Client, DeadlineExceeded
from wicore_client.results import Response

from tests.client_kit import never, silent
from tests.fake_triton import USAGE

pytest_plugins = ["tests.client_fixtures"]


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
