"""Books of the KV blocks: which block holds which tokens of which sequence, and what can be found again.

A sequence is opened on what is kept of its prefix, extended before each step up to the tokens that the step writes,
noted when others may find what it has computed, and closed once. In the local group, blocks that no later token can see
are released on the way.

What is kept for later sequences, and how they find it, is in `hmt/prefixes.py`; what is expected of those that are
open, so that nobody is let in for whom there will be no room, in `hmt/expectations.py`; what moves between the device
and host memory, in `hmt/exchange.py`.

Where attention falls while a sequence is computed is kept with its blocks, and told to the host tier's policies when it
is closed. With a budget, which is lossy, it also says which global blocks a decoding sequence keeps: those that have
left are holes in its table (`hmt/bounding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from wicore_backend.hmt.attention_mass import AttentionMass
from wicore_backend.hmt.block_pool import BlockAccountingError, BlockPool, SingleBlockPool
from wicore_backend.hmt.bounded_kv import BoundCounts, KVBudget
from wicore_backend.hmt.bounding import Bounding
from wicore_backend.hmt.exchange import Exchange
from wicore_backend.hmt.expectations import Expectations
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.policy.base import Access, Policy
from wicore_backend.hmt.prefixes import Prefixes, PrefixMatch
from wicore_backend.hmt.sequence_blocks import SequenceBlocks
from wicore_backend.hmt.transfers import Transfer
from wicore_backend.hmt.window_pool import WindowPool

__all__ = ["BlockAccountingError", "BlockManager", "PrefixMatch", "SequenceBlocks"]


class BlockManager:
    """Gives sequences their blocks, in every layer group of the model at once. See the module's docstring.

    Parameters
    ----------
    max_chunk
        Tokens that a step computes at most, of all sequences together.
    lower
        The colder tiers, if there are any.
    budget
        What a decoding sequence may keep of the global group, which is lossy; None is everything. May be changed while
        no sequence is open.
    policy
        Makes from a capacity the policy that says which blocks, and which windows, the device tier gives up first. It
        is asked in `tend`; None gives up what has been unused longest.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: Mapping[LayerGroup, int],
        *,
        max_chunk: int,
        lower: LowerTiers | None = None,
        budget: KVBudget | None = None,
        policy: Callable[[int], Policy] | None = None,
    ) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self.lower = lower
        self._exchange = Exchange(None if lower is None else lower.host)
        kinds = {LayerGroup.GLOBAL: SingleBlockPool, LayerGroup.LOCAL: WindowPool}
        self.pools: dict[LayerGroup, BlockPool] = {
            group: kinds[group](
                num_blocks[group],
                self._exchange.spilling(group),
                None if policy is None else policy(max(1, (num_blocks[group] - 1) // self._blocks_together(group))),
            )
            for group in layout.groups
        }
        self._prefixes = Prefixes(layout, self.pools, lower)
        has_global = LayerGroup.GLOBAL in self.pools
        self._expectations = Expectations(
            layout, self.pools, max_chunk=max_chunk, budget=budget if has_global else None
        )
        self._bounding = Bounding(self.pools[LayerGroup.GLOBAL], self._prefixes, self._exchange) if has_global else None
        self._listening = policy is not None or lower is not None
        self._groups = tuple(self.pools.items())
        self._pools = tuple(self.pools.values())
        self._reach = layout.window - 1  # tokens before its own that a local layer's token sees
        self._max_chunk_blocks = layout.blocks_for(max_chunk)
        self._open: set[SequenceBlocks] = set()

    def _blocks_together(self, group: LayerGroup) -> int:
        """Of a group, that are given up together: of the local one, windows."""
        return self.layout.blocks_for(self.layout.window) if group is LayerGroup.LOCAL else 1

    def observe(self, access: Access, now: float) -> None:
        """A prompt has come, its blocks by their names; for the policies of all tiers."""
        for pool in self._pools:
            pool.victims.observe(access)
        if self.lower is not None:
            self.lower.observe(access, now)

    @property
    def listening(self) -> bool:
        """Whether there is a policy that wants to know of prompts, and of attention."""
        return self._listening

    def tend(self, now: float) -> None:
        """Have the device tier's policies set aside what the next step may give up; for when there is time."""
        for pool in self._pools:
            pool.tend(now, min(2 * self._max_chunk_blocks, pool.capacity // 4))

    def take_transfers(self) -> list[Transfer]:
        """The copies that have to be made now, in this order, before the next step is computed."""
        return self._exchange.take()

    # What is kept.

    def match(self, names: BlockNames, limit: int) -> PrefixMatch:
        """How much of the first `limit` blocks is kept, on the device or in host memory.

        Changes nothing; holds until the next change of the books.
        """
        return self._prefixes.match(names, limit)

    def startable(self, tokens: int) -> int:
        """How many blocks of so many tokens a sequence can start from: its last token has to be computed anyhow."""
        return (tokens - 1) // self.block_size

    def restorable(self, names: BlockNames, limit: int, match: PrefixMatch) -> tuple[int, list[Key]]:
        """Where a sequence could go on, past `match`, if blocks were brought up from the cold tier; and which ones."""
        return self._prefixes.restorable(names, limit, match)

    def keep_window(self, blocks: SequenceBlocks, count: int) -> None:
        """Let later sequences go on after the sequence's first `count` blocks, once it has computed them."""
        self._prefixes.keep_window(blocks, count)

    def note(self, blocks: SequenceBlocks, computed: int) -> None:
        """The first `computed` tokens have their keys now: blocks completed by that can be found from now on."""
        self._prefixes.note(blocks, computed)

    # What room there is.

    @property
    def budget(self) -> KVBudget | None:
        """What a decoding sequence may keep of the global group, which is lossy; None is everything."""
        return self._expectations.budget

    @budget.setter
    def budget(self, budget: KVBudget | None) -> None:
        self._expectations.budget = budget

    @property
    def spare(self) -> int:
        """Blocks of each group that are left if all that are open grow as expected; negative if there are too few."""
        return self._expectations.spare

    def visible(self, tokens: int) -> int:
        """Keys that a decode of a sequence of so many tokens sees in the global group."""
        return self._expectations.visible(tokens)

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
            shared: Sequence[bytes] = ()
            if names is not None and match.resume:
                shared = names.first(match.resume)[self._prefixes.span(group, match.resume).start : match.resume]
            expected = self._expectations.of(group, tokens=tokens, expected_tokens=expected_tokens)
            left[group] = self._expectations.left(group, pool, shared, expected)
        return left

    def give_up(self, count: int) -> int:
        """Have the device tier spill up to `count` blocks of each group that nobody uses; how many it was at most."""
        return max(pool.give_up(count) for pool in self.pools.values())

    # The life of a sequence.

    def open(
        self, names: BlockNames | None, match: PrefixMatch, *, max_tokens: int, expected_tokens: int, tokens: int = 0
    ) -> SequenceBlocks:
        """Open a sequence that has `match.resume` blocks already; `match` must be of now.

        Parameters
        ----------
        max_tokens
            The longest that the sequence can become.
        expected_tokens
            How long it is likely to become.
        tokens
            Those that it has now: all of them are computed before the first decode.
        """
        most = self.layout.blocks_for(max_tokens)
        blocks = SequenceBlocks(
            names=names,
            tables={group: np.zeros(most, np.int32) for group in self.pools},
            first=dict.fromkeys(self.pools, 0),
            stop=match.resume,
            full=match.resume,
            expected=self._expected(tokens, expected_tokens),
            mass=AttentionMass() if self._listening or self.budget is not None else None,
        )
        if names is not None and match.resume:
            self._take_over(blocks, names.first(match.resume), match.resume)
        if match.known > match.resume:
            self.keep_window(blocks, match.known)
        self._open.add(blocks)
        self._expectations.opened(blocks)
        return blocks

    def _expected(self, tokens: int, expected_tokens: int) -> dict[LayerGroup, int]:
        return {
            group: self._expectations.of(group, tokens=tokens, expected_tokens=expected_tokens) for group in self.pools
        }

    def _take_over(self, blocks: SequenceBlocks, chain: Sequence[bytes], count: int) -> None:
        """Put the kept prefix of `count` blocks into a sequence's tables, loading what is not on the device."""
        missing = {}
        for group, pool in self.pools.items():
            span = self._prefixes.span(group, count)
            blocks.first[group] = span.start
            missing[group] = self._exchange.take_up(group, pool, blocks.tables[group], chain, span)
        for group, pool in self.pools.items():
            self._exchange.load(group, pool, blocks.tables[group], chain, missing[group])
            if group is LayerGroup.LOCAL and missing[group]:
                self._prefixes.keep_window_end(blocks, count)

    def extend(self, blocks: SequenceBlocks, start: int, end: int) -> bool:
        """Place positions `start` to `end` - 1, which the next step computes, everything before being computed.

        False, and nothing has changed but that blocks behind the window are released, if there is no room.
        """
        stop, needed = blocks.stop, -(-end // self.block_size)
        if needed <= stop:
            return True
        self._release_behind(blocks, start)
        count = needed - stop
        for pool in self._pools:
            if count > pool.available:
                return False
        for group, pool in self._groups:
            missing = blocks.missing(group)
            if missing:
                self._expectations.taken(group, min(missing, count))
            blocks.tables[group][stop:needed] = pool.take(count)
        blocks.stop = needed
        return True

    def extend_all(self, growing: Sequence[tuple[SequenceBlocks, int]], count: int) -> None:
        """Give several sequences `count` more blocks each, which is quicker than one by one; so many are `spare`.

        Of each it is told how many tokens have been computed.
        """
        for blocks, computed in growing:
            self._release_behind(blocks, computed)
        for group, pool in self._groups:
            taken, less = pool.take(count * len(growing)), 0
            for (blocks, _), end in zip(growing, range(count, len(taken) + 1, count), strict=True):
                blocks.tables[group][blocks.stop : blocks.stop + count] = taken[end - count : end]
                less += min(count, blocks.missing(group))
            self._expectations.taken(group, less)
        for blocks, _ in growing:
            blocks.stop += count

    def fork(
        self,
        blocks: SequenceBlocks,
        names: BlockNames | None,
        *,
        computed: int,
        max_tokens: int,
        expected_tokens: int,
    ) -> SequenceBlocks | None:
        """A second sequence, with `names`, that goes on from the first one's `computed` tokens; None for lack of room.

        The two share all full blocks. The last one, if it is partly filled, the new sequence gets a copy of.
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
            full=full if blocks.lost is None else blocks.full,
            expected=self._expected(computed, expected_tokens),
            mass=None if blocks.mass is None else blocks.mass.copy(),
            holes=blocks.holes,
        )
        if blocks.lost is not None:
            copy.lost = np.resize(blocks.lost, len(copy.tables[LayerGroup.GLOBAL]))
        for group, pool in self.pools.items():
            first = blocks.first[group]
            shared = blocks.tables[group][first:full]
            copy.tables[group][first:full] = shared
            for block in shared[shared != 0].tolist():
                pool.use(block)
            if partial:
                (target,) = pool.take()
                copy.tables[group][full] = target
                self._exchange.copy(group, int(blocks.tables[group][full]), target)
        self._open.add(copy)
        self._expectations.opened(copy)
        return copy

    def close(self, blocks: SequenceBlocks) -> None:
        """Release everything the sequence holds. What it computed stays findable as long as there is room."""
        if blocks.names is not None and blocks.full:
            self._prefixes.keep_window_end(blocks, blocks.full)
        self._tell_mass(blocks)
        self._open.remove(blocks)
        self._expectations.closed(blocks)
        for group, pool in self.pools.items():
            # From the end: what is deeper in the prefix is of less use to others and recycled earlier.
            held = blocks.tables[group][blocks.first[group] : blocks.stop][::-1].tolist()
            pool.release(filter(None, held) if blocks.holes else held)

    def bound(self, blocks: SequenceBlocks, computed: int) -> None:
        """Have the sequence keep what the budget allows when position `computed` is decoded. LOSSY.

        Nothing happens to a sequence within the budget. `extend` is still to be called.
        """
        budget, count = self.budget, computed // self.block_size + 1
        if budget is None or self._bounding is None or count <= budget.blocks:
            return
        if blocks.lost is None:
            self.note(blocks, computed)
        missing = blocks.missing(LayerGroup.GLOBAL)
        self._bounding.bound(blocks, count, budget)
        self._expectations.changed(blocks, LayerGroup.GLOBAL, before=missing)

    @property
    def bound_counts(self) -> BoundCounts:
        """What bounding has done."""
        return BoundCounts() if self._bounding is None else self._bounding.counts

    def forget_all(self) -> None:
        """Keep nothing of what was computed, as if the cache were new."""
        for pool in self.pools.values():
            pool.drop_all()
        if self.lower is not None:
            self.lower.forget_all()

    def _release_behind(self, blocks: SequenceBlocks, start: int) -> None:
        """Release local blocks that neither the token at `start` sees, nor one after the full block before it."""
        if LayerGroup.LOCAL not in self.pools:
            return
        first, size = blocks.first[LayerGroup.LOCAL], self.block_size
        behind = min((start // size * size - self._reach) // size, blocks.stop)
        if behind > first:
            missing, table = blocks.missing(LayerGroup.LOCAL), blocks.tables[LayerGroup.LOCAL]
            self.pools[LayerGroup.LOCAL].release(table[first:behind].tolist())
            table[first:behind] = 0
            blocks.first[LayerGroup.LOCAL] = behind
            self._expectations.changed(blocks, LayerGroup.LOCAL, before=missing)

    def _tell_mass(self, blocks: SequenceBlocks) -> None:
        """Let the policy know what attention the sequence gave its blocks, each against the mean of them."""
        if not blocks.mass or blocks.names is None or not self._listening:
            return
        # Against the mean of those that have names: the last block, partly filled, is where a question stands, and its
        # share says how much of it stands there.
        masses = blocks.mass.relative(blocks.full).tolist()
        names = blocks.names.first(blocks.full)[: len(masses)]
        if LayerGroup.GLOBAL in self.pools:
            self.pools[LayerGroup.GLOBAL].victims.attend(names, masses)
        if self.lower is not None:
            self.lower.attend(LayerGroup.GLOBAL, names, masses)

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless the books of all tiers follow from the open sequences."""
        if self.lower is not None:
            self.lower.check_integrity()
        for group, pool in self.pools.items():
            pool.check_integrity([block for blocks in self._open for block in blocks.check_integrity(group)])
        self._expectations.check_integrity(self._open)
