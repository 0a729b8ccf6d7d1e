"""Settings of the gateway: a JSON object in the environment's WICORE_GATEWAY, then `--set NAME=VALUE`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from wicore_backend.gateway.access.origins import is_loopback
from wicore_backend.gateway.access.settings import AccessSettings
from wicore_backend.gateway.limits.settings import ConnectionSettings, CorsSettings, LimitSettings, TlsSettings
from wicore_backend.gateway.observability.settings import ObservabilitySettings, WebAddress
from wicore_backend.gateway.picture_urls import PictureUrlSettings
from wicore_backend.settings import Settings

Seconds = Annotated[float, Field(ge=0, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]


Name = Annotated[str, Field(min_length=1)]


def _grpc_address(text: str) -> str:
    if re.match("(https?|grpc)://", text):
        raise ValueError(f"gRPC's address has no scheme; write {text.partition('://')[2].strip('/') or 'host:port'}")
    if ":" not in text:
        raise ValueError("gRPC's address is host:port, such as localhost:8001")
    return text


class GatewaySettings(Settings):
    """What an operator chooses. Each part that is plugged in has a section of its own."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: Port = 8080
    """0 takes a free one."""

    triton_url: Annotated[str, AfterValidator(_grpc_address)] = "localhost:8001"
    """The server's gRPC address, host:port."""

    triton_metrics_url: WebAddress | None = "http://localhost:8002/metrics"
    """The server's Prometheus page, for `/status`; None if it cannot be reached."""

    model: Name = "wicore"
    """The Triton model that takes text, messages and pictures, and its name in the API."""

    aliases: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """More names for it, for programs with a name of a model in them."""

    token_model: Name = "wicore_gemma3"
    """The Triton model that takes token ids."""

    connect_timeout_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How long the server may take to accept a connection; a request then gets 503."""

    first_response_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """How long the first response of a request may take, and any after it; then the request gets 504."""

    stalled_reader_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """How long a client may take none of what is sent to it; then its request is cancelled."""

    socket_requests: Annotated[int, Field(ge=1, le=1000)] = 16
    """Requests under way on one WebSocket."""

    socket_message_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    """Longest message that a WebSocket takes."""

    drain_s: Seconds = 20.0
    """How long running answers may take to end when the gateway is told to stop; new ones are refused meanwhile."""

    drain_notice_s: Seconds = 0.0
    """For how long it goes on listening, not ready, before that: what a load balancer takes to notice."""

    access: AccessSettings = AccessSettings()
    limits: LimitSettings = LimitSettings()
    connections: ConnectionSettings = ConnectionSettings()
    cors: CorsSettings = CorsSettings()
    tls: TlsSettings = TlsSettings()
    picture_urls: PictureUrlSettings = PictureUrlSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @model_validator(mode="after")
    def _not_open_to_the_network(self) -> GatewaySettings:
        if self.access.keys_file is None and not self.access.open_to_network and not is_loopback(self.host):
            raise ValueError(
                f"host = {self.host!r} lets everybody in the network in, since there is no access.keys_file; make one"
                " (`python -m wicore_backend.gateway keys add`), or set access.open_to_network to true"
            )
        return self
