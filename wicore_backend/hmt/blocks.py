"""Books of the KV blocks: which block holds which tokens of which sequence, and what can be found again.

A sequence is opened on what is kept of its prefix, extended before each step up to the tokens that the step writes,
noted when others may find what it has computed, and closed once. In the local group, blocks that no later token can see
are released on the way.

What is kept for later sequences, under the names of `hmt/names.py`:

- Every full block of the global group, once it is noted: a prompt's after each step, an answer's at its end.
- Of the local group the *window end* at each resume point, as one object: the blocks that the tokens after it see.
  Resume points are the end of a prompt, the end of what a sequence computed, and any place at which a later sequence
  was found to branch off without a window to go on from.

A sequence can go on at a block's end where all global blocks before it and the local ones of the window there are kept:
in the device tier, or in the host tier (`hmt/host_tier.py`), to which the device tier spills what it gives up, and from
which opening a sequence loads. What has to be copied for that is listed, as `hmt/transfers.py` says.

Where attention falls while a sequence is computed is kept with its blocks, and told to the host tier's policies when it
is closed. With a budget, which is lossy, it also says which global blocks a decoding sequence keeps: those that have
left are holes in its table (`hmt/bounded_kv.py`).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.attention_mass import AttentionMass, Mask, Masses
from wicore_backend.hmt.block_pool import BlockAccountingError, BlockPool, GivenUp, SingleBlockPool, WindowPool
from wicore_backend.hmt.bounded_kv import BoundCounts, KVBudget
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.policy.base import Access, Policy
from wicore_backend.hmt.transfers import Route, Transfer

__all__ = ["BlockAccountingError", "BlockManager", "PrefixMatch", "SequenceBlocks"]


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


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """The blocks of one open sequence.

    Attributes
    ----------
    names
        None if nothing of the sequence is to be kept.
    tables
        For each group int32 [N]: entry n is the physical block of positions n * block_size onwards, or 0 where the
        sequence has none (not reached yet, behind the local window, or a global one that has left).
    first
        For each group the first table entry that holds a block.
    stop
        Table entries in use, the same in all groups.
    full
        How many of them have been completed, and named. It stays where it is when the first one has left.
    expected
        For each group the blocks that the sequence is likely to hold at once, as it grows.
    resume_points
        Block counts at which a window end is to be kept, in order.
    mass
        Where attention has fallen, if anybody wants to know.
    holes
        Global blocks between the first and `stop` that have left.
    lost
        For a sequence of which blocks have left, bool [N]: those that cannot come back. None for an exact one.
    """

    names: BlockNames | None
    tables: dict[LayerGroup, NDArray[np.int32]]
    first: dict[LayerGroup, int]
    stop: int
    full: int
    expected: dict[LayerGroup, int]
    resume_points: list[int] = field(default_factory=list)
    mass: AttentionMass | None = None
    holes: int = 0
    lost: Mask | None = None

    def attended(self, mass: Masses) -> None:
        """A step has measured where attention fell: float32 [blocks], as `Attention.mass` gives it."""
        if self.mass is not None:
            self.mass.fold(mass, self.tables[LayerGroup.GLOBAL][: len(mass)] != 0 if self.holes else None)

    def held(self, group: LayerGroup) -> int:
        return self.stop - self.first[group] - (self.holes if group is LayerGroup.GLOBAL else 0)

    def missing(self, group: LayerGroup) -> int:
        """Blocks that the sequence is likely to take on top of those that it holds."""
        missing = self.expected[group] - self.stop + self.first[group]
        if group is LayerGroup.GLOBAL:
            missing += self.holes
        return missing if missing > 0 else 0


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
        self.budget = budget if LayerGroup.GLOBAL in layout.groups else None
        self.bound_counts = BoundCounts()
        self.layout = layout
        self.block_size = layout.block_size
        self.lower = lower
        kinds = {LayerGroup.GLOBAL: SingleBlockPool, LayerGroup.LOCAL: WindowPool}
        self.pools: dict[LayerGroup, BlockPool] = {
            group: kinds[group](
                num_blocks[group],
                self._spilling(group),
                None if policy is None else policy(max(1, (num_blocks[group] - 1) // self._blocks_together(group))),
            )
            for group in layout.groups
        }
        self._listening = policy is not None or lower is not None
        self._groups = tuple(self.pools.items())
        self._pools = tuple(self.pools.values())
        self._reach = layout.window - 1  # tokens before its own that a local layer's token sees
        self._transfers: list[Transfer] = []
        self._window_blocks = layout.blocks_for(layout.window) + 2  # that a decode is likely to hold at most
        self._max_chunk_blocks = layout.blocks_for(max_chunk)
        self._open: set[SequenceBlocks] = set()
        self._missing = dict.fromkeys(self.pools, 0)

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
        transfers, self._transfers = self._transfers, []
        return transfers

    # What is kept.

    def match(self, names: BlockNames, limit: int) -> PrefixMatch:
        """How much of the first `limit` blocks is kept, on the device or in host memory.

        Changes nothing; holds until the next change of the books.
        """
        return self._match(names, limit, self._keeps)

    def startable(self, tokens: int) -> int:
        """How many blocks of so many tokens a sequence can start from: its last token has to be computed anyhow."""
        return (tokens - 1) // self.block_size

    def restorable(self, names: BlockNames, limit: int, match: PrefixMatch) -> tuple[int, list[Key]]:
        """Where a sequence could go on, past `match`, if blocks were brought up from the cold tier; and which ones."""
        if self.lower is None or self.lower.cold is None:
            return match.resume, []
        resume = self._match(names, limit, self._reaches).resume
        if resume <= match.resume:
            return match.resume, []
        chain = names.first(resume)
        span = [(group, chain[n]) for group in self.pools for n in self._span(group, resume)]
        return resume, [key for key in span if self.pools[key[0]].find(key[1]) is None]

    def _match(self, names: BlockNames, limit: int, keeps: Callable[[LayerGroup, bytes], bool]) -> PrefixMatch:
        chain = names.first(limit)
        known = limit
        if LayerGroup.GLOBAL in self.pools:
            known = next((n for n in range(limit) if not keeps(LayerGroup.GLOBAL, chain[n])), limit)
        resume = names.resumable(known)
        if LayerGroup.LOCAL in self.pools:
            while resume:
                # From the end: where a block is missing, no window that has it will do.
                window = range(resume - 1, self._window_start(resume) - 1, -1)
                missing = next((n for n in window if not keeps(LayerGroup.LOCAL, chain[n])), None)
                if missing is None:
                    break
                resume = names.resumable(missing)
        return PrefixMatch(resume, known if LayerGroup.GLOBAL in self.pools else resume)

    def _keeps(self, group: LayerGroup, name: bytes) -> bool:
        if self.pools[group].find(name) is not None:
            return True
        return self.lower is not None and self.lower.host.holds(group, name)

    def _reaches(self, group: LayerGroup, name: bytes) -> bool:
        if self.pools[group].find(name) is not None:
            return True
        return self.lower is not None and self.lower.reachable(group, name)

    def _window_start(self, count: int) -> int:
        """The first block that a token after `count` blocks sees in the local group."""
        return max(0, count * self.block_size - self.layout.window + 1) // self.block_size

    def _span(self, group: LayerGroup, count: int) -> range:
        """The blocks that a sequence needs to go on after `count` blocks."""
        return range(0 if group is LayerGroup.GLOBAL else self._window_start(count), count)

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
            shared = 0
            if names is not None and match.resume:
                chain = names.first(match.resume)
                kept = (pool.find(chain[n]) for n in self._span(group, match.resume))
                shared = sum(block is not None and pool.is_active(block) for block in kept)
            spare = pool.available - self._missing[group] + shared
            if group is LayerGroup.LOCAL:  # A chunk of a prompt holds more than its window, while it is computed.
                spare -= self._max_chunk_blocks
            left[group] = spare - self._expected(group, tokens, expected_tokens)
        return left

    def _expected(self, group: LayerGroup, tokens: int, expected_tokens: int) -> int:
        """The most blocks that a sequence is likely to hold that has `tokens` to compute before its next decode."""
        blocks = self.layout.blocks_for(max(tokens, expected_tokens))
        if group is LayerGroup.LOCAL:
            return min(blocks, self._window_blocks)
        return blocks if self.budget is None else max(self.layout.blocks_for(tokens), min(blocks, self.budget.blocks))

    def visible(self, tokens: int) -> int:
        """Keys that a decode of a sequence of so many tokens sees in the global group."""
        return tokens if self.budget is None else min(tokens, self.budget.blocks * self.block_size)

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
            expected={group: self._expected(group, tokens, expected_tokens) for group in self.pools},
            mass=AttentionMass() if self._listening or self.budget is not None else None,
        )
        if names is not None and match.resume:
            self._take_over(blocks, names.first(match.resume), match.resume)
        if match.known > match.resume:
            self.keep_window(blocks, match.known)
        self._open.add(blocks)
        self._count_missing(blocks, 1)
        return blocks

    def _take_over(self, blocks: SequenceBlocks, chain: Sequence[bytes], count: int) -> None:
        """Put the kept prefix of `count` blocks into a sequence's tables, loading what is not on the device."""
        missing: dict[LayerGroup, list[tuple[int, int]]] = {}
        for group in self.pools:
            span = self._span(group, count)
            blocks.first[group] = span.start
            missing[group] = self._take_up(blocks, group, chain, span)
        for group, pool in self.pools.items():
            self._load(blocks, group, chain, missing[group])
            if group is LayerGroup.LOCAL and missing[group]:
                span = self._span(group, count)
                pool.keep(chain[span.start : count], blocks.tables[group][span.start : count].tolist())

    def _take_up(
        self, blocks: SequenceBlocks, group: LayerGroup, chain: Sequence[bytes], indices: Iterable[int]
    ) -> list[tuple[int, int]]:
        """Put kept blocks into a sequence's table: those on the device. The others, with their host slots, stay pinned.

        They are to be loaded when all of the sequence's have been taken up: taking a block recycles others.
        """
        pool, table = self.pools[group], blocks.tables[group]
        missing: list[tuple[int, int]] = []
        for index in indices:
            block = pool.find(chain[index])
            if block is None:
                assert self.lower is not None, "a block that is nowhere was matched"
                missing.append((index, self.lower.host.pin(group, chain[index])))
            else:
                pool.use(block)
                table[index] = block
        return missing

    def _load(
        self, blocks: SequenceBlocks, group: LayerGroup, chain: Sequence[bytes], missing: list[tuple[int, int]]
    ) -> None:
        """Bring blocks of the host tier to the device; there is room for them."""
        pool = self.pools[group]
        for index, slot in missing:
            (block,) = pool.take()
            blocks.tables[group][index] = block
            self._transfers.append(Transfer(Route.HOST_TO_DEVICE, group, slot, block))
        for index, _ in reversed(missing):  # Deepest first, as policies want it.
            assert self.lower is not None
            self.lower.host.unpin(group, chain[index])
            self.lower.host.loaded(group, 1)
            if group is LayerGroup.GLOBAL:
                pool.keep((chain[index],), (int(blocks.tables[group][index]),))

    def _spilling(self, group: LayerGroup) -> GivenUp | None:
        """What becomes of the blocks that the device tier gives up."""
        lower = self.lower
        if lower is None:
            return None

        def spill(name: bytes, block: int) -> None:
            slot = lower.host.spill(group, name)
            if slot is not None:
                self._transfers.append(Transfer(Route.DEVICE_TO_HOST, group, block, slot))

        return spill

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
                self._missing[group] -= min(missing, count)
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
            self._missing[group] -= less
        for blocks, _ in growing:
            blocks.stop += count

    @property
    def spare(self) -> int:
        """Blocks of each group that are left if all that are open grow as expected; negative if there are too few."""
        return min(pool.available - self._missing[group] for group, pool in self._groups)

    def note(self, blocks: SequenceBlocks, computed: int) -> None:
        """The first `computed` tokens have their keys now: blocks completed by that can be found from now on."""
        full = computed // self.block_size
        if full == blocks.full or blocks.names is None or blocks.lost is not None:
            return
        chain = blocks.names.first(full)
        if LayerGroup.GLOBAL in self.pools:
            new = slice(blocks.full, full)
            self.pools[LayerGroup.GLOBAL].keep(chain[new], blocks.tables[LayerGroup.GLOBAL][new].tolist())
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
            expected={group: self._expected(group, computed, expected_tokens) for group in self.pools},
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
                source = int(blocks.tables[group][full])
                self._transfers.append(Transfer(Route.WITHIN_DEVICE, group, source, target))
        self._open.add(copy)
        self._count_missing(copy, 1)
        return copy

    def close(self, blocks: SequenceBlocks) -> None:
        """Release everything the sequence holds. What it computed stays findable as long as there is room."""
        if blocks.names is not None and blocks.full:
            self._keep_window_end(blocks, blocks.full)
        self._tell_mass(blocks)
        self._open.remove(blocks)
        self._count_missing(blocks, -1)
        for group, pool in self.pools.items():
            # From the end: what is deeper in the prefix is of less use to others and recycled earlier.
            held = blocks.tables[group][blocks.first[group] : blocks.stop][::-1].tolist()
            pool.release(filter(None, held) if blocks.holes else held)

    def bound(self, blocks: SequenceBlocks, computed: int) -> None:
        """Have the sequence keep what the budget allows when position `computed` is decoded. LOSSY.

        Nothing happens to a sequence within the budget. `extend` is still to be called.
        """
        budget, count = self.budget, computed // self.block_size + 1
        if budget is None or count <= budget.blocks:
            return
        assert blocks.mass is not None, "a budget came while the sequence was open"
        group, table = LayerGroup.GLOBAL, blocks.tables[LayerGroup.GLOBAL]
        if blocks.lost is None:
            self.note(blocks, computed)
            blocks.lost = np.zeros(len(table), np.bool_)
        missing, lost = blocks.missing(group), blocks.lost[:count]
        held = table[:count] != 0
        held[-1] = True  # Taken already, or by `extend`.
        chain: Sequence[bytes] = () if blocks.names is None else blocks.names.first(blocks.full)
        while True:  # Each time around, blocks are found to be lost for ever.
            keep = budget.choose(blocks.mass, held, lost)
            back = np.flatnonzero(keep & ~held).tolist()
            gone = [index for index in back if not self._keeps(group, chain[index])]
            if not gone:
                break
            self._lose(lost, gone)
        leaving = np.flatnonzero(held & ~keep)
        self._lose(lost, leaving[leaving >= len(chain[: blocks.full])])
        self.pools[group].release(table[leaving][::-1].tolist())
        table[leaving] = 0
        # What left may be in use by others; and the block that is written next has to be had, too.
        back = back[: max(0, self.pools[group].available - 1)]
        self._load(blocks, group, chain, self._take_up(blocks, group, chain, back))
        blocks.holes = int(np.count_nonzero(table[: blocks.stop] == 0))
        blocks.expected[group] = min(blocks.expected[group], budget.blocks)
        self._missing[group] += blocks.missing(group) - missing
        self.bound_counts.left += len(leaving)
        self.bound_counts.returned += len(back)

    def _lose(self, lost: Mask, indices: Sequence[int] | NDArray[np.int64]) -> None:
        lost[indices] = True
        self.bound_counts.lost += len(indices)

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
            self._missing[LayerGroup.LOCAL] += blocks.missing(LayerGroup.LOCAL) - missing

    def _keep_window_end(self, blocks: SequenceBlocks, count: int) -> None:
        if LayerGroup.LOCAL not in self.pools or blocks.names is None:
            return
        oldest = self._window_start(count)
        if blocks.first[LayerGroup.LOCAL] <= oldest < count:
            names = blocks.names.first(count)[oldest:count]
            self.pools[LayerGroup.LOCAL].keep(names, blocks.tables[LayerGroup.LOCAL][oldest:count].tolist())

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

    def _count_missing(self, blocks: SequenceBlocks, sign: int) -> None:
        for group in self.pools:
            self._missing[group] += sign * blocks.missing(group)

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless the books of all tiers follow from the open sequences."""
        if self.lower is not None:
            self.lower.check_integrity()
        for group, pool in self.pools.items():
            in_tables: list[int] = []
            for blocks in self._open:
                first, table = blocks.first[group], blocks.tables[group]
                if np.any(table[:first]) or np.any(table[blocks.stop :]):
                    raise BlockAccountingError(f"a {group} table has blocks outside {first}:{blocks.stop}")
                held = table[first : blocks.stop]
                in_tables += held[held != 0].tolist()
                if np.count_nonzero(held) != blocks.held(group) or (blocks.holes and blocks.lost is None):
                    raise BlockAccountingError(f"a {group} table has holes that nobody has counted")
            pool.check_integrity(in_tables)
            if self._missing[group] != sum(blocks.missing(group) for blocks in self._open):
                raise BlockAccountingError(f"{self._missing[group]} {group} blocks are counted as missing")
