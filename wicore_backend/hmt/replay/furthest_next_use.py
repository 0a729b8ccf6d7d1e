"""The reference that knows the future."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from wicore_backend.hmt.policy.base import Access, Key, Policy, no_victim
from wicore_backend.hmt.policy.victim_heap import VictimHeap


class FurthestNextUse(Policy):
    """The block whose next use is furthest away leaves first (Belady 1966); among equals, the deepest.

    It is no bound for a cache that only counts unbroken prefixes, but nothing that does not know the future comes
    near. It must observe exactly `prompts`, in order.

    Parameters
    ----------
    prompts
        For each prompt its blocks, root first.
    """

    def __init__(self, capacity: int, prompts: Sequence[Sequence[Key]]) -> None:
        super().__init__(capacity)
        self._heap: VictimHeap[Key] = VictimHeap()
        self._seen = 0
        self._rank: dict[Key, tuple[float, int]] = {}
        self._next: list[list[float]] = []
        upcoming: dict[Key, float] = {}
        for index in range(len(prompts) - 1, -1, -1):
            blocks = prompts[index]
            self._next.append([upcoming.get(block, math.inf) for block in blocks])
            upcoming.update(dict.fromkeys(blocks, float(index)))
        self._next.reverse()

    def __len__(self) -> int:
        return len(self._heap)

    def observe(self, access: Access) -> None:
        for depth, (key, when) in enumerate(zip(access.keys, self._next[self._seen], strict=True)):
            self._rank[key] = (-when, -depth)
        self._seen += 1

    def admit(self, key: Key) -> bool:
        """Whether the block's next use is no later than that of the one that would leave for it."""
        lowest = self._heap.peek()
        return len(self) < self.capacity or lowest is None or self._rank[key] > lowest[0]

    def add(self, key: Key) -> None:
        self._heap.push(key, self._rank[key])

    def use(self, key: Key) -> None:
        self._heap.remove(key)

    def evict(self) -> Key:
        if not self._heap:
            raise no_victim("belady")
        return self._heap.pop()

    def dearest(self) -> Iterator[Key]:
        return self._heap.highest()

    def discard(self, key: Key) -> None:
        if key in self._heap:
            self._heap.remove(key)
