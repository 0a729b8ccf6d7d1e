"""The client for threads. `async_client` has the same for event loops."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

from wicore_client.endpoint import Endpoint, Protocol
from wicore_client.errors import InvalidArgument, WicoreClientError, cancelled_here
from wicore_client.grpc_transport import GrpcTransport
from wicore_client.http_transport import HttpTransport
from wicore_client.metrics import fetch as fetch_metrics
from wicore_client.requests import GenerateRequest, ImageSource, Message, SamplingOptions, check_text
from wicore_client.results import Answer, Chunk, Completion, Health, Metric, Response, Statistics
from wicore_client.retry import RetryPolicy
from wicore_client.timer import Timer, checked_timeout
from wicore_client.transport import Call, Transport

DEFAULT_URL = "localhost"  # the port follows the protocol
DEFAULT_MODEL = "wicore"
CONNECT_TIMEOUT = 5.0  # seconds; an answer may take minutes, finding a server may not
METRICS_PORT = 8002  # Triton's own
DEFAULT_RETRY = RetryPolicy()


class Stream(Iterator[Chunk]):
    """A request's answer as it grows: an iterator over its chunks, made by `Client.stream`.

    The request is sent by the first `next`. It ends with its last chunk, with an error, or when the stream is
    closed: by `close`, by leaving its `with` block, or by dropping it, as breaking out of a `for` over
    `client.stream(...)` does. Closing before the end cancels the request. `cancel` does the same from another thread.
    """

    def __init__(
        self, transport: Transport, request: GenerateRequest, timeout: float | None, retry: RetryPolicy | None
    ) -> None:
        self._transport = transport
        self._request = request
        self._timeout = timeout
        self._retry = retry
        self._timer: Timer | None = None
        self._call: Call | None = None
        self._answer = Answer()
        self._failures = 0
        self._closed = False
        self._error: WicoreClientError | None = None
        self._cancelled = threading.Event()

    @property
    def request_id(self) -> str:
        """The name of this request in the server's log, and for `Client.cancel`."""
        return self._request.id

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._answer.text

    def __next__(self) -> Chunk:
        """The next chunk. Raises WicoreClientError."""
        if self._closed:
            raise StopIteration
        try:
            chunk = self._advance()
        except WicoreClientError as error:
            self.close()
            self._error = self._answer.interrupted(error)
            raise self._error from None
        except BaseException:
            self.close()
            raise
        if self._answer.whole:
            self.close()
        return chunk

    def _advance(self) -> Chunk:
        """One chunk, from the call under way or, while there is nothing of the answer, from another attempt."""
        self._timer = self._timer or Timer(self._timeout)
        while True:
            try:
                return self._answer.accept(self._receive(self._timer))
            except WicoreClientError as error:
                if self._cancelled.is_set():
                    raise cancelled_here() from None
                self._failures += 1
                delay = self._retry.delay(error, self._failures) if self._retry and self._answer.empty else None
                if delay is None or self._timer.ends_within(delay):
                    raise
                self._drop_call()
                self._cancelled.wait(delay)

    def _receive(self, timer: Timer) -> Response:
        if self._call is None:
            self._call = self._transport.start(self._request, timer.remaining())
        if self._cancelled.is_set():  # after the call is known to `cancel`, so that neither misses the other
            raise cancelled_here()
        response = self._call.receive()
        if response is None:
            raise self._transport.endpoint.broken("it ended without a last response")
        return response

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.close()
            self._call = None

    def completion(self) -> Completion:
        """The whole answer, after waiting for what is missing of it.

        Raises
        ------
        WicoreClientError
            If it does not become whole; the error has what there is.
        """
        for _ in self:
            pass
        if not self._answer.whole:
            raise self._error or self._answer.interrupted(cancelled_here())
        return self._answer.completion()

    def cancel(self) -> None:
        """End the request, from any thread; whoever waits for the next chunk gets Cancelled."""
        self._cancelled.set()
        if (call := self._call) is not None:
            call.cancel()

    def close(self) -> None:
        """Cancel the request if it has not ended; iteration stops."""
        self._closed = True
        self._drop_call()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A Wicore server, seen from a program. Threads may share one; requests are independent of one another.

    Parameters
    ----------
    url
        `host:port`, or `grpc://host:port` or `http://host:port`, which also choose the protocol. Without a port it is
        Triton's own: 8001 for gRPC, 8000 for HTTP.
    protocol
        "grpc" (the default, and the faster one) or "http".
    model
        The model to ask.
    timeout
        Seconds that a request may take, attempts and waits included, if it does not say itself; None is no limit. The
        server hears of it as `deadline_ms`, unless that is given.
    connect_timeout
        Seconds to wait for a connection.
    retry
        What to do about a server that is not there or too busy; None never tries again.
    metrics_port
        Where the server shows its metrics; None leaves them out of `statistics`.

    Raises
    ------
    InvalidArgument
        If url and protocol make no address.
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
        self._transport: Transport = (GrpcTransport if self.endpoint.protocol == "grpc" else HttpTransport)(
            self.endpoint, model, connect_timeout
        )
        self._timeout = timeout
        self._retry = retry
        self._metrics_port = metrics_port
        self._streams: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageSource] = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer to a question or a conversation.

        Parameters
        ----------
        prompt
            A question, before which the images stand, or chat messages, which say where they stand.
        images
            Pictures, in order.
        request_id
            A name for `cancel` and the server's log; by default a random one.
        timeout
            Seconds, attempts and waits included; by default the client's own.
        options
            See SamplingOptions.

        Raises
        ------
        WicoreClientError
            One type for each thing that can go wrong; see `errors`.
        """
        return self._start(prompt, images, options, request_id, timeout, stream=False).completion()

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[ImageSource] = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """The answer as it grows; the parameters are those of `generate`, whose errors come while iterating."""
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
    ) -> Stream:
        timeout = checked_timeout(self._timeout if timeout is None else timeout)
        if timeout is not None and options.get("deadline_ms") is None:
            # For the server as well: Triton's HTTP may miss that a client has left.
            options = {**options, "deadline_ms": max(1, math.ceil(timeout * 1000))}
        request = GenerateRequest.build(prompt, images, options, stream=stream, request_id=request_id)
        answer = Stream(self._transport, request, timeout, self._retry)
        self._streams[request.id] = answer
        return answer

    def cancel(self, request_id: str) -> bool:
        """End a request, from any thread; whoever waits for it gets Cancelled. False if this client has none such."""
        stream = self._streams.get(request_id)
        if stream is None or stream.ended:
            return False
        stream.cancel()
        return True

    def health(self, *, timeout: float = CONNECT_TIMEOUT) -> Health:
        """The state of the server and its models. Raises WicoreClientError if there is no server."""
        return self._transport.health(timeout)

    def statistics(self, *, timeout: float = CONNECT_TIMEOUT) -> Statistics:
        """What the server has counted. Raises WicoreClientError."""
        models = self._transport.model_statistics(timeout)
        return Statistics(models, () if self._metrics_port is None else self.metrics(timeout=timeout))

    def metrics(self, *, timeout: float = CONNECT_TIMEOUT) -> tuple[Metric, ...]:
        """Wicore's own metrics, from the server's metrics port. Raises WicoreClientError."""
        if self._metrics_port is None:
            raise InvalidArgument("this client has no metrics_port; name the server's (Triton's own is 8002)")
        return fetch_metrics(self.endpoint.host, self._metrics_port, timeout)

    def close(self) -> None:
        """Cancel what is under way and close the connections."""
        for stream in list(self._streams.values()):
            stream.cancel()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
