"""What an operator can know of an engine: counters and gauges, as numbers and without a metrics library."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wicore_backend.engine.explain import Tier
from wicore_backend.engine.plan import RejectReason, SchedulerCounts, StepPlan
from wicore_backend.engine.request import FinishedEvent, FinishReason, PriorityClass, Request
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import Coefficients, StepShape, StepTimeModel
from wicore_backend.engine.waiting import Backlog
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.bounded_kv import BoundCounts
from wicore_backend.hmt.cold_tier import ColdStatistics, ColdTier
from wicore_backend.hmt.host_tier import HostTier, TierCounts
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers

QUEUE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of queue times."""


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """Blocks of one layer group's pool."""

    active: int
    cached: int
    capacity: int
    recycled: int
    """Cached blocks that were given up for others, since the start."""
    block_bytes: int
    """Of one block, here and in the host tier."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Blocks of one layer group in the host tier."""

    used: int
    capacity: int
    counts: TierCounts


@dataclass(frozen=True, slots=True)
class BoundUsage:
    """What a KV budget does, which is lossy."""

    tokens: int
    """The most that a decoding sequence keeps of its global blocks."""
    counts: BoundCounts


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One class of priority. The times are of requests that have had their first step."""

    waiting: int
    waiting_tokens: int
    oldest_s: float
    """How long the one that waits longest has waited; 0 if none waits."""
    started: int
    queue_seconds: float
    histogram: tuple[int, ...]
    """Requests by queue time, for each bound of QUEUE_BUCKETS_S, and those beyond the last."""


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """The latest step, and how well step times are predicted."""

    shape: StepShape
    seconds: float
    predicted_s: float | None
    error: float
    """Median relative error of recent predictions."""
    coefficients: Coefficients | None
    limit_s: float | None = None
    """The time that the step was given; None if it had no decodes whose pace was to be kept."""


@dataclass(frozen=True, slots=True)
class ExecutorInUse:
    """What computes the dense segments: its name, and why it was chosen."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine's numbers. Counts are since its start, gauges of the moment."""

    executor: ExecutorInUse
    running: int
    waiting: int
    blocks: Mapping[LayerGroup, BlockUsage]
    host: Mapping[LayerGroup, TierUsage]
    """Empty without a host tier."""
    nvme: ColdStatistics | None
    """None without a cold tier."""
    bounded: BoundUsage | None
    """None for exact answers."""
    queues: Mapping[PriorityClass, QueueStatistics]
    requests: Mapping[FinishReason, int]
    rejected: Mapping[RejectReason, int]
    """Requests that never ran."""
    prompt_tokens: int
    completion_tokens: int
    """Of answers that have ended, and of those that grow."""
    steps: int
    step_seconds: float
    retried: int
    """Steps that failed at first."""
    restarts: int
    """How often nothing could be computed and the KV pools were cleared."""
    scheduler: SchedulerCounts
    step: StepStatistics | None
    """None before the first step."""

    @property
    def hit_tokens(self) -> Mapping[Tier, int]:
        """Prompt tokens that need not be computed, by the fastest tier that had them."""
        counts = self.scheduler
        colder = {Tier.HOST: counts.host_hit_tokens, Tier.NVME: counts.nvme_hit_tokens}
        return {Tier.DEVICE: counts.prefix_hit_tokens - sum(colder.values()), **colder}


def class_of(priority: int) -> PriorityClass:
    """The class whose name stands nearest to a priority: operators see three queues, whatever clients send."""
    return min(PriorityClass, key=lambda c: abs(c - priority))


class _Started:
    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.histogram = [0] * (len(QUEUE_BUCKETS_S) + 1)


class StatisticsRecorder:
    """The counting side. Written by the engine's thread (`rejected` by callers' as well); read by any."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(FinishReason, 0)
        self.rejected = dict.fromkeys(RejectReason, 0)
        self.retried = 0
        self.restarts = 0
        self.completion_tokens = 0
        self._prompt_tokens = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._started = {c: _Started() for c in PriorityClass}
        self._latest: StepStatistics | None = None
        self._backlogs: Mapping[int, Backlog] = {}

    def started(self, request: Request, now: float) -> None:
        """A request has its first step."""
        of_class, seconds = self._started[class_of(request.priority)], now - request.arrival
        of_class.count += 1
        of_class.seconds += seconds
        of_class.histogram[bisect_left(QUEUE_BUCKETS_S, seconds)] += 1

    def step(self, plan: StepPlan, seconds: float, model: StepTimeModel) -> None:
        """A step has been computed; `model` has not learnt from it yet."""
        self._steps += 1
        self._step_seconds += seconds
        ready = model.ready
        self._latest = StepStatistics(
            shape=plan.shape,
            seconds=seconds,
            predicted_s=model.predict(plan.shape) if ready else None,
            error=model.error,
            coefficients=model.coefficients if ready else None,
            limit_s=plan.limit_s,
        )

    def queued(self, backlogs: Mapping[int, Backlog]) -> None:
        """What waits, by priority; to be told from the engine's thread, whose queue it is."""
        self._backlogs = backlogs

    def finished(self, event: FinishedEvent) -> None:
        """A request has ended."""
        self.requests[event.reason] += 1
        self._prompt_tokens += event.usage.prompt_tokens

    def snapshot(
        self, executor: ExecutorInUse, scheduler: Scheduler, blocks: BlockManager, *, now: float, unfinished: int
    ) -> EngineStatistics:
        """Everything counted so far, with the gauges of now. `unfinished` requests include those on their way in."""
        queues = {}
        for c, started in self._started.items():
            waiting = [backlog for priority, backlog in self._backlogs.items() if class_of(priority) is c]
            queues[c] = QueueStatistics(
                waiting=sum(b.count for b in waiting),
                waiting_tokens=sum(b.tokens for b in waiting),
                oldest_s=max((now - b.oldest for b in waiting), default=0.0),
                started=started.count,
                queue_seconds=started.seconds,
                histogram=tuple(started.histogram),
            )
        running = scheduler.num_running
        return EngineStatistics(
            executor=executor,
            running=running,
            waiting=max(scheduler.num_waiting, unfinished - running),
            blocks={
                group: BlockUsage(
                    pool.active, pool.cached, pool.capacity, pool.recycled, blocks.layout.block_bytes(group)
                )
                for group, pool in blocks.pools.items()
            },
            host={} if blocks.lower is None else _usage(blocks.lower.host),
            nvme=None if blocks.lower is None else _cold(blocks.lower),
            bounded=_bounded(blocks),
            queues=queues,
            requests=dict(self.requests),
            rejected=dict(self.rejected),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self.completion_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
            retried=self.retried,
            restarts=self.restarts,
            scheduler=replace(scheduler.counts),
            step=self._latest,
        )


def _usage(tier: HostTier) -> dict[LayerGroup, TierUsage]:
    return {
        group: TierUsage(tier.used(group), slots, replace(tier.counts(group))) for group, slots in tier.slots.items()
    }


def _cold(lower: LowerTiers) -> ColdStatistics | None:
    return lower.cold.statistics() if isinstance(lower.cold, ColdTier) else None


def _bounded(blocks: BlockManager) -> BoundUsage | None:
    if blocks.budget is None:
        return None
    return BoundUsage(blocks.budget.blocks * blocks.block_size, replace(blocks.bound_counts))
