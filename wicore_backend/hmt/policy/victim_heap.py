"""A heap whose entries can be taken back."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class VictimHeap(Generic[K]):
    """Keys by score, lowest first, equal scores by who came first. All calls O(log n), amortized.

    Removed entries stay in the heap until they surface; it is rebuilt once they are the majority, so that memory
    stays within twice the live keys. Scores compare with each other (numbers or tuples of them).
    """

    _SLACK = 64

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, K]] = []
        self._live: dict[K, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: K) -> bool:
        return key in self._live

    def push(self, key: K, score: Any) -> None:
        """Put `key` in, in place of its former entry if it has one."""
        self._count += 1
        self._live[key] = self._count
        heapq.heappush(self._heap, (score, self._count, key))
        if len(self._heap) > 2 * len(self._live) + self._SLACK:
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def remove(self, key: K) -> None:
        """Take `key` out. KeyError if it is not in."""
        del self._live[key]

    def peek(self) -> tuple[Any, K] | None:
        """The lowest score and its key, or None if the heap is empty."""
        heap = self._heap
        while heap:
            score, count, key = heap[0]
            if self._live.get(key) == count:
                return score, key
            heapq.heappop(heap)
        return None

    def highest(self) -> Iterator[K]:
        """The keys by score, highest first, in O(n log n)."""
        live = sorted((entry for entry in self._heap if self._live.get(entry[2]) == entry[1]), reverse=True)
        return (key for _, _, key in live)

    def pop(self) -> K:
        """Take out the key of the lowest score. IndexError if the heap is empty."""
        while True:
            _, count, key = heapq.heappop(self._heap)
            if self._live.get(key) == count:
                del self._live[key]
                return key
