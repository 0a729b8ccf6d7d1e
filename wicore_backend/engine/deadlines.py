"""Which request is the next to miss a deadline."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import count

from wicore_backend.engine.request import DeadlineKind, Sequence

Entry = tuple[float, int, DeadlineKind, Sequence]


class DeadlineHeap:
    """Deadlines of live sequences, soonest first. Those that have ended leave theirs behind for a while.

    Parameters
    ----------
    live
        The sequences that have not ended; it is looked at whenever a deadline is.
    """

    def __init__(self, live: AbstractSet[Sequence]) -> None:
        self._live = live
        self._heap: list[Entry] = []
        self._number = count()
        self._clean_at = 64

    def add(self, sequence: Sequence) -> None:
        for kind, seconds in sequence.request.deadlines.items():
            heapq.heappush(self._heap, (sequence.arrival + seconds, next(self._number), kind, sequence))
        if len(self._heap) > self._clean_at:
            self._heap = [entry for entry in self._heap if self._matters(entry[3], entry[2])]
            heapq.heapify(self._heap)
            self._clean_at = max(64, 2 * len(self._heap))

    def missed(self, now: float) -> Iterator[tuple[Sequence, DeadlineKind]]:
        """Take the deadlines that have passed and still matter."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, sequence = heapq.heappop(self._heap)
            if self._matters(sequence, kind):
                yield sequence, kind

    def _matters(self, sequence: Sequence, kind: DeadlineKind) -> bool:
        """Whether the sequence is alive and has not yet done what it had to."""
        if sequence not in self._live:
            return False
        if kind is DeadlineKind.QUEUE:
            return sequence.blocks is None and sequence.leader is None and not sequence.preemptions
        return kind is DeadlineKind.TOTAL or not sequence.answered
