"""Settings of rates, sizes, times and connections."""

from __future__ import annotations

import ssl
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from wicore_backend.gateway.access.keys import KeyLimits
from wicore_backend.settings import Settings

Positive = Annotated[int, Field(ge=1)]
PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]


class LimitSettings(Settings):
    """What is allowed to whom, beside the keys' own limits."""

    anybody: KeyLimits = KeyLimits()
    """Without a keys file: what everybody may do together."""

    redis_url: Annotated[str, Field(pattern="^rediss?://.")] | None = None
    """`redis://[user:password@]host:port/db` or `rediss://`: limits are shared by all copies of the gateway that use
    it. None: each copy counts for itself."""

    redis_failure: Literal["open", "closed"] = "open"
    """While Redis is gone: `open`, each copy counts for itself; `closed`, requests that have limits get 503."""

    redis_timeout_s: Annotated[float, Field(gt=0, le=10)] = 0.25
    """After which Redis counts as gone."""


class ConnectionSettings(Settings):
    """Bounds of what strangers can hold on to."""

    max_connections: Positive = 4096
    """Sockets open at a time; more are answered with 503 and closed. The process needs as many open files."""

    max_connections_per_address: Positive | None = None
    """The same for one client address; None where a proxy stands in between, which all clients seem to come from."""

    header_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024
    """Request line and headers together; larger get 431."""

    header_timeout_s: PositiveSeconds = 10.0
    """From the connection, or the first byte of a later request, to the end of its headers."""

    keep_alive_s: Annotated[int, Field(ge=1, le=86_400)] = 60
    """An idle connection is closed after so long without a request."""

    body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    """Longest body, pictures and uploads included; larger get 413."""

    bodies_bytes: Annotated[int, Field(ge=1024)] = 256 * 2**20
    """All bodies that are held at a time; what would exceed it gets 503. Memory takes a few times as much, since a body
    is there as text, too, while it is read."""

    body_timeout_s: PositiveSeconds = 60.0
    """From the headers to the end of the body; slower get 408."""

    write_timeout_s: PositiveSeconds = 120.0
    """A client that reads nothing of what waits for it for so long is cut off."""


class CorsSettings(Settings):
    """Which web pages of other origins may use the API."""

    origins: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Such as `https://chat.example.com`; `*` is all."""

    max_age_s: Annotated[int, Field(ge=0)] = 600
    """How long browsers may remember it."""


class TlsSettings(Settings):
    """HTTPS without a proxy in front."""

    certificate_file: str | None = None
    """PEM, with the chain."""

    key_file: str | None = None

    key_password: str | None = None

    client_ca_file: str | None = None
    """PEM: clients have to show a certificate that one of these authorities signed."""

    @model_validator(mode="after")
    def _check_files(self) -> TlsSettings:
        if self.certificate_file is None:
            if self.key_file is not None or self.client_ca_file is not None:
                raise ValueError("without a certificate_file there is no TLS")
            return self
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # An empty password, where there is none: otherwise OpenSSL would ask the terminal.
            context.load_cert_chain(self.certificate_file, self.key_file, lambda: self.key_password or "")
            if self.client_ca_file is not None:
                context.load_verify_locations(self.client_ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(
                f"certificate_file {self.certificate_file!r}, key_file {self.key_file!r} or client_ca_file"
                f" {self.client_ca_file!r} cannot be used: {error}"
            ) from None
        return self

    def uvicorn_options(self) -> dict[str, Any]:
        """As uvicorn names them; nothing without a certificate."""
        if self.certificate_file is None:
            return {}
        return {
            "ssl_certfile": self.certificate_file,
            "ssl_keyfile": self.key_file,
            "ssl_keyfile_password": self.key_password,
            "ssl_ca_certs": self.client_ca_file,
            "ssl_cert_reqs": ssl.CERT_NONE if self.client_ca_file is None else ssl.CERT_REQUIRED,
        }
