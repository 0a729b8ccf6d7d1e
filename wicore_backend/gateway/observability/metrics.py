"""Prometheus metrics of the gateway.

Labels come from small fixed sets. What clients choose (paths, models, methods) becomes `other` unless it is one of the
server's own names, and neither tenants nor keys are labels: the log has them.
"""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from wicore_backend.gateway.generation import Generation

disable_created_metrics()  # type: ignore[no-untyped-call]  # They double the page, and say when this process began.

OTHER = "other"

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_TOKEN = (0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def class_name(priority: int) -> str:
    """The class that a priority belongs to: the named one at or after it."""
    return "realtime" if priority <= -10 else "interactive" if priority <= 0 else "batch"


class GatewayMetrics:
    """All of them, in one registry. It is a hook of every generation, and listens to keys and shared limits.

    Parameters
    ----------
    models
        Names that a request may call a model by.
    """

    def __init__(self, models: Collection[str]) -> None:
        self._models = frozenset(models)
        self._gauges: dict[str, Gauge] = {}
        self.registry = registry = CollectorRegistry()
        by_request = ["endpoint", "model", "class", "outcome"]
        by_class = ["model", "class"]
        self.http = Counter(
            "wicore_gateway_http_requests_total", "HTTP answers.", ["route", "method", "status"], registry=registry
        )
        self.open_requests = Gauge("wicore_gateway_open_requests", "HTTP requests being answered.", registry=registry)
        self.open_sockets = Gauge("wicore_gateway_open_websockets", "WebSockets open.", registry=registry)
        self.generations = Counter(
            "wicore_gateway_generations_total", "Answers that were asked for.", by_request, registry=registry
        )
        self.running = Gauge("wicore_gateway_running_generations", "Answers under way.", by_class, registry=registry)
        self.ttft = _seconds("ttft", "From the request to its first token.", by_class, registry)
        self.tpot = _seconds("tpot", "Per token after the first.", by_class, registry, buckets=_PER_TOKEN)
        self.duration = _seconds("request", "From the request to its end.", [*by_class, "outcome"], registry)
        self.queue = _seconds("queue", "In the engine's queue.", by_class, registry)
        self.tokens = Counter(
            "wicore_gateway_tokens_total",
            "Tokens, by kind: prompt, cached, answer.",
            [*by_class, "kind"],
            registry=registry,
        )
        self.prompt_tokens = Histogram(
            "wicore_gateway_prompt_tokens", "Of a prompt.", by_class, buckets=_TOKENS, registry=registry
        )
        self.connections_refused = Counter(
            "wicore_gateway_connections_refused_total",
            "Connections that were closed before they had made a request, by why.",
            ["reason"],
            registry=registry,
        )

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    async def admit(self, generation: Generation) -> None:
        """One more under way."""
        self.running.labels(*self._class_labels(generation)).inc()

    def first_token(self, generation: Generation) -> None:
        """Nothing to do: what is known of it at the end is more exact."""

    def finished(self, generation: Generation) -> None:
        """All the rest."""
        labels = self._class_labels(generation)
        outcome = generation.outcome or OTHER
        self.running.labels(*labels).dec()
        self.generations.labels(generation.endpoint, *labels, outcome).inc()
        ended = generation.ended if generation.ended is not None else generation.began
        self.duration.labels(*labels, outcome).observe(ended - generation.began)
        if (ttft := ttft_of(generation)) is not None:
            self.ttft.labels(*labels).observe(ttft)
        if (tpot := tpot_of(generation)) is not None:
            self.tpot.labels(*labels).observe(tpot)
        usage = generation.usage
        if usage is None:
            self.tokens.labels(*labels, "answer").inc(generation.tokens)
            return
        self.tokens.labels(*labels, "answer").inc(usage.completion_tokens)
        self.tokens.labels(*labels, "prompt").inc(usage.prompt_tokens)
        self.tokens.labels(*labels, "cached").inc(usage.cached_tokens)
        self.prompt_tokens.labels(*labels).observe(usage.prompt_tokens)
        if usage.queue_ms is not None:
            self.queue.labels(*labels).observe(usage.queue_ms / 1000)

    def connection_refused(self, reason: str) -> None:
        """A connection was closed; `reason` is one of the gateway's own words."""
        self.connections_refused.labels(reason).inc()

    def keys_reloaded(self, *, keys: int, ok: bool) -> None:
        """The keys' file was read."""
        self._gauge("keys", "API keys in force.").set(keys)
        self._gauge("keys_file_ok", "1: the keys' file as it stands is in force.").set(ok)

    def limits_shared(self, shared: bool) -> None:
        """Redis answers, or not."""
        self._gauge("shared_limits_up", "1: limits are shared through Redis now.").set(shared)

    def _gauge(self, name: str, what: str) -> Gauge:
        """One that there is only where it means something, so that it can be alerted on."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"wicore_gateway_{name}", what, registry=self.registry)
        return self._gauges[name]

    def _class_labels(self, generation: Generation) -> tuple[str, str]:
        model = generation.model if generation.model in self._models else OTHER
        priority = generation.request.options.get("priority", generation.caller.priority)
        return model, class_name(priority) if isinstance(priority, int) else str(priority)


def ttft_of(generation: Generation) -> float | None:
    """Seconds to the first token: as seen here in a stream; by the engine's clock where the answer came as a whole."""
    if generation.request.stream:
        return generation.ttft_s
    usage = generation.usage
    return None if usage is None or usage.ttft_ms is None else usage.ttft_ms / 1000


def tpot_of(generation: Generation) -> float | None:
    """Seconds per token after the first, of one answer; None for answers of one token."""
    later = generation.tokens / generation.request.answers - 1
    if later <= 0:
        return None
    if generation.request.stream:
        if generation.first_token_at is None or generation.ended is None:
            return None
        return (generation.ended - generation.first_token_at) / later
    usage = generation.usage
    if usage is None or usage.ttft_ms is None or usage.total_ms is None:
        return None
    return (usage.total_ms - usage.ttft_ms) / 1000 / later


def _seconds(
    name: str,
    what: str,
    labels: list[str],
    registry: CollectorRegistry,
    *,
    buckets: tuple[float, ...] = _LATENCY,
) -> Histogram:
    return Histogram(f"wicore_gateway_{name}_seconds", f"Seconds. {what}", labels, buckets=buckets, registry=registry)
