"""What a protocol has to offer. grpc_transport and http_transport have it, for threads and for event loops each."""

from __future__ import annotations

from typing import Protocol

from wicore_client.endpoint import Endpoint
from wicore_client.requests import GenerateRequest
from wicore_client.results import Health, ModelStatistics, Response


class Call(Protocol):
    """A request under way."""

    def receive(self) -> Response | None:
        """The next response; None after the last one. Raises WicoreClientError."""

    def cancel(self) -> None:
        """End it, from any thread, also while another one is in `receive`. Does nothing after the end."""

    def close(self) -> None:
        """End it if need be, and release what it holds. Not while another thread is in `receive`."""


class Transport(Protocol):
    """A server, over one protocol. Calls are independent of one another. Times are in seconds."""

    endpoint: Endpoint

    def start(self, request: GenerateRequest, timeout: float | None) -> Call: ...

    def health(self, timeout: float) -> Health: ...

    def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]: ...

    def close(self) -> None: ...


class AsyncCall(Protocol):
    """A request under way."""

    async def receive(self) -> Response | None:
        """The next response; None after the last one. Raises WicoreClientError."""

    def cancel(self) -> None:
        """End it, also while another task is in `receive`, which then raises asyncio.CancelledError."""

    def close(self) -> None:
        """End it if need be, and release what it holds."""


class AsyncTransport(Protocol):
    """A server, over one protocol. Calls are independent of one another. Times are in seconds."""

    endpoint: Endpoint

    def start(self, request: GenerateRequest, timeout: float | None) -> AsyncCall: ...

    async def health(self, timeout: float) -> Health: ...

    async def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]: ...

    async def close(self) -> None: ...
