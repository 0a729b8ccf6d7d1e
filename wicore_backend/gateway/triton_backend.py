"""The backend that there is: a Triton server, over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from wicore_backend.gateway import triton_wire
from wicore_backend.gateway.backend import BackendStatus, Delta, GenerationRequest, Model, Readiness
from wicore_backend.gateway.errors import ApiError, DeadlineError, UnavailableError
from wicore_backend.gateway.patience import Patience
from wicore_backend.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)

_TROUBLE = "wicore_health_"
"""Begins the name of a model that is not ready, by which an engine shows that it is not well."""

_QUESTION_TIMEOUT_S = 3.0
"""For what is not an answer of the engine: is it ready, what is there, its metrics."""

_SAY_AGAIN_S = 30.0
"""A trouble with the server that lasts is told again after so long: pages ask several things every two seconds."""

_END_S = 5.0
"""How long the server may take to close a stream after the last response. It needs a millisecond or so, in which a
cancel would find it half done: Triton 2.51 then keeps the request for ever, and its stop waits for it."""

_FINGERPRINT_S = 30.0
"""For how long a fingerprint is believed to be right."""


class TritonBackend:
    """See Backend. One channel, on which every request has a stream of its own.

    gRPC finds a server that went away and came back by itself; what is asked meanwhile fails at once.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._url = settings.triton_url
        self._metrics_url = settings.triton_metrics_url
        self._model = settings.model
        self._token_model = settings.token_model
        self._fingerprint: str | None = None
        self._fingerprint_until = 0.0
        self._patience_s = settings.first_response_timeout_s
        self._options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_s * 1000)),  # also its connect timeout
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel: Any = None
        self._service: Any = None
        self._http: httpx.AsyncClient | None = None
        self._calls: set[Any] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._said = ""
        self._say_again = 0.0

    async def start(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=self._options)
        self._service = GRPCInferenceServiceStub(self._channel)
        self._http = httpx.AsyncClient(timeout=_QUESTION_TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        message = triton_wire.encode(request)
        call = self._service.ModelStreamInfer(iter([message]), metadata=request.metadata)
        answers = request.answers
        self._calls.add(call)
        last_seen = False
        try:
            with Patience(self._patience_s, call.cancel) as patience:
                while not last_seen:
                    patience.begin()
                    response = await call.read()
                    patience.end()
                    if response is grpc.aio.EOF:
                        raise UnavailableError(
                            "the inference server ended the stream before the answer was whole",
                            code="backend_unavailable",
                        )
                    last_seen = True  # An error is the last response too.
                    if response.error_message:
                        raise triton_wire.error_from_text(response.error_message)
                    deltas = triton_wire.decode(response, answers=answers)
                    last_seen = any(delta.usage is not None for delta in deltas)
                    for delta in deltas:
                        yield delta
        except grpc.RpcError as error:
            raise self._told(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC says so of a call that was cancelled here, not by who waits for it.
            if patience.lost:
                raise DeadlineError(f"the inference server said nothing for {self._patience_s:g} s") from None
            raise UnavailableError("the gateway is shutting down; try again", code="draining") from None
        finally:
            self._calls.discard(call)
            if last_seen:
                self._let_close(call)
            else:
                call.cancel()

    def end_requests(self) -> None:
        for call in self._calls:
            call.cancel()

    def _let_close(self, call: Any) -> None:
        """Have the server close a stream whose last response has come, whatever becomes of who asked."""
        closing = asyncio.create_task(_end(call))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def readiness(self) -> Readiness:
        try:
            models = await self._index()
        except ApiError as error:
            return Readiness(False, error.message)
        for model in models:
            if model.name.startswith(_TROUBLE) and not model.ready:
                return Readiness(False, f"the engine is not well: {model.reason}")
        if not any(model.name == self._model and model.ready for model in models):
            return Readiness(False, f"the model {self._model} is not ready")
        return Readiness(True)

    async def status(self) -> BackendStatus:
        models, server, statistics, metrics = await asyncio.gather(
            self._index(), self._server(), self._statistics(), self.metrics()
        )
        return BackendStatus(server, models, statistics, metrics)

    async def metrics(self) -> str:
        if self._metrics_url is None or self._http is None:
            return ""
        try:
            answer = await self._http.get(self._metrics_url)
        except httpx.HTTPError:
            return ""
        return answer.text if answer.status_code == 200 else ""

    async def fingerprint(self) -> str | None:
        now = time.monotonic()
        if now > self._fingerprint_until:
            self._fingerprint_until = now + _FINGERPRINT_S
            with suppress(ApiError):
                self._fingerprint = await self._make_fingerprint()
        return self._fingerprint

    async def _make_fingerprint(self) -> str:
        """Of the server and the models' configurations."""
        digest = hashlib.sha256((await self._server()).encode())
        for name in (self._model, self._token_model):
            message = await self._ask("ModelConfig", pb.ModelConfigRequest(name=name))
            digest.update(message.config.SerializeToString(deterministic=True))
        return f"fp_{digest.hexdigest()[:12]}"

    async def _index(self) -> tuple[Model, ...]:
        index = await self._ask("RepositoryIndex", pb.RepositoryIndexRequest())
        return tuple(Model(m.name, m.version, m.state == "READY", m.reason) for m in index.models)

    async def _server(self) -> str:
        message = await self._ask("ServerMetadata", pb.ServerMetadataRequest())
        return f"{message.name} {message.version}"

    async def _statistics(self) -> dict[str, dict[str, float]]:
        message = await self._ask("ModelStatistics", pb.ModelStatisticsRequest())
        entries = MessageToDict(message, preserving_proto_field_name=True).get("model_stats", ())
        return {entry["name"]: _counts(entry) for entry in entries}

    async def _ask(self, method: str, message: Any) -> Any:
        try:
            return await getattr(self._service, method)(message, timeout=_QUESTION_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._told(error) from None

    def _told(self, error: Any) -> ApiError:
        """What clients are told of an error of gRPC's; the log has the rest."""
        told = triton_wire.error_from_rpc(error)
        if told.status >= 500:
            self._warn(error.code().name.lower(), error.details())
        return told

    def _warn(self, trouble: str, details: str | None) -> None:
        """One line in the log for a trouble, not one for each question."""
        now = time.monotonic()
        if trouble != self._said or now >= self._say_again:
            self._said, self._say_again = trouble, now + _SAY_AGAIN_S
            _log.warning("the server at %s: %s (%s)", self._url, trouble, details)


async def _end(call: Any) -> None:
    with suppress(TimeoutError, grpc.RpcError):
        await asyncio.wait_for(call.read(), _END_S)
    call.cancel()


def _counts(entry: dict[str, Any]) -> dict[str, float]:
    stats = entry.get("inference_stats", {})

    def count(name: str) -> int:
        return int(stats.get(name, {}).get("count", 0))

    def mean_ms(name: str) -> float:
        return int(stats.get(name, {}).get("ns", 0)) / max(1, count(name)) / 1e6

    return {
        "succeeded": count("success"),
        "failed": count("fail"),
        "executions": int(entry.get("execution_count", 0)),
        "queue_ms": mean_ms("queue"),
        "compute_ms": mean_ms("compute_infer"),
    }
