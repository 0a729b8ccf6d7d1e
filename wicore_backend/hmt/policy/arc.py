"""ARC: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from wicore_backend.hmt.policy.base import Key, Policy, no_victim

Queue = OrderedDict[Key, None]


class ARC(Policy):
    """Two LRU lists, blocks seen once and blocks seen again, each with ghosts; hits on ghosts move their border.

    Attributes
    ----------
    target
        The paper's p: how many blocks the list of those seen once should have.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.target = 0.0
        self._once: Queue = OrderedDict()
        self._again: Queue = OrderedDict()
        self._once_ghosts: Queue = OrderedDict()
        self._again_ghosts: Queue = OrderedDict()
        self._in_use: set[Key] = set()

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def add(self, key: Key) -> None:
        ghosts, others = self._once_ghosts, self._again_ghosts
        if key in self._in_use:
            self._in_use.remove(key)
            self._again[key] = None
        elif key in ghosts:
            self.target = min(self.capacity, self.target + max(1.0, len(others) / len(ghosts)))
            del ghosts[key]
            self._again[key] = None
        elif key in others:
            self.target = max(0.0, self.target - max(1.0, len(ghosts) / len(others)))
            del others[key]
            self._again[key] = None
        else:
            self._once[key] = None

    def use(self, key: Key) -> None:
        if key in self._once:
            del self._once[key]
        else:
            del self._again[key]
        self._in_use.add(key)

    def evict(self) -> Key:
        if not len(self):
            raise no_victim("arc")
        from_once = bool(self._once) and (len(self._once) > self.target or not self._again)
        source, ghosts = (self._once, self._once_ghosts) if from_once else (self._again, self._again_ghosts)
        key = source.popitem(last=False)[0]
        ghosts[key] = None
        self._forget_ghosts()
        return key

    def dearest(self) -> Iterator[Key]:
        return chain(reversed(self._again), reversed(self._once))

    def discard(self, key: Key) -> None:
        self._in_use.discard(key)
        self._once.pop(key, None)
        self._again.pop(key, None)

    def _forget_ghosts(self) -> None:
        while self._once_ghosts and len(self._once) + len(self._once_ghosts) > self.capacity:
            self._once_ghosts.popitem(last=False)
        while self._again_ghosts and len(self) + len(self._once_ghosts) + len(self._again_ghosts) > 2 * self.capacity:
            self._again_ghosts.popitem(last=False)
