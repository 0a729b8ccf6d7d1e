"""Who is asking, and what they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from wicore_backend.gateway.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as access control found out.

    Attributes
    ----------
    key_id
        Names the key without being it; "" for anybody.
    tenant
        Goes to the engine: tenants get equal service and share no cached prefix.
    priority
        The best class that this caller may have: a number from -100 (first) to 100, smaller goes first.
    models
        Names that this caller may use; None is all.
    """

    key_id: str = ""
    tenant: str = ""
    priority: int = 0
    models: frozenset[str] | None = None

    @property
    def default_priority(self) -> int:
        """The class of a request that asks for none: the key's, or interactive for anybody."""
        return self.priority if self.key_id else max(0, self.priority)

    def check_model(self, model: str) -> None:
        """Raise NotFoundError, as for a model that does not exist, if this caller may not use `model`."""
        if self.models is not None and model not in self.models:
            raise NotFoundError(f"the model {model!r} does not exist", param="model", code="model_not_found")


ANYBODY = Caller()

Authenticate = Callable[[HTTPConnection], Awaitable[Caller]]
"""Who a connection (HTTP or WebSocket) belongs to. Raises ApiError, 401 or 403."""


async def admit_anybody(_connection: HTTPConnection) -> Caller:
    """Without access control everybody is the same caller."""
    return ANYBODY


async def caller_of(connection: HTTPConnection) -> Caller:
    """The caller of a connection, found once."""
    found: Caller | None = getattr(connection.state, "caller", None)
    if found is None:
        found = await cast(Authenticate, connection.app.state.authenticate)(connection)
        connection.state.caller = found
    return found


async def _caller_of_request(request: Request) -> Caller:
    return await caller_of(request)


CallerDep = Annotated[Caller, Depends(_caller_of_request)]
"""What a route declares to be closed to whom access control refuses."""
