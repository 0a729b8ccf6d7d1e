"""A Triton server made of scripts: its gRPC service and its generate endpoints, for tests of the client.

A script is told a request, and yields `Response`s; raising `Failure` ends the request with Triton's error, raising
`Disconnect` cuts the connection.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server
from wicore_client.results import Response

USAGE = json.dumps({"prompt_tokens": 5, "completion_tokens": 3, "queue_ms": 0.5, "ttft_ms": 2.0, "total_ms": 9.0})
METRICS = """# HELP wicore_requests_total Requests by outcome
# TYPE wicore_requests_total counter
wicore_requests_total{model="wicore_gemma3",outcome="stop \\"a\\""} 7
nv_inference_count{model="wicore"} 12
wicore_blocks_used 3.5
"""


@dataclass
class Request:
    """A request as the server sees it, whichever way it came."""

    id: str
    model: str
    stream: bool
    text_input: str | None = None
    messages: str | None = None
    images: list[bytes] = field(default_factory=list)
    sampling_parameters: str | None = None
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the client has left."""

    def wait(self, seconds: float = 10) -> bool:
        """Work for a while; True if the client left meanwhile."""
        return self.gone.wait(seconds)


class Failure(Exception):  # noqa: N818 (an event of a script)
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Disconnect(Exception):  # noqa: N818
    """Cut the connection."""


Script = Callable[[Request], Iterator[Response]]


def words(*texts: str, finish_reason: str = "stop") -> Script:
    """Answers with these texts, one response each, or in one if the request does not stream."""

    def script(request: Request) -> Iterator[Response]:
        parts = [Response(text_output=text, token_ids=(number,)) for number, text in enumerate(texts, start=1)]
        if not request.stream:
            parts = [Response(text_output="".join(texts), token_ids=tuple(range(1, len(texts) + 1)))]
        yield from parts[:-1]
        yield Response(**asdict(parts[-1]) | {"finish_reason": finish_reason, "usage": USAGE})

    return script


class FakeTriton:
    """The server, on free ports; use it as a context manager."""

    def __init__(self) -> None:
        self.script: Script = words("Hello", ", ", "world")
        self.requests: list[Request] = []
        self.model_state = "READY"
        self.closing_s = 0.0
        """What it takes to close a gRPC stream after the last response; a cancel that comes meanwhile is too early."""
        self._grpc = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        self._servicer = _Servicer(self)
        add_GRPCInferenceServiceServicer_to_server(self._servicer, self._grpc)
        self.ports = {"grpc": self._grpc.add_insecure_port("127.0.0.1:0")}
        self._http = _HttpServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.ports["http"] = self._http.server_port

    def __enter__(self) -> FakeTriton:
        self._grpc.start()
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for request in self.requests:
            request.gone.set()
        self._grpc.stop(0).wait()
        self._http.shutdown()
        self._http.server_close()

    def cut_grpc(self) -> None:
        """Close the gRPC connections at once, and the service for good."""
        threading.Thread(target=self._grpc.stop, args=(0,)).start()

    def run(self, request: Request) -> Iterator[Response]:
        self.requests.append(request)
        return self.script(request)

    def wait_until_gone(self, count: int = 1, seconds: float = 10.0) -> bool:
        """Whether `count` clients have left before their requests' ends, within a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if sum(request.gone.is_set() for request in self.requests) >= count:
                return True
            time.sleep(0.005)
        return False

    @property
    def statistics(self) -> dict[str, Any]:
        def spent(count: int, ns: int) -> dict[str, int]:
            return {"count": count, "ns": ns}

        stats = {"success": spent(8, 80), "fail": spent(2, 1), "queue": spent(8, 16_000_000)}
        stats["compute_infer"] = spent(8, 80_000_000)
        return {"model_stats": [{"name": "wicore", "version": "1", "execution_count": 10, "inference_stats": stats}]}


class _Servicer(GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def ModelStreamInfer(self, request_iterator, context):  # noqa: N802 (gRPC's name)
        for message in request_iterator:
            inputs = dict(zip((i.name for i in message.inputs), message.raw_input_contents, strict=True))
            texts = {name: _texts(raw) for name, raw in inputs.items() if name != "stream"}
            request = Request(message.id, message.model_name, stream=inputs["stream"] == b"\x01")
            for name in ("text_input", "messages", "sampling_parameters"):
                setattr(request, name, texts[name][0].decode() if name in texts else None)
            request.images = texts.get("images", [])
            finished = threading.Event()
            context.add_callback(lambda r=request, f=finished: None if f.is_set() else r.gone.set())
            try:
                for response in self._fake.run(request):
                    yield _to_message(response)
            except Failure as failure:
                text = f"in ensemble 'wicore', [{failure.code}] {failure}"
                yield pb.ModelStreamInferResponse(error_message=text)
            except Disconnect:
                self._fake.cut_grpc()
                request.wait()
            time.sleep(self._fake.closing_s)
            finished.set()

    def ServerLive(self, request, context):  # noqa: N802, ARG002
        return pb.ServerLiveResponse(live=True)

    def ServerMetadata(self, request, context):  # noqa: N802, ARG002
        return pb.ServerMetadataResponse(name="triton", version="2.51.0")

    def RepositoryIndex(self, request, context):  # noqa: N802, ARG002
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(models=[index(name="wicore", version="1", state=self._fake.model_state)])

    def ModelStatistics(self, request, context):  # noqa: N802, ARG002
        (entry,) = self._fake.statistics["model_stats"]
        stats = {k: pb.StatisticDuration(**v) for k, v in entry["inference_stats"].items()}
        model = pb.ModelStatistics(**entry | {"inference_stats": pb.InferStatistics(**stats)})
        return pb.ModelStatisticsResponse(model_stats=[model])


def _texts(raw: bytes) -> list[bytes]:
    texts = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return texts


def _to_message(response: Response) -> pb.ModelStreamInferResponse:
    inferred = pb.ModelInferResponse(model_name="wicore")
    for name, value in asdict(response).items():
        if isinstance(value, str):
            kind, shape, raw = "BYTES", 1, struct.pack("<I", len(value.encode())) + value.encode()
        else:
            values = (value,) if isinstance(value, int) else value
            kind, shape, raw = "INT32", len(values), struct.pack(f"<{len(values)}i", *values)
        inferred.outputs.add(name=name, datatype=kind, shape=[shape])
        inferred.raw_output_contents.append(raw)
    return pb.ModelStreamInferResponse(infer_response=inferred)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    fake: FakeTriton
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        pages = {
            "/v2/health/live": b"",
            "/v2": json.dumps({"name": "triton", "version": "2.51.0"}).encode(),
            "/v2/models/stats": json.dumps(self.fake.statistics).encode(),
            "/metrics": METRICS.encode(),
        }
        self._reply(200 if self.path in pages else 404, pages.get(self.path, b"no such page"))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/v2/repository/index":
            index = [{"name": "wicore", "version": "1", "state": self.fake.model_state}]
            self._reply(200, json.dumps(index).encode())
            return
        fields = json.loads(body)
        _, _, _, model, verb = self.path.split("/")
        request = Request(
            id=fields.pop("id"),
            model=model,
            stream=fields.pop("stream"),
            images=[base64.b64decode(image) for image in fields.pop("images", [])],
            **fields,
        )
        assert (verb == "generate_stream") == request.stream
        watcher = threading.Thread(target=self._watch, args=(request,), daemon=True)
        watcher.start()
        try:
            self._answer(request)
        except Disconnect:
            self.connection.shutdown(2)
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            request.gone.set()

    def _watch(self, request: Request) -> None:
        try:
            if self.connection.recv(1) == b"":
                request.gone.set()
        except OSError:
            pass

    def _answer(self, request: Request) -> None:
        self.close_connection = True
        responses = self.fake.run(request)
        try:
            first = next(responses)
        except Failure as failure:
            self._reply(400, _error(failure))  # whatever the error: Triton 2.51 does so
            return
        except StopIteration:  # the client has left
            return
        if not request.stream:
            self._reply(200, _to_json(first))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event(_to_json(first))
        try:
            for response in responses:
                self._event(_to_json(response))
        except Failure as failure:
            self._event(_error(failure))
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: bytes) -> None:
        event = b"data: " + data + b"\n\n"
        for part in (event[:9], event[9:]):  # an event need not come in one piece
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _error(failure: Failure) -> bytes:
    return json.dumps({"error": f"in ensemble 'wicore', [{failure.code}] {failure}"}).encode()


def _to_json(response: Response) -> bytes:
    values = asdict(response)
    tokens = values["token_ids"]
    values["token_ids"] = tokens[0] if len(tokens) == 1 else tokens  # as Triton does
    return json.dumps(values).encode()
