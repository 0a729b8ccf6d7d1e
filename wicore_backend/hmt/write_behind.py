"""What of the device's cache is copied to host memory while the engine is idle, on its way to the disk. Books only."""

from __future__ import annotations

from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.transfers import Route, Transfer

_BYTES_AT_ONCE = 32 << 20
"""Of each group, that are copied before the disk has its turn: the step of a request that comes waits for no more."""


def copies_down(blocks: BlockManager) -> list[Transfer]:
    """The next few copies of cached blocks that are on the device alone, of the latest prompts, from their roots on.

    The device keeps what is copied. Half of the free slots of host memory stay free, for what the device gives up when
    work comes; so each call copies less as host memory fills, and the disk makes room between calls.
    """
    lower = blocks.lower
    copies: list[Transfer] = []
    if lower is None or not lower.may_write_behind:
        return copies
    room = {
        group: min(max(1, _BYTES_AT_ONCE // blocks.layout.block_bytes(group)), lower.host.free(group) // 2)
        for group in blocks.pools
    }
    while lower.latest:
        for name in lower.latest[-1]:
            for group, pool in blocks.pools.items():
                block = pool.find(name)
                if block is None or lower.reachable(group, name):
                    continue
                if not room[group]:
                    return copies
                room[group] -= 1
                slot = lower.host.spill(group, name)
                if slot is not None:
                    copies.append(Transfer(Route.DEVICE_TO_HOST, group, block, slot))
        lower.latest.pop()
    return copies
