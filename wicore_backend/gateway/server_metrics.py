"""Triton's Prometheus page as numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from wicore_client.results import Metric


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """The samples of one look at the page; those that are no number of something are left out. A counter's name ends in
    `_total`, whether it does so on the page or not."""

    samples: tuple[Metric, ...]

    @classmethod
    def parse(cls, page: str) -> ServerMetrics:
        """The page's samples; a page that cannot be read has none."""
        try:
            return cls(
                tuple(
                    Metric(sample.name, sample.labels, sample.value)
                    for family in text_string_to_metric_families(page)
                    for sample in family.samples
                    if math.isfinite(sample.value)
                )
            )
        except ValueError:
            return cls(())

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series of that name that have these labels."""
        return sum(self._values(name, labels))

    def largest(self, name: str) -> float | None:
        """The largest of them; None if there is none."""
        return max(self._values(name, {}), default=None)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Their sums by the values of one label."""
        sums: dict[str, float] = defaultdict(float)
        for metric in self.samples:
            if metric.name == name and label in metric.labels and labels.items() <= metric.labels.items():
                sums[metric.labels[label]] += metric.value
        return dict(sorted(sums.items()))

    def _values(self, name: str, labels: dict[str, str]) -> Iterable[float]:
        return (m.value for m in self.samples if m.name == name and labels.items() <= m.labels.items())
