"""Everybody who runs: who has blocks, and who would lose them first. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from wicore_backend.engine.decodes import Decodes
from wicore_backend.engine.expectations import Expectations
from wicore_backend.engine.plan import Chunk
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch


class Running:
    """The sequences that have blocks, `max_running` at most.

    One begins with its prompt under way (*prefilling*; `start`), or goes on from another one's prompt (`fork`). Once
    its prompt is computed it *decodes* (`Decodes`), until it stops: since it has ended, or gives way. It can
    be stopped in either state, and leaves what it computed in the prefix cache.

    `check_integrity` proves that it has blocks and waits for none, and who may be preempted.
    """

    def __init__(self, blocks: BlockManager, expectations: Expectations, *, max_running: int) -> None:
        self.decodes = Decodes(blocks)
        self.stops = 0
        """How often a sequence has stopped, which is when there may be room for others."""
        self._blocks = blocks
        self._expectations = expectations
        self._max_running = max_running
        self._prefilling: dict[Sequence, None] = {}
        self._preemptible: Counter[int] = Counter()  # those that are not promoted, by priority

    def __len__(self) -> int:
        return len(self.decodes) + len(self._prefilling)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.decodes, self._prefilling)

    @property
    def prefilling(self) -> Collection[Sequence]:
        """Those whose prompts are under way, in the order in which they started."""
        return self._prefilling

    @property
    def free_places(self) -> int:
        """How many more may run."""
        return self._max_running - len(self)

    # Whether one more would fit.

    def shape_beside(self, sequence: Sequence) -> StepShape:
        """A step that decodes all that decode, and the sequence."""
        return self.decodes.shape().with_decode(self._blocks.visible(len(sequence.tokens)))

    def has_room_for(self, sequence: Sequence, match: PrefixMatch) -> bool:
        """Whether there is memory for all who run and the sequence, if they become as long as expected."""
        room = self._blocks.room_for(
            sequence.names,
            match,
            tokens=len(sequence.tokens),
            expected_tokens=self._expectations.tokens(sequence),
        )
        return min(room.values()) >= 0

    # The life of one that runs.

    def start(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Give a sequence that waits what is kept of its prefix; `match` must be of now."""
        size = self._blocks.block_size
        sequence.blocks = self._blocks.open(
            sequence.names,
            match,
            max_tokens=sequence.max_tokens,
            expected_tokens=self._expectations.tokens(sequence),
            tokens=len(sequence.tokens),
        )
        self._blocks.keep_window(sequence.blocks, (sequence.prompt_len - 1) // size)
        sequence.computed = match.resume * size
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
        self._count_preemptible(sequence, 1)
        self._prefilling[sequence] = None

    def fork(self, leader: Sequence, sequence: Sequence) -> bool:
        """Have a sequence that waits go on from a prompt that has just been computed. False if there is no room."""
        if not self.free_places:
            return False
        forked = self._blocks.fork(
            leader.running_blocks,
            sequence.names,
            computed=leader.computed,
            max_tokens=sequence.max_tokens,
            expected_tokens=self._expectations.tokens(sequence),
        )
        if forked is None:
            return False
        sequence.blocks = forked
        sequence.computed = leader.computed
        self._count_preemptible(sequence, 1)
        self.decodes.add(sequence)
        return True

    def extend(self, sequence: Sequence, end: int) -> bool:
        """Get the blocks up to `end`; False if there are none left."""
        return self._blocks.extend(sequence.running_blocks, sequence.computed, end)

    def computed(self, chunk: Chunk) -> None:
        """A step has computed the chunk: its blocks can be found, and with the last one the sequence decodes."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        self._blocks.note(sequence.running_blocks, chunk.end)
        if chunk.completes:
            del self._prefilling[sequence]
            self.decodes.add(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Take a sequence's blocks from it."""
        if sequence in self._prefilling:
            del self._prefilling[sequence]
        else:
            self.decodes.remove(sequence)
        self._count_preemptible(sequence, -1)
        blocks = sequence.running_blocks
        # What is decoded is noted at once here: it is of use to those who come after the answer.
        self._blocks.note(blocks, sequence.computed)
        self._blocks.close(blocks)
        sequence.blocks = None
        sequence.computed = 0
        sequence.computes = False
        self.stops += 1

    # Who gives way.

    def victim_for(self, waiting: Sequence, *, promoted: bool) -> Sequence | None:
        """Whom a waiting sequence may preempt: of the lowest class, if that is below its own or it is promoted."""
        lowest = max(self._preemptible, default=None)
        if lowest is None or not (promoted or lowest > waiting.priority):
            return None
        return _cheapest(s for s in self if s.request.priority == lowest and not s.promoted)

    def victim_behind(self, running: Sequence) -> Sequence | None:
        """Whom a running sequence may take blocks from: somebody behind it in rank."""
        rank = running.rank
        return _cheapest(s for s in self if s.rank > rank)

    def _count_preemptible(self, sequence: Sequence, change: int) -> None:
        if sequence.promoted:
            return
        priority = sequence.priority
        count = self._preemptible[priority] = self._preemptible[priority] + change
        if not count:
            del self._preemptible[priority]

    def check_integrity(self) -> None:
        """Raise AssertionError unless whoever runs has what it needs, and nothing that belongs to those who wait."""
        everybody = list(self)
        assert len(everybody) == len(set(everybody)) <= self._max_running, "one runs twice, or too many do"
        assert all(s.blocks is not None for s in everybody), "a running sequence has no blocks"
        assert not any(s.restore or s.leader for s in everybody), "a running sequence waits for something"
        assert self._preemptible == Counter(s.priority for s in everybody if not s.promoted), "who may be preempted"
        self.decodes.check_integrity()


def _cheapest(candidates: Iterable[Sequence]) -> Sequence | None:
    """Whose preemption costs least: of the lowest class, the one that has computed least."""
    return min(candidates, key=lambda s: (s.promoted, -s.priority, s.computed), default=None)
