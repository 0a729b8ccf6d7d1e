"""The engine's statistics as Triton's custom metrics, on the server's own /metrics page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from wicore_backend.engine.request import FinishReason, Usage
from wicore_backend.engine.statistics import EngineStatistics
from wicore_backend.hmt.layout import LayerGroup

_log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the buckets of every histogram of times."""


class Metrics:
    """Counters and gauges follow the engine's statistics; histograms take each request's times as it ends."""

    def __init__(self, model: str, layer_groups: list[LayerGroup]) -> None:
        self._label = {"model": model}
        self._families: list[Any] = []  # Triton drops a metric whose family is gone.
        self._told: dict[str, float] = {}  # Each call is a message to the server; unchanged values need none.

        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        requests = self._family("wicore_requests_total", "Requests that ended, by outcome", counter)
        self._requests = {reason: self._metric(requests, outcome=str(reason)) for reason in FinishReason}
        self._refused = self._single("wicore_requests_refused_total", "Requests refused: the queue was full", counter)
        self._prompt = self._single("wicore_prompt_tokens_total", "Prompt tokens of requests that ended", counter)
        self._generated = self._single("wicore_generated_tokens_total", "Tokens of answers that ended", counter)
        self._steps = self._single("wicore_steps_total", "Steps of the engine", counter)
        self._step_seconds = self._single("wicore_step_seconds_total", "Time spent in steps", counter)
        self._running = self._single("wicore_running_requests", "Requests being computed", gauge)
        self._waiting = self._single("wicore_waiting_requests", "Requests in the queue", gauge)
        used = self._family("wicore_kv_blocks_used", "KV blocks in use, by layer group", gauge)
        capacity = self._family("wicore_kv_blocks", "KV blocks there are, by layer group", gauge)
        self._used = {group: self._metric(used, group=str(group)) for group in layer_groups}
        self._capacity = {group: self._metric(capacity, group=str(group)) for group in layer_groups}
        self._queue_seconds = self._histogram("wicore_queue_seconds", "From arrival to the first step")
        self._ttft_seconds = self._histogram("wicore_ttft_seconds", "From arrival to the first token")
        self._tpot_seconds = self._histogram("wicore_tpot_seconds", "Time per output token after the first")

    def observe(self, usage: Usage) -> None:
        """A request has ended."""
        for metric, seconds in (
            (self._queue_seconds, usage.queue_s),
            (self._ttft_seconds, usage.ttft_s),
            (self._tpot_seconds, usage.tpot_s),
        ):
            if seconds is not None:
                metric.observe(seconds)

    def update(self, statistics: EngineStatistics) -> None:
        """Bring counters and gauges to what `statistics` says."""
        for reason, metric in self._requests.items():
            self._count(f"requests {reason}", metric, statistics.requests[reason])
        self._count("refused", self._refused, sum(statistics.rejected.values()))
        self._count("prompt", self._prompt, statistics.prompt_tokens)
        self._count("generated", self._generated, statistics.completion_tokens)
        self._count("steps", self._steps, statistics.steps)
        self._count("step seconds", self._step_seconds, statistics.step_seconds)
        self._show("running", self._running, statistics.running)
        self._show("waiting", self._waiting, statistics.waiting)
        for group, usage in statistics.blocks.items():
            self._show(f"used {group}", self._used[group], usage.active)
            self._show(f"capacity {group}", self._capacity[group], usage.capacity)

    def _count(self, name: str, metric: Any, value: float) -> None:
        if more := value - self._told.get(name, 0):
            metric.increment(more)
            self._told[name] = value

    def _show(self, name: str, metric: Any, value: float) -> None:
        if value != self._told.get(name):
            metric.set(value)
            self._told[name] = value

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family

    def _metric(self, family: Any, **labels: str) -> Any:
        return family.Metric(labels=self._label | labels)

    def _single(self, name: str, description: str, kind: Any) -> Any:
        return self._metric(self._family(name, description, kind))

    def _histogram(self, name: str, description: str) -> Any:
        family = self._family(name, f"{description}, seconds", pb_utils.MetricFamily.HISTOGRAM)
        return family.Metric(labels=self._label, buckets=list(_SECONDS))


class MetricsThread:
    """Keeps the metrics at most `interval_s` behind the engine."""

    def __init__(
        self, metrics: Metrics, statistics: Callable[[], EngineStatistics], *, interval_s: float = 0.1
    ) -> None:
        self._metrics = metrics
        self._statistics = statistics
        self._interval_s = interval_s
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wicore-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Update once more and end."""
        self._stop.set()
        self._thread.join()
        self._update()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._update()

    def _update(self) -> None:
        try:
            self._metrics.update(self._statistics())
        except Exception:
            if not self._failing:  # Once, not ten times a second.
                _log.exception("the metrics could not be brought up to date; trying on")
            self._failing = True
        else:
            self._failing = False
