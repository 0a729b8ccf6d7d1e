"""What a server's KV cache holds and does, tier by tier, and why prompts missed it: read off its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from wicore_client.results import Metric

TIERS = {"device": "kv_cache_bytes", "host": "host_cache_bytes", "nvme": "nvme_cache_path"}
"""From the fastest to the largest, each with the server's setting that gives it room."""

_TROUBLES = {
    "disk_full": "the disk, or a quota of it, was full",
    "permission": "no permission to write",
    "read_error": "the disk reported an error to a read",
    "write_error": "the disk reported an error to a write",
    "slow_read": "reads that took longer than their deadline",
    "slow_write": "writes that took longer than their deadline",
    "corrupt": "damaged bytes; the blocks count as missing",
    "files_lost": "its files were deleted; it is empty until a restart",
}
_NOT_RESTORED = {
    "missing": "gone when they were asked for",
    "late": "the disk was too slow",
    "failed": "the disk reported an error",
    "corrupt": "they were damaged",
    "cancelled": "whoever waited for them had left",
}


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """One layer group's blocks in a tier. None is what the tier does not count.

    Attributes
    ----------
    group
        "global", "local", or "all" for what the groups share.
    stored, loaded
        Blocks that came from the tier above, and that went back to it.
    evicted
        Given up to make room; those of the host tier may have gone on to the disk.
    refused
        Blocks that the tier was offered and did not take.
    written_behind
        Blocks that were stored in the tier below while they stayed.
    """

    group: str
    used: int | None
    capacity: int | None
    stored: int | None
    loaded: int | None
    evicted: int | None
    refused: int | None
    written_behind: int | None


@dataclass(frozen=True, slots=True)
class TierUsage:
    """One tier. Bytes are those that the blocks take on the device, whatever the tier makes of them.

    Attributes
    ----------
    found_tokens
        Of prompts, those that it had and no faster tier.
    store_bytes_per_second, load_bytes_per_second, load_latency_s
        As the server has measured lately; None if it has not.
    used_disk_bytes, disk_bytes
        What its blocks take on the disk, encoded, and what they may take; None for a tier in memory.
    errors
        What went wrong with the disk, and how often.
    """

    tier: str
    groups: tuple[GroupUsage, ...]
    found_tokens: int
    used_bytes: int | None
    stored_bytes: int | None
    loaded_bytes: int | None
    store_bytes_per_second: float | None
    load_bytes_per_second: float | None
    load_latency_s: float | None
    used_disk_bytes: int | None
    disk_bytes: int | None
    errors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MissReason:
    """Why prompt tokens had to be computed. `unit` is what `count` counts: tokens, times or blocks."""

    reason: str
    count: int
    unit: str


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The KV cache of one model.

    Attributes
    ----------
    found_tokens, missed_tokens
        Of prompts, in all tiers together.
    restores, restored_tokens
        How often a prompt waited for blocks from the disk, and the tokens that such prompts found in all.
    reasons
        Those that have occurred, in tokens first, the most frequent of a unit first.
    tiers
        Those that the server has, the fastest first.
    bounded_tokens
        The server is LOSSY if there is one: what an answer keeps of its layers with unlimited attention.
    bounded_blocks
        Blocks that left answers for that, by fate: "left", "returned", "lost".
    """

    model: str
    found_tokens: int
    missed_tokens: int
    restores: int
    restored_tokens: int
    reasons: tuple[MissReason, ...]
    tiers: tuple[TierUsage, ...]
    bounded_tokens: int | None
    bounded_blocks: Mapping[str, int]

    def only(self, tier: str) -> Self:
        """The report with one of its tiers, or none if the server does not have that."""
        return replace(self, tiers=tuple(t for t in self.tiers if t.tier == tier))


def since(before: Iterable[Metric], after: Iterable[Metric]) -> tuple[Metric, ...]:
    """Metrics of the time between two looks: counters count from the first one, gauges are the second one's."""
    counted = {_series(m): m.value for m in before if m.name.endswith("_total")}
    return tuple(
        # A server that was started anew counts from 0.
        Metric(m.name, m.labels, m.value - base if (base := counted.get(_series(m), 0.0)) <= m.value else m.value)
        for m in after
    )


def reports(metrics: Sequence[Metric]) -> tuple[CacheReport, ...]:
    """What the metrics say of the cache of each model that has one."""
    models = sorted({m.labels.get("model", "") for m in metrics if m.name == "wicore_tier_blocks"})
    return tuple(_report(model, [m for m in metrics if m.labels.get("model", "") == model]) for model in models)


class _Page:
    """The metrics of one model. A value that is no number of something is as good as none."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._values = {_series(m): m.value for m in metrics if math.isfinite(m.value) and m.value >= 0}

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one series."""
        return self._values.get((name, frozenset(labels.items())))

    def count(self, name: str, **labels: str) -> int | None:
        value = self.value(name, **labels)
        return None if value is None else round(value)

    def total(self, name: str) -> int:
        return self.count(name) or 0

    def by(self, label: str, name: str, **labels: str) -> dict[str, int]:
        """The values of the series that have these labels and one more."""
        wanted = labels.items()
        found = {}
        for series, value in self._values.items():
            given = dict(series[1])
            key = given.pop(label, None)
            if series[0] == name and key is not None and given.items() == wanted:
                found[key] = round(value)
        return dict(sorted(found.items()))


def _series(metric: Metric) -> tuple[str, frozenset[tuple[str, str]]]:
    return metric.name, frozenset((key, value) for key, value in metric.labels.items() if key != "model")


def _report(model: str, metrics: Iterable[Metric]) -> CacheReport:
    page = _Page(metrics)
    tiers = tuple(_tier(page, tier) for tier in TIERS if page.by("group", "wicore_tier_blocks", tier=tier))
    return CacheReport(
        model=model,
        found_tokens=page.total("wicore_prefix_hit_tokens_total"),
        missed_tokens=page.total("wicore_prefix_missed_tokens_total"),
        restores=page.total("wicore_restores_total"),
        restored_tokens=page.total("wicore_restored_tokens_total"),
        reasons=_reasons(page, tiers),
        tiers=tiers,
        bounded_tokens=page.count("wicore_bounded_kv_tokens"),
        bounded_blocks=page.by("fate", "wicore_bounded_kv_blocks_total"),
    )


def _tier(page: _Page, tier: str) -> TierUsage:
    used = page.by("group", "wicore_tier_blocks_used", tier=tier)
    capacity = page.by("group", "wicore_tier_blocks", tier=tier)
    shared = "all" in capacity
    groups = [
        GroupUsage(
            group=group,
            used=sum(used.values()) if shared and group == "all" else used.get(group),
            capacity=capacity.get(group),
            stored=page.count("wicore_tier_spilled_blocks_total", tier=tier, group=group),
            loaded=page.count("wicore_tier_loaded_blocks_total", tier=tier, group=group),
            evicted=page.count("wicore_tier_evicted_blocks_total", tier=tier, group=group),
            refused=page.count("wicore_tier_refused_blocks_total", tier=tier, group=group),
            written_behind=page.count("wicore_tier_written_behind_blocks_total", tier=tier, group=group),
        )
        for group in [*used, *(group for group in capacity if group not in used)]
    ]
    sizes = page.by("group", "wicore_kv_block_bytes")
    return TierUsage(
        tier=tier,
        groups=tuple(groups),
        found_tokens=_found(page).get(tier, 0),
        used_bytes=sum(count * sizes[group] for group, count in used.items()) if used.keys() <= sizes.keys() else None,
        stored_bytes=_sum(page.by("group", "wicore_tier_spilled_bytes_total", tier=tier)),
        loaded_bytes=_sum(page.by("group", "wicore_tier_loaded_bytes_total", tier=tier)),
        store_bytes_per_second=page.value("wicore_tier_bytes_per_second", tier=tier, operation="spill"),
        load_bytes_per_second=page.value("wicore_tier_bytes_per_second", tier=tier, operation="restore"),
        load_latency_s=page.value("wicore_tier_latency_seconds", tier=tier, operation="restore"),
        used_disk_bytes=page.count("wicore_tier_disk_bytes_used", tier=tier),
        disk_bytes=page.count("wicore_tier_disk_bytes", tier=tier),
        errors={
            _TROUBLES.get(kind, kind): count
            for kind, count in page.by("kind", "wicore_tier_troubles_total", tier=tier).items()
            if count
        },
    )


def _found(page: _Page) -> dict[str, int]:
    """Prompt tokens by the fastest tier that had them: the device those that no other one counts."""
    lower = page.by("tier", "wicore_tier_hit_tokens_total")
    return {"device": max(0, page.total("wicore_prefix_hit_tokens_total") - sum(lower.values())), **lower}


def _sum(values: Mapping[str, int]) -> int | None:
    return sum(values.values()) if values else None


def _reasons(page: _Page, tiers: Iterable[TierUsage]) -> tuple[MissReason, ...]:
    missed = page.total("wicore_prefix_missed_tokens_total")
    window = min(missed, page.total("wicore_prefix_window_missing_tokens_total"))
    declined = page.total("wicore_restores_declined_total")
    no_room = min(declined, page.total("wicore_restores_without_room_total"))
    unrestored: dict[str, int] = {}
    for tier in tiers:
        for group in tier.groups:
            labels = {"tier": tier.tier, "group": group.group, "operation": "restore"}
            for why, count in page.by("reason", "wicore_tier_unmoved_blocks_total", **labels).items():
                unrestored[why] = unrestored.get(why, 0) + count
    reasons = [
        MissReason("never computed, or given up by every tier", missed - window, "tokens"),
        MissReason("cached, but without the sliding window before them", window, "tokens"),
        MissReason("on disk, but computing was faster", declined - no_room, "times"),
        MissReason("on disk, but there was no room for them in host memory", no_room, "times"),
        *(
            MissReason(f"on disk, but {_NOT_RESTORED.get(why, why)}", count, "blocks")
            for why, count in unrestored.items()
        ),
    ]
    units = ("tokens", "times", "blocks")
    return tuple(sorted((r for r in reasons if r.count), key=lambda r: (units.index(r.unit), -r.count)))
