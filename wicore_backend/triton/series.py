"""What Triton's /metrics page says of an engine: every series, with where its value is in the engine's statistics.

Nothing here imports Triton, so that it is tested without a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from wicore_backend.engine.explain import Tier
from wicore_backend.engine.health import Health
from wicore_backend.engine.request import PriorityClass
from wicore_backend.engine.statistics import (
    QUEUE_BUCKETS_S,
    BlockUsage,
    EngineStatistics,
    QueueStatistics,
    StepStatistics,
    TierUsage,
)
from wicore_backend.hmt.cold_tier import ColdCounts, ColdStatistics
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStatistics, Outcome, Trouble

Samples = Iterable[tuple[Mapping[str, str], float]]
"""Values of a family's series, by their labels."""

Read = Callable[[EngineStatistics, Health], Samples]


@dataclass(frozen=True, slots=True)
class Family:
    """Series of one name."""

    kind: Literal["counter", "gauge"]
    name: str
    description: str
    read: Read


def _one(value: float) -> Samples:
    return [({}, value)]


def _by(label: str, values: Mapping[Any, float]) -> Samples:
    return [({label: str(key)}, value) for key, value in values.items()]


def _by_class(statistics: EngineStatistics, read: Callable[[QueueStatistics], float]) -> Samples:
    return [({"class": _name(c)}, read(queue)) for c, queue in statistics.queues.items()]


def _by_group(statistics: EngineStatistics, read: Callable[[BlockUsage], float]) -> Samples:
    return _by("group", {group: read(usage) for group, usage in statistics.blocks.items()})


def _by_tier(
    *,
    device: Callable[[BlockUsage], float] | None = None,
    host: Callable[[TierUsage], float] | None = None,
    nvme: Callable[[ColdCounts], float] | None = None,
    in_bytes: bool = False,
) -> Read:
    """Reads a number of blocks, or their bytes, from each layer group of the tiers that there are and that count it."""

    def read(statistics: EngineStatistics, _: Health) -> Samples:
        blocks: dict[tuple[str, LayerGroup], float] = {}
        if device is not None:
            blocks |= {("device", group): device(usage) for group, usage in statistics.blocks.items()}
        if host is not None:
            blocks |= {("host", group): host(usage) for group, usage in statistics.host.items()}
        if nvme is not None and statistics.nvme is not None:
            blocks |= {("nvme", group): nvme(counts) for group, counts in statistics.nvme.groups.items()}
        for (tier, group), count in blocks.items():
            size = statistics.blocks[group].block_bytes if in_bytes else 1
            yield {"tier": tier, "group": str(group)}, count * size

    return read


def _tier_hit_tokens(statistics: EngineStatistics, _: Health) -> Samples:
    """Of the tiers below the device. Its own is what is left of all hits: it may fall for the moment in which a request
    is being counted, which a counter must not."""
    there = {Tier.HOST: statistics.host, Tier.NVME: statistics.nvme}
    return _by("tier", {tier: statistics.hit_tokens[tier] for tier, usage in there.items() if usage})


def _tier_blocks_used(statistics: EngineStatistics, health: Health) -> Samples:
    yield from _by_tier(device=lambda b: b.active + b.cached, host=lambda t: t.used)(statistics, health)
    if statistics.nvme is not None:
        for group, held in statistics.nvme.held.items():
            yield {"tier": "nvme", "group": str(group)}, held


def _tier_blocks(statistics: EngineStatistics, health: Health) -> Samples:
    yield from _by_tier(device=lambda b: b.capacity, host=lambda t: t.capacity)(statistics, health)
    if statistics.nvme is not None:
        yield {"tier": "nvme", "group": "all"}, statistics.nvme.capacity


def _unmoved(statistics: EngineStatistics, _: Health) -> Samples:
    if statistics.nvme is None:
        return
    for group, counts in statistics.nvme.groups.items():
        spills = dict.fromkeys(_NOT_STORED, 0) | counts.spills
        restores = dict.fromkeys(_NOT_RESTORED, 0) | counts.restores
        for operation, outcomes in (("spill", spills), ("restore", restores)):
            for outcome, count in outcomes.items():
                if outcome not in (Outcome.DONE, Outcome.HELD):
                    labels = {"tier": "nvme", "group": str(group), "operation": operation, "reason": str(outcome)}
                    yield labels, count


_NOT_STORED = (Outcome.FULL, Outcome.BUSY, Outcome.REFUSED, Outcome.LATE, Outcome.FAILED)
_NOT_RESTORED = (Outcome.MISSING, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT, Outcome.CANCELLED)
"""Reasons that have a series before the first time, so that a rate over it sees that one."""


def _bounded_blocks(statistics: EngineStatistics, _: Health) -> Samples:
    return [] if statistics.bounded is None else _by("fate", asdict(statistics.bounded.counts))


def _troubles(statistics: EngineStatistics, _: Health) -> Samples:
    if statistics.nvme is not None:
        for kind, count in (dict.fromkeys(Trouble, 0) | statistics.nvme.store.troubles).items():
            yield {"tier": "nvme", "kind": str(kind)}, count


def _of_disk(read: Callable[[NvmeStatistics], float]) -> Read:
    return lambda s, _: [] if s.nvme is None else [({"tier": "nvme"}, read(s.nvme.store))]


def _by_operation(
    spill: Callable[[ColdStatistics], float | None], restore: Callable[[ColdStatistics], float | None]
) -> Read:
    def read(statistics: EngineStatistics, _: Health) -> Samples:
        if statistics.nvme is None:
            return
        for operation, value in (("spill", spill(statistics.nvme)), ("restore", restore(statistics.nvme))):
            if value is not None:
                yield {"tier": "nvme", "operation": operation}, value

    return read


def _name(priority: PriorityClass) -> str:
    return priority.name.lower()


def _queue_buckets(statistics: EngineStatistics) -> Samples:
    bounds = [*(f"{bound:g}" for bound in QUEUE_BUCKETS_S), "+Inf"]
    for c, queue in statistics.queues.items():
        for bound, count in zip(bounds, accumulate(queue.histogram), strict=True):
            yield {"class": _name(c), "le": bound}, count


def _of_step(statistics: EngineStatistics, read: Callable[[StepStatistics], float | None]) -> Samples:
    value = None if statistics.step is None else read(statistics.step)
    return [] if value is None else _one(value)


def _coefficients(statistics: EngineStatistics) -> Samples:
    if statistics.step is None or statistics.step.coefficients is None:
        return []
    return _by("of", asdict(statistics.step.coefficients))


FAMILIES = (
    Family("gauge", "wicore_engine_healthy", "1 if the engine is well, 0 if not", lambda _, h: _one(float(h.ok))),
    Family(
        "gauge",
        "wicore_executor_info",
        "1, with the executor of the dense segments and why it was chosen",
        lambda s, _: [({"executor": s.executor.name, "reason": s.executor.reason}, 1.0)],
    ),
    # Requests. The queue times are a histogram that the engine keeps. Triton's own kind could only be added to time by
    # time, so its series are counters, under the names that Prometheus gives to a histogram's.
    Family(
        "counter", "wicore_requests_total", "Requests that ended, by outcome", lambda s, _: _by("outcome", s.requests)
    ),
    Family(
        "counter",
        "wicore_requests_rejected_total",
        "Requests that were turned away, by reason",
        lambda s, _: _by("reason", s.rejected),
    ),
    Family("gauge", "wicore_running_requests", "Requests being computed", lambda s, _: _one(s.running)),
    Family("gauge", "wicore_waiting_requests", "Requests in the queue", lambda s, _: _one(s.waiting)),
    Family(
        "gauge",
        "wicore_queue_requests",
        "Requests in the queue, by class",
        lambda s, _: _by_class(s, lambda q: q.waiting),
    ),
    Family(
        "gauge",
        "wicore_queue_tokens",
        "Tokens expected of the requests in the queue, by class",
        lambda s, _: _by_class(s, lambda q: q.waiting_tokens),
    ),
    Family(
        "gauge",
        "wicore_queue_oldest_seconds",
        "How long the request has waited that waits longest, by class",
        lambda s, _: _by_class(s, lambda q: q.oldest_s),
    ),
    Family(
        "counter",
        "wicore_queue_seconds_bucket",
        "From arrival to the first step: requests up to a time",
        lambda s, _: _queue_buckets(s),
    ),
    Family(
        "counter",
        "wicore_queue_seconds_sum",
        "From arrival to the first step: seconds of all requests",
        lambda s, _: _by_class(s, lambda q: q.queue_seconds),
    ),
    Family(
        "counter",
        "wicore_queue_seconds_count",
        "From arrival to the first step: requests",
        lambda s, _: _by_class(s, lambda q: q.started),
    ),
    # Tokens
    Family(
        "counter",
        "wicore_prompt_tokens_total",
        "Prompt tokens of requests that ended",
        lambda s, _: _one(s.prompt_tokens),
    ),
    Family(
        "counter",
        "wicore_generated_tokens_total",
        "Tokens of answers that ended",
        lambda s, _: _one(s.completion_tokens),
    ),
    Family(
        "counter",
        "wicore_prefix_hit_tokens_total",
        "Prompt tokens found in the prefix cache",
        lambda s, _: _one(s.scheduler.prefix_hit_tokens),
    ),
    Family(
        "counter",
        "wicore_prefix_missed_tokens_total",
        "Prompt tokens not found in the prefix cache",
        lambda s, _: _one(s.scheduler.prefix_missed_tokens),
    ),
    Family(
        "counter",
        "wicore_prefix_window_missing_tokens_total",
        "Missed prompt tokens of which only the local window was not in the prefix cache",
        lambda s, _: _one(s.scheduler.window_missing_tokens),
    ),
    Family(
        "counter",
        "wicore_shared_prefill_tokens_total",
        "Prompt tokens taken from another request that was computing the same prompt",
        lambda s, _: _one(s.scheduler.shared_prefill_tokens),
    ),
    Family(
        "counter",
        "wicore_restores_total",
        "Times that a request waited for KV blocks from the disk",
        lambda s, _: _one(s.scheduler.restores),
    ),
    Family(
        "counter",
        "wicore_restored_tokens_total",
        "Prompt tokens that such requests found in the prefix cache",
        lambda s, _: _one(s.scheduler.restored_tokens),
    ),
    Family(
        "counter",
        "wicore_restores_declined_total",
        "Times that the disk had blocks and computing was thought to be faster, or that there was no room for them",
        lambda s, _: _one(s.scheduler.restores_declined),
    ),
    Family(
        "counter",
        "wicore_restores_without_room_total",
        "Of those, the times that there was no room",
        lambda s, _: _one(s.scheduler.restores_without_room),
    ),
    # Scheduling
    Family(
        "counter",
        "wicore_preemptions_total",
        "Answers that gave way to others and came back later",
        lambda s, _: _one(s.scheduler.preemptions),
    ),
    Family(
        "counter",
        "wicore_preemption_lost_tokens_total",
        "Computed tokens given up by preemptions",
        lambda s, _: _one(s.scheduler.lost_tokens),
    ),
    Family(
        "counter",
        "wicore_promotions_total",
        "Requests that went before a higher class because of their age",
        lambda s, _: _one(s.scheduler.promotions),
    ),
    Family(
        "counter",
        "wicore_guessed_tokens_total",
        "Tokens computed in case they come",
        lambda s, _: _one(s.scheduler.guessed_tokens),
    ),
    Family(
        "counter",
        "wicore_guessed_tokens_right_total",
        "Of those, the tokens that came",
        lambda s, _: _one(s.scheduler.guessed_right),
    ),
    # Steps
    Family("counter", "wicore_steps_total", "Steps of the engine", lambda s, _: _one(s.steps)),
    Family("counter", "wicore_step_seconds_total", "Time spent in steps", lambda s, _: _one(s.step_seconds)),
    Family("counter", "wicore_steps_retried_total", "Steps that failed at first", lambda s, _: _one(s.retried)),
    Family(
        "counter",
        "wicore_pool_restarts_total",
        "How often nothing could be computed and the KV pools were cleared",
        lambda s, _: _one(s.restarts),
    ),
    Family(
        "gauge",
        "wicore_step_tokens",
        "Tokens computed in the latest step",
        lambda s, _: _of_step(s, lambda step: step.shape.tokens),
    ),
    Family(
        "gauge",
        "wicore_step_sequences",
        "Sequences computed in the latest step",
        lambda s, _: _of_step(s, lambda step: step.shape.sequences),
    ),
    Family(
        "gauge", "wicore_step_seconds", "Time of the latest step", lambda s, _: _of_step(s, lambda step: step.seconds)
    ),
    Family(
        "gauge",
        "wicore_step_limit_seconds",
        "Time that the latest step was given, for the sake of its decodes",
        lambda s, _: _of_step(s, lambda step: step.limit_s),
    ),
    Family(
        "gauge",
        "wicore_step_predicted_seconds",
        "Time that was predicted for the latest step",
        lambda s, _: _of_step(s, lambda step: step.predicted_s),
    ),
    Family(
        "gauge",
        "wicore_step_prediction_error",
        "Median relative error of recent predictions of a step's time",
        lambda s, _: _of_step(s, lambda step: step.error),
    ),
    Family(
        "gauge",
        "wicore_step_time_coefficient",
        "Seconds that a step takes for each thing that it does, as learnt",
        lambda s, _: _coefficients(s),
    ),
    # Memory
    Family(
        "gauge",
        "wicore_kv_blocks_used",
        "KV blocks that requests hold, by layer group",
        lambda s, _: _by_group(s, lambda b: b.active),
    ),
    Family(
        "gauge",
        "wicore_kv_blocks_cached",
        "KV blocks that nobody holds and the prefix cache keeps, by layer group",
        lambda s, _: _by_group(s, lambda b: b.cached),
    ),
    Family(
        "gauge",
        "wicore_kv_blocks",
        "KV blocks that there are, by layer group",
        lambda s, _: _by_group(s, lambda b: b.capacity),
    ),
    Family(
        "counter",
        "wicore_kv_blocks_recycled_total",
        "Cached KV blocks given up for others, by layer group",
        lambda s, _: _by_group(s, lambda b: b.recycled),
    ),
    # The tiers of the KV cache, the device's among them. The numbers of its own blocks are above in more detail.
    Family(
        "gauge",
        "wicore_kv_block_bytes",
        "Bytes of a KV block, by layer group",
        lambda s, _: _by_group(s, lambda b: b.block_bytes),
    ),
    Family(
        "gauge",
        "wicore_tier_blocks_used",
        "KV blocks that a tier has, by tier and layer group",
        _tier_blocks_used,
    ),
    Family(
        "gauge",
        "wicore_tier_blocks",
        "KV blocks that a tier has room for, by tier and layer group (all: the groups share it, and it is an estimate)",
        _tier_blocks,
    ),
    Family(
        "counter",
        "wicore_tier_hit_tokens_total",
        "Prompt tokens found in the prefix cache that no faster tier had, by tier; the device had the others",
        _tier_hit_tokens,
    ),
    Family(
        "counter",
        "wicore_tier_spilled_blocks_total",
        "KV blocks moved to a colder tier, by tier and layer group",
        _by_tier(host=lambda t: t.counts.spilled, nvme=lambda c: c.spills[Outcome.DONE]),
    ),
    Family(
        "counter",
        "wicore_tier_spilled_bytes_total",
        "Their bytes, before they are encoded, by tier and layer group",
        _by_tier(host=lambda t: t.counts.spilled, nvme=lambda c: c.spills[Outcome.DONE], in_bytes=True),
    ),
    Family(
        "counter",
        "wicore_tier_loaded_blocks_total",
        "KV blocks brought back from a colder tier, by tier and layer group",
        _by_tier(host=lambda t: t.counts.loaded, nvme=lambda c: c.restores[Outcome.DONE]),
    ),
    Family(
        "counter",
        "wicore_tier_loaded_bytes_total",
        "Their bytes, decoded, by tier and layer group",
        _by_tier(host=lambda t: t.counts.loaded, nvme=lambda c: c.restores[Outcome.DONE], in_bytes=True),
    ),
    Family(
        "counter",
        "wicore_tier_evicted_blocks_total",
        "KV blocks that a tier gave up to make room, by tier and layer group",
        _by_tier(device=lambda b: b.recycled, host=lambda t: t.counts.evicted, nvme=lambda c: c.evicted),
    ),
    Family(
        "counter",
        "wicore_tier_written_behind_blocks_total",
        "KV blocks of a tier that were stored in the colder one while they stayed, by tier and layer group",
        _by_tier(host=lambda t: t.counts.written_behind),
    ),
    Family(
        "counter",
        "wicore_tier_refused_blocks_total",
        "KV blocks that a colder tier did not take, by tier and layer group",
        _by_tier(host=lambda t: t.counts.refused, nvme=lambda c: c.refused),
    ),
    Family(
        "counter",
        "wicore_tier_lost_blocks_total",
        "KV blocks that the disk lost: damaged, unreadable, or their files deleted, by tier and layer group",
        _by_tier(nvme=lambda c: c.lost),
    ),
    Family(
        "counter",
        "wicore_tier_unmoved_blocks_total",
        "KV blocks that were not stored, or not brought back, by tier, layer group, operation and reason",
        _unmoved,
    ),
    Family(
        "gauge",
        "wicore_bounded_kv_tokens",
        "LOSSY: tokens that an answer keeps of its layers with unlimited attention; no series for exact answers",
        lambda s, _: [] if s.bounded is None else _one(s.bounded.tokens),
    ),
    Family(
        "counter",
        "wicore_bounded_kv_blocks_total",
        "KV blocks that left answers for the sake of that bound, came back, or were lost to them, by fate",
        _bounded_blocks,
    ),
    Family(
        "counter",
        "wicore_tier_troubles_total",
        "Troubles with the disk, by tier and kind",
        _troubles,
    ),
    Family(
        "gauge",
        "wicore_tier_disk_bytes_used",
        "Bytes that a tier's blocks take on its disk, encoded, by tier",
        _of_disk(lambda store: store.used_bytes),
    ),
    Family(
        "gauge",
        "wicore_tier_disk_bytes",
        "Bytes that a tier has on its disk, by tier",
        _of_disk(lambda store: store.capacity_bytes),
    ),
    Family(
        "gauge",
        "wicore_tier_moving_bytes",
        "Bytes of KV blocks under way, by tier and operation",
        _by_operation(lambda c: c.spilling_bytes, lambda c: c.restoring_bytes),
    ),
    Family(
        "counter",
        "wicore_tier_busy_seconds_total",
        "Time in which KV blocks were under way, by tier and operation",
        _by_operation(lambda c: c.spill_seconds, lambda c: c.restore_seconds),
    ),
    Family(
        "gauge",
        "wicore_tier_bytes_per_second",
        "How fast KV blocks move, as measured lately, by tier and operation",
        _by_operation(lambda c: c.spill_bytes_per_second, lambda c: c.restore_bytes_per_second),
    ),
    Family(
        "gauge",
        "wicore_tier_latency_seconds",
        "What moving KV blocks takes apart from their bytes, as measured lately, by tier and operation",
        _by_operation(lambda _: None, lambda c: c.restore_latency_s),
    ),
)
