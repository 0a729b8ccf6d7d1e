"""Small ways to talk to the server that the tests share, beside the client."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlparse

import numpy as np
import tritonclient.grpc as grpcclient
from wicore_client import Client


def post(server, path: str, body: object) -> tuple[int, str]:
    """Status and text of a POST; a body that is not bytes goes as JSON."""
    url = urlparse(server.urls.http)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def generate(server, model: str = "wicore", **body) -> tuple[int, str]:
    return post(server, f"/v2/models/{model}/generate", body)


def open_http(server, path: str, body: dict) -> socket.socket:
    """A socket with a request on its way, to be closed at will."""
    url = urlparse(server.urls.http)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {url.hostname}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((url.hostname, url.port), timeout=30)
    connection.sendall(head.encode() + data)
    return connection


def client(server, **options) -> Client:
    port = urlparse(server.urls.metrics).port
    return Client(server.urls.grpc, metrics_port=port, **options)


def metric(server, name: str, **labels: str) -> float:
    """Sum of the samples of a metric."""
    with client(server) as c:
        samples = c.statistics().metrics
    return sum(m.value for m in samples if m.name == name and labels.items() <= m.labels.items())


def assert_stopped_by_itself(server) -> None:
    """That nobody had to kill it; if somebody had, its log says how far its stop came."""
    assert server.exit_code == 0, f"{server.ending}\n{server.log.read_text()[-4000:]}"


def wait_idle(server, timeout: float) -> float:
    """Seconds until no request runs or waits and no block is used; fails after `timeout`."""
    names = ("wicore_running_requests", "wicore_waiting_requests", "wicore_kv_blocks_used")
    began = time.monotonic()
    with client(server) as c:
        while True:
            left = {m.name: m.value for m in c.statistics().metrics if m.name in names and m.value}
            waited = time.monotonic() - began
            if not left:
                return waited
            assert waited < timeout, f"after {waited:.1f} s there is still {left}"
            time.sleep(0.02)


def comes_to(expected: float, read: Callable[[], float]) -> bool:
    """Whether what `read` says is as expected, in a while: metrics are a moment behind."""
    end = time.monotonic() + 10
    while read() != expected and time.monotonic() < end:
        time.sleep(0.05)
    return read() == expected


class BareStream:
    """One request to wicore_gemma3 over gRPC, without the ensemble; collects what comes."""

    def __init__(self, server, ids: list[int], **parameters) -> None:
        self.results: list = []
        self.errors: list = []
        self._client = grpcclient.InferenceServerClient(server.urls.grpc)
        self._client.start_stream(self._take)
        tensor = grpcclient.InferInput("input_ids", [len(ids)], "INT32")
        tensor.set_data_from_numpy(np.array(ids, np.int32))
        self._client.async_stream_infer(
            "wicore_gemma3", [tensor], parameters=parameters, enable_empty_final_response=True
        )

    def _take(self, result, error) -> None:
        (self.results if error is None else self.errors).append(result if error is None else error)

    def wait(self, responses: int = 1, timeout: float = 20) -> None:
        end = time.monotonic() + timeout
        while len(self.results) + len(self.errors) < responses:
            assert time.monotonic() < end, f"{len(self.results)} of {responses} responses after {timeout} s"
            time.sleep(0.005)

    @property
    def ended(self) -> bool:
        """Whether the server has said that nothing more comes."""
        if self.errors:
            return True
        last = self.results[-1].get_response() if self.results else None
        return last is not None and last.parameters["triton_final_response"].bool_param

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def close(self) -> None:
        """After the last response: let the server close the stream, which a cancel would find half done."""
        self._client.stop_stream()
        self._client.close()
