"""What is kept of a sequence's prefix: the block books, asked about sequences instead of names."""

from __future__ import annotations

from collections.abc import Sequence as Several

from wicore_backend.engine.plan import SchedulerCounts
from wicore_backend.engine.request import Sequence
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.base import Access


class KeptPrefixes:
    """Holds nothing of its own, and so has no checker: what it answers is true until the books change.

    Of a sequence without names nothing is kept, and nobody is told of it.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks

    def match(self, sequence: Sequence) -> PrefixMatch:
        """What the sequence could start from now, on the device or in host memory."""
        if sequence.names is None:
            return PrefixMatch()
        return self._blocks.match(sequence.names, self._blocks.startable(len(sequence.tokens)))

    def restorable(self, sequence: Sequence, match: PrefixMatch) -> tuple[int, Several[Key]]:
        """Where it could go on, past `match`, with blocks from the cold tier; and those blocks, none if nowhere."""
        if sequence.names is None:
            return match.resume, ()
        return self._blocks.restorable(sequence.names, self._blocks.startable(len(sequence.tokens)), match)

    def tell_of(self, sequence: Sequence, now: float) -> None:
        """Let the policies of all tiers know of a prompt that has come."""
        if not self._blocks.listening or sequence.names is None:
            return
        count = self._blocks.startable(len(sequence.tokens))
        retention = sequence.request.retention
        access = Access(
            keys=sequence.names.first(count)[:count],
            retain_seconds=retention.seconds,
            session_end=retention.session_end,
        )
        self._blocks.observe(access, now)

    def count_hits(self, sequence: Sequence, match: PrefixMatch, counts: SchedulerCounts) -> None:
        """Count what a sequence finds that is about to start for the first time, and in which tier it lies."""
        size = self._blocks.block_size
        counts.prefix_hit_tokens += match.resume * size
        counts.prefix_missed_tokens += len(sequence.tokens) - match.resume * size
        counts.window_missing_tokens += (match.known - match.resume) * size
        pool = self._blocks.pools.get(LayerGroup.GLOBAL)
        if self._blocks.lower is None or pool is None or sequence.names is None:
            return
        fetched = () if sequence.restore is None else sequence.restore.fetched
        for name in sequence.names.first(match.resume)[: match.resume]:
            if pool.find(name) is not None:
                continue
            if (LayerGroup.GLOBAL, name) in fetched:
                counts.nvme_hit_tokens += size
            else:
                counts.host_hit_tokens += size
