"""From a connection to its caller: the key it presents, and what that key may."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from wicore_backend.gateway.access.key_ring import KeyRing
from wicore_backend.gateway.access.keys import KeyRecord, PresentedKey, ServiceClass
from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.generation import Generation

SUBPROTOCOL = "wicore.key."
"""Browsers set no headers on a WebSocket: they offer this subprotocol with the key behind it, and `wicore.chat.v1`."""

PRIORITIES = {ServiceClass.REALTIME: -10, ServiceClass.INTERACTIVE: 0, ServiceClass.BATCH: 10}
"""As the engine has them (README, `priority`)."""

_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


class InvalidKeyError(ApiError):
    """401."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"{message}; send a valid one as 'Authorization: Bearer KEY'",
            status=401,
            kind="invalid_request_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class ForbiddenError(ApiError):
    """403: a valid key, for something else."""

    def __init__(self, message: str, *, code: str = "permission_denied") -> None:
        super().__init__(message, status=403, kind="permission_error", code=code)


@dataclass(frozen=True, slots=True)
class KeyAuthentication:
    """Callers by their keys."""

    ring: KeyRing

    async def __call__(self, connection: HTTPConnection) -> Caller:
        """The caller of an ordinary endpoint. Raises InvalidKeyError or ForbiddenError."""
        key, record = self._record(connection)
        if record.admin:
            raise ForbiddenError(f"key {key.id} is for the admin endpoints only; use one of the tenant's keys here")
        return _caller(key.id, record)

    async def administrator(self, connection: HTTPConnection) -> Caller:
        """The caller of an admin endpoint. Raises InvalidKeyError or ForbiddenError."""
        key, record = self._record(connection)
        if not record.admin:
            raise ForbiddenError(f"key {key.id} is not an admin key; `keys add --admin` makes one")
        return _caller(key.id, record)

    async def observer(self, connection: HTTPConnection) -> Caller:
        """The caller of what any key may see. Raises InvalidKeyError."""
        key, record = self._record(connection)
        return _caller(key.id, record)

    def _record(self, connection: HTTPConnection) -> tuple[PresentedKey, KeyRecord]:
        texts = list(_presented(connection))
        if not texts:
            raise InvalidKeyError("no API key was given")
        if len(set(texts)) > 1:
            raise InvalidKeyError("more than one API key was given")
        key = PresentedKey.parse(texts[0])
        if key is None:
            raise InvalidKeyError("the API key given has not the form wk_ID_SECRET")
        record = self.ring.find(key)
        if record is None:
            raise InvalidKeyError(f"the API key given, wk_{key.id}_..., is not valid")
        return key, record


@dataclass(frozen=True, slots=True)
class KeyInForce:
    """A hook of every generation: a WebSocket, opened with a key, may outlive it, or what it allowed then."""

    ring: KeyRing

    async def admit(self, generation: Generation) -> None:
        """Raise InvalidKeyError if the key is no longer what the connection was opened with."""
        caller = generation.caller
        record = self.ring.named(caller.key_id)
        if record is None or record.admin or _caller(caller.key_id, record) != caller:
            raise InvalidKeyError(
                f"the API key that this connection was opened with, wk_{caller.key_id}_..., has been changed or revoked"
            )

    def first_token(self, generation: Generation) -> None:
        """Nothing to do."""

    def finished(self, generation: Generation) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True)
class OpenAuthentication:
    """Without a keys file: everybody is the same caller, and nobody administers."""

    async def __call__(self, _connection: HTTPConnection) -> Caller:
        """Anybody, in any class."""
        return ANYONE

    async def administrator(self, _connection: HTTPConnection) -> Caller:
        """Nobody. Raises ForbiddenError."""
        raise ForbiddenError("the admin endpoints need an admin key, and this server has no keys file")

    async def observer(self, _connection: HTTPConnection) -> Caller:
        """Anybody."""
        return ANYONE


ANYONE = Caller(priority=PRIORITIES[ServiceClass.REALTIME])
"""Who has the server for himself may use every class."""

Authentication = KeyAuthentication | OpenAuthentication


def _presented(connection: HTTPConnection) -> Iterator[str]:
    for value in connection.headers.getlist("authorization"):
        match = _BEARER.fullmatch(value)
        if match is None:
            raise InvalidKeyError("the header Authorization has not the form 'Bearer KEY'")
        yield match[1]
    if connection.scope["type"] == "websocket":
        for offered in connection.scope.get("subprotocols", ()):
            if offered.startswith(SUBPROTOCOL):
                yield offered.removeprefix(SUBPROTOCOL)


def _caller(key_id: str, record: KeyRecord) -> Caller:
    return Caller(
        key_id=key_id,
        tenant=record.tenant,
        priority=PRIORITIES[record.service_class],
        models=None if record.models is None else frozenset(record.models),
    )
