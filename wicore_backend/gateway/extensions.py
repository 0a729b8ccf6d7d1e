"""What is plugged into the gateway: access control, limits, metrics, tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import FastAPI

from wicore_backend.gateway.settings import GatewaySettings


class Extension(Protocol):
    """A part that `create_app` installs: it sets `app.state.authenticate`, appends to `app.state.hooks`, adds (pure
    ASGI) middleware and routers."""

    def install(self, app: FastAPI) -> None:
        """Called once, before the routes are added."""

    async def start(self) -> None:
        """Called in the event loop before the first request."""

    async def close(self) -> None:
        """Called after the last."""


def standard_extensions(settings: GatewaySettings) -> Sequence[Extension]:  # noqa: ARG001
    """Those that the settings ask for, in the order of their installation."""
    return ()
