"""Hostile clients, slow, silent, endless, malformed: others are answered meanwhile, and nothing is held for long."""

import http.client
import json
import select
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway_kit import CHAT, Keys, ScriptedBackend, bearer, gateway, metric, served_gateway
from tests.schema_values import ANYTHING, values

PATH = "/v1/chat/completions"
QUICK = {"header_timeout_s": 0.5, "body_timeout_s": 0.6, "write_timeout_s": 0.5, "keep_alive_s": 1}


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(connection, seconds=10.0):
    """What comes until the server closes."""
    connection.settimeout(seconds)
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def send_until_closed(connection, parts):
    """Send slowly; whether the server closed before everything was sent."""
    try:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.02)
    except OSError:
        return True
    return False


def status_of(response):
    return int(response.split(b" ")[1]) if response else None


def error_of(response):
    return json.loads(response.partition(b"\r\n\r\n")[2])["error"]


def head(path=PATH, method="POST", **headers):
    fields = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def is_well(port):
    """Whether the server answers somebody else, and soon."""
    began = time.monotonic()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as client:
        client.request("POST", PATH, json.dumps(CHAT), {"Content-Type": "application/json"})
        answer = client.getresponse()
        return answer.status == 200 and b"word" in answer.read() and time.monotonic() - began < 5


def wait_until_well(port):
    """Until the server has seen that others left."""
    end = time.monotonic() + 10
    while True:
        with suppress(OSError, http.client.HTTPException):  # A connection that is one too many is closed at once.
            if is_well(port):
                return
        assert time.monotonic() < end, "what was theirs has not been given back"
        time.sleep(0.02)


def page_of(port):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as client:
        client.request("GET", "/metrics")
        return client.getresponse().read().decode()


@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"POST /v1/chat", head()[:-2], head()[:-4] + b"\r\nX: y"])
def test_who_does_not_finish_asking_is_closed(beginning):
    with served_gateway(connections=QUICK) as port:
        began = time.monotonic()
        with closing(connect(port)) as silent:
            silent.sendall(beginning)
            assert read_all(silent) == b""
        assert 0.9 * QUICK["header_timeout_s"] < time.monotonic() - began < 5
        assert is_well(port)
        assert metric(page_of(port), "wicore_gateway_connections_refused_total", reason="silent") == 1


def test_a_header_that_dribbles_has_no_more_time_than_one_that_is_silent():
    with served_gateway(connections=QUICK) as port, closing(connect(port)) as slow:
        began = time.monotonic()
        assert send_until_closed(slow, (bytes([byte]) for byte in head() * 20)), "it may dribble for ever"
        assert time.monotonic() - began < 5
        assert is_well(port)


@pytest.mark.parametrize(
    "header",
    [
        b"POST / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000,
        b"POST /" + b"y" * 100_000,
        b"POST / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
)
def test_endless_headers_are_refused(header):
    with served_gateway() as port, closing(connect(port)) as client:
        client.sendall(header)
        answer = read_all(client)
        assert status_of(answer) == 431
        assert error_of(answer)["code"] == "headers_too_large"
        assert is_well(port)


def test_a_body_that_dribbles_gets_408():
    with served_gateway(connections=QUICK) as port, closing(connect(port)) as slow:
        began = time.monotonic()
        slow.sendall(head(Content_Length=1000) + b"{")
        time.sleep(0.2)
        assert is_well(port)
        slow.sendall(b" ")
        answer = slow.recv(65536)
        assert 0.9 * QUICK["body_timeout_s"] < time.monotonic() - began < 5
        assert status_of(answer) == 408
        assert error_of(answer)["code"] == "body_timeout"
        read_all(slow)
        assert time.monotonic() - began < 5, "the rest of the body is not waited for"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_and_its_client_can_read_why(chunked):
    with served_gateway(connections={"body_bytes": 100_000}) as port, closing(connect(port)) as client:
        if chunked:
            client.sendall(head(Transfer_Encoding="chunked"))
            chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
            for _ in range(64):
                client.sendall(chunk)
            client.sendall(b"0\r\n\r\n")
        else:
            client.sendall(head(Content_Length=1_000_000) + b"x" * 1_000_000)
        answer = client.recv(65536)
        assert status_of(answer) == 413
        assert error_of(answer)["code"] == "body_too_large"
        client.sendall(head("/health", "GET"))
        assert status_of(client.recv(65536)) == 200, "the connection is of use afterwards"


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_methods_that_need_no_key_take_no_large_body(method):
    with served_gateway() as port, closing(connect(port)) as client:
        client.sendall(head("/health", method, Content_Length=100_000) + bytes(100_000))
        assert status_of(client.recv(65536)) == 413
        client.sendall(head("/health", "GET", Content_Length=2) + b"{}")
        while status_of(answer := client.recv(65536)) != 200:
            assert answer, "a small one is no harm"


def test_who_goes_on_sending_after_the_answer_is_cut_off():
    with served_gateway(connections={"body_bytes": 2000}) as port, closing(connect(port)) as client:
        client.sendall(head(Content_Length=10**9))
        assert status_of(client.recv(65536)) == 413
        began = time.monotonic()
        assert send_until_closed(client, [b"x" * 1000] * 500), "it may send for ever"
        assert time.monotonic() - began < 4


def test_bodies_together_are_bounded():
    limits = {"body_bytes": 50_000, "bodies_bytes": 100_000, "body_timeout_s": 5.0}
    with served_gateway(connections=limits) as port:
        held = [connect(port) for _ in range(3)]
        try:
            for client in held[:2]:
                client.sendall(head(Content_Length=50_000) + b" " * 49_000)
            held[2].sendall(head(Content_Length=50_000) + b" " * 49_000)
            (refused,), _, _ = select.select(held, [], [], 10)  # The one that came last.
            answer = refused.recv(65536)
            assert status_of(answer) == 503
            assert error_of(answer)["code"] == "bodies_full"
        finally:
            for client in held:
                client.close()
        wait_until_well(port)
        body = json.dumps(CHAT).encode().ljust(49_000)
        for _ in range(5):  # What left has been given back.
            with closing(connect(port)) as client:
                client.sendall(head(Content_Length=len(body), Content_Type="application/json") + body)
                assert status_of(client.recv(65536)) == 200


def test_compressed_bodies_are_refused():
    with gateway() as client:
        answer = client.post(PATH, content=b"\x1f\x8b" + bytes(100), headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
def test_connections_are_bounded_and_given_back(limit):
    with served_gateway(connections={limit: 5}) as port:
        held = [connect(port) for _ in range(5)]
        with closing(connect(port)) as one_more:
            answer = read_all(one_more)
            assert status_of(answer) == 503
            assert error_of(answer)["code"] == "connections_full"
        for client in held:
            client.close()
        wait_until_well(port)


def test_a_reader_that_stops_is_cut_off_and_its_answer_cancelled():
    backend = ScriptedBackend(tokens=10**9)
    with served_gateway(backend, connections=QUICK) as port, closing(socket.socket()) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", port))
        body = json.dumps({**CHAT, "stream": True}).encode()
        stuck.sendall(head(Content_Length=len(body), Content_Type="application/json") + body)
        deadline = time.monotonic() + 20
        while not backend.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while backend.running:
            assert time.monotonic() < deadline, "its answer is still being made"
            time.sleep(0.05)
        assert metric(page_of(port), "wicore_gateway_connections_refused_total", reason="stopped_reading") == 1


def test_a_stray_line_end_after_a_request_does_not_cut_its_stream():
    backend = ScriptedBackend(tokens=20, pause_s=0.1)
    with served_gateway(backend, connections=QUICK) as port, closing(connect(port)) as client:
        body = json.dumps({**CHAT, "stream": True}).encode()
        client.sendall(head(Content_Length=len(body), Content_Type="application/json") + body)
        time.sleep(0.2)
        client.sendall(b"\r\n")
        received = b""
        while b"[DONE]" not in received:
            chunk = client.recv(65536)
            assert chunk, "the stream was cut"
            received += chunk


def resident_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@contextmanager
def sockets(port, count):
    held = []
    try:
        held += [connect(port) for _ in range(count)]
        yield held
    finally:
        for client in held:
            client.close()


def test_idle_and_slow_sockets_hold_up_nobody_and_memory_stays_flat():
    """The sample of scripts/abuse_gateway.py that fits here."""
    with served_gateway(connections={"header_timeout_s": 5.0, "body_timeout_s": 5.0}) as port:
        with sockets(port, 200):  # A first round, so that what is allocated once is not counted.
            assert is_well(port)
        before = resident_bytes()
        for _ in range(3):
            with sockets(port, 200) as held:
                for i, client in enumerate(held):
                    client.sendall((b"", b"POST /v1", head(Content_Length=10_000) + b"{", b"\x16\x03\x01")[i % 4])
                assert all(is_well(port) for _ in range(5))
        assert resident_bytes() - before < 16 * 2**20


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=400),
        st.builds(
            lambda h, b: b"POST /v1/chat/completions HTTP/1.1\r\n" + h + b"\r\n\r\n" + b, st.binary(), st.binary()
        ),
        st.builds(lambda p: b"GET /" + p + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", st.binary(max_size=100)),
        st.builds(
            lambda n, v: b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + n + b": " + v + b"\r\n\r\n",
            st.sampled_from(
                b"content-length transfer-encoding upgrade authorization expect origin cookie x-request-id traceparent"
                b" content-encoding connection sec-websocket-key host".split()
            ),
            st.binary(max_size=60),
        ),
    )
)
def test_no_bytes_bring_an_error_of_the_servers(fuzzed_port, data):
    with closing(connect(fuzzed_port)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client, 5.0)
        assert not answer or status_of(answer) < 500, answer


@pytest.fixture(scope="module")
def fuzzed_port():
    quick = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "keep_alive_s": 1}
    with served_gateway(connections=quick) as port:
        yield port
        wait_until_well(port)  # A busy machine may be late with a request's headers, too.


@pytest.fixture(scope="module")
def client():
    with gateway() as client:
        yield client


def operations():
    """Method, path, body's schema and whole document of every operation that takes JSON."""
    with gateway() as client:
        document = client.get("/openapi.json").json()
    return [
        pytest.param(method, path, body["schema"], document, id=f"{method} {path}")
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if (body := operation.get("requestBody", {}).get("content", {}).get("application/json"))
    ]


@pytest.mark.parametrize(("method", "path", "schema", "document"), operations())
def test_no_body_brings_an_error_of_the_servers(client, method, path, schema, document):
    seen = set()

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values(schema, document))
    def try_body(body):
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body["model"] = "wicore"  # Any other is refused before the rest is looked at.
        text = json.dumps(body).encode()
        answer = client.request(method, path, content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (text[:500], answer.text)
        seen.add(answer.status_code)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    try_body()
    assert 400 in seen


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "\\ud800"}',
        b'{"model": "wicore", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "wicore", "messages": [{"role": "user", "content": "\\u0000"}], "stop": ["\\ud800"]}',
        b'{"model": "wicore", "messages": [], "temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/responses", "/v1/inference"])
def test_known_tricks_of_json_are_refused(client, path, body):
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(ANYTHING.map(json.dumps), st.text(), st.binary()), max_size=5))
def test_no_frame_closes_a_socket_or_brings_an_error_of_the_servers(client, frames):
    with client.websocket_connect("/ws/chat", headers={"Host": "localhost"}) as socket_:
        for frame in frames:
            socket_.send_bytes(frame) if isinstance(frame, bytes) else socket_.send_text(frame)
        socket_.send_json({"type": "ping"})
        while (answer := socket_.receive_json()) != {"type": "pong"}:
            assert answer["type"] == "error"
            assert answer["error"]["status"] < 500


def test_keys_hold_under_many_clients_at_once(tmp_path):
    """What one thread of clients may does not leak to another."""
    keys = Keys(tmp_path / "keys.json")
    good, admin = keys.add(), keys.add(admin=True)
    seen = {}
    with served_gateway(access={"keys_file": str(keys.path)}) as port:

        def ask(name, headers):
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as client:
                for _ in range(30):
                    client.request("POST", PATH, json.dumps(CHAT), {"Content-Type": "application/json", **headers})
                    answer = client.getresponse()
                    answer.read()
                    seen.setdefault(name, set()).add(answer.status)

        who = {"good": bearer(good), "nobody": {}, "admin": bearer(admin), "wrong": bearer(good[:-1] + "x")}
        threads = [threading.Thread(target=ask, args=item) for item in who.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"good": {200}, "nobody": {401}, "admin": {403}, "wrong": {401}}
