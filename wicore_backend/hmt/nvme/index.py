"""The books of the store: which record has which slots. No files, no clock, no lock."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import Record, slots_for
from wicore_backend.hmt.nvme.space import FreeSpace, Run, runs_of


class StoreAccountingError(AssertionError):
    """The books contradict themselves: a bug here, never a user's fault."""


class Index:
    """Every slot is in exactly one state.

    - *free*: any record may take it.
    - *arriving*: of a record whose write is not over; nobody can find it.
    - *held*: of a record that can be found by its name.
    - *leaving*: of a record that is no longer found, while a read or a write of it is still in the kernel.
    - *retired*: the disk failed there; not used again before the store is opened anew.

    A slot is *stale* while its header on the disk may be that of a record that is not held any more. That is harmless,
    since a record whose bytes are overwritten fails its checksum; but it is erased before the slot is written, so that
    a crash in between leaves nothing behind that looks like a damaged record.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.stale: NDArray[np.bool_] = np.zeros(slots, np.bool_)
        self._slot_bytes = slot_bytes
        self._space = FreeSpace([Run(0, slots)])
        self._held: dict[bytes, Record] = {}
        self._arriving: dict[bytes, Record] = {}
        self._users: dict[Record, int] = {}
        self._leaving: set[Record] = set()
        self._bad: set[Record] = set()
        self._retired: list[Run] = []
        self._next_sequence = 1

    @classmethod
    def of(
        cls,
        slots: int,
        slot_bytes: int,
        *,
        records: Iterable[Record],
        stale: NDArray[np.bool_],
        next_sequence: int,
    ) -> Index:
        """The books of a store that was found to hold `records`, which share no slot."""
        index = cls(slots, slot_bytes)
        index._held = {record.name: record for record in records}
        free = np.ones(slots, np.bool_)
        for record in index._held.values():
            for start, length in record.runs:
                free[start : start + length] = False
        index._space = FreeSpace(runs_of(np.flatnonzero(free).tolist()))
        index.stale = stale.copy()
        index._next_sequence = next_sequence
        return index

    @property
    def held(self) -> list[Record]:
        """The records that can be found, oldest first."""
        return list(self._held.values())

    @property
    def count(self) -> int:
        """How many records can be found."""
        return len(self._held)

    @property
    def used_slots(self) -> int:
        """Slots that are not free."""
        return self.slots - self._space.slots

    def __contains__(self, name: bytes) -> bool:
        return name in self._held

    def reserve(self, name: bytes, payload_bytes: int) -> Record | Outcome:
        """A record with slots of its own, arriving and in use once; or why not: `HELD` or `FULL`."""
        if name in self._held or name in self._arriving:
            return Outcome.HELD
        runs = self._space.take(slots_for(payload_bytes, self._slot_bytes))
        if runs is None:
            return Outcome.FULL
        record = Record(name, payload_bytes, self._next_sequence, b"", runs)
        self._next_sequence += 1
        self._arriving[name] = record
        self._users[record] = 1
        return record

    def commit(self, record: Record) -> bool:
        """Its write is over and well: hold it from now on. False if it was dropped meanwhile."""
        if record in self._leaving:
            return False
        del self._arriving[record.name]
        self._held[record.name] = record
        return True

    def use(self, name: bytes, payload_bytes: int) -> Record | None:
        """The held record of that name and length, in use once more until `let_go`."""
        record = self._held.get(name)
        if record is None or record.payload_bytes != payload_bytes:
            return None
        self._users[record] = self._users.get(record, 0) + 1
        return record

    def let_go(self, record: Record) -> None:
        """One use of a record is over."""
        self._users[record] -= 1
        if not self._users[record]:
            del self._users[record]
            if record in self._leaving:
                self._leaving.remove(record)
                self._free(record)

    def drop(self, record: Record, *, bad: bool = False) -> None:
        """Let nobody find the record any more, and free its slots when it is out of use, or retire them if `bad`."""
        if bad:
            self._bad.add(record)
        for names in (self._arriving, self._held):
            if names.get(record.name) is record:
                del names[record.name]
                break
        else:
            return
        self._mark_stale(record)
        if record in self._users:
            self._leaving.add(record)
        else:
            self._free(record)

    def delete(self, name: bytes) -> bool:
        """Drop the record of that name, held or arriving; whether there was one."""
        record = self._held.get(name) or self._arriving.get(name)
        if record is not None:
            self.drop(record)
        return record is not None

    def clear(self) -> None:
        """Drop every record."""
        for record in [*self._held.values(), *self._arriving.values()]:
            self.drop(record)

    def check_integrity(self) -> None:
        """Raise StoreAccountingError unless every slot is in exactly one state."""
        records = [*self._held.values(), *self._arriving.values(), *self._leaving]
        runs = [*self._space.runs, *self._retired, *(run for record in records for run in record.runs)]
        end = 0
        for run in sorted(runs):
            if run.start != end:
                raise StoreAccountingError(
                    f"slots {min(end, run.start)} to {max(end, run.start)} are in no or two states"
                )
            end = run.stop
        if end != self.slots:
            raise StoreAccountingError(f"{end} of {self.slots} slots are in some state")
        for record in records:
            if sum(run.length for run in record.runs) != slots_for(record.payload_bytes, self._slot_bytes):
                raise StoreAccountingError(f"record {record.name.hex()} has slots for another length")
        unknown = set(self._users) - set(records)
        idle = {*self._arriving.values(), *self._leaving} - set(self._users)
        if unknown or idle or not self._bad <= set(records):
            raise StoreAccountingError(
                f"{len(unknown)} unknown records are in use, {len(idle)} in no use are in flight"
            )

    def _mark_stale(self, record: Record) -> None:
        for run in record.runs:
            self.stale[run.start : run.stop] = True

    def _free(self, record: Record) -> None:
        self._mark_stale(record)  # Once more: a write of it may have ended after it was dropped.
        if record in self._bad:
            self._bad.remove(record)
            self._retired.extend(record.runs)
        else:
            self._space.release(record.runs)
