"""Who waits, and who is next: priorities that age, and tenants that share. Pure accounting: no tensors, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

IDLE_ACCOUNTS = 256
"""Tenants of a class that have nothing waiting and are still remembered: about as many as requests run at once."""


class Waiting(Protocol):
    """What the queue asks of an item. It is read once, at `push`, so the values may change while the item waits."""

    @property
    def priority(self) -> int:
        """The item's class; the smallest comes first."""

    @property
    def tenant(self) -> str: ...

    @property
    def arrival(self) -> float:
        """Seconds, on the clock of `now`."""

    @property
    def cost(self) -> int:
        """Tokens that serving it will take, as far as one knows."""


T = TypeVar("T", bound=Waiting)
V = TypeVar("V")
Key = tuple[Any, ...]


class Next(NamedTuple, Generic[T]):
    """The item to serve next. A `promoted` one goes before a higher class by its age: none should preempt it."""

    item: T
    promoted: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in a class: items, tokens, and the arrival of the oldest."""

    count: int
    tokens: int
    oldest: float


class WaitingQueue(Generic[T]):
    """Items in the order in which they should be served.

    *Between classes* the smaller priority goes first. So that nothing starves, every `aged_share`-th pop goes instead
    to the class of the item that has waited longest, once that is `ageing_s`; from a lower class it is *promoted*.

    *Between the tenants of a class* service is shared by weight (virtual token counters: Sheng et al., "Fairness in
    Serving Large Language Models", OSDI 2024). Each has a counter of tokens received / weight, and the smallest goes
    first. A tenant that comes back from having nothing to do starts no lower than the smallest counter of those that
    wait: it keeps its debts and saves no credit. When nobody waits in a class, all its debts are forgiven. A pop by
    age goes to the tenant whose last service is longest ago, so that a long backlog does not count as patience.

    *Within a tenant* items go in order of arrival.

    Each operation on an item takes O(log n), amortised. Items are told apart by identity.

    Parameters
    ----------
    ageing_s
        Seconds of waiting after which an item's class may have its turn by age.
    aged_share
        One pop in so many is open to turns by age.
    weights
        Shares of tenants; 1 for those not named.
    """

    def __init__(self, *, ageing_s: float, aged_share: int, weights: Mapping[str, float] | None = None) -> None:
        if not ageing_s >= 0:
            raise ValueError(f"ageing_s is {ageing_s}; give a number of seconds, 0 or more")
        if aged_share < 1:
            raise ValueError(f"aged_share is {aged_share}; give 1 or more (10 opens every tenth pop to ageing)")
        for tenant, weight in (weights or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of tenant {tenant!r} is {weight}; give a positive, finite number")
        self._ageing_s = ageing_s
        self._aged_share = aged_share
        self._weights = dict(weights or {})
        self._entries: dict[int, _Entry[T]] = {}
        self._classes: dict[int, _Class[T]] = {}
        self._by_priority: _Heap[_Class[T]] = _Heap()
        self._by_age: _Heap[_Entry[T]] = _Heap()
        self._unserved: _Heap[_Entry[T]] = _Heap()
        self._pushes = 0
        self._pops = 0
        self.tokens = 0
        """Sum of the costs of all that wait."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """All that wait, in order of their pushes."""
        return (entry.item for entry in self._entries.values())

    def push(self, item: T, *, charged: bool = False) -> None:
        """Add an item. One that comes back (`charged`) takes its old place and is not charged again."""
        if id(item) in self._entries:
            raise ValueError(f"{item!r} waits already; remove it first")
        self._pushes += 1
        order = (item.arrival, not charged, self._pushes)
        entry = _Entry(item, item.priority, item.tenant, item.cost, charged, order)
        if (klass := self._classes.get(entry.priority)) is None:
            klass = self._classes[entry.priority] = _Class(self._weights)
            self._by_priority.put((entry.priority,), klass)
        klass.add(entry)
        self._entries[id(item)] = entry
        self._by_age.put(order, entry)
        if not charged:
            self._unserved.put(entry.lowest_and_newest_first, entry)
        self.tokens += entry.cost

    def remove(self, item: T) -> None:
        """Take an item out, wherever it is. KeyError if it does not wait."""
        if (entry := self._entries.get(id(item))) is None:
            raise KeyError(f"{item!r} does not wait")
        self._take(entry)

    def peek(self, now: float, *, ageing: bool = True) -> Next[T] | None:
        """What `pop` would take, or None if nothing waits. Changes nothing."""
        if (chosen := self._next(now, ageing)) is None:
            return None
        entry, promoted = chosen
        return Next(entry.item, promoted)

    def pop(self, now: float) -> Next[T]:
        """Take the next item and charge its tenant for it. IndexError if nothing waits."""
        if (chosen := self._next(now)) is None:
            raise IndexError("pop from an empty queue")
        entry, promoted = chosen
        self.serve(entry.item, now)
        return Next(entry.item, promoted)

    def serve(self, item: T, now: float) -> None:
        """Take and charge an item that `peek` named, whatever has been pushed since."""
        self._pops += 1
        self._take(self._entries[id(item)], served=now)

    def charge(self, priority: int, tenant: str, tokens: int) -> None:
        """Settle what a popped item really took: `tokens` more (or less, if negative) than its cost said."""
        if klass := self._classes.get(priority):
            klass.charge(tenant, tokens)

    def newest_of_lowest(self) -> T | None:
        """The item to turn away for a higher class: the newest of the lowest class, of those never served yet."""
        entry = self._unserved.first
        return None if entry is None else entry.item

    def backlogs(self) -> dict[int, Backlog]:
        """What waits in each class, by priority."""
        return {
            priority: Backlog(len(klass.by_age), klass.tokens, klass.by_age.key[0])
            for priority, klass in sorted(self._classes.items())
        }

    def _next(self, now: float, ageing: bool = True) -> tuple[_Entry[T], bool] | None:
        oldest, klass = self._by_age.first, self._by_priority.first
        if oldest is None or klass is None:
            return None
        if ageing and (self._pops + 1) % self._aged_share == 0 and now - oldest.order[0] >= self._ageing_s:
            aged = self._classes[oldest.priority]
            return aged.most_patient, aged is not klass
        return klass.next, False

    def _take(self, entry: _Entry[T], *, served: float | None = None) -> None:
        klass = self._classes[entry.priority]
        klass.take(entry, served=served)
        if not klass.by_age:
            del self._classes[entry.priority]
            self._by_priority.remove((entry.priority,))
        del self._entries[id(entry.item)]
        self._by_age.remove(entry.order)
        if not entry.charged:
            self._unserved.remove(entry.lowest_and_newest_first)
        self.tokens -= entry.cost


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    """An item, and what it said of itself when it was pushed."""

    item: T
    priority: int
    tenant: str
    cost: int
    charged: bool
    order: Key
    """Arrival; at the same time, one that comes back before a new one; then order of pushes."""

    @property
    def lowest_and_newest_first(self) -> Key:
        arrival, _, push = self.order
        return (-self.priority, -arrival, -push)


class _Class(Generic[T]):
    """The items of one priority, never none, and the accounts of their tenants.

    An account is *active* while something of its tenant waits, and has then a place in `_turns` and in `_patience`;
    else it is *idle*. Of the idle ones those with the smallest counters are forgotten first: they owe least.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._accounts: dict[str, _Account[T]] = {}
        self._turns: _Heap[_Account[T]] = _Heap()
        self._patience: _Heap[_Account[T]] = _Heap()
        self._idle: _Heap[_Account[T]] = _Heap()
        self.by_age: _Heap[_Entry[T]] = _Heap()
        self.tokens = 0

    @property
    def next(self) -> _Entry[T]:
        """The oldest item of the tenant that has had the least."""
        return _head(self._turns)

    @property
    def most_patient(self) -> _Entry[T]:
        """The oldest item of the tenant that has gone longest without service."""
        return _head(self._patience)

    def add(self, entry: _Entry[T]) -> None:
        account = self._account(entry.tenant)
        self._leave_places(account)
        if not account.waiting:
            account.floor = self._least
            account.counter = max(account.counter, account.floor)
        account.waiting.put(entry.order, entry)
        self._take_places(account)
        self.by_age.put(entry.order, entry)
        self.tokens += entry.cost

    def take(self, entry: _Entry[T], *, served: float | None) -> None:
        """Take an item out; if it is `served` (now), its tenant is charged, unless it has been for this item."""
        account = self._accounts[entry.tenant]
        self._leave_places(account)
        account.waiting.remove(entry.order)
        if served is not None:
            account.served = served
            if not entry.charged:
                account.charge(entry.cost)
        self._take_places(account)
        self.by_age.remove(entry.order)
        self.tokens -= entry.cost
        self._forget()

    def charge(self, tenant: str, tokens: int) -> None:
        account = self._account(tenant)
        self._leave_places(account)
        account.charge(tokens)
        self._take_places(account)
        self._forget()

    @property
    def _least(self) -> float:
        """The smallest counter of the active accounts; 0 for the first item of a class."""
        return self._turns.key[0] if self._turns else 0.0

    def _account(self, tenant: str) -> _Account[T]:
        if (account := self._accounts.get(tenant)) is None:
            account = _Account(tenant, self._weights.get(tenant, 1.0), counter=self._least, floor=self._least)
            self._accounts[tenant] = account
            self._take_places(account)
        return account

    def _take_places(self, account: _Account[T]) -> None:
        if head := account.waiting.first:
            self._turns.put((account.counter, *head.order), account)
            self._patience.put((max(account.served, head.order[0]), *head.order), account)
        else:
            self._idle.put((account.counter, account.tenant), account)

    def _leave_places(self, account: _Account[T]) -> None:
        """Undo `_take_places`; to be called before anything changes that decides the places."""
        if head := account.waiting.first:
            self._turns.remove((account.counter, *head.order))
            self._patience.remove((max(account.served, head.order[0]), *head.order))
        else:
            self._idle.remove((account.counter, account.tenant))

    def _forget(self) -> None:
        if len(self._idle) > IDLE_ACCOUNTS and (account := self._idle.first):
            self._leave_places(account)
            del self._accounts[account.tenant]


@dataclass(eq=False, slots=True)
class _Account(Generic[T]):
    """A tenant's standing in one class."""

    tenant: str
    weight: float
    counter: float
    """Tokens received / weight."""
    floor: float
    """Where the counter starts without debts. A refund goes no lower: it is not credit from before."""
    served: float = -math.inf
    """When something of it was last popped."""
    waiting: _Heap[_Entry[T]] = field(default_factory=lambda: _Heap())

    def charge(self, tokens: int) -> None:
        self.counter = max(self.counter + tokens / self.weight, self.floor)


class _Heap(Generic[V]):
    """Values by unique key, smallest first. A removed key stays until it surfaces or such keys outnumber the others."""

    __slots__ = ("_keys", "_values")

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._values: dict[Key, V] = {}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def first(self) -> V | None:
        return self._values[self._keys[0]] if self._keys else None

    @property
    def key(self) -> Key:
        """The key of `first`."""
        return self._keys[0]

    def put(self, key: Key, value: V) -> None:
        self._values[key] = value
        heappush(self._keys, key)

    def remove(self, key: Key) -> None:
        keys, values = self._keys, self._values
        del values[key]
        if len(keys) > 2 * len(values) + 16:
            keys[:] = values
            heapify(keys)
        while keys and keys[0] not in values:
            heappop(keys)


def _head(accounts: _Heap[_Account[T]]) -> _Entry[T]:
    account = accounts.first
    assert account is not None, "a class without items outlived its last"
    entry = account.waiting.first
    assert entry is not None, "an idle account has a place among the active"
    return entry
