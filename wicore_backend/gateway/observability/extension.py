"""Plugs metrics, traces and the access log into the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from wicore_backend.gateway.generation import GenerationHook
from wicore_backend.gateway.observability.metrics import GatewayMetrics
from wicore_backend.gateway.observability.middleware import GenerationLog, ObservingMiddleware
from wicore_backend.gateway.observability.tracing import Tracing, make_tracing
from wicore_backend.gateway.openai.documentation import refusals_documented
from wicore_backend.gateway.settings import GatewaySettings

CHAT_SOCKET = "/ws/chat"
"""OpenAPI has no WebSockets."""


class ObservabilityExtension:
    """Watches every request from outside, and every answer as a hook before all others, so that it sees what those
    refuse."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics, *, tracing: Tracing | None = None) -> None:
        self._settings = settings.observability
        self.metrics = metrics
        self.tracing = tracing or make_tracing(settings.observability)
        self._app: FastAPI | None = None
        self._paths: set[str] = set()

    def install(self, app: FastAPI) -> None:
        """Add hooks, middleware (the outermost) and `/metrics`."""
        self._app = app
        app.state.metrics = self.metrics
        hooks: Sequence[GenerationHook] = (self.metrics, self.tracing)
        if self._settings.access_log:
            hooks = (*hooks, GenerationLog(self._settings))
        app.state.hooks[:0] = hooks
        app.add_middleware(
            ObservingMiddleware,
            settings=self._settings,
            metrics=self.metrics,
            tracing=self.tracing,
            paths=self._paths,
        )

        @app.get("/metrics", tags=["status"], response_class=PlainTextResponse, responses=refusals_documented(401))
        async def metrics(request: Request) -> Response:
            """Prometheus metrics of this gateway; Triton and the engine have their own page."""
            if not self._settings.metrics_open:
                await request.app.state.authentication.observer(request)
            return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def start(self) -> None:
        """Learn which paths there are, now that all are."""
        if self._app is not None:
            self._paths.update(self._app.openapi()["paths"], [CHAT_SOCKET])

    async def close(self) -> None:
        """Send the last traces."""
        await asyncio.to_thread(self.tracing.close)
