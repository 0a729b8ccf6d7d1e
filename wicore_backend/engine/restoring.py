"""Sequences that wait for blocks from the cold tier before they start. Pure accounting, like the scheduler's."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several
from enum import Enum, auto

from wicore_backend.engine.expectations import Expectations
from wicore_backend.engine.kept_prefix import KeptPrefixes
from wicore_backend.engine.plan import SchedulerCounts
from wicore_backend.engine.request import Sequence
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.lower_tiers import LowerTiers, Restore

_PATIENCE = 1.5
"""Times the tier's own deadline, after which a sequence starts with what has come: a disk may also be slow to make room
in host memory."""


class Decision(Enum):
    """What becomes of a sequence that is the head of the queue."""

    START = auto()
    """Nothing that it lacks is worth waiting for."""
    RESTORE = auto()
    """Blocks of its prefix are on their way."""
    WAIT = auto()
    """They are worth it, but others' are on their way first."""


class Restoring:
    """Who waits for the cold tier. Decides by what has been measured: restoring has to beat computing.

    A sequence that is the head of the queue begins to wait with a `restore` of its own, and is out of the queue until
    that is done, or too late. It keeps the restore, and with it the blocks in host memory, until it starts, or ends, or
    goes on from another one's prompt (`end`). One for which it was not worth while `computes`, and is not asked again
    until it has given way.
    """

    def __init__(
        self, blocks: BlockManager, prefixes: KeptPrefixes, expectations: Expectations, counts: SchedulerCounts
    ) -> None:
        self._blocks = blocks
        self._prefixes = prefixes
        self._expectations = expectations
        self._counts = counts
        self._began: dict[Sequence, float] = {}

    def __len__(self) -> int:
        return len(self._began)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._began)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._began

    def begin(self, sequence: Sequence, now: float) -> Decision:
        """Have a sequence that could start wait for more of its prefix, if that is worth while."""
        lower = self._lower
        if lower is None or sequence.restore is not None or sequence.computes:
            return Decision.START
        match = self._prefixes.match(sequence)
        resume, keys = self._prefixes.restorable(sequence, match)
        if not keys:
            return Decision.START
        seconds = self._seconds(lower, keys)
        saved = self.prefill_seconds(sequence, match.resume) - self.prefill_seconds(sequence, resume)
        worth = seconds is None or seconds < min(saved or seconds + 1, lower.restore_deadline_s)
        restore = lower.restore(keys) if worth else None
        if restore is None:
            if worth and lower.restoring:
                return Decision.WAIT
            sequence.computes = True
            self._counts.restores_declined += 1
            self._counts.restores_without_room += worth
            return Decision.START
        self._counts.restores += 1
        sequence.restore = restore
        sequence.restore_began = self._began[sequence] = now
        return Decision.RESTORE

    def take_done(self, now: float) -> Several[Sequence]:
        """Those that wait no more: their blocks have come, or will not."""
        lower = self._lower
        if lower is None:
            return ()
        lower.collect()
        done = []
        for sequence, began in list(self._began.items()):
            restore = sequence.restore
            assert restore is not None
            late = now - began > _PATIENCE * lower.restore_deadline_s
            if restore.done or late:
                del self._began[sequence]
                sequence.restore_s, sequence.restore_began = sequence.restore_seconds(now), None
                done.append(sequence)
            if late:
                lower.end(restore)
        return done

    def started(self, sequence: Sequence) -> None:
        """The sequence runs, from `computed` on."""
        if sequence.restore is not None:
            self._counts.restored_tokens += sequence.computed
        self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence has started, or ends, or goes on from another one's prompt: nothing is held for it any more."""
        self._began.pop(sequence, None)
        if sequence.restore is not None:
            assert self._blocks.lower is not None
            self._blocks.lower.end(sequence.restore)
            sequence.restore = None

    def prefill_seconds(self, sequence: Sequence, resume: int) -> float:
        """Least time that the sequence's prompt takes from so many blocks on."""
        return self._expectations.prefill_seconds(len(sequence.tokens), resume * self._blocks.block_size)

    def seconds(self, sequence: Sequence, match: PrefixMatch) -> float | None:
        """The least time to a first token by way of the cold tier; None if there is nothing for the sequence."""
        lower = self._lower
        if lower is None:
            return None
        resume, keys = self._prefixes.restorable(sequence, match)
        if not keys:
            return None
        return (self._seconds(lower, keys) or 0.0) + self.prefill_seconds(sequence, resume)

    @property
    def _lower(self) -> LowerTiers | None:
        lower = self._blocks.lower
        return lower if lower is not None and lower.cold is not None else None

    def _seconds(self, lower: LowerTiers, keys: Several[Key]) -> float | None:
        """How long those take that host memory does not hold; None if that is not known."""
        assert lower.cold is not None
        layout = self._blocks.layout
        return lower.cold.restore_seconds(
            sum(layout.block_bytes(group) for group, name in keys if not lower.host.holds(group, name))
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless those that wait have something to wait for."""
        for sequence in self._began:
            assert isinstance(sequence.restore, Restore), "one waits for a restore that it does not have"
            assert sequence.blocks is None, "one waits for a restore, and runs"
            assert sequence.leader is None, "one waits for a restore, and for a leader"
