"""The engine's statistics as Triton's custom metrics, on the server's own /metrics page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from wicore_backend.engine.health import Health
from wicore_backend.engine.request import Usage
from wicore_backend.engine.statistics import EngineStatistics
from wicore_backend.triton.series import FAMILIES

_log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histograms that requests' times go into as they end."""


class Metrics:
    """Counters and gauges follow what the engine says of itself; histograms take each request's times as it ends."""

    def __init__(self, model: str) -> None:
        self._label = {"model": model}
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
        self._families = {
            family.name: pb_utils.MetricFamily(
                name=family.name, description=family.description, kind=kinds[family.kind]
            )
            for family in FAMILIES
        }
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._told: dict[tuple[str, ...], float] = {}  # Each call is a message to the server; most values stay.
        self._ttft_seconds = self._histogram("wicore_ttft_seconds", "From arrival to the first token")
        self._tpot_seconds = self._histogram("wicore_tpot_seconds", "Time per output token after the first")

    def observe(self, usage: Usage) -> None:
        """A request has ended."""
        for metric, seconds in ((self._ttft_seconds, usage.ttft_s), (self._tpot_seconds, usage.tpot_s)):
            if seconds is not None:
                metric.observe(seconds)

    def update(self, statistics: EngineStatistics, health: Health) -> None:
        """Bring counters and gauges to what the engine says."""
        for family in FAMILIES:
            for labels, value in family.read(statistics, health):
                series = (family.name, *labels.values())
                if series not in self._metrics:
                    self._metrics[series] = self._families[family.name].Metric(labels={**self._label, **labels})
                told = self._told.get(series)
                if value == told:
                    continue
                if family.kind == "gauge":
                    self._metrics[series].set(value)
                else:
                    self._metrics[series].increment(value - (told or 0))
                self._told[series] = value

    def _histogram(self, name: str, description: str) -> Any:
        kind = pb_utils.MetricFamily.HISTOGRAM
        # Triton drops a metric whose family is gone.
        self._families[name] = pb_utils.MetricFamily(name=name, description=f"{description}, seconds", kind=kind)
        return self._families[name].Metric(labels=self._label, buckets=list(_SECONDS))


class MetricsThread:
    """Keeps metrics at most `interval_s` behind the engine, by calling `update`."""

    def __init__(self, update: Callable[[], None], *, interval_s: float = 0.1) -> None:
        self._update = update
        self._interval_s = interval_s
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wicore-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Update once more and end."""
        self._stop.set()
        self._thread.join()
        self._try()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._try()

    def _try(self) -> None:
        try:
            self._update()
            self._failing = False
        except Exception:
            if not self._failing:  # Once, not ten times a second.
                _log.exception("the metrics could not be brought up to date; trying on")
            self._failing = True
