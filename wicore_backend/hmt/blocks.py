"""Books of the KV blocks: which block belongs to which sequence. No tensors, no clock, no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.layout import KVLayout, LayerGroup


class BlockAccountingError(AssertionError):
    """The books contradict themselves: a bug here or in a caller, never a user's fault."""


class BlockPool:
    """Blocks of one layer group.

    Block 0 belongs to nobody (unused table entries point at it). Every other block is in exactly one state:
    *free*, on the free list, its bytes meaningless; or *active*, in the table of exactly one open sequence.
    A *reservation* is a promise about free blocks, not a state: a sequence reserves at admission the most blocks it
    can ever hold at once, so that taking a block within the reservation never fails in the middle of an answer.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._reserved = 0

    @property
    def capacity(self) -> int:
        """Blocks that sequences can use."""
        return self.num_blocks - 1

    @property
    def used(self) -> int:
        """Active blocks."""
        return self.capacity - len(self._free)

    @property
    def unreserved(self) -> int:
        """Blocks that nobody holds or has been promised."""
        return self.capacity - self._reserved

    def reserve(self, count: int) -> None:
        """Promise `count` blocks; the caller has seen that `unreserved` allows it."""
        if count > self.unreserved:
            raise BlockAccountingError(f"{count} blocks reserved where {self.unreserved} were left")
        self._reserved += count

    def unreserve(self, count: int) -> None:
        """Give a promise back; its blocks must have been released before."""
        self._reserved -= count

    def take(self) -> int:
        """A free block, now active; within a reservation there always is one."""
        if not self._free:
            raise BlockAccountingError("a block was taken beyond what had been reserved")
        return self._free.pop()

    def release(self, block: int) -> None:
        """Make an active block free."""
        self._free.append(block)

    def check_integrity(self, active: list[int], reserved: int) -> None:
        """Raise BlockAccountingError unless `active` and the free list are a partition of the pool."""
        if sorted([*self._free, *active]) != list(range(1, self.num_blocks)):
            raise BlockAccountingError(
                f"{len(self._free)} free and {len(active)} active blocks do not partition {self.capacity}"
            )
        if reserved != self._reserved or len(active) > reserved:
            raise BlockAccountingError(
                f"{len(active)} active, {reserved} reserved by sequences, {self._reserved} in the books"
            )


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """The blocks of one open sequence.

    Attributes
    ----------
    tables
        For each group int32 [N]: entry n is the physical block of positions n * block_size onwards, or 0 where the
        sequence has none (not reached yet, or behind the local window).
    reserved
        Blocks promised to the sequence, those it holds included.
    live
        For each group the half-open range of table entries that hold a block.
    """

    tables: dict[LayerGroup, NDArray[np.int32]]
    reserved: dict[LayerGroup, int]
    live: dict[LayerGroup, tuple[int, int]]


class BlockManager:
    """Gives sequences their blocks, in every layer group of the model at once.

    A sequence is opened with the longest it may become, extended before each step up to the tokens that the step
    writes, and closed once. In the local group `extend` first releases the blocks that no later token can see.
    """

    def __init__(self, layout: KVLayout, num_blocks: Mapping[LayerGroup, int], *, max_chunk: int) -> None:
        self._layout = layout
        self._max_chunk = max_chunk
        self._open: set[SequenceBlocks] = set()
        self.pools = {group: BlockPool(num_blocks[group]) for group in layout.groups}

    def need(self, max_tokens: int) -> dict[LayerGroup, int]:
        """The most blocks that a sequence of up to `max_tokens` tokens holds at once, for each group."""
        return {group: self._layout.blocks_held(group, max_tokens, self._max_chunk) for group in self.pools}

    def fits(self, max_tokens: int) -> bool:
        """Whether a sequence of up to `max_tokens` tokens can be opened now."""
        return all(count <= self.pools[group].unreserved for group, count in self.need(max_tokens).items())

    def open(self, max_tokens: int) -> SequenceBlocks:
        """Open a sequence that will hold up to `max_tokens` tokens; `fits` must be true."""
        need = self.need(max_tokens)
        for group, count in need.items():
            self.pools[group].reserve(count)
        width = -(-max_tokens // self._layout.block_size)
        blocks = SequenceBlocks(
            tables={group: np.zeros(width, np.int32) for group in self.pools},
            reserved=need,
            live=dict.fromkeys(self.pools, (0, 0)),
        )
        self._open.add(blocks)
        return blocks

    def extend(self, blocks: SequenceBlocks, start: int, end: int) -> None:
        """Place positions `start` to `end` - 1, which the next step computes, everything before being computed."""
        size = self._layout.block_size
        for group, pool in self.pools.items():
            table = blocks.tables[group]
            first, stop = blocks.live[group]
            if group is LayerGroup.LOCAL:
                # The step's first token sees positions > start - window, and later tokens see none before that.
                oldest = max(0, start - self._layout.window + 1) // size
                for index in range(first, min(oldest, stop)):
                    pool.release(int(table[index]))
                    table[index] = 0
                first = max(first, oldest)
            needed = -(-end // size)
            for index in range(max(stop, first), needed):
                table[index] = pool.take()
            blocks.live[group] = (first, max(stop, needed))

    def close(self, blocks: SequenceBlocks) -> None:
        """Release everything the sequence holds or was promised."""
        self._open.remove(blocks)
        for group, pool in self.pools.items():
            first, stop = blocks.live[group]
            for block in blocks.tables[group][first:stop]:
                pool.release(int(block))
            pool.unreserve(blocks.reserved[group])

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless every block is free or in exactly one open sequence's table."""
        for group, pool in self.pools.items():
            active: list[int] = []
            for blocks in self._open:
                first, stop = blocks.live[group]
                if np.any(blocks.tables[group][:first]) or np.any(blocks.tables[group][stop:]):
                    raise BlockAccountingError(f"a {group} table has blocks outside its live range {first}:{stop}")
                held = blocks.tables[group][first:stop].tolist()
                if len(held) > blocks.reserved[group]:
                    raise BlockAccountingError(
                        f"a sequence holds {len(held)} {group} blocks, {blocks.reserved[group]} were reserved"
                    )
                active += held
            pool.check_integrity(active, sum(blocks.reserved[group] for blocks in self._open))
