"""Requests: how they ended, how they waited, what of their prompts was cached, and what scheduling did to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from wicore_backend.engine.health import Health
from wicore_backend.engine.request import PriorityClass
from wicore_backend.engine.statistics import QUEUE_BUCKETS_S, EngineStatistics, QueueStatistics
from wicore_backend.triton.series.family import Family, Kind, Samples, labelled, one


def _name(priority: PriorityClass) -> str:
    return priority.name.lower()


def _by_class(kind: Kind, name: str, description: str, read: Callable[[QueueStatistics], float]) -> Family:
    return labelled(
        kind, name, description, "class", lambda s: {_name(c): read(queue) for c, queue in s.queues.items()}
    )


def _queue_buckets(statistics: EngineStatistics, _: Health) -> Samples:
    bounds = [*(f"{bound:g}" for bound in QUEUE_BUCKETS_S), "+Inf"]
    for c, queue in statistics.queues.items():
        for bound, count in zip(bounds, accumulate(queue.histogram), strict=True):
            yield {"class": _name(c), "le": bound}, count


FAMILIES = (
    labelled("counter", "wicore_requests_total", "Requests that ended, by outcome", "outcome", lambda s: s.requests),
    labelled(
        "counter",
        "wicore_requests_rejected_total",
        "Requests that were turned away, by reason",
        "reason",
        lambda s: s.rejected,
    ),
    one("gauge", "wicore_running_requests", "Requests being computed", lambda s: s.running),
    one("gauge", "wicore_waiting_requests", "Requests in the queue", lambda s: s.waiting),
    _by_class("gauge", "wicore_queue_requests", "Requests in the queue, by class", lambda q: q.waiting),
    _by_class(
        "gauge",
        "wicore_queue_tokens",
        "Tokens expected of the requests in the queue, by class",
        lambda q: q.waiting_tokens,
    ),
    _by_class(
        "gauge",
        "wicore_queue_oldest_seconds",
        "How long the request has waited that waits longest, by class",
        lambda q: q.oldest_s,
    ),
    # The queue times are a histogram that the engine keeps. Triton's own kind could only be added to time by time, so
    # its series are counters, under the names that Prometheus gives to a histogram's.
    Family(
        "counter",
        "wicore_queue_seconds_bucket",
        "From arrival to the first step: requests up to a time",
        _queue_buckets,
    ),
    _by_class(
        "counter",
        "wicore_queue_seconds_sum",
        "From arrival to the first step: seconds of all requests",
        lambda q: q.queue_seconds,
    ),
    _by_class("counter", "wicore_queue_seconds_count", "From arrival to the first step: requests", lambda q: q.started),
    # Tokens
    one("counter", "wicore_prompt_tokens_total", "Prompt tokens of requests that ended", lambda s: s.prompt_tokens),
    one(
        "counter", "wicore_generated_tokens_total", "Tokens of answers, as they are told", lambda s: s.completion_tokens
    ),
    one(
        "counter",
        "wicore_prefix_hit_tokens_total",
        "Prompt tokens found in the prefix cache",
        lambda s: s.scheduler.prefix_hit_tokens,
    ),
    one(
        "counter",
        "wicore_prefix_missed_tokens_total",
        "Prompt tokens not found in the prefix cache",
        lambda s: s.scheduler.prefix_missed_tokens,
    ),
    one(
        "counter",
        "wicore_prefix_window_missing_tokens_total",
        "Missed prompt tokens of which only the local window was not in the prefix cache",
        lambda s: s.scheduler.window_missing_tokens,
    ),
    one(
        "counter",
        "wicore_shared_prefill_tokens_total",
        "Prompt tokens taken from another request that was computing the same prompt",
        lambda s: s.scheduler.shared_prefill_tokens,
    ),
    # Prefixes from the disk
    one(
        "counter",
        "wicore_restores_total",
        "Times that a request waited for KV blocks from the disk",
        lambda s: s.scheduler.restores,
    ),
    one(
        "counter",
        "wicore_restored_tokens_total",
        "Prompt tokens that such requests found in the prefix cache",
        lambda s: s.scheduler.restored_tokens,
    ),
    one(
        "counter",
        "wicore_restores_declined_total",
        "Times that the disk had blocks and computing was thought to be faster, or that there was no room for them",
        lambda s: s.scheduler.restores_declined,
    ),
    one(
        "counter",
        "wicore_restores_without_room_total",
        "Of those, the times that there was no room",
        lambda s: s.scheduler.restores_without_room,
    ),
    # Scheduling
    one(
        "counter",
        "wicore_preemptions_total",
        "Answers that gave way to others and came back later",
        lambda s: s.scheduler.preemptions,
    ),
    one(
        "counter",
        "wicore_preemption_lost_tokens_total",
        "Computed tokens given up by preemptions",
        lambda s: s.scheduler.lost_tokens,
    ),
    one(
        "counter",
        "wicore_promotions_total",
        "Requests that went before a higher class because of their age",
        lambda s: s.scheduler.promotions,
    ),
    one(
        "counter",
        "wicore_guessed_tokens_total",
        "Tokens computed in case they come",
        lambda s: s.scheduler.guessed_tokens,
    ),
    one(
        "counter",
        "wicore_guessed_tokens_right_total",
        "Of those, the tokens that came",
        lambda s: s.scheduler.guessed_right,
    ),
)
