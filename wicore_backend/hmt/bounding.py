"""Has decoding sequences keep what a budget allows; `hmt/bounded_kv.py` says what that means. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.attention_mass import Mask
from wicore_backend.hmt.block_pool import BlockPool
from wicore_backend.hmt.bounded_kv import BoundCounts, KVBudget
from wicore_backend.hmt.exchange import Exchange
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.prefixes import Prefixes
from wicore_backend.hmt.sequence_blocks import SequenceBlocks

_GROUP = LayerGroup.GLOBAL


class Bounding:
    """Lets global blocks leave a sequence's table, and come back.

    Parameters
    ----------
    pool
        Of the global group.
    """

    def __init__(self, pool: BlockPool, prefixes: Prefixes, exchange: Exchange) -> None:
        self.counts = BoundCounts()
        self._pool = pool
        self._prefixes = prefixes
        self._exchange = exchange

    def bound(self, blocks: SequenceBlocks, count: int, budget: KVBudget) -> None:
        """Have a sequence that decodes into its block `count` - 1 keep what the budget allows of its `count` blocks.

        There is to be one available block at least, for the one that is written next.
        """
        assert blocks.mass is not None, "a budget came while the sequence was open"
        table = blocks.tables[_GROUP]
        if blocks.lost is None:
            blocks.lost = np.zeros(len(table), np.bool_)
        lost = blocks.lost[:count]
        held = table[:count] != 0
        held[-1] = True  # Taken already, or to be taken next.
        chain: Sequence[bytes] = () if blocks.names is None else blocks.names.first(blocks.full)
        while True:  # Each time around, blocks are found to be lost for ever.
            keep = budget.choose(blocks.mass, held, lost)
            back = np.flatnonzero(keep & ~held).tolist()
            gone = [index for index in back if not self._prefixes.keeps(_GROUP, chain[index])]
            if not gone:
                break
            self._lose(lost, gone)
        leaving = np.flatnonzero(held & ~keep)
        self._lose(lost, leaving[leaving >= len(chain[: blocks.full])])
        self._pool.release(table[leaving][::-1].tolist())
        table[leaving] = 0
        # What left may be in use by others; and the block that is written next has to be had, too.
        back = back[: max(0, self._pool.available - 1)]
        missing = self._exchange.take_up(_GROUP, self._pool, table, chain, back)
        self._exchange.load(_GROUP, self._pool, table, chain, missing)
        blocks.holes = int(np.count_nonzero(table[: blocks.stop] == 0))
        blocks.expected[_GROUP] = min(blocks.expected[_GROUP], budget.blocks)
        self.counts.left += len(leaving)
        self.counts.returned += len(back)

    def _lose(self, lost: Mask, indices: Sequence[int] | NDArray[np.int64]) -> None:
        lost[indices] = True
        self.counts.lost += len(indices)
