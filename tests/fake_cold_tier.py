"""A cold tier that moves blocks when a test says so, and fails when it says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wicore_backend.hmt.host_tier import Key, SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.base import Access

GARBAGE = ["what is in a slot that nobody may read"]


@dataclass(eq=False)
class FakeRestore:
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(frozen=True)
class FakeReport:
    block: SlotBlock
    there: bool
    restore: FakeRestore | None


@dataclass
class FakeColdTier:
    """Keeps to the contract of `wicore_backend.hmt.cold_tier`, and makes the most of it: a slot that is to be written
    holds garbage until it is reported, and one that is to be read is read at the last moment.

    Attributes
    ----------
    slots
        For each group the contents of the host tier's slots.
    capacity
        Records held; the oldest goes first.
    backlog
        Spills under way at most.
    """

    slots: dict[LayerGroup, list[Any]]
    capacity: int = 40
    backlog: int = 12
    seconds: float | None = None
    records: dict[Key, Any] = field(default_factory=dict)
    moved: int = 0
    _under_way: list[tuple[SlotBlock, FakeRestore | None]] = field(default_factory=list)
    _reports: list[FakeReport] = field(default_factory=list)

    def holds(self, group: LayerGroup, name: bytes) -> bool:
        return (group, name) in self.records

    def observe(self, access: Access) -> None:
        del access

    def attend(self, keys: Sequence[Key], masses: Sequence[float]) -> None:
        assert len(keys) == len(masses)

    def room(self, group: LayerGroup) -> int:
        del group
        return max(0, self.backlog - sum(restore is None for _, restore in self._under_way))

    def room_behind(self, group: LayerGroup) -> int:
        del group
        return 0 if self._under_way or self._reports else self.backlog

    def spill_behind(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None = None) -> int:
        return self.spill(blocks, after)

    def spill(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None = None) -> int:
        del after
        self._check(blocks)
        taken = min(len(blocks), max(0, self.backlog - sum(restore is None for _, restore in self._under_way)))
        self._under_way += [(block, None) for block in blocks[:taken]]
        return taken

    def restore(
        self, blocks: Sequence[SlotBlock], deadline_s: float | None = None, after: Callable[[], None] | None = None
    ) -> FakeRestore:
        del deadline_s, after
        self._check(blocks)
        restore = FakeRestore()
        for block in blocks:
            self.slots[block.group][block.slot] = GARBAGE
            self._under_way.append((block, restore))
        return restore

    def restore_seconds(self, size: int) -> float | None:
        del size
        return self.seconds

    def finished(self) -> list[FakeReport]:
        reports, self._reports = self._reports, []
        return reports

    def move(self, count: int, *, failing: bool = False) -> None:
        """End up to `count` of what is under way."""
        for block, restore in self._under_way[:count]:
            self.moved += 1
            if restore is None:
                if not failing:
                    self.records[block.key] = self.slots[block.group][block.slot]
                    if len(self.records) > self.capacity:
                        del self.records[next(iter(self.records))]
                self._reports.append(FakeReport(block, not failing, None))
                continue
            there = block.key in self.records and not failing and not restore.cancelled
            if there:
                self.slots[block.group][block.slot] = self.records[block.key]
            self._reports.append(FakeReport(block, there, restore))
        del self._under_way[:count]

    def _check(self, blocks: Sequence[SlotBlock]) -> None:
        busy = {(block.group, block.slot) for block, _ in self._under_way}
        busy |= {(report.block.group, report.block.slot) for report in self._reports}
        assert not busy & {(block.group, block.slot) for block in blocks}, "a slot is given away twice"
