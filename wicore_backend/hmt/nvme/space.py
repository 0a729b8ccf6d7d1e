"""Which slots are free: runs of neighbours, so that a record is few I/Os after years of reuse. No files, no clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Run(NamedTuple):
    """`length` slots from slot `start` onwards."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def runs_of(slots: Iterable[int]) -> Iterator[Run]:
    """The slots, in their order, as runs."""
    start = stop = None
    for slot in slots:
        if slot != stop:
            if start is not None and stop is not None:
                yield Run(start, stop - start)
            start = slot
        stop = slot + 1
    if start is not None and stop is not None:
        yield Run(start, stop - start)


class FreeSpace:
    """The free slots, as maximal runs: two free runs never touch.

    A record takes the shortest run that holds it whole, so that records of one size refill each other's places and a
    fresh store is written from front to back. Where no run is long enough, it takes the longest ones.
    Each operation costs O(log distinct lengths) for each run that it takes or gives.
    """

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self.slots = 0
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._starts_of: dict[int, dict[int, None]] = {}
        self._lengths: list[int] = []
        self.release(runs)

    @property
    def runs(self) -> list[Run]:
        """The free runs in order of place."""
        return sorted(Run(start, length) for start, length in self._length_at.items())

    def take(self, slots: int) -> tuple[Run, ...] | None:
        """`slots` slots, no longer free; None, and nothing taken, if there are fewer."""
        if slots > self.slots:
            return None
        taken = []
        while slots:
            place = bisect_left(self._lengths, slots)
            length = self._lengths[min(place, len(self._lengths) - 1)]
            start = next(reversed(self._starts_of[length]))
            self._remove(start, length)
            if length > slots:
                self._add(start + slots, length - slots)
                length = slots
            taken.append(Run(start, length))
            slots -= length
        return tuple(taken)

    def release(self, runs: Iterable[Run]) -> None:
        """Make `runs`, none of which is free, free."""
        for start, length in runs:
            before = self._start_before.get(start)
            after = self._length_at.get(start + length)
            if after is not None:
                self._remove(start + length, after)
                length += after
            if before is not None:
                length += start - before
                self._remove(before, start - before)
                start = before
            self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        if length not in self._starts_of:
            self._starts_of[length] = {}
            insort(self._lengths, length)
        self._starts_of[length][start] = None
        self.slots += length

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_before[start + length]
        starts = self._starts_of[length]
        del starts[start]
        if not starts:
            del self._starts_of[length]
            del self._lengths[bisect_left(self._lengths, length)]
        self.slots -= length
