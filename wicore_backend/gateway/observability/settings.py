"""Settings of metrics, traces and logs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wicore_backend.settings import Settings


class ObservabilitySettings(Settings):
    """What is recorded of requests, and where to."""

    access_log: bool = True
    """One line for each request."""

    log_content: bool = False
    """Prompts in the log, too: **personal data**. They are cut at `log_content_chars`."""

    log_content_chars: Annotated[int, Field(ge=1)] = 2000

    metrics_open: bool = False
    """Let anybody read `/metrics`; else it takes one of the keys, if there are keys."""

    otlp_endpoint: str | None = None
    """Where traces go: the URL of an OpenTelemetry collector for OTLP over HTTP, such as `http://localhost:4318/v1/traces`.
    None: none are made, and the trace context of a request goes on to Triton as it came."""

    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the requests without a trace context of their own that are traced; others do as their context says."""

    service_name: str = "wicore-gateway"
