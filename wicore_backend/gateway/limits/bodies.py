"""Bodies are received whole, within bounds of size and time, before anything else sees them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wicore_backend.gateway.asgi import header, send_error, state_of
from wicore_backend.gateway.errors import ApiError, InvalidRequestError, UnavailableError
from wicore_backend.gateway.limits.settings import ConnectionSettings

_STRANGERS_BYTES = 64 * 1024
"""Longest body from whom access control has not looked at."""

_MOST_VALUES = 1 << 20
"""Lists, objects and what stands in them, of a body: to parse so many takes a quarter of a second, in which nobody else
is served. The longest prompts, as token ids, have an eighth of that."""


class BodyTimeoutError(ApiError):
    """408."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the body was not complete within {seconds:g} s; send it faster, or a smaller one",
            status=408,
            kind="invalid_request_error",
            code="body_timeout",
        )


class _ClientLeftError(Exception):
    """The client closed the connection in the middle of its body."""


class _RefusedError(Exception):
    """Tells errors of receiving a body from those of the application."""

    def __init__(self, answer: ApiError) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(slots=True)
class BodyBudget:
    """Bytes of all bodies that are arriving or being worked on: many at a time must not exhaust memory."""

    limit: int
    held: int = field(init=False, default=0)


@dataclass(slots=True)
class _Share:
    """One body's part of the budget."""

    budget: BodyBudget
    held: int = field(init=False, default=0)

    def grow(self, size: int) -> None:
        if self.budget.held + size > self.budget.limit:
            raise UnavailableError("the server holds as many bodies as it can; try again", code="bodies_full")
        self.budget.held += size
        self.held += size

    def release(self) -> None:
        self.budget.held -= self.held
        self.held = 0


@dataclass(frozen=True, slots=True)
class BodyMiddleware:
    """Hands the application a body in one piece, or nothing."""

    app: ASGIApp
    limits: ConnectionSettings
    budget: BodyBudget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        share = _Share(self.budget)
        # Access control has let nobody in whose method (GET, HEAD) needs no body.
        most = self.limits.body_bytes if "caller" in state_of(scope) else _STRANGERS_BYTES
        try:
            body = await self._whole(scope, receive, share, most)
            await self.app(scope, _body_then(body, receive), send)
        except _RefusedError as refused:
            await send_error(scope, send, refused.answer)
        except _ClientLeftError:
            pass
        finally:
            share.release()

    async def _whole(self, scope: Scope, receive: Receive, share: _Share, most: int) -> bytes:
        try:
            _check_headers(scope, most)
            async with asyncio.timeout(self.limits.body_timeout_s):
                body = await _receive(receive, share, most)
            _check_values(body)
            return body
        except TimeoutError:
            raise _RefusedError(BodyTimeoutError(self.limits.body_timeout_s)) from None
        except ApiError as error:
            raise _RefusedError(error) from None


def _check_headers(scope: Scope, most: int) -> None:
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise InvalidRequestError(
            f"bodies in content-encoding {encoding[:40]!r} are not taken; send it plain",
            code="unsupported_encoding",
            status=415,
        )
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdecimal() and int(announced) > most:
        raise _too_large(announced, most)


def _check_values(body: bytes) -> None:
    """Refuse what is large for being parsed, not for being sent. Bytes of pictures hardly count."""
    if len(body) > _MOST_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise InvalidRequestError(
            f"the body holds more than {_MOST_VALUES:,} values; ask for less at once", code="body_too_large", status=413
        )


async def _receive(receive: Receive, share: _Share, most: int) -> bytes:
    body = bytearray()  # Grows as one piece, which the system gets back: many small ones leave holes behind.
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeftError
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        share.grow(len(chunk))
        if share.held > most:
            raise _too_large(f"more than {most}", most)
        body += chunk
    return bytes(body)


def _body_then(body: bytes, receive: Receive) -> Receive:
    """`body` first, then whatever comes: the client's leaving."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_whole() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_whole


def _too_large(size: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the body has {size[:20]} bytes; {most} are allowed here (connections.body_bytes)",
        code="body_too_large",
        status=413,
    )


def _has_body(scope: Scope) -> bool:
    length = header(scope, b"content-length")
    return (length is not None and length != "0") or header(scope, b"transfer-encoding") is not None
