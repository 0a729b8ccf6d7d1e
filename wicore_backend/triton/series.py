"""What Triton's /metrics page says of an engine: every series, with where its value is in the engine's statistics.

Nothing here imports Triton, so that it is tested without a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

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

Samples = Iterable[tuple[Mapping[str, str], float]]
"""Values of a family's series, by their labels."""


@dataclass(frozen=True, slots=True)
class Family:
    """Series of one name."""

    kind: Literal["counter", "gauge"]
    name: str
    description: str
    read: Callable[[EngineStatistics, Health], Samples]


def _one(value: float) -> Samples:
    return [({}, value)]


def _by(label: str, values: Mapping[Any, float]) -> Samples:
    return [({label: str(key)}, value) for key, value in values.items()]


def _by_class(statistics: EngineStatistics, read: Callable[[QueueStatistics], float]) -> Samples:
    return [({"class": _name(c)}, read(queue)) for c, queue in statistics.queues.items()]


def _by_group(statistics: EngineStatistics, read: Callable[[BlockUsage], float]) -> Samples:
    return _by("group", {group: read(usage) for group, usage in statistics.blocks.items()})


def _by_tier(statistics: EngineStatistics, read: Callable[[TierUsage], float]) -> Samples:
    # One tier so far; a second one is a label more, and no new name.
    return [({"tier": "host", "group": str(group)}, read(usage)) for group, usage in statistics.host.items()]


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
    Family(
        "gauge",
        "wicore_tier_blocks_used",
        "KV blocks kept in a colder tier, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.used),
    ),
    Family(
        "gauge",
        "wicore_tier_blocks",
        "KV blocks that a colder tier has room for, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.capacity),
    ),
    Family(
        "counter",
        "wicore_tier_spilled_blocks_total",
        "KV blocks moved to a colder tier, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.counts.spilled),
    ),
    Family(
        "counter",
        "wicore_tier_loaded_blocks_total",
        "KV blocks brought back from a colder tier, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.counts.loaded),
    ),
    Family(
        "counter",
        "wicore_tier_evicted_blocks_total",
        "KV blocks that a colder tier gave up, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.counts.evicted),
    ),
    Family(
        "counter",
        "wicore_tier_refused_blocks_total",
        "KV blocks that a colder tier did not take, by tier and layer group",
        lambda s, _: _by_tier(s, lambda t: t.counts.refused),
    ),
)
