"""Small things that pure ASGI middleware shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope, Send

from wicore_backend.gateway.errors import ApiError


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


def state_of(scope: Scope) -> dict[str, Any]:
    """What the parts of the gateway tell each other of one connection: `request.state`, as a dict."""
    state: dict[str, Any] = scope.setdefault("state", {})
    return state


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers in ASGI's form."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with `error` instead of an application: an HTTP response, or that of a WebSocket's handshake."""
    prefix = "http"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        prefix = "websocket.http"
    body = json.dumps(error.body, ensure_ascii=False).encode()
    headers = encoded(
        {"content-type": "application/json", "content-length": str(len(body)), **error.headers},
    )
    await send({"type": f"{prefix}.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})
