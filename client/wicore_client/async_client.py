"""The client for event loops: what `client` has for threads."""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, Unpack

from wicore_client.client import CONNECT_TIMEOUT, DEFAULT_MODEL, DEFAULT_RETRY, DEFAULT_URL, METRICS_PORT
from wicore_client.endpoint import Endpoint, Protocol
from wicore_client.errors import InvalidArgument, WicoreClientError, cancelled_here
from wicore_client.grpc_transport import AsyncGrpcTransport
from wicore_client.http_transport import AsyncHttpTransport
from wicore_client.metrics import fetch as fetch_metrics
from wicore_client.requests import GenerateRequest, ImageSource, Message, SamplingOptions, check_text
from wicore_client.results import Answer, Chunk, Completion, Health, Metric, Response, Statistics
from wicore_client.retry import RetryPolicy
from wicore_client.timer import Timer, checked_timeout
from wicore_client.transport import AsyncCall, AsyncTransport


class AsyncStream(AsyncIterator[Chunk]):
    """A request's answer as it grows: an asynchronous iterator over its chunks, made by `AsyncClient.stream`.

    The request is sent by the first `anext`. It ends with its last chunk, with an error, or when the stream is closed:
    by `aclose`, by leaving its `async with` block, by cancelling the task that waits for it, or by dropping it, as
    breaking out of `async for ... in client.stream(...)` does. Closing before the end cancels the request. `cancel`
    does the same from another task.
    """

    def __init__(
        self, transport: AsyncTransport, request: GenerateRequest, timeout: float | None, retry: RetryPolicy | None
    ) -> None:
        self._transport = transport
        self._request = request
        self._timeout = timeout
        self._retry = retry
        self._timer: Timer | None = None
        self._call: AsyncCall | None = None
        self._answer = Answer()
        self._failures = 0
        self._closed = False
        self._error: WicoreClientError | None = None
        self._cancelled = asyncio.Event()

    @property
    def request_id(self) -> str:
        """The name of this request in the server's log, and for `AsyncClient.cancel`."""
        return self._request.id

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._answer.text

    async def __anext__(self) -> Chunk:
        """The next chunk. Raises WicoreClientError."""
        if self._closed:
            raise StopAsyncIteration
        try:
            chunk = await self._advance()
        except WicoreClientError as error:
            self._close()
            self._error = self._answer.interrupted(error)
            raise self._error from None
        except BaseException:
            self._close()
            raise
        if self._answer.whole:
            self._close()
        return chunk

    async def _advance(self) -> Chunk:
        """One chunk, from the call under way or, while there is nothing of the answer, from another attempt."""
        self._timer = self._timer or Timer(self._timeout)
        while True:
            try:
                return self._answer.accept(await self._receive(self._timer))
            except WicoreClientError as error:
                if self._cancelled.is_set():
                    raise cancelled_here() from None
                self._failures += 1
                delay = self._retry.delay(error, self._failures) if self._retry and self._answer.empty else None
                if delay is None or self._timer.ends_within(delay):
                    raise
                self._drop_call()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._cancelled.wait()

    async def _receive(self, timer: Timer) -> Response:
        if self._cancelled.is_set():
            raise cancelled_here()
        if self._call is None:
            self._call = self._transport.start(self._request, timer.remaining())
        try:
            response = await self._call.receive()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._cancelled.is_set() or (task is not None and task.cancelling()):
                raise
            raise cancelled_here() from None  # by `cancel`: the task that waits here is to go on
        if response is None:
            raise self._transport.endpoint.broken("it ended without a last response")
        return response

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.close()
            self._call = None

    async def completion(self) -> Completion:
        """The whole answer, after waiting for what is missing of it.

        Raises
        ------
        WicoreClientError
            If it does not become whole; the error has what there is.
        """
        async for _ in self:
            pass
        if not self._answer.whole:
            raise self._error or self._answer.interrupted(cancelled_here())
        return self._answer.completion()

    def cancel(self) -> None:
        """End the request; whoever waits for the next chunk gets Cancelled."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """Cancel the request if it has not ended; iteration stops."""
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._drop_call()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may be gone, and the connection with it
            self._close()


class AsyncClient:
    """A Wicore server, seen from a program with an event loop; all parameters are those of `Client`.

    It belongs to the event loop in which it is first used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        protocol: Protocol | None = None,
        *,
        model: str = DEFAULT_MODEL,
        timeout: float | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        metrics_port: int | None = METRICS_PORT,
    ) -> None:
        self.endpoint = Endpoint.parse(url, protocol)
        check_text("model", model)
        self._transport: AsyncTransport = (
            AsyncGrpcTransport if self.endpoint.protocol == "grpc" else AsyncHttpTransport
        )(self.endpoint, model, connect_timeout)
        self._timeout = timeout
        self._retry = retry
        self._metrics_port = metrics_port
        self._streams: weakref.WeakValueDictionary[str, AsyncStream] = weakref.WeakValueDictionary()

    async def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageSource] = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer; see `Client.generate`."""
        return await self._start(prompt, images, options, request_id, timeout, stream=False).completion()

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageSource] = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """The answer as it grows; see `Client.stream`."""
        return self._start(prompt, images, options, request_id, timeout, stream=True)

    def _start(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        options: SamplingOptions,
        request_id: str | None,
        timeout: float | None,
        *,
        stream: bool,
    ) -> AsyncStream:
        timeout = checked_timeout(self._timeout if timeout is None else timeout)
        if timeout is not None and options.get("deadline_ms") is None:
            # For the server as well: Triton's HTTP may miss that a client has left.
            options = {**options, "deadline_ms": max(1, math.ceil(timeout * 1000))}
        request = GenerateRequest.build(prompt, images, options, stream=stream, request_id=request_id)
        answer = AsyncStream(self._transport, request, timeout, self._retry)
        self._streams[request.id] = answer
        return answer

    def cancel(self, request_id: str) -> bool:
        """End a request; whoever waits for it gets Cancelled. False if this client has none such."""
        stream = self._streams.get(request_id)
        if stream is None or stream.ended:
            return False
        stream.cancel()
        return True

    async def health(self, *, timeout: float = CONNECT_TIMEOUT) -> Health:
        """The state of the server and its models. Raises WicoreClientError if there is no server."""
        return await self._transport.health(timeout)

    async def statistics(self, *, timeout: float = CONNECT_TIMEOUT) -> Statistics:
        """What the server has counted. Raises WicoreClientError."""
        models = await self._transport.model_statistics(timeout)
        return Statistics(models, () if self._metrics_port is None else await self.metrics(timeout=timeout))

    async def metrics(self, *, timeout: float = CONNECT_TIMEOUT) -> tuple[Metric, ...]:
        """Wicore's own metrics, from the server's metrics port. Raises WicoreClientError."""
        if self._metrics_port is None:
            raise InvalidArgument("this client has no metrics_port; name the server's (Triton's own is 8002)")
        return await asyncio.to_thread(fetch_metrics, self.endpoint.host, self._metrics_port, timeout)

    async def close(self) -> None:
        """Cancel what is under way and close the connections."""
        for stream in list(self._streams.values()):
            stream.cancel()
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
