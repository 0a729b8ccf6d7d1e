"""Access control before anything of a request is read: names, keys, and how much one caller has under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wicore_backend.gateway.access.authentication import SUBPROTOCOL, Authentication
from wicore_backend.gateway.access.keys import KeyLimits
from wicore_backend.gateway.access.origins import HostCheck
from wicore_backend.gateway.asgi import send_error, state_of
from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import ApiError

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CHAT_SUBPROTOCOL = "wicore.chat.v1"

LimitsOf = Callable[[str], KeyLimits]


class TooManyConcurrentError(ApiError):
    """429: the caller has as much under way as he may."""

    def __init__(self, whose: str, limit: int) -> None:
        super().__init__(
            f"{whose} has {limit} requests and WebSockets open, as many as allowed; wait for one to end",
            status=429,
            kind="requests",
            code="concurrency_limit_exceeded",
            retry_after_s=1,
        )


@dataclass(slots=True)
class ConcurrencyLimit:
    """How much each key and each tenant has open in this process."""

    limits_of_key: LimitsOf
    limits_of_tenant: LimitsOf
    open: Counter[str] = field(default_factory=Counter)

    def enter(self, caller: Caller) -> None:
        """Take a place for one request. Raises TooManyConcurrentError if there is none."""
        for name, limits in zip(_names(caller), self._limits(caller), strict=True):
            if limits.concurrent_requests is not None and self.open[name] >= limits.concurrent_requests:
                raise TooManyConcurrentError(name, limits.concurrent_requests)
        self.open.update(_names(caller))

    def leave(self, caller: Caller) -> None:
        """Give it back."""
        for name in _names(caller):
            self.open[name] -= 1
            if not self.open[name]:
                del self.open[name]

    def _limits(self, caller: Caller) -> tuple[KeyLimits, KeyLimits]:
        return self.limits_of_key(caller.key_id), self.limits_of_tenant(caller.tenant)


def _names(caller: Caller) -> tuple[str, str]:
    return f"key {caller.key_id}", f"tenant {caller.tenant}"


@dataclass(frozen=True, slots=True)
class AccessMiddleware:
    """Finds the caller of whatever can cost something (what is not GET or HEAD, and WebSockets) before its body is
    read, so that strangers cannot even upload. The routes ask for the caller of the rest, where they have secrets.
    """

    app: ASGIApp
    authentication: Authentication
    hosts: HostCheck
    concurrency: ConcurrencyLimit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self.hosts.check(scope)
            caller = None if scope.get("method") in _SAFE_METHODS else await self._caller(HTTPConnection(scope))
            if caller:
                self.concurrency.enter(caller)
        except ApiError as error:
            await send_error(scope, send, error)
            return
        if caller is None:
            await self.app(scope, receive, send)
            return
        state_of(scope)["caller"] = caller
        if scope["type"] == "websocket":
            send = _choosing_subprotocol(scope, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.concurrency.leave(caller)

    async def _caller(self, connection: HTTPConnection) -> Caller:
        if connection.scope["path"].startswith("/admin/"):
            return await self.authentication.administrator(connection)
        return await self.authentication(connection)


def _choosing_subprotocol(scope: Scope, send: Send) -> Send:
    """Browsers break off when no subprotocol that they offered is chosen; the one with the key must not be."""
    offered = [name for name in scope.get("subprotocols", ()) if not name.startswith(SUBPROTOCOL)]
    scope["subprotocols"] = offered  # The key goes no further.

    async def choosing(message: Message) -> None:
        if message["type"] == "websocket.accept" and not message.get("subprotocol") and _CHAT_SUBPROTOCOL in offered:
            message = {**message, "subprotocol": _CHAT_SUBPROTOCOL}
        await send(message)

    return choosing
