"""Where buckets are kept: what that must do, and how it is done in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wicore_backend.gateway.limits.bucket import Charge, Decision, Level, Rate, decide

_SWEEP_EVERY = 1024
"""Buckets are looked through for full ones, which are as good as none, each time so many have been used."""


class BucketStore(Protocol):
    """Keeps buckets. A bucket that it has not heard of is full."""

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges or none, at once for all who use the store."""

    async def adjust(self, charges: Sequence[Charge]) -> None:
        """Take all charges in any case, into debt if need be; negative ones give back, up to what a bucket holds."""

    async def close(self) -> None:
        """Let go of connections."""


@dataclass(slots=True)
class MemoryStore:
    """Buckets of this process. In an event loop every operation is one step, and so atomic."""

    clock: Callable[[], float] = time.monotonic
    _levels: dict[str, tuple[Level, Rate]] = field(default_factory=dict)
    _operations: int = 0

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """As BucketStore has it."""
        now = self.clock()
        decision = decide(charges, [self._now(c, now) for c in charges])
        self._keep(charges, decision.levels, now)
        return decision

    async def adjust(self, charges: Sequence[Charge]) -> None:
        """As BucketStore has it."""
        now = self.clock()
        self._keep(charges, [min(c.rate.capacity, self._now(c, now) - c.cost) for c in charges], now)

    async def close(self) -> None:
        """Nothing to do."""

    def __len__(self) -> int:
        return len(self._levels)

    def _now(self, charge: Charge, now: float) -> float:
        kept = self._levels.get(charge.bucket)
        return charge.rate.capacity if kept is None else kept[0].now(charge.rate, now)

    def _keep(self, charges: Sequence[Charge], levels: Sequence[float], now: float) -> None:
        for charge, level in zip(charges, levels, strict=True):
            self._levels[charge.bucket] = Level(level, now), charge.rate
        self._operations += 1
        if self._operations % _SWEEP_EVERY == 0:
            self._levels = {
                name: (level, rate)
                for name, (level, rate) in self._levels.items()
                if level.now(rate, now) < rate.capacity
            }
