"""How many blocks each layer group gets out of a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.layout import KVLayout, LayerGroup


def divide_memory(
    layout: KVLayout, *, memory_bytes: int, max_sequences: int, max_tokens: int, max_chunk: int
) -> Mapping[LayerGroup, int]:
    """Blocks for each group, block 0 included.

    The local group needs a fixed number of blocks a sequence and gets enough for `max_sequences`, though never more
    than half of the memory; the rest goes to the global group, up to what `max_sequences` of `max_tokens` could use.

    Raises
    ------
    InvalidArgumentError
        If not even one sequence of `max_tokens` fits.
    """
    least = {group: layout.blocks_held(group, max_tokens, max_chunk) for group in layout.groups}
    size = {group: layout.block_bytes(group) for group in layout.groups}
    least_bytes = sum((least[group] + 1) * size[group] for group in layout.groups)
    if least_bytes > memory_bytes:
        raise InvalidArgumentError(
            f"kv_cache_bytes is {memory_bytes:,}, but one sequence of max_model_len = {max_tokens:,} tokens takes "
            f"{least_bytes:,}; give the KV cache more memory or lower max_model_len"
        )
    spare = memory_bytes - least_bytes
    counts = {group: 1 + least.get(group, 0) for group in LayerGroup}
    for group in (LayerGroup.LOCAL, LayerGroup.GLOBAL):
        if group in size:
            share = spare // 2 if group is LayerGroup.LOCAL and LayerGroup.GLOBAL in size else spare
            more = min(share // size[group], (max_sequences - 1) * least[group])
            counts[group] += more
            spare -= more * size[group]
    return counts


def divide_host_memory(
    device_blocks: Mapping[LayerGroup, int], slot_bytes: Mapping[LayerGroup, int], memory_bytes: int
) -> Mapping[LayerGroup, int]:
    """Slots of the host tier for each group, in the ratio of the device's blocks, in up to `memory_bytes`.

    Parameters
    ----------
    slot_bytes
        Of a slot of each group that has layers: a block as the host tier's codec writes it.
    """
    device_bytes = sum(device_blocks[group] * size for group, size in slot_bytes.items())
    return {group: int(device_blocks[group] * memory_bytes / device_bytes) for group in slot_bytes}
