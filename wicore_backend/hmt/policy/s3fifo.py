"""S3-FIFO: Yang et al., "FIFO Queues Are All You Need for Cache Eviction", SOSP 2023."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from wicore_backend.hmt.policy.base import Key, Policy, no_victim


class S3FIFO(Policy):
    """A small queue for newcomers, a main queue for what was used there, ghosts of what was not.

    A hit only counts; a block keeps its place in its queue. One that is in use when its turn to leave comes is taken
    out, and comes back at the end of the main queue, where a block with a hit would have gone.
    """

    SMALL_SHARE = 0.1  # the paper's
    MAX_COUNT = 3  # the paper's two bits

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small_size = max(1, round(capacity * self.SMALL_SHARE))
        self._ghost_size = capacity - self._small_size
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._in_use: set[Key] = set()
        self._evictable = 0

    def __len__(self) -> int:
        return self._evictable

    def add(self, key: Key) -> None:
        self._evictable += 1
        if key in self._in_use:
            self._in_use.remove(key)
            if key not in self._small:
                self._main.setdefault(key, 0)
            return
        queue = self._main if key in self._ghosts else self._small
        self._ghosts.pop(key, None)
        queue[key] = 0

    def use(self, key: Key) -> None:
        if key in self._in_use:
            raise KeyError(key)
        queue = self._small if key in self._small else self._main
        queue[key] = min(self.MAX_COUNT, queue[key] + 1)
        self._in_use.add(key)
        self._evictable -= 1

    def evict(self) -> Key:
        if not self._evictable:
            raise no_victim("s3fifo")
        while True:
            from_small = bool(self._small) and (len(self._small) >= self._small_size or not self._main)
            queue = self._small if from_small else self._main
            key, count = queue.popitem(last=False)
            if key in self._in_use:
                continue
            if from_small and count > 1:
                self._main[key] = 0
            elif not from_small and count:
                self._main[key] = count - 1
            else:
                break
        if from_small:
            self._ghosts[key] = None
            if len(self._ghosts) > self._ghost_size:
                self._ghosts.popitem(last=False)
        self._evictable -= 1
        return key

    def dearest(self) -> Iterator[Key]:
        cached = chain(reversed(self._main), reversed(self._small))
        return (key for key in cached if key not in self._in_use)

    def discard(self, key: Key) -> None:
        cached = self._small.pop(key, None) is not None or self._main.pop(key, None) is not None
        if key in self._in_use:
            self._in_use.remove(key)
        elif cached:
            self._evictable -= 1
