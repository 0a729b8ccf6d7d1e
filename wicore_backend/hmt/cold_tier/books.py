"""What the cold tier holds, and which records leave for others. Safe on any thread; no tensors.

The lock is held for microseconds, by `listen` for a millisecond, and never while the disk is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import Protocol, TypeVar, cast

from wicore_backend.hmt.cold_tier.records import key_of, record_name
from wicore_backend.hmt.cold_tier.statistics import ColdCounts
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import HeldRecord, Outcome
from wicore_backend.hmt.nvme.record import slots_for
from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE, Access, Policy
from wicore_backend.hmt.policy.lru import LRU

_log = logging.getLogger(__name__)

_HEARD = object()

_MOST_NEWS = 1024
"""That wait for the policy's thread; if it does not come to them, the oldest are forgotten."""

T = TypeVar("T")


class ColdAccountingError(AssertionError):
    """The books contradict themselves: a bug here, never a user's fault."""


class StoreShape(Protocol):
    """How many slots a store has, and of what size."""

    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...


class RecordNames(Protocol):
    """A store of records, as far as the books are concerned: `hmt/nvme` is one."""

    @property
    def config(self) -> StoreShape: ...
    @property
    def lost(self) -> bool: ...
    def __contains__(self, name: bytes) -> bool: ...
    def records(self) -> Sequence[HeldRecord]: ...
    def delete(self, name: bytes) -> bool: ...
    def check_integrity(self) -> None: ...


class ColdBooks:
    """Every block is in one state.

    - *unknown*: neither in the store nor on its way.
    - *spilling*: on its way there.
    - *held*: in the store. The policy may choose it as a victim, unless it is
    - *pinned*: held and being restored, once or several times.

    Parameters
    ----------
    encoded_bytes
        Of a record of each group. Records of another length, or of no known name, are deleted.
    policy
        Makes the policy from the capacity in records.
    clock
        Of the policy, in seconds.
    """

    def __init__(
        self,
        store: RecordNames,
        encoded_bytes: Mapping[LayerGroup, int],
        policy: Callable[[int], Policy],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        slot_bytes = store.config.slot_bytes
        self._store = store
        self._clock = clock
        self._slots = {group: slots_for(size, slot_bytes) for group, size in encoded_bytes.items()}
        self.capacity = max(1, store.config.slots * len(self._slots) // sum(self._slots.values()))
        self._policy = policy(self.capacity)
        self._news: deque[Callable[[Policy], Iterator[None]]] = deque(maxlen=_MOST_NEWS)
        self._hearing: Iterator[None] | None = None
        self._lock = threading.Lock()
        self._held: dict[Key, int] = {}
        """For each held block how many restores pin it."""
        self._spilling: set[Key] = set()
        self._used_slots = 0
        self._held_blocks = dict.fromkeys(self._slots, 0)
        self._counts = {group: ColdCounts() for group in self._slots}
        for record in store.records():
            key = key_of(record.name)
            if key is None or encoded_bytes.get(key[0]) != record.payload_bytes:
                store.delete(record.name)
            else:
                self._held[key] = 0
                self._held_blocks[key[0]] += 1
        self._used_slots = sum(self._slots[group] * count for group, count in self._held_blocks.items())
        held = list(self._held)
        self._ask(lambda policy: policy.adopt(held))

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def newest(self, count: int) -> list[Key]:
        """Up to `count` held blocks, the one that was stored last first."""
        with self._lock:
            return list(islice(reversed(self._held), count))

    def observe(self, access: Access) -> None:
        """The policy is to hear of a prompt; see `listen`."""
        self._news.append(lambda policy: policy.observing(access))

    def attend(self, keys: Sequence[Key], masses: Sequence[float]) -> None:
        """The policy is to hear what attention blocks have had; see `listen`."""
        self._news.append(lambda policy: _attend(policy, keys, masses))

    def listen(self) -> bool:
        """Let the policy hear, or think, a bit more; whether there was anything."""
        with self._lock:
            if self._hearing is None:
                if not self._news:
                    return self._ask(lambda policy: policy.think())
                self._hearing = self._news.popleft()(self._policy)
            hearing = self._hearing
            if self._ask(lambda _: next(hearing, _HEARD)) is _HEARD:
                self._hearing = None
            return True

    # Down.

    def offer(self, key: Key) -> Outcome | None:
        """A block to be spilled: None if it is spilling from now on, else how that ends at once."""
        with self._lock:
            group = key[0]
            if key in self._held or key in self._spilling:
                outcome = Outcome.HELD
            elif self._used_slots + self._slots[group] > self._store.config.slots and not self._admits(key):
                outcome = Outcome.REFUSED
            else:
                self._spilling.add(key)
                self._used_slots += self._slots[group]
                return None
            self._counts[group].spills[outcome] += 1
            return outcome

    def stored(self, key: Key, outcome: Outcome) -> None:
        """A block's spilling is over."""
        with self._lock:
            self._spilling.remove(key)
            self._used_slots -= self._slots[key[0]]
            self._counts[key[0]].spills[outcome] += 1
            if outcome is Outcome.DONE:
                self._hold(key)

    def room(self, group: LayerGroup) -> int:
        """How many blocks would fit without another one's leaving."""
        with self._lock:
            return max(0, (self._store.config.slots - self._used_slots) // self._slots[group])

    def leave(self, group: LayerGroup, blocks: int) -> None:
        """So many were left to the caller."""
        with self._lock:
            self._counts[group].unasked += blocks

    def make_room(self, keys: Iterable[Key]) -> bool:
        """Delete victims until `keys` may fit; False if there was none."""
        missing = sum(self._slots[group] for group, _ in keys)
        any_deleted = False
        while missing > 0:
            with self._lock:
                if not self._ask(len):
                    break
                victim = cast(Key, self._ask(lambda policy: policy.evict()))
                self._drop(victim)
                self._store.delete(record_name(victim))
                self._counts[victim[0]].evicted += 1
            missing -= self._slots[victim[0]]
            any_deleted = True
        return any_deleted

    # Up.

    def pin(self, key: Key) -> bool:
        """Whether the block is held; if so it stays until `unpin`."""
        with self._lock:
            pins = self._held.get(key)
            if pins is None:
                self._counts[key[0]].restores[Outcome.MISSING] += 1
                return False
            if not pins:
                self._ask(lambda policy: policy.use(key))
            self._held[key] = pins + 1
            return True

    def unpin(self, key: Key, outcome: Outcome) -> None:
        """A restore of the block is over. If the store has lost the record meanwhile, it is forgotten."""
        with self._lock:
            self._counts[key[0]].restores[outcome] += 1
            pins = self._held.get(key)
            if pins is None:  # Forgotten by another restore of it.
                return
            if outcome is not Outcome.DONE and record_name(key) not in self._store:
                self._forget(key)
                return
            self._held[key] = pins - 1
            if pins == 1:
                self._ask(lambda policy: policy.add(key))

    def look(self, key: Key) -> None:
        """Forget the block if the store has lost it."""
        with self._lock:
            if key in self._held and record_name(key) not in self._store:
                self._forget(key)

    # Together.

    def counts(self) -> dict[LayerGroup, ColdCounts]:
        with self._lock:
            return deepcopy(self._counts)

    def held(self) -> dict[LayerGroup, int]:
        """For each group how many blocks are held."""
        with self._lock:
            return dict(self._held_blocks)

    def check_integrity(self, spilling: set[Key], pins: Mapping[Key, int]) -> None:
        """Raise ColdAccountingError unless the books fit the store's and what is under way."""
        with self._lock:
            self._store.check_integrity()
            in_store = {key_of(record.name) for record in self._store.records()}
            evictable = sum(not count for count in self._held.values())
            used = sum(self._slots[group] for group, _ in [*self._held, *self._spilling])
            if len(self._policy) != evictable:
                raise ColdAccountingError(f"{len(self._policy)} records are evictable to the policy, not {evictable}")
            if Counter(self._held_blocks) != Counter(group for group, _ in self._held):
                raise ColdAccountingError(f"{self._held_blocks} blocks are counted as held")
            if used != self._used_slots:
                raise ColdAccountingError(f"{self._used_slots} slots are counted as used, {used} are")
            if not self._spilling <= spilling or self._spilling & self._held.keys():
                raise ColdAccountingError("blocks are spilling that nobody has spilled, or that are held")
            if any(count > pins.get(key, 0) for key, count in self._held.items()):
                raise ColdAccountingError("records are pinned that nobody restores")
            if not in_store <= self._held.keys() | self._spilling:
                raise ColdAccountingError("the store has records that the books do not know")
            if not self._store.lost and any(key not in in_store for key, count in self._held.items() if not count):
                raise ColdAccountingError("records are held that the store does not have")

    def _admits(self, key: Key) -> bool:
        return self._ask(lambda policy: policy.admit(key))

    def _hold(self, key: Key) -> None:
        self._held[key] = 0
        self._held_blocks[key[0]] += 1
        self._used_slots += self._slots[key[0]]
        self._ask(lambda policy: policy.add(key))

    def _drop(self, key: Key) -> None:
        del self._held[key]
        self._held_blocks[key[0]] -= 1
        self._used_slots -= self._slots[key[0]]

    def _forget(self, key: Key) -> None:
        self._ask(lambda policy: policy.discard(key))
        self._drop(key)
        self._counts[key[0]].lost += 1

    def _ask(self, question: Callable[[Policy], T]) -> T:
        """What the policy says now. One that fails, which is a bug, gives way to the plainest there is."""
        try:
            self._policy.advance(self._clock())
            return question(self._policy)
        except Exception:
            _log.exception("cold_tier_policy_failed")
            self._policy = LRU(self.capacity)
            for key, pins in self._held.items():
                if not pins:
                    self._policy.add(key)
            return question(self._policy)


def _attend(policy: Policy, keys: Sequence[Key], masses: Sequence[float]) -> Iterator[None]:
    for count, (key, mass) in enumerate(zip(keys, masses, strict=True), start=1):
        policy.attend(key, mass)
        if count % BLOCKS_AT_ONCE == 0:
            yield
