"""The closed forms of A2CR: fixed weights instead of what the learnt form finds out.

Both count uses beyond a block's eviction (bounded ghosts) and take attention as a block's share of it over the mean
block's. Attention that is not known counts as the mean's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE, Access, Key, Policy, no_victim
from wicore_backend.hmt.policy.victim_heap import VictimHeap


@dataclass(frozen=True, slots=True, kw_only=True)
class FormulaSettings:
    """Weights of the weighted form, and the decay of both, in 1/s."""

    attention_weight: float = 0.4
    frequency_weight: float = 0.3
    recency_weight: float = 0.3
    time_decay_factor: float = 0.05
    ghost_multiple: int = 16


@dataclass(eq=False, slots=True)
class _Past:
    """Uses and smoothed relative attention of a block, cached or not."""

    uses: int = 0
    attention: float = 1.0


class _Formula(Policy):
    """What both forms remember."""

    _SMOOTHING = 0.25

    def __init__(self, capacity: int, settings: FormulaSettings | None = None) -> None:
        super().__init__(capacity)
        self.settings = settings or FormulaSettings()
        self._pasts: OrderedDict[Key, _Past] = OrderedDict()
        self._mean_mass = 0.0

    def observe(self, access: Access) -> None:
        for _ in self.observing(access):
            pass

    def observing(self, access: Access) -> Iterator[None]:
        """See Policy. A prompt is a use of each of its blocks, cached or not."""
        for count, key in enumerate(access.keys, start=1):
            self._count_use(key)
            if count % BLOCKS_AT_ONCE == 0:
                yield

    def attend(self, key: Key, mass: float) -> None:
        past = self._pasts.get(key)
        if past is None or not (math.isfinite(mass) and mass >= 0):
            return
        self._mean_mass += (mass - self._mean_mass) / 1024 if self._mean_mass else mass
        if self._mean_mass > 0:
            past.attention += self._SMOOTHING * (mass / self._mean_mass - past.attention)

    def _past(self, key: Key) -> _Past:
        """Of a block that is added; one that was in no prompt that this has been told of counts as used now."""
        return self._pasts.get(key) or self._count_use(key)

    def _count_use(self, key: Key) -> _Past:
        past = self._pasts.setdefault(key, _Past())
        past.uses += 1
        self._pasts.move_to_end(key)
        if len(self._pasts) > (1 + self.settings.ghost_multiple) * self.capacity:
            self._pasts.popitem(last=False)
        return past


class ProductA2CR(_Formula):
    """Attention x uses x exp(-decay x age). All age alike, so the order never changes between uses."""

    def __init__(self, capacity: int, settings: FormulaSettings | None = None) -> None:
        super().__init__(capacity, settings)
        self._heap: VictimHeap[Key] = VictimHeap()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: Key) -> None:
        past = self._past(key)
        score = math.log(max(past.attention, 1e-9) * past.uses) + self.settings.time_decay_factor * self.now
        self._heap.push(key, score)

    def use(self, key: Key) -> None:
        self._heap.remove(key)

    def evict(self) -> Key:
        if not self._heap:
            raise no_victim("a2cr_product")
        return self._heap.pop()

    def dearest(self) -> Iterator[Key]:
        return self._heap.highest()

    def discard(self, key: Key) -> None:
        if key in self._heap:
            self._heap.remove(key)


class WeightedA2CR(_Formula):
    """Weighted sum of attention, uses and recency.

    Attention a and uses u count as a / (1 + a) and u / (1 + u), recency as exp(-decay x age). The first two stay as
    they are between uses: in steps of a 64th they make queues, whose oldest block has the lowest score of its queue.
    """

    STEPS = 64

    def __init__(self, capacity: int, settings: FormulaSettings | None = None) -> None:
        super().__init__(capacity, settings)
        self._queues: dict[int, OrderedDict[Key, float]] = {}
        self._home: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._home)

    def add(self, key: Key) -> None:
        past, settings = self._past(key), self.settings
        steady = settings.attention_weight * past.attention / (1 + past.attention)
        steady += settings.frequency_weight * past.uses / (1 + past.uses)
        step = self._home[key] = round(self.STEPS * steady)
        self._queues.setdefault(step, OrderedDict())[key] = self.now

    def use(self, key: Key) -> None:
        self._leave(key)

    def evict(self) -> Key:
        if not self._home:
            raise no_victim("a2cr_weighted")
        lowest = min(self._queues.items(), key=lambda item: self._score(*item))[1]
        victim = next(iter(lowest))
        self._leave(victim)
        return victim

    def dearest(self) -> Iterator[Key]:
        queues = sorted(self._queues.items(), reverse=True, key=lambda item: item[0])
        return chain.from_iterable(reversed(queue) for _, queue in queues)

    def discard(self, key: Key) -> None:
        if key in self._home:
            self._leave(key)

    def _score(self, step: int, queue: OrderedDict[Key, float]) -> float:
        age = self.now - next(iter(queue.values()))
        return step / self.STEPS + self.settings.recency_weight * math.exp(-self.settings.time_decay_factor * age)

    def _leave(self, key: Key) -> None:
        step = self._home.pop(key)
        queue = self._queues[step]
        del queue[key]
        if not queue:
            del self._queues[step]
