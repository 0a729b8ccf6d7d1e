"""What is plugged into the gateway: access control, limits, metrics, tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import FastAPI

from wicore_backend.gateway.access.extension import AccessExtension
from wicore_backend.gateway.limits.extension import CorsExtension, LimitsExtension
from wicore_backend.gateway.observability.extension import ObservabilityExtension
from wicore_backend.gateway.observability.metrics import GatewayMetrics
from wicore_backend.gateway.picture_urls import PictureFetcher, PictureUrlSettings
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


class PictureUrls:
    """Pictures by URL, for routes that ask `app.state.picture_fetcher`; without it they refuse URLs."""

    def __init__(self, settings: PictureUrlSettings) -> None:
        self._fetcher = PictureFetcher(settings)

    def install(self, app: FastAPI) -> None:
        """Set `app.state.picture_fetcher`."""
        app.state.picture_fetcher = self._fetcher

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: connections end with their fetch."""


def standard_extensions(settings: GatewaySettings) -> Sequence[Extension]:
    """Those that the settings ask for, in the order of their installation: what comes later lies further out.

    Raises
    ------
    InvalidArgumentError
        If the keys' file is wrong.
    """
    metrics = GatewayMetrics((settings.model, *settings.aliases))
    access = AccessExtension(settings, metrics)
    limits = LimitsExtension(
        settings, limits_of_key=access.limits_of_key, limits_of_tenant=access.limits_of_tenant, listener=metrics
    )
    pictures = [PictureUrls(settings.picture_urls)] if settings.picture_urls.hosts else []
    return (
        *pictures,
        limits,
        access,
        CorsExtension(settings.cors),
        ObservabilityExtension(settings, metrics),
    )
