"""What the gateway costs and keeps: CPU per token, pace, time to first token, blocks after disconnects.

    .venv/bin/python -m scripts.benchmark_gateway            # all of it, some two minutes

The pace and the costs are measured on a real tritonserver with a model that answers at a set pace in Wicore's own wire
format, so that no engine competes for the CPU; each request also goes straight over gRPC in the same run. Disconnects
are measured on the demo model. Numbers of a busy machine are noise: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import struct
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from scripts.serving import Installation, ServerOptions, TritonServer
from scripts.serving.gateway import Gateway, GatewayOptions
from scripts.serving.installation import ROOT

PACED_CONFIG = """
name: "wicore"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "messages" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "token_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "usage" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU } ]
"""

PACED_MODEL = '''
import heapq, itertools, json, threading, time
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    """Each request gets `max_tokens` tokens; the first message says after how many seconds each."""

    def initialize(self, args):
        self.wake = threading.Condition()
        self.due, self.order = [], itertools.count()
        threading.Thread(target=self.run, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            messages = json.loads(pb.get_input_tensor_by_name(request, "messages").as_numpy()[0])
            options = json.loads(pb.get_input_tensor_by_name(request, "sampling_parameters").as_numpy()[0])
            answer = (request.get_response_sender(), float(messages[0]["content"]), options["max_tokens"], 0)
            with self.wake:
                heapq.heappush(self.due, (time.monotonic(), next(self.order), *answer))
                self.wake.notify()

    def run(self):
        while True:
            with self.wake:
                while not self.due or self.due[0][0] > time.monotonic():
                    self.wake.wait(self.due[0][0] - time.monotonic() if self.due else None)
                at, _, sender, pace, count, sent = heapq.heappop(self.due)
            if sender.is_cancelled():
                sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            sent += 1
            text = np.array([b"token "], dtype=object)
            outputs = [pb.Tensor("text_output", text), pb.Tensor("token_ids", np.array([7], np.int32))]
            if sent == count:
                usage = {"prompt_tokens": 1, "completion_tokens": count, "cached_tokens": 0}
                outputs.append(pb.Tensor("finish_reason", np.array([b"length"], dtype=object)))
                outputs.append(pb.Tensor("usage", np.array([json.dumps(usage).encode()], dtype=object)))
                sender.send(pb.InferenceResponse(outputs), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            sender.send(pb.InferenceResponse(outputs))
            with self.wake:
                heapq.heappush(self.due, (at + pace, next(self.order), sender, pace, count, sent))
'''


@dataclass(frozen=True, slots=True)
class Streamed:
    """When a request was sent and its tokens came, in seconds of one clock."""

    sent: float
    tokens: list[float]

    @property
    def ttft_s(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def pace(self) -> float:
        """Tokens a second after the first."""
        return (len(self.tokens) - 1) / (self.tokens[-1] - self.tokens[0])


class OverGrpc:
    """Requests straight to the server."""

    def __init__(self, url: str) -> None:
        self._service = GRPCInferenceServiceStub(grpc.aio.insecure_channel(url))

    async def stream(self, *, seconds_per_token: float, tokens: int) -> Streamed:
        """One answer."""
        message = pb.ModelInferRequest(model_name="wicore")
        contents = (
            ("messages", json.dumps([{"role": "user", "content": str(seconds_per_token)}])),
            ("sampling_parameters", json.dumps({"max_tokens": tokens})),
        )
        for name, text in contents:
            message.inputs.append(pb.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[1]))
            message.raw_input_contents.append(struct.pack("<I", len(text)) + text.encode())
        message.inputs.append(pb.ModelInferRequest.InferInputTensor(name="stream", datatype="BOOL", shape=[1]))
        message.raw_input_contents.append(b"\x01")
        sent = time.perf_counter()
        times = [time.perf_counter() async for _ in self._service.ModelStreamInfer(iter([message]))]
        return Streamed(sent, times)


class OverHttp:
    """Requests to the gateway, on connections that are kept as a client's pool keeps them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def stream(self, *, seconds_per_token: float, tokens: int) -> Streamed:
        """One answer."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        sent, times = time.perf_counter(), []
        writer.write(chat_request(str(seconds_per_token), tokens))
        async for event in events(reader):
            times += [time.perf_counter()] * event.count(b'"content":"token "')
        self._idle.append((reader, writer))
        return Streamed(sent, times)

    def close(self) -> None:
        """Close what is kept."""
        for _, writer in self._idle:
            writer.close()


def chat_request(content: str, max_tokens: int) -> bytes:
    """An HTTP request for a streamed chat completion."""
    body = {
        "model": "wicore",
        "stream": True,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": content}],
    }
    encoded = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


async def events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a chunked answer. Raises RuntimeError if it is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RuntimeError(f"the gateway answered {head!r} {await reader.read(1000)!r}")
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


def cpu_seconds(process_id: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_pace(gateway: Gateway, straight: OverGrpc, *, streams: int, per_second: float, tokens: int) -> None:
    """Many streams at once, straight and through the gateway: their pace, their gaps, CPU per token of the gateway
    and, to compare, of a client that reads the same messages straight."""
    through = OverHttp(gateway.port)
    warm = [through.stream(seconds_per_token=0.01, tokens=3) for _ in range(streams)]
    await asyncio.gather(*warm)
    for name, client in (("straight", straight), ("gateway", through)):
        process_id = gateway.process_id if name == "gateway" else os.getpid()
        before = cpu_seconds(process_id)
        many = [client.stream(seconds_per_token=1 / per_second, tokens=tokens) for _ in range(streams)]
        done = await asyncio.gather(*many)
        spent = cpu_seconds(process_id) - before
        paces = sorted(answer.pace for answer in done)
        gaps = sorted(b - a for answer in done for a, b in zip(answer.tokens, answer.tokens[1:], strict=False))
        line = (
            f"{streams} streams of {per_second:g} tokens/s, {name}: slowest {paces[0]:.2f}, median "
            f"{statistics.median(paces):.2f} tokens/s; gap p50 {_ms(gaps, 0.5)}, p99 {_ms(gaps, 0.99)}"
        )
        whose = "its" if name == "gateway" else "the reading gRPC client's"
        print(f"{line}; {whose} CPU {spent / (streams * tokens) * 1e6:.0f} us a token")
    through.close()


async def measure_ttft(gateway: Gateway, straight: OverGrpc, *, requests: int) -> None:
    """One request after the other, straight and through the gateway in turns."""
    through = OverHttp(gateway.port)
    times: dict[str, list[float]] = {"straight": [], "gateway": []}
    for i in range(requests + 10):
        for name, client in (("straight", straight), ("gateway", through)):
            answer = await client.stream(seconds_per_token=0.002, tokens=3)
            if i >= 10:
                times[name].append(answer.ttft_s)
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    added = medians["gateway"] - medians["straight"]
    print(
        f"TTFT of {requests} requests one by one: straight p50 {medians['straight']:.2f} ms, "
        f"gateway p50 {medians['gateway']:.2f} ms, {added:.2f} ms more"
    )
    through.close()


async def measure_disconnects(gateway: Gateway, metrics_url: str, *, requests: int, at_once: int) -> None:
    """Clients that leave at random moments, and what the engine still holds two seconds after the last."""
    random.seed(0)
    places = asyncio.Semaphore(at_once)

    async def leave_early() -> None:
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(chat_request(f"Count from {random.randrange(100)} to 400.", 2000))
            try:
                async with asyncio.timeout(random.uniform(0, 2)):
                    await reader.read(-1)
            except TimeoutError:
                pass
            writer.transport.abort()

    await asyncio.gather(*(leave_early() for _ in range(requests)))
    left, held = time.monotonic(), _held(metrics_url)
    while held and time.monotonic() - left < 2:
        await asyncio.sleep(0.05)
        held = _held(metrics_url)
    print(
        f"{requests} disconnects, {at_once} at once: {held} blocks and requests held "
        f"{time.monotonic() - left:.2f} s after the last"
    )


def _held(metrics_url: str) -> int:
    names = ("wicore_running_requests", "wicore_waiting_requests", "wicore_kv_blocks_used")
    with urllib.request.urlopen(metrics_url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(round(float(line.rpartition(" ")[2])) for line in lines if line.split("{")[0] in names)


def _ms(values: Sequence[float], quantile: float) -> str:
    return f"{values[int(quantile * (len(values) - 1))] * 1000:.1f} ms"


@contextmanager
def _serving(options: ServerOptions, settings: dict[str, Any]) -> Iterator[tuple[TritonServer, Gateway]]:
    installation = Installation.of_this_environment()
    with TritonServer(options, installation) as server:
        gateway_options = GatewayOptions(port=0, settings=settings)
        with Gateway(gateway_options, installation, server.urls, log=server.log.with_suffix(".gateway.log")) as gateway:
            yield server, gateway


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--per-second", type=float, default=30.0, help="tokens of each stream")
    parser.add_argument("--disconnects", type=int, default=300)
    given = parser.parse_args()
    free: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "drain_seconds": 1.0}

    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "wicore"
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(PACED_CONFIG)
        (model / "1" / "model.py").write_text(PACED_MODEL)
        options = ServerOptions(model_repository=Path(directory), **free)
        with _serving(options, {"token_model": "wicore"}) as (server, gateway):

            async def paced() -> None:
                straight = OverGrpc(server.urls.grpc)
                await measure_pace(
                    gateway, straight, streams=given.streams, per_second=given.per_second, tokens=given.tokens
                )
                await measure_ttft(gateway, straight, requests=200)

            asyncio.run(paced())

    settings = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
    with _serving(ServerOptions(settings=settings, **free), {}) as (server, gateway):
        asyncio.run(measure_disconnects(gateway, server.urls.metrics, requests=given.disconnects, at_once=64))


if __name__ == "__main__":
    main()
