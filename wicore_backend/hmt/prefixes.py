"""What is kept of sequences, and how a later one finds it: where it can go on, and from which blocks.

What is kept, under the names of `hmt/names.py`:

- Every full block of the global group, once it is noted: a prompt's after each step, an answer's at its end.
- Of the local group the *window end* at each resume point, as one object: the blocks that the tokens after it see.
  Resume points are the end of a prompt, the end of what a sequence computed, and any place at which a later sequence
  was found to branch off without a window to go on from.

A sequence can go on at a block's end where all global blocks before it and the local ones of the window there are kept:
in the device tier, or in the host tier.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wicore_backend.hmt.block_pool import BlockPool
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.sequence_blocks import SequenceBlocks


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


class Prefixes:
    """Finds what is kept, and keeps what has been computed. See the module's docstring; it has no state of its own."""

    def __init__(self, layout: KVLayout, pools: Mapping[LayerGroup, BlockPool], lower: LowerTiers | None) -> None:
        self._layout = layout
        self._pools = pools
        self._lower = lower

    # To find. Nothing here changes the books.

    def match(self, names: BlockNames, limit: int) -> PrefixMatch:
        """How much of the first `limit` blocks is kept, on the device or in host memory."""
        return self._match(names, limit, self.keeps)

    def restorable(self, names: BlockNames, limit: int, match: PrefixMatch) -> tuple[int, list[Key]]:
        """Where a sequence could go on, past `match`, if blocks were brought up from the cold tier; and which ones."""
        if self._lower is None or self._lower.cold is None:
            return match.resume, []
        resume = self._match(names, limit, self._reaches).resume
        if resume <= match.resume:
            return match.resume, []
        chain = names.first(resume)
        span = [(group, chain[n]) for group in self._pools for n in self.span(group, resume)]
        return resume, [key for key in span if self._pools[key[0]].find(key[1]) is None]

    def keeps(self, group: LayerGroup, name: bytes) -> bool:
        """Whether a block is on the device or in host memory."""
        if self._pools[group].find(name) is not None:
            return True
        return self._lower is not None and self._lower.host.holds(group, name)

    def span(self, group: LayerGroup, count: int) -> range:
        """The blocks that a sequence needs to go on after `count` blocks."""
        return range(0 if group is LayerGroup.GLOBAL else self._window_start(count), count)

    def _match(self, names: BlockNames, limit: int, keeps: Callable[[LayerGroup, bytes], bool]) -> PrefixMatch:
        chain = names.first(limit)
        known = limit
        if LayerGroup.GLOBAL in self._pools:
            known = next((n for n in range(limit) if not keeps(LayerGroup.GLOBAL, chain[n])), limit)
        resume = names.resumable(known)
        if LayerGroup.LOCAL in self._pools:
            while resume:
                # From the end: where a block is missing, no window that has it will do.
                window = range(resume - 1, self._window_start(resume) - 1, -1)
                missing = next((n for n in window if not keeps(LayerGroup.LOCAL, chain[n])), None)
                if missing is None:
                    break
                resume = names.resumable(missing)
        return PrefixMatch(resume, known if LayerGroup.GLOBAL in self._pools else resume)

    def _reaches(self, group: LayerGroup, name: bytes) -> bool:
        if self._pools[group].find(name) is not None:
            return True
        return self._lower is not None and self._lower.reachable(group, name)

    def _window_start(self, count: int) -> int:
        """The first block that a token after `count` blocks sees in the local group."""
        size = self._layout.block_size
        return max(0, count * size - self._layout.window + 1) // size

    # To keep.

    def keep_window(self, blocks: SequenceBlocks, count: int) -> None:
        """Let later sequences go on after the sequence's first `count` blocks, once it has computed them."""
        if blocks.names is None:
            return
        count = blocks.names.resumable(count)
        if count > blocks.full and count not in blocks.resume_points:
            insort(blocks.resume_points, count)

    def note(self, blocks: SequenceBlocks, computed: int) -> None:
        """The first `computed` tokens have their keys now: blocks completed by that can be found from now on."""
        full = computed // self._layout.block_size
        if full == blocks.full or blocks.names is None or blocks.lost is not None:
            return
        chain = blocks.names.first(full)
        if LayerGroup.GLOBAL in self._pools:
            new = slice(blocks.full, full)
            self._pools[LayerGroup.GLOBAL].keep(chain[new], blocks.tables[LayerGroup.GLOBAL][new].tolist())
        blocks.full = full
        while blocks.resume_points and blocks.resume_points[0] <= full:
            self.keep_window_end(blocks, blocks.resume_points.pop(0))

    def keep_window_end(self, blocks: SequenceBlocks, count: int) -> None:
        """Keep the window after the first `count` blocks, which are full, if the sequence still has all of it."""
        if LayerGroup.LOCAL not in self._pools or blocks.names is None:
            return
        oldest = self._window_start(count)
        if blocks.first[LayerGroup.LOCAL] <= oldest < count:
            names = blocks.names.first(count)[oldest:count]
            self._pools[LayerGroup.LOCAL].keep(names, blocks.tables[LayerGroup.LOCAL][oldest:count].tolist())
