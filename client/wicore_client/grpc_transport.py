"""Triton over gRPC: one channel, and on it one stream for each request, so that requests end independently."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from wicore_client import grpc_wire
from wicore_client.endpoint import Endpoint
from wicore_client.errors import WicoreClientError
from wicore_client.interrupts import interrupts_held
from wicore_client.requests import GenerateRequest
from wicore_client.results import Health, ModelStatistics, Response

_END_SECONDS = 5.0
"""How long the server may take to end a stream after the last response. It needs a millisecond or so, in which a cancel
would find it half done: Triton 2.51 then keeps the request, and so its model, until it is killed."""


class GrpcCall:
    def __init__(self, responses: Any, endpoint: Endpoint) -> None:
        self._responses = responses
        self._endpoint = endpoint
        self._answered = False
        self._last_seen = False
        self._ended = threading.Event()
        with interrupts_held():
            responses.add_done_callback(lambda _: self._ended.set())

    def receive(self) -> Response | None:
        try:
            with interrupts_held(self._responses.cancel):
                message = next(self._responses, None)
        except grpc.RpcError as error:
            raise grpc_wire.error_from_rpc(error, self._endpoint, answered=self._answered) from None
        self._answered = True
        self._last_seen = True  # An error is the last response too.
        response = None if message is None else grpc_wire.decode(message)
        self._last_seen = response is None or bool(response.finish_reason)
        return response

    def cancel(self) -> None:
        with interrupts_held():
            if (responses := self._responses) is not None:
                responses.cancel()

    def close(self) -> None:
        with interrupts_held():
            if self._last_seen:
                self._ended.wait(_END_SECONDS)
            self.cancel()
            self._responses = None  # its finalizer is gRPC's code too


class GrpcTransport:
    """See Transport."""

    def __init__(self, endpoint: Endpoint, model: str, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self._model = model
        self._channel = grpc.insecure_channel(endpoint.address, options=grpc_wire.channel_options(connect_timeout))
        self._stub = GRPCInferenceServiceStub(self._channel)

    def start(self, request: GenerateRequest, timeout: float | None) -> GrpcCall:
        messages = iter([grpc_wire.encode(request, self._model)])
        with interrupts_held():
            responses = self._stub.ModelStreamInfer(messages, timeout=timeout)
        return GrpcCall(responses, self.endpoint)

    def health(self, timeout: float) -> Health:
        live = self._ask(self._stub.ServerLive, pb.ServerLiveRequest(), timeout)
        server = self._ask(self._stub.ServerMetadata, pb.ServerMetadataRequest(), timeout)
        index = self._ask(self._stub.RepositoryIndex, pb.RepositoryIndexRequest(), timeout)
        return grpc_wire.health(live, server, index, self._model)

    def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]:
        return grpc_wire.model_statistics(self._ask(self._stub.ModelStatistics, pb.ModelStatisticsRequest(), timeout))

    def _ask(self, method: Any, request: Any, timeout: float) -> Any:
        with interrupts_held():
            answer = method.future(request, timeout=timeout)
        try:
            with interrupts_held(answer.cancel):
                return answer.result()
        except grpc.RpcError as error:
            raise grpc_wire.error_from_rpc(error, self.endpoint) from None
        finally:
            with interrupts_held():
                del answer  # see GrpcCall.close

    def close(self) -> None:
        with interrupts_held():
            self._channel.close()


class AsyncGrpcCall:
    def __init__(self, call: Any, endpoint: Endpoint) -> None:
        self._call = call
        self._endpoint = endpoint
        self._answered = False

    async def receive(self) -> Response | None:
        try:
            message = await self._call.read()
            if message is grpc.aio.EOF:
                return None
        except grpc.RpcError as error:
            raise grpc_wire.error_from_rpc(error, self._endpoint, answered=self._answered) from None
        self._answered = True
        try:
            response = grpc_wire.decode(message)
        except WicoreClientError:
            await self._end()
            raise
        if response.finish_reason:
            await self._end()
        return response

    async def _end(self) -> None:
        """After the last response: let the server end the stream."""
        with contextlib.suppress(TimeoutError, grpc.RpcError):
            await asyncio.wait_for(self._call.read(), _END_SECONDS)

    def cancel(self) -> None:
        self._call.cancel()

    close = cancel


class AsyncGrpcTransport:
    """See AsyncTransport."""

    def __init__(self, endpoint: Endpoint, model: str, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self._model = model
        self._options = grpc_wire.channel_options(connect_timeout)
        self._channel: grpc.aio.Channel | None = None

    @property
    def _stub(self) -> Any:
        """The service on the one channel, which is made when an event loop runs."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.endpoint.address, options=self._options)
            self._service = GRPCInferenceServiceStub(self._channel)
        return self._service

    def start(self, request: GenerateRequest, timeout: float | None) -> AsyncGrpcCall:
        messages = iter([grpc_wire.encode(request, self._model)])
        call = self._stub.ModelStreamInfer(messages, timeout=timeout)
        return AsyncGrpcCall(call, self.endpoint)

    async def health(self, timeout: float) -> Health:
        try:
            live = await self._stub.ServerLive(pb.ServerLiveRequest(), timeout=timeout)
            server = await self._stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=timeout)
            index = await self._stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise grpc_wire.error_from_rpc(error, self.endpoint) from None
        return grpc_wire.health(live, server, index, self._model)

    async def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]:
        try:
            message = await self._stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise grpc_wire.error_from_rpc(error, self.endpoint) from None
        return grpc_wire.model_statistics(message)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
