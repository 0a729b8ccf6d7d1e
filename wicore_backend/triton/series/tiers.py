"""The tiers of the KV cache, the device's among them, of which `blocks.py` has more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wicore_backend.engine.explain import Tier
from wicore_backend.engine.health import Health
from wicore_backend.engine.statistics import BlockUsage, EngineStatistics, TierUsage
from wicore_backend.hmt.cold_tier import ColdCounts, ColdStatistics
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStatistics, Outcome, Trouble
from wicore_backend.triton.series.family import Family, Kind, Samples, by

_NOT_STORED = (Outcome.FULL, Outcome.BUSY, Outcome.REFUSED, Outcome.LATE, Outcome.FAILED)
_NOT_RESTORED = (Outcome.MISSING, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT, Outcome.CANCELLED)
"""Reasons that have a series before the first time, so that a rate over it sees that one."""


def _in_tier(tier: str, counts: Mapping[Any, float]) -> Samples:
    return [({"tier": tier, "group": str(group)}, count) for group, count in counts.items()]


def _by_tier(
    kind: Kind,
    name: str,
    description: str,
    *,
    device: Callable[[BlockUsage], float] | None = None,
    host: Callable[[TierUsage], float] | None = None,
    nvme: Callable[[ColdCounts], float] | None = None,
    in_bytes: bool = False,
) -> Family:
    """A number of blocks, or their bytes, of each layer group of the tiers that there are and that count it."""

    def read(statistics: EngineStatistics, _: Health) -> Samples:
        sizes = {group: usage.block_bytes if in_bytes else 1 for group, usage in statistics.blocks.items()}

        def sized(counts: Iterable[tuple[LayerGroup, float]]) -> Mapping[LayerGroup, float]:
            return {group: count * sizes[group] for group, count in counts}

        if device is not None:
            yield from _in_tier("device", sized((group, device(usage)) for group, usage in statistics.blocks.items()))
        if host is not None:
            yield from _in_tier("host", sized((group, host(usage)) for group, usage in statistics.host.items()))
        if nvme is not None and statistics.nvme is not None:
            yield from _in_tier("nvme", sized((group, nvme(c)) for group, c in statistics.nvme.groups.items()))

    return Family(kind, name, description, read)


def _of_disk(name: str, description: str, read: Callable[[NvmeStatistics], float]) -> Family:
    return Family(
        "gauge",
        name,
        description,
        lambda s, _: [] if s.nvme is None else [({"tier": "nvme"}, read(s.nvme.store))],
    )


def _by_operation(
    kind: Kind,
    name: str,
    description: str,
    *,
    spill: Callable[[ColdStatistics], float | None] | None = None,
    restore: Callable[[ColdStatistics], float | None],
) -> Family:
    """Of the disk's two ways, each once it has a value."""

    def read(statistics: EngineStatistics, _: Health) -> Samples:
        if statistics.nvme is None:
            return
        for operation, of_operation in (("spill", spill), ("restore", restore)):
            value = None if of_operation is None else of_operation(statistics.nvme)
            if value is not None:
                yield {"tier": "nvme", "operation": operation}, value

    return Family(kind, name, description, read)


def _used(statistics: EngineStatistics, _: Health) -> Samples:
    yield from _in_tier("device", {group: usage.active + usage.cached for group, usage in statistics.blocks.items()})
    yield from _in_tier("host", {group: usage.used for group, usage in statistics.host.items()})
    if statistics.nvme is not None:
        yield from _in_tier("nvme", statistics.nvme.held)


def _room(statistics: EngineStatistics, _: Health) -> Samples:
    yield from _in_tier("device", {group: usage.capacity for group, usage in statistics.blocks.items()})
    yield from _in_tier("host", {group: usage.capacity for group, usage in statistics.host.items()})
    if statistics.nvme is not None:
        yield from _in_tier("nvme", {"all": statistics.nvme.capacity})


def _hit_tokens(statistics: EngineStatistics, _: Health) -> Samples:
    """Of the tiers below the device. Its own is what is left of all hits: it may fall for the moment in which a request
    is being counted, which a counter must not."""
    there = {Tier.HOST: statistics.host, Tier.NVME: statistics.nvme}
    return by("tier", {tier: statistics.hit_tokens[tier] for tier, usage in there.items() if usage})


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


def _troubles(statistics: EngineStatistics, _: Health) -> Samples:
    if statistics.nvme is not None:
        for kind, count in (dict.fromkeys(Trouble, 0) | statistics.nvme.store.troubles).items():
            yield {"tier": "nvme", "kind": str(kind)}, count


FAMILIES = (
    Family("gauge", "wicore_tier_blocks_used", "KV blocks that a tier has, by tier and layer group", _used),
    Family(
        "gauge",
        "wicore_tier_blocks",
        "KV blocks that a tier has room for, by tier and layer group (all: the groups share it, and it is an estimate)",
        _room,
    ),
    Family(
        "counter",
        "wicore_tier_hit_tokens_total",
        "Prompt tokens found in the prefix cache that no faster tier had, by tier; the device had the others",
        _hit_tokens,
    ),
    _by_tier(
        "counter",
        "wicore_tier_spilled_blocks_total",
        "KV blocks moved to a colder tier, by tier and layer group",
        host=lambda t: t.counts.spilled,
        nvme=lambda c: c.spills[Outcome.DONE],
    ),
    _by_tier(
        "counter",
        "wicore_tier_spilled_bytes_total",
        "Their bytes, before they are encoded, by tier and layer group",
        host=lambda t: t.counts.spilled,
        nvme=lambda c: c.spills[Outcome.DONE],
        in_bytes=True,
    ),
    _by_tier(
        "counter",
        "wicore_tier_loaded_blocks_total",
        "KV blocks brought back from a colder tier, by tier and layer group",
        host=lambda t: t.counts.loaded,
        nvme=lambda c: c.restores[Outcome.DONE],
    ),
    _by_tier(
        "counter",
        "wicore_tier_loaded_bytes_total",
        "Their bytes, decoded, by tier and layer group",
        host=lambda t: t.counts.loaded,
        nvme=lambda c: c.restores[Outcome.DONE],
        in_bytes=True,
    ),
    _by_tier(
        "counter",
        "wicore_tier_evicted_blocks_total",
        "KV blocks that a tier gave up to make room, by tier and layer group",
        device=lambda b: b.recycled,
        host=lambda t: t.counts.evicted,
        nvme=lambda c: c.evicted,
    ),
    _by_tier(
        "counter",
        "wicore_tier_written_behind_blocks_total",
        "KV blocks of a tier that were stored in the colder one while they stayed, by tier and layer group",
        host=lambda t: t.counts.written_behind,
    ),
    _by_tier(
        "counter",
        "wicore_tier_refused_blocks_total",
        "KV blocks that a colder tier did not take, by tier and layer group",
        host=lambda t: t.counts.refused,
        nvme=lambda c: c.refused,
    ),
    _by_tier(
        "counter",
        "wicore_tier_lost_blocks_total",
        "KV blocks that the disk lost: damaged, unreadable, or their files deleted, by tier and layer group",
        nvme=lambda c: c.lost,
    ),
    Family(
        "counter",
        "wicore_tier_unmoved_blocks_total",
        "KV blocks that were not stored, or not brought back, by tier, layer group, operation and reason",
        _unmoved,
    ),
    Family("counter", "wicore_tier_troubles_total", "Troubles with the disk, by tier and kind", _troubles),
    _of_disk(
        "wicore_tier_disk_bytes_used",
        "Bytes that a tier's blocks take on its disk, encoded, by tier",
        lambda store: store.used_bytes,
    ),
    _of_disk(
        "wicore_tier_disk_bytes", "Bytes that a tier has on its disk, by tier", lambda store: store.capacity_bytes
    ),
    _by_operation(
        "gauge",
        "wicore_tier_moving_bytes",
        "Bytes of KV blocks under way, by tier and operation",
        spill=lambda c: c.spilling_bytes,
        restore=lambda c: c.restoring_bytes,
    ),
    _by_operation(
        "counter",
        "wicore_tier_busy_seconds_total",
        "Time in which KV blocks were under way, by tier and operation",
        spill=lambda c: c.spill_seconds,
        restore=lambda c: c.restore_seconds,
    ),
    _by_operation(
        "gauge",
        "wicore_tier_bytes_per_second",
        "How fast KV blocks move, as measured lately, by tier and operation",
        spill=lambda c: c.spill_bytes_per_second,
        restore=lambda c: c.restore_bytes_per_second,
    ),
    _by_operation(
        "gauge",
        "wicore_tier_latency_seconds",
        "What moving KV blocks takes apart from their bytes, as measured lately, by tier and operation",
        restore=lambda c: c.restore_latency_s,
    ),
)
