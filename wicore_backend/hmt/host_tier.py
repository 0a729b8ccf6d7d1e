"""Books of the host tier: what the device tier gave up, by name, in slots of host memory. No tensors, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.base import Policy


@dataclass(slots=True)
class TierCounts:
    """What happened in one group's part of a tier since the start, in blocks."""

    spilled: int = 0
    loaded: int = 0
    evicted: int = 0
    refused: int = 0
    """Not spilled: no slot could be had, or the policy thought nothing of the block."""


@dataclass(slots=True)
class _Shelf:
    """One group's slots. A slot is free, or holds the block of one name."""

    free: list[int]
    policy: Policy
    slots: dict[bytes, int] = field(default_factory=dict)
    pinned: set[bytes] = field(default_factory=set)
    counts: TierCounts = field(default_factory=TierCounts)


class HostTier:
    """Which block is in which slot, and which leaves when room is needed.

    A slot's bytes are written and read by the transfers that its calls lead to, and these are made in the order of the
    calls: so a slot may be given to another block while a transfer that reads it is still outstanding.

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
        """Blocks held."""
        shelf = self._shelves.get(group)
        return 0 if shelf is None else len(shelf.slots)

    def counts(self, group: LayerGroup) -> TierCounts:
        shelf = self._shelves.get(group)
        return TierCounts() if shelf is None else shelf.counts

    def spill(self, group: LayerGroup, name: bytes) -> int | None:
        """The slot for a block that the device tier gives up; None if it needs no copying, or is not to be kept."""
        shelf = self._shelves.get(group)
        if shelf is None or name in shelf.slots:
            return None
        if not shelf.free and (not len(shelf.policy) or not shelf.policy.admit(name)):
            shelf.counts.refused += 1
            return None
        if not shelf.free:
            victim = shelf.policy.evict()
            assert isinstance(victim, bytes)
            shelf.free.append(shelf.slots.pop(victim))
            shelf.counts.evicted += 1
        slot = shelf.slots[name] = shelf.free.pop()
        shelf.policy.add(name)
        shelf.counts.spilled += 1
        return slot

    def pin(self, group: LayerGroup, name: bytes) -> int:
        """The slot of a block that is held, and stays until `unpin`."""
        shelf = self._shelves[group]
        shelf.policy.use(name)
        shelf.pinned.add(name)
        shelf.counts.loaded += 1
        return shelf.slots[name]

    def unpin(self, group: LayerGroup, name: bytes) -> None:
        shelf = self._shelves[group]
        shelf.pinned.remove(name)
        shelf.policy.add(name)

    def forget_all(self) -> None:
        """Hold nothing."""
        for shelf in self._shelves.values():
            for name, slot in shelf.slots.items():
                shelf.policy.discard(name)
                shelf.free.append(slot)
            shelf.slots.clear()
            shelf.pinned.clear()

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless every slot is free or holds one block, and the policies know which."""
        for group, shelf in self._shelves.items():
            if sorted([*shelf.free, *shelf.slots.values()]) != list(range(self.slots[group])):
                raise BlockAccountingError(f"free and used {group} slots of the host tier do not partition it")
            if len(shelf.policy) != len(shelf.slots) - len(shelf.pinned) or not shelf.pinned <= shelf.slots.keys():
                raise BlockAccountingError(f"the policy of the host tier's {group} slots has lost track")
