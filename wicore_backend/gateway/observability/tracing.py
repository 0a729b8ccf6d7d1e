"""OpenTelemetry traces: one span for an HTTP request, one for each answer, and the context passed on to Triton.

Without an endpoint no span is made, and a valid `traceparent` goes on as it came, so that who traces around the gateway
still sees Triton's part under his own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from wicore_backend.gateway.asgi import header, state_of
from wicore_backend.gateway.generation import Generation
from wicore_backend.gateway.observability.settings import ObservabilitySettings

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE_LONGEST = 512
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_SPAN = "span"

_propagator = TraceContextTextMapPropagator()


def incoming_context(scope: Scope) -> dict[str, str]:
    """The request's W3C trace context, if it is well-formed; else nothing."""
    parent = header(scope, b"traceparent")
    if parent is None or not _TRACEPARENT.fullmatch(parent):
        return {}
    context = {"traceparent": parent}
    state = header(scope, b"tracestate")
    if state and len(state) <= _TRACESTATE_LONGEST and _PRINTABLE.fullmatch(state):
        context["tracestate"] = state
    return context


class Tracing(Protocol):
    """What the middleware and the hook need."""

    def begin_request(self, scope: Scope, request_id: str) -> None:
        """A request has come."""

    def end_request(self, scope: Scope, *, route: str, status: int) -> None:
        """It has been answered."""

    async def admit(self, generation: Generation) -> None: ...

    def first_token(self, generation: Generation) -> None: ...

    def finished(self, generation: Generation) -> None: ...

    def close(self) -> None:
        """Send what is waiting."""


class PassedOn:
    """No traces of the gateway's own: the context goes through."""

    def begin_request(self, scope: Scope, request_id: str) -> None:
        """Nothing to do."""

    def end_request(self, scope: Scope, *, route: str, status: int) -> None:
        """Nothing to do."""

    async def admit(self, generation: Generation) -> None:
        """Pass the context on."""
        generation.metadata.update(incoming_context(generation.connection.scope))

    def first_token(self, generation: Generation) -> None:
        """Nothing to do."""

    def finished(self, generation: Generation) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass(slots=True)
class Traced:
    """Spans to a collector. They hold sizes and times, never text."""

    settings: ObservabilitySettings
    exporter: SpanExporter | None = None
    """Another way out than OTLP over HTTP, for tests."""
    _provider: TracerProvider = field(init=False)
    _tracer: trace.Tracer = field(init=False)
    _spans: dict[Generation, Span] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        exporter = self.exporter or OTLPSpanExporter(endpoint=self.settings.otlp_endpoint)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": self.settings.service_name}),
            sampler=ParentBasedTraceIdRatio(self.settings.trace_ratio),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("wicore.gateway")

    def begin_request(self, scope: Scope, request_id: str) -> None:
        """Begin the request's span, below the context that came with it."""
        method = scope.get("method", "WEBSOCKET")
        state_of(scope)[_SPAN] = self._tracer.start_span(
            method,
            context=_propagator.extract(incoming_context(scope)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "wicore.request_id": request_id},
        )

    def end_request(self, scope: Scope, *, route: str, status: int) -> None:
        """End it."""
        span: Span | None = state_of(scope).pop(_SPAN, None)
        if span is None:
            return
        span.update_name(f"{scope.get('method', 'WEBSOCKET')} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    async def admit(self, generation: Generation) -> None:
        """Begin the answer's span, and tell Triton that it is the parent of what follows."""
        span = self._tracer.start_span(
            f"generate {generation.model}",
            context=self._request_context(generation),
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "generate_content",
                "gen_ai.request.model": generation.model,
                "wicore.request_id": generation.request.id,
                "wicore.tenant": generation.caller.tenant,
                "wicore.images": len(generation.request.images),
            },
        )
        self._spans[generation] = span
        _propagator.inject(generation.metadata, context=trace.set_span_in_context(span))

    def first_token(self, generation: Generation) -> None:
        """An event on the span."""
        self._spans[generation].add_event("first_token")

    def finished(self, generation: Generation) -> None:
        """End it, with what it took."""
        span = self._spans.pop(generation)
        numbers: Mapping[str, int] = {"gen_ai.usage.output_tokens": generation.tokens}
        if (usage := generation.usage) is not None:
            numbers = {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "wicore.cached_tokens": usage.cached_tokens,
            }
        span.set_attributes({**numbers, "wicore.outcome": generation.outcome or ""})
        if generation.error is not None and generation.error.status >= 500:
            span.set_status(Status(StatusCode.ERROR, generation.error.code))
        span.end()

    def close(self) -> None:
        """Send what is waiting; blocks for seconds if nobody answers."""
        self._provider.shutdown()

    def _request_context(self, generation: Generation) -> Context:
        span: Span | None = state_of(generation.connection.scope).get(_SPAN)
        return Context() if span is None else trace.set_span_in_context(span)


def make_tracing(settings: ObservabilitySettings) -> Tracing:
    """What the settings ask for."""
    return PassedOn() if settings.otlp_endpoint is None else Traced(settings)
