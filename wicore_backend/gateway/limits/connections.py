"""What uvicorn does not bound: silent connections, endless headers, bodies that nobody waits for, readers that stop.

Uvicorn gives a connection that sends nothing, or half a header, all the time it wants, and takes headers of any size.
All of it is bounded here, in the protocol, where it costs a timer for each connection and nothing for each token.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import ClassVar, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from wicore_backend.gateway.errors import ApiError, InvalidRequestError, UnavailableError
from wicore_backend.gateway.limits.settings import ConnectionSettings

_LINGER_S = 2.0
_LINGER_BYTES = 4 * 2**20
"""How long, and how much of, the rest of a body is read and thrown away after the answer: a client that is still
sending would lose the answer to a reset connection. More is left unread, so that it costs nothing."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol within `limits`. `bounded_protocols` makes the class for a server."""

    limits: ClassVar[ConnectionSettings]
    by_address: ClassVar[Counter[str]]
    on_refusal: ClassVar[Callable[[str], None]]

    _timer: asyncio.TimerHandle | None = None
    """Of the headers that are being waited for, or of the body that is being thrown away."""
    _write_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = True
    _lingering_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self.limits
        address = self.client[0] if self.client else ""
        self.by_address[address] += 1
        most = limits.max_connections_per_address
        if len(self.connections) > limits.max_connections or (most is not None and self.by_address[address] > most):
            self._refuse(UnavailableError("the server has as many connections as it takes", code="connections_full"))
            return
        self._start_timer(limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        _count_out(self.by_address, self.client)
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            if self._timer is None:  # The first byte of another request on this connection.
                self._start_timer(self.limits.header_timeout_s)
            self._header_bytes += len(data)
        super().data_received(data)
        # Past the limit, and there is still no end to them.
        if self._in_headers and self._header_bytes > self.limits.header_bytes:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes:
            self._refuse_headers()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is None:  # The headers were refused.
            return
        super().on_body(body)
        if self.cycle.response_complete:
            self._lingering_bytes += len(body)
            if self._lingering_bytes > _LINGER_BYTES:
                self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self.cycle is None:
            return
        super().on_message_complete()
        self._in_headers = True
        self._header_bytes = 0
        if self.cycle.response_complete:  # The rest of a body that had been answered early.
            self._start_timer(self.limits.header_timeout_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._lingering_bytes = 0
            self._start_timer(_LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._stopped_reading)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequestError(msg, code="invalid_http"))

    def _refuse_headers(self) -> None:
        self._refuse(
            InvalidRequestError(
                f"the headers are longer than {self.limits.header_bytes} bytes (connections.header_bytes)",
                code="headers_too_large",
                status=431,
            )
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer and close, without the application."""
        type(self).on_refusal(error.code or "")
        self.transport.write(raw_response(error))
        self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stopped_reading(self) -> None:
        type(self).on_refusal("stopped_reading")
        self.transport.abort()

    def _too_slow(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer(self.limits.header_timeout_s)  # The answer to the request before is still on its way.
        else:
            type(self).on_refusal("silent")
            self.transport.close()


class BoundedWebSocketProtocol(WebSocketsSansIOProtocol):
    """What a connection becomes that asks for a WebSocket: it goes on counting."""

    by_address: ClassVar[Counter[str]]

    def connection_lost(self, exc: Exception | None) -> None:
        _count_out(self.by_address, self.client)
        super().connection_lost(exc)


class Protocols(NamedTuple):
    """Classes for uvicorn's `http` and `ws`."""

    http: type[BoundedHttpProtocol]
    ws: type[BoundedWebSocketProtocol]


def bounded_protocols(limits: ConnectionSettings, *, on_refusal: Callable[[str], None]) -> Protocols:
    """The protocols of one server.

    Parameters
    ----------
    on_refusal
        Told why a connection is closed, in one word, when that was not its client's wish.
    """
    by_address: Counter[str] = Counter()
    bounds = {"limits": limits, "by_address": by_address, "on_refusal": staticmethod(on_refusal)}
    return Protocols(
        type("Http", (BoundedHttpProtocol,), bounds),
        type("WebSocket", (BoundedWebSocketProtocol,), {"by_address": by_address}),
    )


def _count_out(by_address: Counter[str], client: tuple[str, int] | None) -> None:
    address = client[0] if client else ""
    by_address[address] -= 1
    if by_address[address] <= 0:
        del by_address[address]


def raw_response(error: ApiError) -> bytes:
    """An answer before there is a request to answer."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in {**headers, **error.headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
