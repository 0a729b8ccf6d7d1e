"""A CacheReport for people, on 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wicore_client.cache import TIERS, CacheReport, GroupUsage, TierUsage
from wicore_client.terminal import one_line

_BLOCKS = ("blocks", "of", "full", "stored", "loaded", "evicted", "refused", "behind")
_BLOCK_WIDTHS = (8, 8, 6, 8, 8, 8, 8, 8)
_BYTES = ("size", "on disk", "stored", "loaded", "store speed", "load speed", "delay")
_BYTE_WIDTHS = (9, 10, 11, 11, 12, 12, 8)
_TIMES = ("us", "ms", "s")
_TIER_WIDTH, _GROUP_WIDTH = 8, 8
_NARROW_TIER_WIDTH = 6


def lines(report: CacheReport, *, seconds: float | None, every_tier: bool) -> Iterator[str]:
    """The report, line by line.

    Parameters
    ----------
    seconds
        If it is of the time between two looks, how long that was: then bytes that moved are given per second.
    every_tier
        Name also the tiers that the server does not have, with what would give it one.
    """
    yield from _tokens(report)
    if report.bounded_tokens is not None:
        fates = ", ".join(f"{_count(count)} {one_line(fate)}" for fate, count in report.bounded_blocks.items())
        yield f"LOSSY: an answer keeps {_count(report.bounded_tokens)} tokens (kv_budget_tokens)"
        yield f"of the blocks of answers: {fates}"
    yield ""
    yield f"{'tier':{_TIER_WIDTH}}{'group':{_GROUP_WIDTH}}{_cells(_BLOCKS, _BLOCK_WIDTHS)}"
    for tier in report.tiers:
        for number, group in enumerate(tier.groups):
            name = "" if number else tier.tier
            yield f"{name:{_TIER_WIDTH}}{one_line(group.group):{_GROUP_WIDTH}}{_cells(_of(group), _BLOCK_WIDTHS)}"
    if every_tier:
        there = {tier.tier for tier in report.tiers}
        for name, setting in TIERS.items():
            if name not in there:
                yield f"{name:{_TIER_WIDTH}}none; {setting} gives the server one"
    yield ""
    yield f"{'tier':{_NARROW_TIER_WIDTH}}{_cells(_BYTES, _BYTE_WIDTHS)}"
    for tier in report.tiers:
        yield f"{tier.tier:{_NARROW_TIER_WIDTH}}{_cells(_bytes_of(tier, seconds), _BYTE_WIDTHS)}"
    if report.reasons:
        yield ""
        yield "why prompts missed"
        for reason in report.reasons:
            yield f"{_count(reason.count):>9} {reason.unit:6}  {one_line(reason.reason)}"
    errors = [(tier.tier, text, count) for tier in report.tiers for text, count in tier.errors.items()]
    if errors:
        yield ""
        yield "errors, of which the server's log has the first of each kind"
    for name, text, count in errors:
        yield f"{_count(count):>9} times   {one_line(f'{name}: {text}')}"


def _tokens(report: CacheReport) -> Iterator[str]:
    prompts = report.found_tokens + report.missed_tokens
    share = f" ({_percent(report.found_tokens, prompts)})" if prompts else ""
    yield f"{_count(prompts)} prompt tokens, {_count(report.found_tokens)}{share} of them found in the cache"
    if report.found_tokens and report.tiers:
        yield f"by tier: {', '.join(f'{tier.tier} {_count(tier.found_tokens)}' for tier in report.tiers)}"
    if report.restores:
        times = "once" if report.restores == 1 else f"{_count(report.restores)} times"
        yield f"{_count(report.restored_tokens)} of these by prompts that waited for the disk, {times}"


def _of(group: GroupUsage) -> list[str]:
    full = "" if group.used is None or not group.capacity else _percent(group.used, group.capacity)
    moved = (group.stored, group.loaded, group.evicted, group.refused, group.written_behind)
    return [_or_blank(group.used), _or_blank(group.capacity), full, *map(_or_blank, moved)]


def _bytes_of(tier: TierUsage, seconds: float | None) -> list[str]:
    moved = [
        "" if size is None else _size(size) if seconds is None else _speed(size / seconds)
        for size in (tier.stored_bytes, tier.loaded_bytes)
    ]
    speeds = ["" if s is None else _speed(s) for s in (tier.store_bytes_per_second, tier.load_bytes_per_second)]
    # 0 is what the server says as long as it cannot tell delay and speed apart.
    delay = "" if not tier.load_latency_s else _scaled(1e6 * tier.load_latency_s, 1000.0, _TIMES, " ")
    sizes = ["" if size is None else _size(size) for size in (tier.used_bytes, tier.used_disk_bytes)]
    return [*sizes, *moved, *speeds, delay]


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    """Each text at the right of its column; one that is too long for it still stands apart."""
    return "".join(f" {text:>{width - 1}}" for text, width in zip(texts, widths, strict=True)).rstrip()


def _or_blank(count: int | None) -> str:
    return "" if count is None else _count(count)


def _count(number: float) -> str:
    """At most 7 characters, unless it is absurd."""
    if number < 999_999.5:
        return f"{number:,.0f}"
    return _scaled(number, 1000.0, ("", "k", "M", "G", "T", "P"), "")


def _size(size: float) -> str:
    return _scaled(size, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def _speed(bytes_per_second: float) -> str:
    return f"{_size(bytes_per_second)}/s"


def _scaled(number: float, step: float, units: Sequence[str], gap: str) -> str:
    power = 0
    while number >= step * 0.9995 and power < len(units) - 1:
        number /= step
        power += 1
    if number >= 1e4:
        return f"{number:.0e}{gap}{units[power]}"
    return f"{number:.{0 if power == 0 or number >= 99.95 else 1}f}{gap}{units[power]}"


def _percent(part: float, whole: float) -> str:
    """Rounded, but 0% and 100% mean none and all."""
    share = 100 * part / whole
    if 0 < share < 1:
        return "<1%"
    if 99 < share < 100:
        return ">99%"
    return f"{share:.0f}%"
