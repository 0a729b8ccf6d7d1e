"""Triton over HTTP: one connection for each request, so that closing it is the request's cancel.

Only the standard library for the sync form; aiohttp, which tritonclient brings along, for the async one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPResponse, RemoteDisconnected

import aiohttp

from wicore_client import http_wire
from wicore_client.endpoint import Endpoint
from wicore_client.errors import cancelled_here, timed_out
from wicore_client.requests import GenerateRequest
from wicore_client.results import Health, ModelStatistics, Response
from wicore_client.timer import Timer

READ_SIZE = 65536  # bytes; far more than a response, so that one read takes what there is
NOT_HTTP = "what answers there does not speak HTTP/1"


class HttpCall:
    """A request under way, on a connection of its own."""

    def __init__(self, endpoint: Endpoint, connect_timeout: float, timeout: float | None) -> None:
        self._endpoint = endpoint
        self._timer = Timer(timeout)
        self._connection = HTTPConnection(endpoint.host, endpoint.port)
        self._connect_timeout = connect_timeout
        self._socket: socket.socket | None = None
        self._response: HTTPResponse | None = None
        self._parser = http_wire.EventParser()
        self._events: deque[bytes] = deque()
        self._cancelled = False

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        """Connect and send the request."""
        remaining = self._timer.remaining()
        self._connection.timeout = min(self._connect_timeout, remaining or self._connect_timeout)
        try:
            self._connection.connect()
        except OSError as error:
            self._timer.remaining()
            raise self._endpoint.unreachable(error.strerror or str(error)) from None
        self._socket = self._connection.sock
        with self._failures():
            self._await_socket()
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})

    def receive(self) -> Response | None:
        with self._failures():
            response = self._response or self._open()
            if response.getheader("Content-Type", "").startswith("text/event-stream"):
                while not self._events:
                    self._await_socket()
                    data = response.read1(READ_SIZE)
                    if not data:
                        return None
                    self._events.extend(self._parser.feed(data))
                return http_wire.decode(self._events.popleft())
            return None if response.isclosed() else http_wire.decode(response.read())

    def read(self) -> bytes:
        """The whole body of a plain exchange."""
        with self._failures():
            return self._open().read()

    def _open(self) -> HTTPResponse:
        self._await_socket()
        response = self._response = self._connection.getresponse()
        if response.status != HTTPStatus.OK:
            retry_after = response.getheader("Retry-After")
            raise http_wire.error_from_status(response.status, response.read(), retry_after, self._endpoint)
        return response

    def _await_socket(self) -> None:
        """Let the next operation on the socket take what is left of the time."""
        if self._cancelled or self._socket is None:
            raise cancelled_here()
        self._socket.settimeout(self._timer.remaining())

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise timed_out() from None
        except (OSError, HTTPException, ValueError) as error:  # http.client: ValueError for a closed file
            if self._cancelled:
                raise cancelled_here() from None
            if isinstance(error, BadStatusLine) and not isinstance(error, RemoteDisconnected):
                raise self._endpoint.unreachable(NOT_HTTP) from None
            raise self._endpoint.broken(str(error) or type(error).__name__) from None

    def cancel(self) -> None:
        self._cancelled = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # unlike close, this wakes a thread that reads

    def close(self) -> None:
        self.cancel()
        if self._response is not None:
            self._response.close()
        self._connection.close()


class HttpTransport:
    """See Transport."""

    def __init__(self, endpoint: Endpoint, model: str, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self._model = model
        self._connect_timeout = connect_timeout

    def start(self, request: GenerateRequest, timeout: float | None) -> HttpCall:
        call = HttpCall(self.endpoint, self._connect_timeout, timeout)
        call.send("POST", http_wire.generate_path(request, self._model), http_wire.encode(request))
        return call

    def health(self, timeout: float) -> Health:
        self._exchange("GET", http_wire.LIVE_PATH, timeout)
        server = self._exchange("GET", http_wire.SERVER_PATH, timeout)
        index = self._exchange("POST", http_wire.INDEX_PATH, timeout)
        return http_wire.health(server, index, self._model)

    def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]:
        return http_wire.model_statistics(self._exchange("GET", http_wire.STATISTICS_PATH, timeout))

    def _exchange(self, method: str, path: str, timeout: float) -> bytes:
        return exchange(self.endpoint, method, path, min(self._connect_timeout, timeout), timeout)

    def close(self) -> None:
        """Nothing to release: connections belong to their calls."""


def exchange(endpoint: Endpoint, method: str, path: str, connect_timeout: float, timeout: float) -> bytes:
    """The body of the answer to one plain request. Raises WicoreClientError."""
    call = HttpCall(endpoint, connect_timeout, timeout)
    try:
        call.send(method, path)
        return call.read()
    finally:
        call.close()


class AsyncHttpCall:
    """A request under way, on a connection of its own. It is sent by the first `receive`."""

    def __init__(self, endpoint: Endpoint, sent: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> None:
        self._endpoint = endpoint
        self._sent = sent
        self._response: aiohttp.ClientResponse | None = None
        self._receiving: asyncio.Task[Response | None] | None = None
        self._parser = http_wire.EventParser()
        self._events: deque[bytes] = deque()

    async def receive(self) -> Response | None:
        self._receiving = asyncio.create_task(self._receive())
        return await self._receiving

    async def _receive(self) -> Response | None:
        with translated(self._endpoint):
            response = self._response or await self._open()
            if response.content_type == "text/event-stream":
                while not self._events:
                    data = await response.content.readany()
                    if not data:
                        return None
                    self._events.extend(self._parser.feed(data))
                return http_wire.decode(self._events.popleft())
            return None if response.content.at_eof() else http_wire.decode(await response.read())

    async def _open(self) -> aiohttp.ClientResponse:
        response = self._response = await self._sent.__aenter__()
        await raise_for_status(response, self._endpoint)
        return response

    def cancel(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
        if self._response is not None:
            self._response.close()

    close = cancel


class AsyncHttpTransport:
    """See AsyncTransport."""

    def __init__(self, endpoint: Endpoint, model: str, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self._model = model
        self._connect_timeout = connect_timeout
        self._session: aiohttp.ClientSession | None = None

    def _open_session(self) -> aiohttp.ClientSession:
        """The one session, made when an event loop runs."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                base_url=f"http://{self.endpoint.address}",
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
            )
        return self._session

    def _timeout(self, timeout: float | None) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=timeout, sock_connect=self._connect_timeout)

    def start(self, request: GenerateRequest, timeout: float | None) -> AsyncHttpCall:
        path = http_wire.generate_path(request, self._model)
        headers = {"Content-Type": "application/json"}
        post = self._open_session().post(
            path, data=http_wire.encode(request), headers=headers, timeout=self._timeout(timeout)
        )
        return AsyncHttpCall(self.endpoint, post)

    async def health(self, timeout: float) -> Health:
        await self._exchange("GET", http_wire.LIVE_PATH, timeout)
        server = await self._exchange("GET", http_wire.SERVER_PATH, timeout)
        index = await self._exchange("POST", http_wire.INDEX_PATH, timeout)
        return http_wire.health(server, index, self._model)

    async def model_statistics(self, timeout: float) -> tuple[ModelStatistics, ...]:
        return http_wire.model_statistics(await self._exchange("GET", http_wire.STATISTICS_PATH, timeout))

    async def _exchange(self, method: str, path: str, timeout: float) -> bytes:
        with translated(self.endpoint):
            async with self._open_session().request(method, path, timeout=self._timeout(timeout)) as response:
                await raise_for_status(response, self.endpoint)
                return await response.read()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def raise_for_status(response: aiohttp.ClientResponse, endpoint: Endpoint) -> None:
    """Raise Triton's error if that is what the response is."""
    if response.status != HTTPStatus.OK:
        retry_after = response.headers.get("Retry-After")
        raise http_wire.error_from_status(response.status, await response.read(), retry_after, endpoint)


@contextlib.contextmanager
def translated(endpoint: Endpoint) -> Iterator[None]:
    """aiohttp's errors as the client's own."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise endpoint.unreachable("connecting took too long") from None
    except TimeoutError:
        raise timed_out() from None
    except aiohttp.ClientResponseError:
        raise endpoint.unreachable(NOT_HTTP) from None
    except aiohttp.ClientConnectorError as error:
        raise endpoint.unreachable(os.strerror(error.errno) if error.errno else str(error)) from None
    except (aiohttp.ClientError, OSError) as error:
        raise endpoint.broken(str(error) or type(error).__name__) from None
