"""The scheduler's words: what it is told, what it plans, whom it turns away, what it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from wicore_backend.config import EngineConfig
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.step_time import StepShape
from wicore_backend.processor.prompt import PromptImage

MOST_GUESSED = 64
"""Guessed tokens of a step: each has logits of its own, a megabyte, and several times that where it is drawn."""

Guess = Callable[[Sequence, int], tuple[int, ...]]
"""For a step of decodes alone: up to so many tokens that may follow those of a sequence."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much at once.

    Attributes
    ----------
    max_batch_tokens
        Of one step; at least `max_running` plus the tokens of an image, since an image is never split.
    max_waiting, max_waiting_tokens
        Requests, and their tokens with the answers expected, that may wait.
    target_tpot_s
        Mean length of a step with decodes in it; None is `max_decode_slowdown` times what the decodes alone would take.
    ageing_s, aged_share
        See WaitingQueue.
    tenant_weights
        Shares of service; 1 for who is not named.
    """

    max_batch_tokens: int
    max_running: int
    max_waiting: int = 1024
    max_waiting_tokens: int = 2**21
    target_tpot_s: float | None = None
    max_decode_slowdown: float = 1.5
    ageing_s: float = 30.0
    aged_share: int = 8
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EngineConfig) -> SchedulerLimits:
        """What the settings say."""
        return cls(
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
            target_tpot_s=None if config.target_tpot_ms is None else config.target_tpot_ms / 1000,
            max_decode_slowdown=config.max_decode_slowdown,
            ageing_s=config.priority_ageing_s,
            tenant_weights=config.tenant_weights,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` - 1 of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.end == len(self.sequence.tokens)

    @property
    def images(self) -> list[PromptImage]:
        """The images whose soft tokens the chunk computes, all of each."""
        return [i for i in self.sequence.request.prompt.images if self.start <= i.start < self.end]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, the blocks for it in place.

    Attributes
    ----------
    decodes
        Sequences of which the last token is computed.
    chunks
        Parts of prompts, and of what a preempted sequence had.
    shape
        The step as the step-time model sees it.
    """

    decodes: list[Sequence]
    chunks: list[Chunk]
    shape: StepShape
    limit_s: float | None = None
    """Time that it was to take at most, for the sake of its decodes; None without any."""
    guesses: Mapping[Sequence, tuple[int, ...]] = field(default_factory=dict)
    """Of a step of decodes alone: tokens that are computed after those of some of them, in case they come."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def parts(self) -> list[Chunk]:
        """What is computed of each decode and each chunk."""
        guesses = self.guesses
        decodes = (Chunk(s, s.computed, s.computed + 1 + len(guesses.get(s, ()))) for s in self.decodes)
        return [*decodes, *self.chunks]


class Fork(NamedTuple):
    """A sequence that now goes on from another one's prompt."""

    source: Sequence
    sequence: Sequence


class RejectReason(StrEnum):
    """Why a request was turned away before it ran."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_TOKENS = "queue_tokens"
    TOO_LATE = "too_late"
    """It could not have met its deadline."""
    DRAINING = "draining"


class Rejected(NamedTuple):
    """A waiting sequence that was turned away. `retry_after_s` is when there may be room."""

    sequence: Sequence
    reason: RejectReason
    retry_after_s: float
    expected_s: float | None = None
    """When its first token would have come, in seconds after its arrival, if that is the reason."""


@dataclass(slots=True)
class SchedulerCounts:
    """What happened since the start."""

    preemptions: int = 0
    lost_tokens: int = 0
    """Computed, and then given up by a preemption; those that the cache still has are not computed again."""
    prefix_hit_tokens: int = 0
    prefix_missed_tokens: int = 0
    window_missing_tokens: int = 0
    """Of the missed ones, those whose global blocks were there: only the local window was not."""
    shared_prefill_tokens: int = 0
    """Prompt tokens that a sequence got from another one that was computing the same prompt."""
    promotions: int = 0
    restores: int = 0
    """Times that a sequence had blocks brought up from the cold tier."""
    restored_tokens: int = 0
    """Prompt tokens from which such sequences went on: those that they did not have to compute for that."""
    restores_declined: int = 0
    """Sequences for which computing was thought to be faster, or for which there was no room in host memory."""
    restores_without_room: int = 0
    """Of those, the ones for which there was no room."""
    host_hit_tokens: int = 0
    """Of `prefix_hit_tokens`, those that were in host memory and not on the device, ..."""
    nvme_hit_tokens: int = 0
    """... and those that were on disk alone. The others were on the device."""
    guessed_tokens: int = 0
    """Tokens computed in case they come, and ..."""
    guessed_right: int = 0
    """... those of them that came."""
