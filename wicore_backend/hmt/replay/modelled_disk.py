"""A cold tier of a replay: the real books over a store that keeps names alone, and is never busy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wicore_backend.hmt.cold_tier import ColdCounts, Finished, Restore
from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.host_tier import Key, SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.lower_tiers import Written
from wicore_backend.hmt.nvme import HeldRecord, Outcome
from wicore_backend.hmt.policy import Access, Policy


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a store of so many records, one to a slot."""

    slots: int
    slot_bytes: int = 1


class _Names:
    """The names of a store's records."""

    lost = False

    def __init__(self, slots: int) -> None:
        self.config = _Shape(slots)
        self._names: dict[bytes, None] = {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def add(self, name: bytes) -> bool:
        """Whether there was room."""
        if len(self._names) == self.config.slots:
            return False
        self._names[name] = None
        return True

    def delete(self, name: bytes) -> bool:
        return self._names.pop(name, self) is None

    def records(self) -> list[HeldRecord]:
        return [HeldRecord(name, self.config.slot_bytes) for name in self._names]

    def check_integrity(self) -> None:
        """Nothing can be wrong with names."""


class ModelledDisk:
    """A `ColdBlocks` of `blocks` blocks, to which everything that is asked happens at once.

    Parameters
    ----------
    policy
        Makes the policy from the number of blocks.
    clock
        The trace's time.
    seconds_per_byte
        What a restore would take.
    """

    def __init__(
        self,
        blocks: int,
        policy: Callable[[int], Policy],
        *,
        clock: Callable[[], float],
        seconds_per_byte: float,
    ) -> None:
        self._names = _Names(blocks)
        self._seconds_per_byte = seconds_per_byte
        self._books = ColdBooks(self._names, {LayerGroup.GLOBAL: 1}, policy, clock=clock)
        self._finished: list[Finished] = []

    def holds(self, group: LayerGroup, name: bytes) -> bool:
        """See ColdBlocks, as for the others."""
        return (group, name) in self._books

    def observe(self, access: Access) -> None:
        self._books.observe(access)
        self._listen()

    def attend(self, keys: Sequence[Key], masses: Sequence[float]) -> None:
        self._books.attend(keys, masses)
        self._listen()

    def room(self, group: LayerGroup) -> int:
        del group
        return self._names.config.slots

    def room_behind(self, group: LayerGroup) -> int:
        """None: there is nothing to outlive."""
        del group
        return 0

    def spill_behind(self, blocks: Sequence[SlotBlock], after: Written = None) -> int:
        return self.spill(blocks, after)

    def spill(self, blocks: Sequence[SlotBlock], after: Written = None) -> int:
        del after
        for block in blocks:
            outcome = self._books.offer(block.key)
            if outcome is None:
                outcome = self._store(block.key)
                self._books.stored(block.key, outcome)
            self._finished.append(Finished(block, outcome, None))
        return len(blocks)

    def restore(self, blocks: Sequence[SlotBlock], deadline_s: float | None = None, after: Written = None) -> Restore:
        del deadline_s, after
        restore = Restore(blocks, 0.0, lambda _: None)
        for block in blocks:
            there = self._books.pin(block.key)
            if there:
                self._books.unpin(block.key, Outcome.DONE)
            self._finished.append(Finished(block, Outcome.DONE if there else Outcome.MISSING, restore))
        return restore

    def restore_seconds(self, size: int) -> float:
        return size * self._seconds_per_byte

    def finished(self) -> list[Finished]:
        finished, self._finished = self._finished, []
        return finished

    def counts(self) -> Mapping[LayerGroup, ColdCounts]:
        """What happened so far."""
        return self._books.counts()

    def check_integrity(self) -> None:
        """Raise ColdAccountingError unless the books balance."""
        self._books.check_integrity(set(), {})

    def _listen(self) -> None:
        while self._books.listen():
            pass

    def _store(self, key: Key) -> Outcome:
        while not self._names.add(record_name(key)):
            if not self._books.make_room([key]):
                return Outcome.FULL
        return Outcome.DONE
