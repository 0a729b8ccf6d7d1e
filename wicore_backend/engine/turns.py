"""Whose prompt a step computes next, and on how much of it. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from wicore_backend.engine.request import Sequence
from wicore_backend.engine.waiting import Next

_AT_ONCE = 4
"""Prompts of a class that are under way together."""

_LEAD, _LEAST = 0.75, 0.25
"""Of what is left of a step, for the shortest of those who compete for it; and for one that is to get on anyway."""


class Turns:
    """The order in which prompts share one step.

    Better classes go first, and leave to others what they do not need. In a class a few prompts are under way at once,
    so that a long one does not hold up all that come after it: the shortest rest gets most of a step, and what is left
    goes on to the next. So that a long one is not held up for ever either, the first in rank has a turn before all
    others, for its least share. The same share is all that a promoted one takes from others, of whatever class.

    Parameters
    ----------
    prefilling
        Those whose prompts are under way.
    """

    def __init__(self, prefilling: Iterable[Sequence]) -> None:
        line = deque(sorted(prefilling, key=_length))
        self._under_way: defaultdict[int, int] = defaultdict(int)
        for sequence in line:
            self._under_way[sequence.priority] += 1
        self._first = min(line, key=_rank, default=None)
        if self._first is not None:
            line.remove(self._first)
            line.appendleft(self._first)
        self._line = line

    def admit(self, ahead: Next[Sequence]) -> bool:
        """Whether the next turn is for the head of the queue, and not for one whose prompt is under way."""
        item = ahead.item
        if ahead.promoted or not self._has_place(item):
            return ahead.promoted
        if not self._line:
            return True
        if (other := self._line[0]) is self._first:
            return not other.promoted and item.priority < other.priority
        return _length(item) < _length(other)

    def __bool__(self) -> bool:
        """Whether one whose prompt is under way has not had its turn."""
        return bool(self._line)

    def pop(self) -> Sequence:
        """The next one whose prompt is under way."""
        return self._line.popleft()

    def started(self, sequence: Sequence) -> None:
        """A sequence has come out of the queue, perhaps one that had given way before its turn in this very step."""
        if sequence in self._line:
            self._line.remove(sequence)
        else:
            self._under_way[sequence.priority] += 1

    def completed(self, sequence: Sequence) -> None:
        """The step completes a prompt."""
        self._under_way[sequence.priority] -= 1

    def share(self, sequence: Sequence, ahead: Next[Sequence] | None) -> float:
        """How much of what is left of a step the sequence, which has its turn, may take if it needs more than that.

        `ahead` is the head of the queue, if it can be admitted in this step.
        """
        rivals = [self._line[0]] if self._line else []
        if ahead and self._has_place(ahead.item) and not _are_twins(ahead.item, sequence):
            rivals.append(ahead.item)
        rivals = [r for r in rivals if sequence.promoted or r.priority <= sequence.priority]
        if not rivals:
            return 1.0
        if sequence.promoted or any(r.uncomputed < sequence.uncomputed for r in rivals):
            return _LEAST
        return _LEAD

    def _has_place(self, sequence: Sequence) -> bool:
        return self._under_way[sequence.priority] < _AT_ONCE


def _rank(sequence: Sequence) -> tuple[bool, int, float, int]:
    return sequence.rank


def _length(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.uncomputed


def _are_twins(one: Sequence, other: Sequence) -> bool:
    return one.twin_key is not None and one.twin_key == other.twin_key
