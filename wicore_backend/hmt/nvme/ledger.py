"""The store's books as its threads share them: the index, what is counted, and when stores are refused. No files.

Everything is done under one lock, which is held for microseconds and never while the disk is waited for.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from wicore_backend.hmt.nvme.index import Index, StoreAccountingError
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record
from wicore_backend.hmt.nvme.space import Run, runs_of
from wicore_backend.hmt.nvme.statistics import HeldRecord, NvmeStatistics
from wicore_backend.hmt.nvme.trouble import Trouble, Troubles, write_trouble


class Ledger:
    """Safe on any thread.

    It is in one of these states:

    - *open*: records are taken and given;
    - *refusing*: for `retry_s` after a failed write; records are given, and none is taken;
    - *lost*: the files have been deleted; it holds nothing, and takes nothing;
    - *closed*: by the caller; nothing is taken or given.
    """

    def __init__(self, index: Index, troubles: Troubles, *, retry_s: float) -> None:
        self.troubles = troubles
        self._index = index
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._closed = False
        self._lost = False
        self._refuse_until = 0.0
        self._stores: Counter[Outcome] = Counter()
        self._fetches: Counter[Outcome] = Counter()
        self._bytes_written = self._bytes_read = 0
        self._write_seconds = self._read_seconds = 0.0

    # The states.

    @property
    def lost(self) -> bool:
        return self._lost

    def lose(self) -> bool:
        """The files have been deleted: every record is gone. False if that was known."""
        with self._lock:
            if self._lost:
                return False
            self._lost = True
            self._index.clear()
        self.troubles.add(Trouble.FILES_LOST)
        return True

    def close(self) -> bool:
        """Take and give nothing more. False if that was so already."""
        with self._lock:
            was_open, self._closed = not self._closed, True
        return was_open

    def write_failed(self, error: OSError) -> None:
        """Refuse stores for a while."""
        with self._lock:
            self._refuse_until = time.monotonic() + self._retry_s
        self.troubles.add(write_trouble(error), error)

    # A store.

    def reserve(self, names: Sequence[bytes], sizes: Sequence[int], *, most: int) -> list[Record | Outcome]:
        """For each name a record to be written, or why there is none; `BUSY` beyond `most` records."""
        with self._lock:
            reserved: list[Record | Outcome] = []
            refusal = self._refusal()
            for name, size in zip(names, sizes, strict=True):
                answer = refusal or (self._index.reserve(name, size) if most > 0 else Outcome.BUSY)
                if isinstance(answer, Outcome):
                    self._stores[answer] += 1
                else:
                    most -= 1
                reserved.append(answer)
            return reserved

    def written(self, record: Record, outcome: Outcome, *, wanted: bool, bad: bool) -> Outcome:
        """No thread works on writing the record any more; how it ends, if that is still `wanted`.

        It is held if the outcome says so. If `bad`, its slots are not used again.
        """
        with self._lock:
            if wanted and outcome is Outcome.DONE and not self._index.commit(record):
                outcome = Outcome.CANCELLED
            if not wanted or outcome is not Outcome.DONE:
                self._index.drop(record, bad=bad)
            self._index.let_go(record)
        return outcome

    def store_ended(self, record: Record, outcome: Outcome) -> None:
        """The caller is told of a store; a thread may be writing the record still."""
        if outcome is Outcome.LATE:
            self.troubles.add(Trouble.SLOW_WRITE)
        with self._lock:
            self._stores[outcome] += 1
            if outcome is not Outcome.DONE:
                self._index.drop(record)

    def delete(self, name: bytes) -> bool:
        """Drop the record of that name; whether there was one."""
        with self._lock:
            return self._index.delete(name)

    def is_stale(self, run: Run) -> bool:
        """Whether headers on the disk may be those of records that are not held any more."""
        return bool(self._index.stale[run.start : run.stop].any())

    def stale_runs(self) -> list[Run]:
        """All of those."""
        with self._lock:
            return list(runs_of(np.flatnonzero(self._index.stale).tolist()))

    def erased(self, run: Run) -> None:
        """The headers of slots are blank now; the slots are free, or the caller's."""
        with self._lock:
            self._index.stale[run.start : run.stop] = False

    # A fetch.

    def use(self, names: Sequence[bytes], sizes: Sequence[int]) -> list[Record | Outcome]:
        """For each name and length the record, in use once more, or why there is none."""
        with self._lock:
            used = [
                Outcome.CLOSED if self._closed else self._index.use(name, size) or Outcome.MISSING
                for name, size in zip(names, sizes, strict=True)
            ]
            self._fetches.update(answer for answer in used if isinstance(answer, Outcome))
            return used

    def read(self, record: Record, outcome: Outcome, *, bad: bool) -> None:
        """No thread reads the record for this fetch any more. What is damaged, or cannot be read, is not held."""
        if outcome is Outcome.CORRUPT:
            self.troubles.add(Trouble.CORRUPT)
        with self._lock:
            if bad or outcome is Outcome.CORRUPT:
                self._index.drop(record, bad=bad)
            self._index.let_go(record)

    def fetch_ended(self, outcome: Outcome) -> None:
        """The caller is told of a fetch; a thread may be reading the record still."""
        if outcome is Outcome.LATE:
            self.troubles.add(Trouble.SLOW_READ)
        with self._lock:
            self._fetches[outcome] += 1

    # What it tells.

    def moved_down(self, size: int, seconds: float) -> None:
        """So many bytes were written in so long."""
        with self._lock:
            self._bytes_written += size
            self._write_seconds += seconds

    def moved_up(self, size: int, seconds: float) -> None:
        """So many bytes were read in so long."""
        with self._lock:
            self._bytes_read += size
            self._read_seconds += seconds

    def __contains__(self, name: bytes) -> bool:
        with self._lock:
            return name in self._index

    def records(self) -> list[HeldRecord]:
        """What can be fetched, in the order in which it was stored."""
        with self._lock:
            return [HeldRecord(record.name, record.payload_bytes) for record in self._index.held]

    def statistics(self, *, capacity_bytes: int, slot_bytes: int) -> NvmeStatistics:
        """A consistent copy of the counters."""
        with self._lock:
            return NvmeStatistics(
                capacity_bytes=capacity_bytes,
                used_bytes=self._index.used_slots * (slot_bytes + HEADER_BYTES),
                records=self._index.count,
                stores=dict(self._stores),
                fetches=dict(self._fetches),
                troubles=self.troubles.counts,
                bytes_written=self._bytes_written,
                bytes_read=self._bytes_read,
                write_seconds=self._write_seconds,
                read_seconds=self._read_seconds,
            )

    def check_integrity(self) -> None:
        """Raise StoreAccountingError unless the books balance."""
        with self._lock:
            self._index.check_integrity()
            if self._lost and self._index.count:
                raise StoreAccountingError(f"{self._index.count} records are held by files that were deleted")

    def _refusal(self) -> Outcome | None:
        if self._closed:
            return Outcome.CLOSED
        if self._lost or time.monotonic() < self._refuse_until:
            return Outcome.REFUSED
        return None
