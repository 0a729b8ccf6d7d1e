"""What a pool of device blocks gives up when it needs room, in which order. No tensors, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from wicore_backend.hmt.policy.base import Access, Policy

V = TypeVar("V")

_AT_ONCE = 512
"""Names that a policy is told of in one `tend`, or more if others wait: about two milliseconds' work."""
_WAITING_SHARE = 1 / 8
"""Of those that wait it is told at least so many, so that they never become more than it takes to catch up."""
_PART = 64
"""What a part of `Policy.observing` counts for: a millisecond's work at most, most have less."""


class _News(NamedTuple):
    """Something that a policy has not been told yet: `tell` is called for each of `items`, which count for `weight`."""

    tell: Callable[[Any], object]
    items: Iterator[Any]
    weight: int


class Victims(Generic[V]):
    """Things that nobody uses, by name, each of which can be given up: *idle*, or *set aside* by a policy.

    What has been idle longest is given up first, unless a policy has set others aside: those go before. To ask a policy
    takes longer than the planning of a step may. So it is neither told nor asked anything but in `tend`, for which
    there is time while the device computes: what happens in between is noted, and if more is given up than was set
    aside, the rest is what has been idle longest. To the policy what it set aside is gone.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy
        self._idle: OrderedDict[bytes, V] = OrderedDict()
        self._aside: OrderedDict[bytes, V] = OrderedDict()
        self._news: deque[_News] = deque()
        self._waiting = 0  # how much the news count for, about

    def __len__(self) -> int:
        return len(self._idle) + len(self._aside)

    def __contains__(self, name: bytes) -> bool:
        return name in self._idle or name in self._aside

    def __iter__(self) -> Iterator[V]:
        """As they would be given up now."""
        yield from self._aside.values()
        yield from self._idle.values()

    def add(self, names: Sequence[bytes], victims: Sequence[V]) -> None:
        """Nobody uses these any more; the first is the first to go."""
        idle = self._idle
        for name, victim in zip(names, victims, strict=True):
            idle[name] = victim
        if self._policy is not None:
            self._note(self._policy.add, names)

    def use(self, name: bytes) -> None:
        """It is used again. KeyError if it is not here."""
        if self._aside.pop(name, None) is None:
            del self._idle[name]
            if self._policy is not None:
                self._note(self._policy.use, (name,))

    def take(self, count: int) -> list[V]:
        """Give up so many; KeyError if there are fewer."""
        taken: list[V] = []
        while self._aside and len(taken) < count:
            taken.append(self._aside.popitem(last=False)[1])
        if missing := count - len(taken):
            take = self._idle.popitem
            longest = [take(last=False) for _ in range(missing)]
            taken += [victim for _, victim in longest]
            if self._policy is not None:
                self._note(self._policy.discard, [name for name, _ in longest])
        return taken

    def clear(self) -> None:
        """There are none any more."""
        if self._policy is not None:
            self._note(self._policy.discard, list(self._idle))
        self._idle.clear()
        self._aside.clear()

    # The policy.

    def observe(self, access: Access) -> None:
        """A prompt has come; see Policy."""
        if self._policy is not None:
            self._waiting += len(access.keys)
            self._news.append(_News(_nothing, self._policy.observing(access), _PART))

    def attend(self, names: Sequence[bytes], masses: Sequence[float]) -> None:
        """A sequence gave things of these names such attention; see Policy."""
        policy = self._policy
        if policy is not None:
            self._note(lambda told: policy.attend(*told), list(zip(names, masses, strict=True)))

    def tend(self, now: float, count: int) -> None:
        """Let the policy know what has happened, and set aside what it would give up, until there are `count` aside."""
        if self._policy is None:
            return
        self._policy.advance(now)
        self._policy.think()
        self._tell(max(_AT_ONCE, int(_WAITING_SHARE * self._waiting)))
        # Who does not know all yet could choose what is used again, or gone.
        while not self._news and len(self._aside) < count and self._idle:
            name = self._policy.evict()
            assert isinstance(name, bytes)
            self._aside[name] = self._idle.pop(name)

    def _note(self, tell: Callable[[Any], object], items: Collection[Any]) -> None:
        self._waiting += len(items)
        self._news.append(_News(tell, iter(items), 1))

    def _tell(self, most: int) -> None:
        """Tell the policy what has been noted, in order, until it counts for `most`."""
        left = most
        while self._news and left > 0:
            tell, items, weight = self._news[0]
            for item in items:
                tell(item)
                left -= weight
                if left <= 0:
                    break
            else:
                self._news.popleft()
        self._waiting = max(0, self._waiting - most + left) if self._news else 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless everything is here once, and a policy that knows all knows what is idle."""
        assert not self._idle.keys() & self._aside.keys(), "something is idle and set aside"
        if self._policy is not None and not self._news:
            assert len(self._policy) == len(self._idle), "the policy has lost track of what is idle"


def _nothing(_: object) -> None:
    """Parts of an observation come with work, and without a result."""
