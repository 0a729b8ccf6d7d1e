"""Clients that leave, stall or read slowly, and a gateway that is told to stop: over real sockets."""

import asyncio
import json
import socket
import threading
import time

import pytest
from websockets.sync.client import connect

from tests.gateway_kit import CHAT, ScriptedBackend, gateway, served_gateway
from tests.waiting import wait_until
from wicore_backend.gateway.backend import Delta, Usage
from wicore_backend.gateway.caller import ANYBODY
from wicore_backend.gateway.errors import ApiError, UnavailableError
from wicore_backend.gateway.generation import Generation, Generations
from wicore_backend.gateway.patience import Patience

PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "wicore", "prompt": ["a", "b"]},
    "/v1/responses": {"model": "wicore", "input": "a"},
    "/v1/inference": {"prompt": "a"},
}


def http(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Chatter(ScriptedBackend):
    """Says large things as fast as they are taken, and counts them."""

    said = 0

    async def generate(self, request):
        self.requests.append(request)
        self.running += 1
        try:
            for _ in range(20_000):
                await asyncio.sleep(0)
                self.said += 1
                yield Delta(0, "x" * 10_000, (7,))
            yield Delta(0, "", (), None, "stop", Usage(1, 20_000))
        finally:
            self.running -= 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_s", [0.01, 30.0], ids=["while it answers", "before the first token"])
def test_a_client_that_leaves_cancels_its_request(path, stream, pause_s):
    if stream and path == "/v1/inference":
        pytest.skip("it does not stream")
    backend = ScriptedBackend(tokens=10_000, pause_s=pause_s)
    with served_gateway(backend) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(http(path, PATHS[path] | ({"stream": True} if stream else {})))
        wait_until(lambda: backend.running > 0)
        if stream and pause_s < 1:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.close()
        wait_until(lambda: backend.running == 0)


def test_a_slow_reader_holds_up_its_own_stream_and_nothing_piles_up():
    backend = Chatter()
    with served_gateway(backend) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(http("/v1/chat/completions", CHAT | {"stream": True}))
        wait_until(lambda: backend.said > 0)
        said = -1
        while said != backend.said:
            said = backend.said
            assert said * 10_000 < 20e6, "it goes on though nobody reads"
            time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in other.recv(1000)
        client.close()
        wait_until(lambda: backend.running == 0)


def test_a_client_that_reads_nothing_for_too_long_is_left():
    backend = Chatter()
    with served_gateway(backend, stalled_reader_timeout_s=0.3) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(http("/v1/chat/completions", CHAT | {"stream": True}))
        wait_until(lambda: backend.said > 0)
        wait_until(lambda: backend.running == 0)
        client.close()


def ws(port: int):
    return connect(f"ws://localhost:{port}/ws/chat", max_size=None)


def generate(request_id: str, **fields) -> str:
    return json.dumps({"type": "generate", "id": request_id, "request": {**CHAT, **fields}})


def test_a_socket_carries_several_requests_and_each_ends_with_one_last_frame():
    with served_gateway(ScriptedBackend(tokens=5, pause_s=0.01)) as port, ws(port) as socket_:
        for name in "abc":
            socket_.send(generate(name))
        frames: dict[str, list[dict]] = {"a": [], "b": [], "c": []}
        while any(not told or told[-1]["type"] != "done" for told in frames.values()):
            frame = json.loads(socket_.recv(timeout=5))
            frames[frame["id"]].append(frame)
        for told in frames.values():
            assert [frame["type"] for frame in told] == ["started", *["delta"] * 5, "finish", "done"]
            assert "".join(frame.get("text", "") for frame in told) == "word " * 5
            assert told[-1]["usage"]["completion_tokens"] == 5
            assert told[-1]["timing"]["ttft_ms"] > 0
        assert len({told[0]["request_id"] for told in frames.values()}) == 3


def test_a_cancel_frame_cancels_one_request_and_not_the_other():
    backend = ScriptedBackend(tokens=10_000, pause_s=0.01)
    with served_gateway(backend) as port, ws(port) as socket_:
        socket_.send(generate("a"))
        socket_.send(generate("b"))
        wait_until(lambda: backend.running == 2)
        socket_.send(json.dumps({"type": "cancel", "id": "a"}))
        wait_until(lambda: backend.running == 1)
        while (frame := json.loads(socket_.recv(timeout=5)))["type"] != "cancelled":
            assert frame["type"] in ("started", "delta")
        assert frame["id"] == "a"
        socket_.send(generate("a"))  # Its name is free again.
        wait_until(lambda: backend.running == 2)
        socket_.send(json.dumps({"type": "cancel", "id": "nobody"}))
        socket_.send(json.dumps({"type": "ping"}))
        while json.loads(socket_.recv(timeout=5))["type"] != "pong":
            pass
    wait_until(lambda: backend.running == 0)


def test_a_request_that_is_cancelled_in_the_same_breath_has_its_last_frame():
    with served_gateway(ScriptedBackend(pause_s=0.05)) as port, ws(port) as socket_:
        for i in range(10):
            socket_.send(generate(f"r{i}"))
            socket_.send(json.dumps({"type": "cancel", "id": f"r{i}"}))
        ended = set()
        while len(ended) < 10:
            frame = json.loads(socket_.recv(timeout=5))
            if frame["type"] in ("cancelled", "done"):
                ended.add(frame["id"])


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "{",
        "[]",
        "7",
        '{"type": "dance"}',
        '{"type": "generate", "id": ""}',
        '{"type":"generate","id":"a","request":{}}',
        generate("a", stream=True),
        generate("a", foo=1),
        generate("a", model="other"),
        '{"type": "ping", "x": 1}',
    ],
)
def test_a_bad_frame_is_answered_and_the_socket_stays_open(frame):
    with served_gateway() as port, ws(port) as socket_:
        socket_.send(frame)
        told = json.loads(socket_.recv(timeout=5))
        assert told["type"] == "error"
        assert told["error"].keys() == {"message", "type", "param", "code", "status", "retry_after"}
        socket_.send(generate("ok"))
        while (told := json.loads(socket_.recv(timeout=5)))["type"] != "done":
            assert told["type"] != "error", told


def test_a_socket_has_only_so_many_requests_and_a_name_only_once():
    with served_gateway(ScriptedBackend(pause_s=1), socket_requests=2) as port, ws(port) as socket_:
        for name in ("a", "a", "b", "c"):
            socket_.send(generate(name))
        told = []
        while len(told) < 2:
            frame = json.loads(socket_.recv(timeout=5))
            told += [frame] if frame["type"] == "error" else []
        # An error with the id of the first "a" would seem to be its last frame.
        assert [(frame["id"], frame["error"]["status"]) for frame in told] == [(None, 400), ("c", 429)]
        assert told[0]["error"]["param"] == "id"


def test_what_is_wrong_with_a_request_is_told_under_its_id():
    with served_gateway() as port, ws(port) as socket_:
        for fields in ({"foo": 1}, {"temperature": 9}, {"messages": 5}):
            socket_.send(generate("a", **fields))
            frame = json.loads(socket_.recv(timeout=5))
            assert (frame["type"], frame["id"]) == ("error", "a")
        for name in ("", "x" * 65, 7, None):
            socket_.send(generate(name))
            assert json.loads(socket_.recv(timeout=5))["id"] is None


def test_an_error_of_the_backend_is_the_last_frame():
    backend = ScriptedBackend(error=UnavailableError("full", code="overloaded", retry_after_s=7))
    with served_gateway(backend) as port, ws(port) as socket_:
        socket_.send(generate("a"))
        while (frame := json.loads(socket_.recv(timeout=5)))["type"] != "error":
            pass
        assert (frame["id"], frame["error"]["status"], frame["error"]["retry_after"]) == ("a", 503, 7)


class Endable(ScriptedBackend):
    """Whose requests end when they are told to."""

    def __init__(self) -> None:
        super().__init__(tokens=3, pause_s=0.05)
        self.told = asyncio.Event()

    def end_requests(self) -> None:
        self.told.set()

    async def generate(self, request):
        async for delta in super().generate(request):
            if delta.usage is None:
                yield delta
        await self.told.wait()
        raise UnavailableError("ended", code="draining")


def generation() -> Generation:
    from starlette.requests import HTTPConnection

    from wicore_backend.gateway.backend import GenerationRequest

    request = GenerationRequest(id="1", model="wicore", prompt="x")
    return Generation(HTTPConnection({"type": "http", "headers": []}), ANYBODY, "/x", "wicore", request)


def test_a_gateway_that_drains_refuses_new_requests_and_lets_running_ones_end():
    async def scenario() -> None:
        generations = Generations(ScriptedBackend(tokens=3, pause_s=0.05), [])
        running = [delta async for delta in _after_start(generations)]
        assert running[-1].usage is not None

    async def _after_start(generations):
        deltas = generations.run(generation())
        yield await anext(deltas)
        draining = asyncio.create_task(generations.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await anext(generations.run(generation()))
        async for delta in deltas:
            yield delta
        await asyncio.wait_for(draining, 5)

    asyncio.run(scenario())


def test_what_outlasts_the_drain_ends_with_an_error():
    async def scenario() -> None:
        generations = Generations(Endable(), [])
        deltas = generations.run(generation())
        await anext(deltas)
        draining = asyncio.create_task(generations.drain(0.2))
        with pytest.raises(UnavailableError, match="ended"):
            async for _ in deltas:
                pass
        await asyncio.wait_for(draining, 5)

    asyncio.run(scenario())


class Witness:
    """A hook that keeps what it sees."""

    def __init__(self, refuse: ApiError | None = None) -> None:
        self.refuse = refuse
        self.seen: list[str] = []

    async def admit(self, generation) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.seen.append("admitted")
        generation.metadata["traceparent"] = "00-1"

    def first_token(self, _generation) -> None:
        self.seen.append("first")

    def finished(self, generation) -> None:
        self.seen.append(f"{generation.outcome} {generation.tokens}")


def test_hooks_see_each_request_once_from_its_admission_to_its_end():
    async def run(backend, hooks, *, take: int | None = None) -> None:
        deltas = Generations(backend, hooks).run(generation())
        count = 0
        try:
            async for _ in deltas:
                count += 1
                if count == take:
                    break
        except ApiError:
            pass
        await deltas.aclose()

    backend, witness = ScriptedBackend(), Witness()
    asyncio.run(run(backend, [witness]))
    assert witness.seen == ["admitted", "first", "completed 3"]
    assert backend.requests[0].metadata == (("traceparent", "00-1"),)
    asyncio.run(run(ScriptedBackend(), [witness := Witness()], take=1))
    assert witness.seen == ["admitted", "first", "cancelled 1"]
    asyncio.run(run(ScriptedBackend(error=UnavailableError("x")), [witness := Witness()]))
    assert witness.seen == ["admitted", "refused 0"]
    first, last = Witness(), Witness(refuse=UnavailableError("no"))
    asyncio.run(run(backend := ScriptedBackend(), [first, last]))
    assert (first.seen, last.seen, backend.requests) == (["admitted", "refused 0"], [], [])


def test_patience_is_lost_with_one_long_wait_and_not_with_many_short_ones():
    async def scenario() -> None:
        gave_up = threading.Event()
        with Patience(0.5, gave_up.set) as patience:
            end = time.monotonic() + 0.75
            while time.monotonic() < end:
                patience.begin()
                await asyncio.sleep(0)
                patience.end()
            await asyncio.sleep(0.75)  # Nobody waits.
            assert not gave_up.is_set()
            patience.begin()
            async with asyncio.timeout(5):
                while not gave_up.is_set():
                    await asyncio.sleep(0.01)
            assert patience.lost

    asyncio.run(scenario())


def test_ready_and_status_of_a_gateway_that_drains():
    with gateway() as client:
        assert client.get("/ready").json() == {"ready": True, "reason": None}
        client.app.state.generations.draining = True
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        status = client.get("/status").json()
        assert (status["ready"], status["gateway"]["draining"]) == (False, True)
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
