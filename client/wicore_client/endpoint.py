"""Where the server is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from wicore_client.errors import ConnectionFailed, InvalidArgument

Protocol = Literal["grpc", "http"]
DEFAULT_PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
"""Triton's own."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address and how to talk to it."""

    protocol: Protocol
    host: str
    port: int

    @classmethod
    def parse(cls, url: str, protocol: Protocol | None) -> Endpoint:
        """`host`, `host:port`, `grpc://host:port` or `http://host:port`; a missing port is the protocol's default.

        Raises
        ------
        InvalidArgument
            If it is none of these, or its scheme and `protocol` contradict one another.
        """
        form = "write host:port, grpc://host:port or http://host:port"
        try:
            parts = urlsplit(url if "://" in url else f"//{url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidArgument(f"url {url!r}: {error}; {form}") from None
        if not host or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
            raise InvalidArgument(f"url {url!r} is not an address; {form}")
        if parts.scheme not in ("", "grpc", "http"):
            raise InvalidArgument(f"url {url!r} has scheme {parts.scheme!r}; {form} (TLS ends at a proxy)")
        if protocol not in (None, "grpc", "http"):
            raise InvalidArgument(f"protocol {protocol!r} is not known; use 'grpc' or 'http'")
        named: Protocol | None = "grpc" if parts.scheme == "grpc" else "http" if parts.scheme == "http" else None
        if named and protocol and named != protocol:
            raise InvalidArgument(f"url {url!r} says {named}, protocol says {protocol}; leave one of them out")
        chosen = named or protocol or "grpc"
        return cls(chosen, host, DEFAULT_PORTS[chosen] if port is None else port)

    @property
    def address(self) -> str:
        """host:port, as gRPC and URLs want it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.address} ({'gRPC' if self.protocol == 'grpc' else 'HTTP'})"

    def unreachable(self, reason: str) -> ConnectionFailed:
        """The error of a connection that never came about."""
        return ConnectionFailed(
            f"no server at {self}: {reason}; start it, or check address and protocol "
            f"(Triton's gRPC port is {DEFAULT_PORTS['grpc']}, its HTTP port {DEFAULT_PORTS['http']})",
            sent=False,
        )

    def broken(self, reason: str) -> ConnectionFailed:
        """The error of a connection that ended before the answer did."""
        return ConnectionFailed(
            f"the connection to {self} broke before the answer was whole: {reason}; the server's log may say why",
            sent=True,
        )
