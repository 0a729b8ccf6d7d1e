"""Books of the KV blocks: which block holds which tokens of which sequence, and what can be found again.

A sequence is opened on what is kept of its prefix, extended before each step up to the tokens that the step writes,
noted after each step, and closed once. In the local group, blocks that no later token can see are released on the way.

What is kept for later sequences, under the names of `hmt/names.py`:

- Every full block of the global group, from the step that completed it on.
- Of the local group the *window end* at each resume point, as one object: the blocks that the tokens after it see.
  Resume points are the end of a prompt, the end of what a sequence computed, and any place at which a later sequence
  was found to branch off without a window to go on from.

A sequence can go on at a block's end where all global blocks before it and the window end at it are kept.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.block_pool import BlockAccountingError, BlockPool
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.names import BlockNames

__all__ = ["BlockAccountingError", "BlockCopy", "BlockManager", "PrefixMatch", "SequenceBlocks"]


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What is kept of a sequence's prefix, counted in blocks.

    Attributes
    ----------
    resume
        Where the sequence can go on.
    known
        How far the global group reaches. Beyond `resume`, only the window is missing.
    """

    resume: int = 0
    known: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block whose bytes go to another one of the same group."""

    group: LayerGroup
    source: int
    target: int


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """The blocks of one open sequence.

    Attributes
    ----------
    names
        None if nothing of the sequence is to be kept.
    tables
        For each group int32 [N]: entry n is the physical block of positions n * block_size onwards, or 0 where the
        sequence has none (not reached yet, or behind the local window).
    first
        For each group the first table entry that holds a block.
    stop
        Table entries in use, the same in all groups.
    full
        How many of them have been completed, and named.
    expected
        For each group the blocks that the sequence is likely to hold at once, as it grows.
    resume_points
        Block counts at which a window end is to be kept, in order.
    """

    names: BlockNames | None
    tables: dict[LayerGroup, NDArray[np.int32]]
    first: dict[LayerGroup, int]
    stop: int
    full: int
    expected: dict[LayerGroup, int]
    resume_points: list[int] = field(default_factory=list)

    def held(self, group: LayerGroup) -> int:
        return self.stop - self.first[group]

    def missing(self, group: LayerGroup) -> int:
        """Blocks that the sequence is likely to take on top of those that it holds."""
        return max(0, self.expected[group] - self.held(group))


class BlockManager:
    """Gives sequences their blocks, in every layer group of the model at once. See the module's docstring.

    Parameters
    ----------
    max_chunk
        Tokens that a step computes at most, of all sequences together.
    """

    def __init__(self, layout: KVLayout, num_blocks: Mapping[LayerGroup, int], *, max_chunk: int) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self.pools = {group: BlockPool(num_blocks[group]) for group in layout.groups}
        self._max_chunk = max_chunk
        self._open: set[SequenceBlocks] = set()
        self._missing = dict.fromkeys(self.pools, 0)

    # What is kept.

    def match(self, names: BlockNames, limit: int) -> PrefixMatch:
        """How much of the first `limit` blocks is kept. Changes nothing; holds until the next change of the books."""
        chain = names.first(limit)
        known = limit
        if LayerGroup.GLOBAL in self.pools:
            find = self.pools[LayerGroup.GLOBAL].find
            known = next((n for n in range(limit) if find(chain[n]) is None), limit)
        resume = known
        if LayerGroup.LOCAL in self.pools:
            find = self.pools[LayerGroup.LOCAL].find
            kept = (n for n in range(known, 0, -1) if find(chain[n - 1]) is not None)
            resume = next((n for n in kept if names.resumable(n) == n), 0)
        resume = names.resumable(resume)
        return PrefixMatch(resume, known if LayerGroup.GLOBAL in self.pools else resume)

    def room_for(
        self, names: BlockNames | None, match: PrefixMatch, *, tokens: int, expected_tokens: int
    ) -> Mapping[LayerGroup, int]:
        """For each group, how many blocks would be left if a sequence were opened now and all went as expected.

        Parameters
        ----------
        tokens
            Those that it has now; it is to have `expected_tokens` in the end.
        """
        left = {}
        for group, pool in self.pools.items():
            shared = sum(pool.is_active(block) for block in self._kept(names, match.resume, group))
            spare = pool.available - self._missing[group] + shared
            if group is LayerGroup.LOCAL:  # A chunk of a prompt holds more than its window, while it is computed.
                spare -= self.layout.blocks_for(self._max_chunk)
            left[group] = spare - self._expected(group, max(tokens, expected_tokens))
        return left

    def _kept(self, names: BlockNames | None, count: int, group: LayerGroup) -> Sequence[int]:
        """The kept blocks of the group on which a sequence goes on after `count` blocks."""
        if names is None or not count:
            return ()
        chain, pool = names.first(count), self.pools[group]
        runs = [pool.find(name) for name in (chain[:count] if group is LayerGroup.GLOBAL else chain[count - 1 : count])]
        return [block for run in runs if run is not None for block in run.blocks]

    def _expected(self, group: LayerGroup, tokens: int) -> int:
        blocks = self.layout.blocks_for(tokens)
        return blocks if group is LayerGroup.GLOBAL else min(blocks, self.layout.blocks_for(self.layout.window) + 2)

    # The life of a sequence.

    def open(
        self, names: BlockNames | None, match: PrefixMatch, *, max_tokens: int, expected_tokens: int
    ) -> SequenceBlocks:
        """Open a sequence that has `match.resume` blocks already; `match` must be of now.

        Parameters
        ----------
        max_tokens
            The longest that the sequence can become.
        expected_tokens
            How long it is likely to become.
        """
        blocks = SequenceBlocks(
            names=names,
            tables={group: np.zeros(self.layout.blocks_for(max_tokens), np.int32) for group in self.pools},
            first=dict.fromkeys(self.pools, 0),
            stop=match.resume,
            full=match.resume,
            expected={group: self._expected(group, expected_tokens) for group in self.pools},
        )
        for group, pool in self.pools.items():
            kept = self._kept(names, match.resume, group)
            blocks.first[group] = match.resume - len(kept)
            blocks.tables[group][match.resume - len(kept) : match.resume] = kept
            for block in kept:
                pool.use(block)
        if match.known > match.resume:
            self.keep_window(blocks, match.known)
        self._open.add(blocks)
        self._count_missing(blocks, 1)
        return blocks

    def keep_window(self, blocks: SequenceBlocks, count: int) -> None:
        """Let later sequences go on after the sequence's first `count` blocks, once it has computed them."""
        if blocks.names is None:
            return
        count = blocks.names.resumable(count)
        if count > blocks.full and count not in blocks.resume_points:
            insort(blocks.resume_points, count)

    def extend(self, blocks: SequenceBlocks, start: int, end: int) -> bool:
        """Place positions `start` to `end` - 1, which the next step computes, everything before being computed.

        False, and nothing has changed but that blocks behind the window are released, if there is no room.
        """
        needed = self.layout.blocks_for(end)
        if needed <= blocks.stop:
            return True
        self._count_missing(blocks, -1)
        self._release_behind(blocks, start)
        fits = all(needed - blocks.stop <= pool.available for pool in self.pools.values())
        if fits:
            for group, pool in self.pools.items():
                table = blocks.tables[group]
                for index in range(blocks.stop, needed):
                    table[index] = pool.take()
            blocks.stop = needed
        self._count_missing(blocks, 1)
        return fits

    def note(self, blocks: SequenceBlocks, computed: int) -> None:
        """The first `computed` tokens have their keys now: blocks completed by that can be found from now on."""
        full = computed // self.block_size
        if full == blocks.full or blocks.names is None:
            return
        chain = blocks.names.first(full)
        if LayerGroup.GLOBAL in self.pools:
            pool, table = self.pools[LayerGroup.GLOBAL], blocks.tables[LayerGroup.GLOBAL]
            for index in range(blocks.full, full):
                pool.keep(chain[index], (int(table[index]),))
        blocks.full = full
        while blocks.resume_points and blocks.resume_points[0] <= full:
            self._keep_window_end(blocks, blocks.resume_points.pop(0))

    def fork(
        self,
        blocks: SequenceBlocks,
        names: BlockNames | None,
        *,
        computed: int,
        max_tokens: int,
        expected_tokens: int,
    ) -> tuple[SequenceBlocks, list[BlockCopy]] | None:
        """A second sequence, with `names`, that goes on from the first one's `computed` tokens; None for lack of room.

        The two share all full blocks. The last one, if it is partly filled, the new sequence gets a copy of: the
        caller makes the copies before the next step.
        """
        full = computed // self.block_size
        partial = computed % self.block_size > 0
        if partial and not all(pool.available for pool in self.pools.values()):
            return None
        copy = SequenceBlocks(
            names=names,
            tables={group: np.zeros(self.layout.blocks_for(max_tokens), np.int32) for group in self.pools},
            first=dict(blocks.first),
            stop=full + partial,
            full=full,
            expected={group: self._expected(group, expected_tokens) for group in self.pools},
        )
        copies = []
        for group, pool in self.pools.items():
            first = blocks.first[group]
            shared = blocks.tables[group][first:full]
            copy.tables[group][first:full] = shared
            for block in shared.tolist():
                pool.use(block)
            if partial:
                target = copy.tables[group][full] = pool.take()
                copies.append(BlockCopy(group, int(blocks.tables[group][full]), int(target)))
        self._open.add(copy)
        self._count_missing(copy, 1)
        return copy, copies

    def close(self, blocks: SequenceBlocks) -> None:
        """Release everything the sequence holds. What it computed stays findable as long as there is room."""
        if blocks.names is not None and blocks.full:
            self._keep_window_end(blocks, blocks.full)
        self._open.remove(blocks)
        self._count_missing(blocks, -1)
        for group, pool in self.pools.items():
            # From the end: what is deeper in the prefix is of less use to others and recycled earlier.
            for block in blocks.tables[group][blocks.first[group] : blocks.stop][::-1].tolist():
                pool.release(block)

    def forget_all(self) -> None:
        """Keep nothing of what was computed, as if the cache were new."""
        for pool in self.pools.values():
            pool.drop_all()

    def _release_behind(self, blocks: SequenceBlocks, start: int) -> None:
        """Release local blocks that neither the token at `start` sees, nor one after the full block before it."""
        if LayerGroup.LOCAL not in self.pools:
            return
        size = self.block_size
        oldest = max(0, start // size * size - self.layout.window + 1) // size
        table, pool = blocks.tables[LayerGroup.LOCAL], self.pools[LayerGroup.LOCAL]
        first = blocks.first[LayerGroup.LOCAL]
        for index in range(first, min(oldest, blocks.stop)):
            pool.release(int(table[index]))
            table[index] = 0
        blocks.first[LayerGroup.LOCAL] = min(max(first, oldest), blocks.stop)

    def _keep_window_end(self, blocks: SequenceBlocks, count: int) -> None:
        if LayerGroup.LOCAL not in self.pools or blocks.names is None:
            return
        oldest = max(0, count * self.block_size - self.layout.window + 1) // self.block_size
        if oldest < blocks.first[LayerGroup.LOCAL]:
            return
        pool, name = self.pools[LayerGroup.LOCAL], blocks.names.first(count)[count - 1]
        if not pool.keep(name, blocks.tables[LayerGroup.LOCAL][oldest:count].tolist()):
            run = pool.find(name)
            assert run is not None
            pool.touch(run)

    def _count_missing(self, blocks: SequenceBlocks, sign: int) -> None:
        for group in self.pools:
            self._missing[group] += sign * blocks.missing(group)

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless the books of all pools follow from the open sequences."""
        for group, pool in self.pools.items():
            in_tables: list[int] = []
            for blocks in self._open:
                first, table = blocks.first[group], blocks.tables[group]
                if np.any(table[:first]) or np.any(table[blocks.stop :]):
                    raise BlockAccountingError(f"a {group} table has blocks outside {first}:{blocks.stop}")
                in_tables += table[first : blocks.stop].tolist()
            pool.check_integrity(in_tables)
            if self._missing[group] != sum(blocks.missing(group) for blocks in self._open):
                raise BlockAccountingError(f"{self._missing[group]} {group} blocks are counted as missing")
