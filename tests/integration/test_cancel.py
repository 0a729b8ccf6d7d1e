"""Clients that go away: their blocks are free within a second, whatever road they came, and nothing leaks."""

import random
import threading
import time

import pytest
from wicore_client import Cancelled
from wicore_client.requests import SamplingOptions

from tests.integration.wire import BareStream, client, metric, open_http, wait_idle

ENDLESS: SamplingOptions = {"temperature": 0.0, "max_tokens": 8000, "ignore_eos": True}
LONG_PROMPT = "tell me of the red circle and the blue square " * 400
FREED_WITHIN_S = 1.0


def freed_within(seconds: float, server, leave) -> bool:
    """Whether a client that leaves frees its blocks in so long; a machine that is busy elsewhere gets three chances."""
    for _ in range(3):
        wait_idle(server, 10)
        leave(server)
        if wait_idle(server, 5) <= seconds:
            return True
    return False


def wait_running(server) -> None:
    end = time.monotonic() + 10
    while not metric(server, "wicore_kv_blocks_used"):
        assert time.monotonic() < end, "the request does not start"
        time.sleep(0.02)


def leave_grpc_ensemble(server) -> None:
    with client(server) as c:
        stream = c.stream("hello", **ENDLESS)
        next(stream)
        wait_running(server)
        stream.close()


def leave_grpc_bare(server) -> None:
    stream = BareStream(server, [2, 300, 301], stream=True, **ENDLESS)
    stream.wait()
    wait_running(server)
    stream.cancel()


def leave_http(text: str):
    def leave(server) -> None:
        body = {"text_input": text, "stream": True, **ENDLESS}
        connection = open_http(server, "/v2/models/wicore/generate_stream", body)
        wait_running(server)
        connection.close()

    return leave


def leave_http_bare(server) -> None:
    body = {"input_ids": [2, 300], "stream": True, **ENDLESS}
    connection = open_http(server, "/v2/models/wicore_gemma3/generate_stream", body)
    wait_running(server)
    connection.close()


def leave_while_prefilling(server) -> None:
    with client(server) as c:
        stream = c.stream(LONG_PROMPT, **ENDLESS)
        ended: list[Exception] = []

        def read() -> None:
            try:
                list(stream)
            except Cancelled as error:
                ended.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        wait_running(server)
        stream.cancel()
        thread.join(5)
        assert ended


ROADS = {
    "gRPC, ensemble": leave_grpc_ensemble,
    "gRPC, model": leave_grpc_bare,
    "HTTP, ensemble": leave_http("hello"),
    "HTTP, model": leave_http_bare,
    "HTTP, ensemble, in prefill": leave_http(LONG_PROMPT),
    "gRPC, ensemble, in prefill": leave_while_prefilling,
}


@pytest.mark.parametrize("road", ROADS)
def test_a_client_that_leaves_frees_its_blocks_within_a_second(server, road):
    assert freed_within(FREED_WITHIN_S, server, ROADS[road])


def test_a_client_of_generate_that_leaves_is_noticed_at_its_deadline(server):
    """Triton's HTTP server looks at a connection when it writes to it, and `generate` writes once, at the end."""

    def leave(server) -> None:
        body = {"text_input": "hello", "deadline_ms": 1500, **ENDLESS}
        connection = open_http(server, "/v2/models/wicore/generate", body)
        wait_running(server)
        connection.close()

    assert freed_within(1.5 + FREED_WITHIN_S, server, leave)


def test_200_random_cancels_and_disconnects_leak_nothing(server):
    """Through model and ensemble, streamed and whole, at any moment from before the first token to after the last."""
    wait_idle(server, 5)
    rng = random.Random(0)
    failures: list[BaseException] = []

    def one(index: int, kind: int, delay: float, tokens: int) -> None:
        options: SamplingOptions = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
        try:
            if kind == 0:
                with client(server, retry=None) as c:
                    stream = c.stream(f"hello {index}", **options)
                    end = time.monotonic() + delay
                    for _ in stream:
                        if time.monotonic() > end:
                            break
                    stream.close()
            elif kind == 1:
                bare = BareStream(server, [2, 300 + index], stream=True, **options)
                time.sleep(delay)
                bare.cancel()
            else:
                path = "/v2/models/wicore/" + ("generate" if kind == 2 else "generate_stream")
                body = {"text_input": f"hello {index}", "stream": kind == 3, **options}
                if kind == 2:  # Noticed at the end only; see above.
                    body["max_tokens"] = min(tokens, 40)
                connection = open_http(server, path, body)
                time.sleep(delay)
                connection.close()
        except BaseException as error:
            failures.append(error)

    cases = [
        (i, rng.randrange(4), rng.choice([0.0, 0.01, rng.random() * 1.5]), rng.choice([1, 5, 40, 3000]))
        for i in range(200)
    ]
    before = metric(server, "wicore_requests_total")
    for first in range(0, 200, 20):
        threads = [threading.Thread(target=one, args=case) for case in cases[first : first + 20]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures
    wait_idle(server, 5)
    with client(server) as c:
        assert c.generate("hello", max_tokens=5, temperature=0.0).usage.completion_tokens <= 5
        assert c.health().ready
    assert metric(server, "wicore_requests_total") > before
    assert metric(server, "nv_inference_pending_request_count") == 0
