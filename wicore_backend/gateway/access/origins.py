"""What a browser may do on behalf of other web pages.

With keys, a page of another origin has no authority: it does not know a key, and no cookie carries one. Without keys,
the one thing that protects a server on somebody's own machine is that no page he visits can reach it. Two ways are
closed: a host name of the page's that points to 127.0.0.1 (the Host header gives it away), and requests that browsers
send across origins without asking first, WebSockets among them (the Origin header does).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import Scope

from wicore_backend.gateway.access.authentication import ForbiddenError
from wicore_backend.gateway.asgi import header
from wicore_backend.gateway.errors import InvalidRequestError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class HostCheck:
    """Refuses requests that call the server by a name that is not its own.

    Attributes
    ----------
    hosts
        Its names, without ports; None is any.
    same_origin
        Also refuse what pages of origins other than the server's and `origins` send.
    origins
        Those that CORS allows; "*" is all.
    """

    hosts: frozenset[str] | None = None
    same_origin: bool = False
    origins: frozenset[str] = frozenset()

    def check(self, scope: Scope) -> None:
        """Raise InvalidRequestError (421) or ForbiddenError (403) for one that is to be refused."""
        host = header(scope, b"host") or ""
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise InvalidRequestError(
                f"this server does not go by the name {host[:100]!r}; the setting access.hosts has its names",
                code="wrong_host",
                status=421,
            )
        origin = header(scope, b"origin")
        if not self.same_origin or origin is None or origin in self.origins or "*" in self.origins:
            return
        if _authority(origin) != host.lower():
            raise ForbiddenError(
                f"pages of {origin[:100]!r} may not use this server; the setting cors.origins lets them",
                code="wrong_origin",
            )


def host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets, in lower case; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _authority(origin: str) -> str:
    """Host and port in an Origin header, in lower case; "" if it is malformed, or `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
