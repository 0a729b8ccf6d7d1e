"""Plugs limits into the gateway: bodies, rates, and which pages of other origins may call."""

from __future__ import annotations

from fastapi import FastAPI
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.middleware.cors import CORSMiddleware

from wicore_backend.gateway.limits.bodies import BodyBudget, BodyMiddleware
from wicore_backend.gateway.limits.heap import return_large_blocks
from wicore_backend.gateway.limits.rate_limits import LimitsOf, RateLimits
from wicore_backend.gateway.limits.settings import CorsSettings, LimitSettings
from wicore_backend.gateway.limits.shared import FailureListener, RedisStore
from wicore_backend.gateway.limits.stores import BucketStore, MemoryStore
from wicore_backend.gateway.settings import GatewaySettings

_EXPOSED = [
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]


class LimitsExtension:
    """Rates of keys and tenants as a hook, bodies as middleware."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        limits_of_key: LimitsOf,
        limits_of_tenant: LimitsOf,
        listener: FailureListener,
    ) -> None:
        self._settings = settings
        self.rate_limits = RateLimits(make_store(settings.limits, listener), limits_of_key, limits_of_tenant)

    def install(self, app: FastAPI) -> None:
        """Add the hook and the middleware, which has to be the innermost: strangers' bodies are not even read."""
        app.state.rate_limits = self.rate_limits
        app.state.hooks.append(self.rate_limits)
        connections = self._settings.connections
        app.add_middleware(BodyMiddleware, limits=connections, budget=BodyBudget(connections.bodies_bytes))

    async def start(self) -> None:
        """See that bodies do not leave the process larger. Redis is connected to by the first request."""
        return_large_blocks()

    async def close(self) -> None:
        """Settle what is open."""
        await self.rate_limits.close()


class CorsExtension:
    """Answers browsers that ask whether a page of another origin may call. It has to be outside of access control:
    browsers ask without a key."""

    def __init__(self, settings: CorsSettings) -> None:
        self._settings = settings

    def install(self, app: FastAPI) -> None:
        """Add the middleware."""
        app.add_middleware(
            CORSMiddleware,
            allow_origins=self._settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            max_age=self._settings.max_age_s,
        )

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""


def make_store(settings: LimitSettings, listener: FailureListener) -> BucketStore:
    """Where buckets are kept."""
    if settings.redis_url is None:
        return MemoryStore()
    # One attempt: RedisStore has its own rule for failures, and requests wait meanwhile.
    redis = Redis.from_url(
        settings.redis_url,
        socket_timeout=settings.redis_timeout_s,
        socket_connect_timeout=settings.redis_timeout_s,
        retry=Retry(NoBackoff(), 0),
    )
    listener.limits_shared(True)
    return RedisStore(redis, settings.redis_failure, settings.redis_timeout_s, listener=listener)
