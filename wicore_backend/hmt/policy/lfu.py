"""Least frequently used."""

from __future__ import annotations

from collections.abc import Iterator

from wicore_backend.hmt.policy.base import Key, Policy, no_victim
from wicore_backend.hmt.policy.victim_heap import VictimHeap


class LFU(Policy):
    """The block with the fewest uses since it was cached leaves first; among equals, the least recent."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._heap: VictimHeap[Key] = VictimHeap()
        self._uses: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: Key) -> None:
        self._uses[key] = uses = self._uses.get(key, 0) + 1
        self._heap.push(key, uses)

    def use(self, key: Key) -> None:
        self._heap.remove(key)

    def evict(self) -> Key:
        if not self._heap:
            raise no_victim("lfu")
        key = self._heap.pop()
        del self._uses[key]
        return key

    def dearest(self) -> Iterator[Key]:
        return self._heap.highest()

    def discard(self, key: Key) -> None:
        self._uses.pop(key, None)
        if key in self._heap:
            self._heap.remove(key)
