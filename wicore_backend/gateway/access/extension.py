"""Plugs access control into the gateway."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI

from wicore_backend.gateway.access import admin
from wicore_backend.gateway.access.authentication import (
    Authentication,
    KeyAuthentication,
    KeyInForce,
    OpenAuthentication,
)
from wicore_backend.gateway.access.key_ring import KeyRing, ReloadListener
from wicore_backend.gateway.access.keys import KeyLimits
from wicore_backend.gateway.access.middleware import AccessMiddleware, ConcurrencyLimit
from wicore_backend.gateway.access.origins import LOOPBACK_NAMES, HostCheck
from wicore_backend.gateway.settings import GatewaySettings


class AccessExtension:
    """Callers by their keys, or everybody the same without a keys file.

    Raises
    ------
    InvalidArgumentError
        If the keys' file is wrong.
    """

    def __init__(self, settings: GatewaySettings, listener: ReloadListener) -> None:
        self._settings = settings
        keys_file = settings.access.keys_file
        self.ring = None if keys_file is None else KeyRing(Path(keys_file), listener=listener)
        self.authentication: Authentication = KeyAuthentication(self.ring) if self.ring else OpenAuthentication()

    def limits_of_key(self, key_id: str) -> KeyLimits:
        """What one key may; without keys, what everybody may together."""
        return self._settings.limits.anybody if self.ring is None else self.ring.limits_of_key(key_id)

    def limits_of_tenant(self, tenant: str) -> KeyLimits:
        """What all keys of a tenant may together."""
        return KeyLimits() if self.ring is None else self.ring.limits_of_tenant(tenant)

    def install(self, app: FastAPI) -> None:
        """Set `app.state.authenticate`, and add the middleware and the admin endpoints."""
        app.state.authenticate = self.authentication
        app.state.authentication = self.authentication
        app.state.key_ring = self.ring
        app.add_middleware(
            AccessMiddleware,
            authentication=self.authentication,
            hosts=self._host_check(),
            concurrency=ConcurrencyLimit(self.limits_of_key, self.limits_of_tenant),
        )
        if self.ring is not None:
            app.state.hooks.insert(0, KeyInForce(self.ring))
        app.include_router(admin.router)

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    def _host_check(self) -> HostCheck:
        access, is_open = self._settings.access, self.ring is None
        if access.hosts is not None:
            hosts: frozenset[str] | None = frozenset(host.lower() for host in access.hosts)
        else:
            hosts = LOOPBACK_NAMES | {self._settings.host} if is_open and not access.open_to_network else None
        return HostCheck(hosts, same_origin=is_open, origins=frozenset(self._settings.cors.origins))
