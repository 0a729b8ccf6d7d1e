"""KV blocks on the device, and those that bounded answers gave up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from wicore_backend.engine.statistics import BlockUsage
from wicore_backend.triton.series.family import Family, Kind, labelled, one


def _by_group(kind: Kind, name: str, description: str, read: Callable[[BlockUsage], float]) -> Family:
    return labelled(
        kind, name, description, "group", lambda s: {group: read(usage) for group, usage in s.blocks.items()}
    )


FAMILIES = (
    _by_group("gauge", "wicore_kv_blocks_used", "KV blocks that requests hold, by layer group", lambda b: b.active),
    _by_group(
        "gauge",
        "wicore_kv_blocks_cached",
        "KV blocks that nobody holds and the prefix cache keeps, by layer group",
        lambda b: b.cached,
    ),
    _by_group("gauge", "wicore_kv_blocks", "KV blocks that there are, by layer group", lambda b: b.capacity),
    _by_group(
        "counter",
        "wicore_kv_blocks_recycled_total",
        "Cached KV blocks given up for others, by layer group",
        lambda b: b.recycled,
    ),
    _by_group("gauge", "wicore_kv_block_bytes", "Bytes of a KV block, by layer group", lambda b: b.block_bytes),
    one(
        "gauge",
        "wicore_bounded_kv_tokens",
        "LOSSY: tokens that an answer keeps of its layers with unlimited attention; no series for exact answers",
        lambda s: None if s.bounded is None else s.bounded.tokens,
    ),
    labelled(
        "counter",
        "wicore_bounded_kv_blocks_total",
        "KV blocks that left answers for the sake of that bound, came back, or were lost to them, by fate",
        "fate",
        lambda s: {} if s.bounded is None else asdict(s.bounded.counts),
    ),
)
