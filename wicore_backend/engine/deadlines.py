"""Which request is the next to miss a deadline."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count

from wicore_backend.engine.request import DeadlineKind, Sequence

Entry = tuple[float, int, DeadlineKind, Sequence]


class DeadlineHeap:
    """Deadlines of live sequences, soonest first.

    Parameters
    ----------
    relevant
        Whether a deadline of this kind still matters to a sequence: it may have ended, or done what it had to.
    """

    def __init__(self, relevant: Callable[[Sequence, DeadlineKind], bool]) -> None:
        self._relevant = relevant
        self._heap: list[Entry] = []
        self._number = count()
        self._clean_at = 64

    def add(self, sequence: Sequence) -> None:
        for kind, seconds in sequence.request.deadlines.items():
            heapq.heappush(self._heap, (sequence.arrival + seconds, next(self._number), kind, sequence))
        if len(self._heap) > self._clean_at:  # Requests that end in time leave theirs behind.
            self._heap = [entry for entry in self._heap if self._relevant(entry[3], entry[2])]
            heapq.heapify(self._heap)
            self._clean_at = max(64, 2 * len(self._heap))

    def missed(self, now: float) -> Iterator[tuple[Sequence, DeadlineKind]]:
        """Take the deadlines that have passed and still matter."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, sequence = heapq.heappop(self._heap)
            if self._relevant(sequence, kind):
                yield sequence, kind
