"""What an operator can know of an engine: counters and gauges, as numbers and without a metrics library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wicore_backend.engine.request import FinishedEvent, FinishReason
from wicore_backend.hmt.layout import LayerGroup


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """Blocks of one layer group's pool."""

    used: int
    capacity: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine's numbers. Counts are since its start, gauges of the moment."""

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


class StatisticsRecorder:
    """The counting side. Written by the engine's thread, `refused` by callers' under the engine's lock; read by any."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(FinishReason, 0)
        self.refused = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.steps = 0
        self.step_seconds = 0.0

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
        )
