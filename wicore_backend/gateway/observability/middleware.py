"""The outermost layer: each request gets a name, a span, a count and a line in the log, whatever answers it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wicore_backend.gateway.asgi import encoded, header, state_of
from wicore_backend.gateway.generation import Generation
from wicore_backend.gateway.limits.rate_limits import HEADERS
from wicore_backend.gateway.observability.metrics import OTHER, GatewayMetrics, ttft_of
from wicore_backend.gateway.observability.request_ids import request_id
from wicore_backend.gateway.observability.settings import ObservabilitySettings
from wicore_backend.gateway.observability.tracing import Tracing
from wicore_backend.observability.logfmt import logfmt

access_log = logging.getLogger("wicore_backend.gateway.access_log")

_CLIENT_LEFT = 499
"""Nginx's status for a client that left before it was answered."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class ObservingMiddleware:
    """Watches requests go through. It looks at the first message of an answer only, so that a token costs nothing."""

    app: ASGIApp
    settings: ObservabilitySettings
    metrics: GatewayMetrics
    tracing: Tracing
    paths: Collection[str]
    """Those that the application declares."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        state = state_of(scope)
        name = state["request_id"] = request_id(header(scope, b"x-request-id"))
        self.tracing.begin_request(scope, name)
        gauge = self.metrics.open_sockets if scope["type"] == "websocket" else self.metrics.open_requests
        gauge.inc()
        status = _CLIENT_LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            kind = message["type"]
            if kind in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                extra = {"x-request-id": name, **state.get(HEADERS, {})}
                message = {**message, "headers": _with(message.get("headers", ()), extra)}
            elif kind == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            gauge.dec()
            self._record(scope, status, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route, method = route_of(scope, self.paths), scope.get("method", "WEBSOCKET")
        if method not in _METHODS and scope["type"] == "http":
            method = OTHER
        self.metrics.http.labels(route, method, str(status)).inc()
        self.tracing.end_request(scope, route=route, status=status)
        if self.settings.access_log:
            access_log.info(access_line(scope, status=status, seconds=seconds))


def route_of(scope: Scope, paths: Collection[str]) -> str:
    """The path as the application declares it, also of what was refused on the way to it; of any other, `other`."""
    route: str | None = getattr(scope.get("route"), "path", None)
    return route or (scope["path"] if scope["path"] in paths else OTHER)


def access_line(scope: Scope, *, status: int, seconds: float) -> str:
    """The log's line: who, what, how long, with which result. Nothing of what was said."""
    state = state_of(scope)
    caller = state.get("caller")
    client = scope.get("client")
    return logfmt(
        "http",
        id=state.get("request_id"),
        method=scope.get("method", "WEBSOCKET"),
        path=scope["path"][:200],
        status=status,
        seconds=seconds,
        client=client[0] if client else None,
        key=(caller.key_id or None) if caller else None,
        tenant=(caller.tenant or None) if caller else None,
    )


@dataclass(frozen=True, slots=True)
class GenerationLog:
    """A hook: one line for each answer, with its tokens and times; with its prompt only if that is asked for."""

    settings: ObservabilitySettings

    async def admit(self, generation: Generation) -> None:
        """Nothing to do."""

    def first_token(self, generation: Generation) -> None:
        """Nothing to do."""

    def finished(self, generation: Generation) -> None:
        """Write the line."""
        usage, request = generation.usage, generation.request
        fields: dict[str, Any] = {
            "id": request.id,
            "endpoint": generation.endpoint,
            "model": generation.model[:100],
            "outcome": generation.outcome,
            "error": generation.error.code if generation.error else None,
            "key": generation.caller.key_id or None,
            "tenant": generation.caller.tenant or None,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "cached_tokens": usage.cached_tokens if usage else None,
            "tokens": usage.completion_tokens if usage else generation.tokens,
            "images": len(request.images) or None,
            "ttft_s": ttft_of(generation),
            "total_s": None if generation.ended is None else generation.ended - generation.began,
            "trace": generation.metadata.get("traceparent"),
        }
        if self.settings.log_content:
            prompt = request.prompt if isinstance(request.prompt, str) else json.dumps(request.prompt)
            fields["prompt"] = prompt[: self.settings.log_content_chars]
        access_log.info(logfmt("generation", **fields))


def _with(headers: Any, more: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers, and those of `more` that are not among them."""
    there = {name.lower() for name, _ in headers}
    return [*headers, *((name, value) for name, value in encoded(more) if name not in there)]
