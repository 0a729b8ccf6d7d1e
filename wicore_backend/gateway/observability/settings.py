"""Settings of metrics, traces and logs."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from wicore_backend.settings import Settings


def _web_address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is a URL that begins with http:// or https:// and a host")
    return text


WebAddress = Annotated[str, AfterValidator(_web_address)]
"""A URL of HTTP."""


class ObservabilitySettings(Settings):
    """What is recorded of requests, and where to."""

    access_log: bool = True
    """One line for each request."""

    log_content: bool = False
    """Prompts in the log, too: **personal data**. They are cut at `log_content_chars`."""

    log_content_chars: Annotated[int, Field(ge=1)] = 2000

    metrics_open: bool = False
    """Let anybody read `/metrics`; else it takes one of the keys, if there are keys."""

    otlp_endpoint: WebAddress | None = None
    """Where traces go: the URL of an OpenTelemetry collector for OTLP over HTTP, such as `http://localhost:4318/v1/traces`.
    None: none are made, and the trace context of a request goes on to Triton as it came."""

    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the requests without a trace context of their own that are traced; others do as their context says."""

    service_name: str = "wicore-gateway"
