"""Books of the host tier: what the device tier gave up, by name, in slots of host memory. No tensors, no clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeAlias

from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.a2cr import A2CR, ScoreTerms
from wicore_backend.hmt.policy.base import Access, Policy

Key: TypeAlias = tuple[LayerGroup, bytes]
"""A block of any tier: its group and its name."""


class SlotBlock(NamedTuple):
    """A block, and the host tier's slot that holds it or is to hold it."""

    group: LayerGroup
    name: bytes
    slot: int

    @property
    def key(self) -> Key:
        return self.group, self.name


_HEARD = object()

_MOST_UNHEARD = 16
"""Prompts; more come faster than steps, and are heard at once."""


@dataclass(slots=True)
class TierCounts:
    """What happened in one group's part of a tier since the start, in blocks."""

    spilled: int = 0
    loaded: int = 0
    evicted: int = 0
    refused: int = 0
    """Not spilled: no slot could be had, or the policy thought nothing of the block."""
    written_behind: int = 0
    """Stored in the colder tier while they stayed."""


@dataclass(slots=True)
class _Shelf:
    """One group's slots."""

    free: list[int]
    policy: Policy
    slots: dict[bytes, int] = field(default_factory=dict)
    pins: dict[bytes, int] = field(default_factory=dict)
    leaving: set[bytes] = field(default_factory=set)
    stored: dict[bytes, None] = field(default_factory=dict)
    """In the order in which they came to be that."""
    copied: set[bytes] = field(default_factory=set)
    arriving: dict[bytes, int] = field(default_factory=dict)
    counts: TierCounts = field(default_factory=TierCounts)
    unheard: deque[Iterator[None]] = field(default_factory=deque)
    """Prompts that the policy has heard the beginning of, or nothing."""

    def go_on(self) -> bool:
        """Let the policy hear, or think, a bit more; whether there was anything."""
        if not self.unheard:
            return self.policy.think()
        if next(self.unheard[0], _HEARD) is _HEARD:
            self.unheard.popleft()
        return True

    def idle(self, name: bytes) -> bool:
        """Whether the policy may choose a block that is held."""
        return name not in self.pins and name not in self.leaving and name not in self.stored

    @property
    def at_hand(self) -> int:
        """Slots that another block can have, and nothing is lost."""
        return len(self.free) + len(self.stored)

    def take_free(self) -> int:
        """One of them."""
        if self.free:
            return self.free.pop()
        name = next(iter(self.stored))
        del self.stored[name]
        self.counts.evicted += 1
        return self.slots.pop(name)


class HostTier:
    """Which block is in which slot, and which leaves when room is needed.

    A slot is in one state:

    - *free*;
    - *held*: it has a block, which can be found, and which the policy may choose to give up;
    - *pinned*: the same, but somebody is about to use it, so that it stays;
    - *leaving*: the same, but it is on its way to a colder tier; when it is there the block is stored, unless somebody
      has pinned it meanwhile;
    - *stored*: the colder tier has the block as well, so that the slot is as good as free: it is given to another block
      when no other is free, the one that has been stored longest first. Until then the block can be found as ever, and
      is held again when it is used;
    - *copied*: held or pinned, and being read on its way to a colder tier, where it will be as well; if the policy
      gives it up meanwhile, it is leaving;
    - *arriving*: it is reserved for a block that comes from a colder tier, and which cannot be found before that.

    Between device and slots bytes move by the transfers that its calls lead to, and these are made in the order of the
    calls: so a slot may be given to another block while a transfer that reads it is still outstanding. What moves
    between slots and a colder tier is in no such order; `hmt/lower_tiers.py` says what holds there.

    Parameters
    ----------
    slots
        For each group how many blocks fit.
    policy
        Makes the policy of a group from its capacity.
    """

    def __init__(self, slots: Mapping[LayerGroup, int], policy: Callable[[int], Policy]) -> None:
        self.slots = dict(slots)
        self._shelves = {
            group: _Shelf(free=list(range(count - 1, -1, -1)), policy=policy(count))
            for group, count in slots.items()
            if count
        }

    def holds(self, group: LayerGroup, name: bytes) -> bool:
        shelf = self._shelves.get(group)
        return shelf is not None and name in shelf.slots

    def used(self, group: LayerGroup) -> int:
        """Slots that are neither free nor stored."""
        shelf = self._shelves.get(group)
        return 0 if shelf is None else len(shelf.slots) + len(shelf.arriving) - len(shelf.stored)

    def counts(self, group: LayerGroup) -> TierCounts:
        shelf = self._shelves.get(group)
        return TierCounts() if shelf is None else shelf.counts

    def observe(self, group: LayerGroup, access: Access) -> None:
        """A prompt has come; see Policy. Of a long one the policy hears the rest in `go_on`."""
        if (shelf := self._shelves.get(group)) is not None:
            shelf.unheard.append(shelf.policy.observing(access))
            shelf.go_on()
            while len(shelf.unheard) > _MOST_UNHEARD:
                shelf.go_on()

    def go_on(self) -> None:
        """Let each policy do a part of what it has to do, a millisecond or so: once a step."""
        for shelf in self._shelves.values():
            shelf.go_on()

    def attend(self, group: LayerGroup, name: bytes, mass: float) -> None:
        """Decoding gave a block, wherever it is, this share of its attention; see Policy."""
        if (shelf := self._shelves.get(group)) is not None:
            shelf.policy.attend(name, mass)

    def advance(self, now: float) -> None:
        """It is `now`, in seconds of a clock that never runs backwards."""
        for shelf in self._shelves.values():
            shelf.policy.advance(now)

    def explain(self, group: LayerGroup, name: bytes) -> ScoreTerms | None:
        """The score of a block, wherever it is, in its terms; None if the policy does not know it, or has no terms."""
        shelf = self._shelves.get(group)
        if shelf is None or not isinstance(shelf.policy, A2CR):
            return None
        return shelf.policy.explain(name)

    # Between the device and here.

    def spill(self, group: LayerGroup, name: bytes) -> int | None:
        """The slot for a block that the device tier gives up; None if it needs no copying, or is not to be kept."""
        shelf = self._shelves.get(group)
        if shelf is None:
            return None
        if name in shelf.slots:
            if name in shelf.stored:
                del shelf.stored[name]
                shelf.policy.add(name)
            elif shelf.idle(name):  # It has been of use on the device until now.
                shelf.policy.use(name)
                shelf.policy.add(name)
            return None
        if name in shelf.arriving or (not shelf.at_hand and not shelf.policy.admit(name)) or not _make_room(shelf):
            shelf.counts.refused += 1
            return None
        slot = shelf.slots[name] = shelf.take_free()
        shelf.policy.add(name)
        shelf.counts.spilled += 1
        return slot

    def pin(self, group: LayerGroup, name: bytes) -> int:
        """The slot of a block that is held, and stays until as many calls of `unpin`."""
        (slot,) = self.pin_all(group, (name,))
        return slot

    def pin_all(self, group: LayerGroup, names: Sequence[bytes]) -> list[int]:
        """`pin` each, which takes a third of the time."""
        shelf = self._shelves[group]
        pins, leaving, stored, use = shelf.pins, shelf.leaving, shelf.stored, shelf.policy.use
        for name in names:
            if name in pins:
                pins[name] += 1
                continue
            if name in stored:
                del stored[name]
            elif name not in leaving:
                use(name)
            pins[name] = 1
        slots = shelf.slots
        return [slots[name] for name in names]

    def unpin(self, group: LayerGroup, name: bytes) -> None:
        self.unpin_all(group, (name,))

    def unpin_all(self, group: LayerGroup, names: Iterable[bytes]) -> None:
        """`unpin` each; what is named first is the first that policies have back."""
        shelf = self._shelves[group]
        pins, leaving, add = shelf.pins, shelf.leaving, shelf.policy.add
        for name in names:
            count = pins.pop(name) - 1
            if count:
                pins[name] = count
            elif name not in leaving:
                add(name)

    def pins(self) -> Counter[Key]:
        """How often each block is pinned."""
        return Counter({(g, name): count for g, shelf in self._shelves.items() for name, count in shelf.pins.items()})

    def loaded(self, group: LayerGroup, count: int) -> None:
        """So many blocks have been copied to the device."""
        self._shelves[group].counts.loaded += count

    # Between here and a colder tier.

    def leave(self, group: LayerGroup, *, beyond: int, most: int) -> list[SlotBlock]:
        """What the policy would give up first, as many as are `beyond` that number of slots, or `most`: they leave."""
        shelf = self._shelves.get(group)
        chosen: list[SlotBlock] = []
        if shelf is None:
            return chosen
        excess = self.used(group) - len(shelf.leaving) - beyond
        for _ in range(min(excess, most, len(shelf.policy))):
            name = _victim(shelf)
            if not _leaves_as_copied(shelf, name):
                shelf.leaving.add(name)
                chosen.append(SlotBlock(group, name, shelf.slots[name]))
        return chosen

    def copy(self, group: LayerGroup, most: int, wanted: Callable[[LayerGroup, bytes], bool]) -> list[SlotBlock]:
        """Up to `most` blocks, of those that are `wanted` in the colder tier the dearest: they are copied."""
        shelf = self._shelves.get(group)
        if shelf is None or most < 1:
            return []
        dear = (name for name in shelf.policy.dearest() if isinstance(name, bytes) and name not in shelf.copied)
        chosen = list(islice((name for name in dear if wanted(group, name)), most))
        shelf.copied.update(chosen)
        return [SlotBlock(group, name, shelf.slots[name]) for name in chosen]

    def left(self, group: LayerGroup, name: bytes, *, there: bool) -> None:
        """A block that was leaving, or copied, is `there` in the colder tier, or could not be taken there."""
        shelf = self._shelves[group]
        if name in shelf.copied:
            shelf.copied.remove(name)
            shelf.counts.written_behind += there
            return
        shelf.leaving.remove(name)
        if name in shelf.pins:
            return
        if there:
            shelf.stored[name] = None
        else:
            shelf.free.append(shelf.slots.pop(name))
            shelf.counts.evicted += 1

    def stay(self, group: LayerGroup, name: bytes) -> None:
        """A block that was to leave does not."""
        shelf = self._shelves[group]
        shelf.leaving.remove(name)
        if name not in shelf.pins:
            shelf.policy.add(name)

    def free(self, group: LayerGroup) -> int:
        """Slots that are free, or stored."""
        shelf = self._shelves.get(group)
        return 0 if shelf is None else shelf.at_hand

    def reserve(self, group: LayerGroup, names: Sequence[bytes]) -> list[SlotBlock]:
        """As many of those slots, for blocks that can not be found here and are not arriving. They are arriving."""
        reserved = []
        for name in names:
            shelf = self._shelves[group]
            slot = shelf.arriving[name] = shelf.take_free()
            reserved.append(SlotBlock(group, name, slot))
        return reserved

    def arrived(self, group: LayerGroup, name: bytes, *, there: bool) -> None:
        """A block that was arriving is `there` and held, or lost."""
        shelf = self._shelves[group]
        slot = shelf.arriving.pop(name)
        if there:
            shelf.slots[name] = slot
            shelf.policy.add(name)
        else:
            shelf.free.append(slot)

    def forget_all(self) -> None:
        """Hold nothing but what is leaving or arriving: a colder tier has hold of these slots."""
        for shelf in self._shelves.values():
            for name in shelf.copied:
                shelf.policy.discard(name)
            shelf.leaving |= shelf.copied
            shelf.copied.clear()
            shelf.stored.clear()
            for name in [name for name in shelf.slots if name not in shelf.leaving]:
                shelf.policy.discard(name)
                shelf.free.append(shelf.slots.pop(name))
            shelf.pins.clear()

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless every slot is in one state, and the policies know which."""
        for group, shelf in self._shelves.items():
            if sorted([*shelf.free, *shelf.slots.values(), *shelf.arriving.values()]) != list(range(self.slots[group])):
                raise BlockAccountingError(f"free and used {group} slots of the host tier do not partition it")
            if (
                not shelf.pins.keys() | shelf.leaving | shelf.copied | shelf.stored.keys() <= shelf.slots.keys()
                or shelf.leaving & shelf.copied
                or shelf.stored.keys() & (shelf.pins.keys() | shelf.leaving | shelf.copied)
                or shelf.slots.keys() & shelf.arriving.keys()
            ):
                raise BlockAccountingError(f"a {group} block of the host tier is used or on its way and not there")
            if len(shelf.policy) != sum(shelf.idle(name) for name in shelf.slots):
                raise BlockAccountingError(f"the policy of the host tier's {group} slots has lost track")


def _make_room(shelf: _Shelf) -> bool:
    """Have a slot at hand, if that can be."""
    while not shelf.at_hand and len(shelf.policy):
        name = _victim(shelf)
        if not _leaves_as_copied(shelf, name):
            shelf.free.append(shelf.slots.pop(name))
            shelf.counts.evicted += 1
    return bool(shelf.at_hand)


def _leaves_as_copied(shelf: _Shelf, name: bytes) -> bool:
    """Whether a victim is being copied: its slot is read until that is over, and it leaves then."""
    if name not in shelf.copied:
        return False
    shelf.copied.remove(name)
    shelf.leaving.add(name)
    return True


def _victim(shelf: _Shelf) -> bytes:
    name = shelf.policy.evict()
    assert isinstance(name, bytes)
    return name
