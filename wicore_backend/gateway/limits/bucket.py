"""The token bucket, as arithmetic: no clock, no store.

`shared.py` has the same arithmetic in Lua; tests run both on the same sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Rate:
    """What a bucket gives.

    Attributes
    ----------
    per_second
        It fills at this rate.
    capacity
        It holds so much when its owner has been idle.
    """

    per_second: float
    capacity: float

    @classmethod
    def per_minute(cls, amount: float, *, burst_s: float, least: float = 0.0) -> Rate:
        """A rate per minute that saves up what `burst_s` seconds give, or at least `least`."""
        return cls(amount / 60, max(amount / 60 * burst_s, least))


class Level(NamedTuple):
    """A bucket at a moment. Below zero it is in debt: more was taken than it had, and all of it is paid back before
    anything else is given, so that the rate holds in the long run whatever a request costs."""

    value: float
    at: float
    """Seconds, of whatever clock the store goes by."""

    def now(self, rate: Rate, now: float) -> float:
        """What it holds at a later moment. A clock that went backwards adds nothing."""
        return min(rate.capacity, self.value + max(0.0, now - self.at) * rate.per_second)


def wait_for(level: float, cost: float, rate: Rate) -> float:
    """Seconds until `cost` may be taken; 0 if it may now.

    What costs more than the bucket ever holds is given when the bucket is full, and leaves a debt.
    """
    missing = min(cost, rate.capacity) - level
    # A millionth of the cost is rounding, not a limit.
    return 0.0 if missing <= 1e-6 * max(1.0, cost) else missing / rate.per_second


@dataclass(frozen=True, slots=True)
class Charge:
    """What is to be taken from one bucket.

    Attributes
    ----------
    bucket
        Its name.
    """

    bucket: str
    rate: Rate
    cost: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of charges that are taken together or not at all.

    Attributes
    ----------
    waits
        For each charge, in order: the seconds until it alone could be taken; all are 0 if they were taken.
    levels
        For each charge: what its bucket holds now.
    """

    waits: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def taken(self) -> bool:
        """Whether the request may go on."""
        return not any(self.waits)


def decide(charges: Sequence[Charge], levels: Sequence[float]) -> Decision:
    """Take all charges from buckets that hold `levels`, or none of them."""
    waits = tuple(wait_for(level, c.cost, c.rate) for c, level in zip(charges, levels, strict=True))
    if any(waits):
        return Decision(waits, tuple(levels))
    return Decision(waits, tuple(level - c.cost for c, level in zip(charges, levels, strict=True)))
