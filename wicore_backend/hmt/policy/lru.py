"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from wicore_backend.hmt.policy.base import Key, Policy, no_victim


class LRU(Policy):
    """The block that was let go of longest ago leaves first."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, key: Key) -> None:
        self._queue[key] = None
        self._queue.move_to_end(key)

    def use(self, key: Key) -> None:
        del self._queue[key]

    def evict(self) -> Key:
        if not self._queue:
            raise no_victim("lru")
        return self._queue.popitem(last=False)[0]

    def dearest(self) -> Iterator[Key]:
        return reversed(self._queue)

    def discard(self, key: Key) -> None:
        self._queue.pop(key, None)
