"""What an operator can know of an engine: counters, gauges and histograms, as numbers and without a metrics library."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from wicore_backend.engine.request import FinishedEvent, FinishReason
from wicore_backend.hmt.layout import LayerGroup

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the buckets of every histogram of times."""


@dataclass(slots=True)
class Histogram:
    """Observations counted by bucket; `counts` has one more entry than `bounds`, for those above the last."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """Blocks of one layer group's pool."""

    used: int
    capacity: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine's numbers. Counts are since its start, gauges of the moment; the histograms go on counting."""

    running: int
    waiting: int
    blocks: Mapping[LayerGroup, BlockUsage]
    requests: Mapping[FinishReason, int]
    refused: int
    """Requests that never entered the queue because it was full."""
    prompt_tokens: int
    completion_tokens: int
    steps: int
    step_seconds: float
    queue: Histogram
    """Seconds from arrival to the first step."""
    ttft: Histogram
    """Seconds from arrival to the first token."""
    tpot: Histogram
    """Seconds a token after the first, one observation a request."""


class StatisticsRecorder:
    """The counting side. Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(FinishReason, 0)
        self.refused = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.steps = 0
        self.step_seconds = 0.0
        self.queue = Histogram()
        self.ttft = Histogram()
        self.tpot = Histogram()

    def step(self, seconds: float) -> None:
        """A step has been computed."""
        self.steps += 1
        self.step_seconds += seconds

    def finished(self, event: FinishedEvent) -> None:
        """A request has ended."""
        usage = event.usage
        self.requests[event.reason] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        for histogram, seconds in (
            (self.queue, usage.queue_s),
            (self.ttft, usage.ttft_s),
            (self.tpot, usage.tpot_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def snapshot(self, *, running: int, waiting: int, blocks: Mapping[LayerGroup, BlockUsage]) -> EngineStatistics:
        """Everything counted so far, with the gauges given."""
        return EngineStatistics(
            running=running,
            waiting=waiting,
            blocks=blocks,
            requests=dict(self.requests),
            refused=self.refused,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            steps=self.steps,
            step_seconds=self.step_seconds,
            queue=self.queue,
            ttft=self.ttft,
            tpot=self.tpot,
        )
