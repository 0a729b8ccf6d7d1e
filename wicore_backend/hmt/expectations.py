"""How many blocks the open sequences are likely to take on top of those that they hold, and what that leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from wicore_backend.hmt.block_pool import BlockAccountingError, BlockPool
from wicore_backend.hmt.bounded_kv import KVBudget
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.sequence_blocks import SequenceBlocks


class Expectations:
    """A sum over the open sequences, kept as they grow: for each group what they are likely to take.

    Whoever changes what a sequence holds or expects says so here.

    Attributes
    ----------
    budget
        What a decoding sequence may keep of the global group; None is everything. May be changed while no sequence is
        open.
    """

    def __init__(
        self,
        layout: KVLayout,
        pools: Mapping[LayerGroup, BlockPool],
        *,
        max_chunk: int,
        budget: KVBudget | None,
    ) -> None:
        self.budget = budget
        self._layout = layout
        self._pools = tuple(pools.items())
        self._missing = dict.fromkeys(pools, 0)
        self._window_blocks = layout.blocks_for(layout.window) + 2  # that a decode is likely to hold at most
        self._max_chunk_blocks = layout.blocks_for(max_chunk)

    def of(self, group: LayerGroup, *, tokens: int, expected_tokens: int) -> int:
        """The most blocks that a sequence is likely to hold that has `tokens` to compute before its next decode."""
        blocks = self._layout.blocks_for(max(tokens, expected_tokens))
        if group is LayerGroup.LOCAL:
            return min(blocks, self._window_blocks)
        if self.budget is None:
            return blocks
        return max(self._layout.blocks_for(tokens), min(blocks, self.budget.blocks))

    def visible(self, tokens: int) -> int:
        """Keys that a decode of a sequence of so many tokens sees in the global group."""
        return tokens if self.budget is None else min(tokens, self.budget.blocks * self._layout.block_size)

    @property
    def spare(self) -> int:
        """Blocks of each group that are left if all that are open grow as expected; negative if there are too few."""
        return min(pool.available - self._missing[group] for group, pool in self._pools)

    def left(self, group: LayerGroup, pool: BlockPool, shared: Sequence[bytes], expected: int) -> int:
        """How many blocks of a group would be left if one more sequence that takes `expected` were opened now.

        Parameters
        ----------
        shared
            Names of what it would go on from: blocks that others use already, it does not take.
        """
        kept = (pool.find(name) for name in shared)
        left = pool.available - self._missing[group] - expected
        left += sum(block is not None and pool.is_active(block) for block in kept)
        if group is LayerGroup.LOCAL:  # A chunk of a prompt holds more than its window, while it is computed.
            left -= self._max_chunk_blocks
        return left

    # What changes.

    def opened(self, blocks: SequenceBlocks) -> None:
        """A sequence has been opened."""
        for group, _ in self._pools:
            self._missing[group] += blocks.missing(group)

    def closed(self, blocks: SequenceBlocks) -> None:
        """It is to be closed, and has not changed yet."""
        for group, _ in self._pools:
            self._missing[group] -= blocks.missing(group)

    def taken(self, group: LayerGroup, count: int) -> None:
        """Sequences get `count` blocks that they were expected to take."""
        self._missing[group] -= count

    def changed(self, blocks: SequenceBlocks, group: LayerGroup, *, before: int) -> None:
        """A sequence that missed so many blocks holds, or expects, others."""
        self._missing[group] += blocks.missing(group) - before

    def check_integrity(self, opened: Iterable[SequenceBlocks]) -> None:
        """Raise BlockAccountingError unless the sums are those over the sequences that are open."""
        opened = tuple(opened)
        for group, missing in self._missing.items():
            if missing != sum(blocks.missing(group) for blocks in opened):
                raise BlockAccountingError(f"{missing} {group} blocks are counted as missing")
