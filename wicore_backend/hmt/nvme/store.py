"""The NVMe store: the package's docstring says what it promises."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from wicore_backend.hmt.nvme.config import NvmeConfig
from wicore_backend.hmt.nvme.files import StoreFiles, aligned_buffer
from wicore_backend.hmt.nvme.index import Index
from wicore_backend.hmt.nvme.lane import J, Job, Lane
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import (
    HEADER_BYTES,
    NAME_BYTES,
    Record,
    fingerprint_of,
    payload_checksum,
    scan,
    slots_for,
)
from wicore_backend.hmt.nvme.space import Run, runs_of
from wicore_backend.hmt.nvme.statistics import HeldRecord, NvmeStatistics
from wicore_backend.hmt.nvme.tickets import Ticket
from wicore_backend.hmt.nvme.transfer import checked_copy, read_records, write_headers, write_records
from wicore_backend.hmt.nvme.trouble import Trouble, Troubles, write_trouble
from wicore_backend.observability.logfmt import logfmt

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)
_SCAN_SLOTS = 1 << 16
_IO_BYTES = 4 << 20
"""What a thread moves at once, if records are smaller: on a busy machine twice as fast as 1 MiB, and as fast as 8."""


class NvmeStore:
    """Records of opaque bytes in one directory.

    Parameters
    ----------
    config
        Shape and limits.
    open_files
        What opens the directory; a test puts a faulty disk here.

    Raises
    ------
    StoreInUseError
        Another process has the directory.
    StoreUnusableError
        The directory cannot hold the store.
    """

    def __init__(self, config: NvmeConfig, *, open_files: Callable[..., StoreFiles] = StoreFiles) -> None:
        self.config = config
        self._fingerprint = fingerprint_of(config.fingerprint, slot_bytes=config.slot_bytes)
        self._lock = threading.Lock()
        self._header_lock = threading.Lock()
        self._closed = False
        self._lost = False
        self._refuse_until = 0.0
        self._stores: Counter[Outcome] = Counter()
        self._fetches: Counter[Outcome] = Counter()
        self._troubles = Troubles(config.directory)
        self._bytes_written = self._bytes_read = 0
        self._write_seconds = self._read_seconds = 0.0
        self._files = open_files(
            config.directory, slots=config.slots, slot_bytes=config.slot_bytes, preallocate=config.preallocate
        )
        self._index = self._load()
        self._reads = Lane(
            "nvme-read", self._read, self._buffers(config.read_threads), work_deadline_s=config.read_deadline_s
        )
        self._writes = Lane(
            "nvme-write", self._write, self._buffers(config.write_threads), work_deadline_s=config.write_deadline_s
        )

    def store(self, name: bytes, payload: Buffer, *, done: Callable[[Ticket], None] | None = None) -> Ticket:
        """`store_all` of one record."""
        return self.store_all([name], [payload], done=done)

    def store_all(
        self, names: Sequence[bytes], payloads: Sequence[Buffer], *, done: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """Write records; at once back with a ticket of one outcome for each.

        Parameters
        ----------
        names
            16 or 32 bytes each, which stand for the payload's bytes and no others.
        payloads
            Contiguous, at most `max_payload_bytes` each; not to be changed before the ticket is done. Memory aligned to
            4096 bytes is written as it lies, other memory is copied first, by the writing thread.
        done
            Called once with the ticket, on a thread of the store's or on this one before `store_all` returns. It must
            be quick, and must not call `close`.

        Raises
        ------
        ValueError
            The lists differ in length, or a name or a payload has a length that the store does not take.
        """
        views = [memoryview(payload).cast("B") for payload in payloads]
        self._check(names, views)
        ticket = Ticket(len(names), done)
        with self._lock:
            room = self.config.store_limit - self._writes.queued
            refusal = self._refusal()
            reserved: list[Record | Outcome] = []
            for name, view in zip(names, views, strict=True):
                reserved.append(refusal or (self._index.reserve(name, len(view)) if room > 0 else Outcome.BUSY))
                room -= isinstance(reserved[-1], Record)
            self._stores.update(outcome for outcome in reserved if isinstance(outcome, Outcome))
        jobs = [
            _Write(self, record, view, ticket, place)
            for place, (record, view) in enumerate(zip(reserved, views, strict=True))
            if isinstance(record, Record)
        ]
        _start(self._writes, jobs, ticket, deadline_s=self.config.write_deadline_s)
        for place, outcome in enumerate(reserved):
            if isinstance(outcome, Outcome):
                ticket.settle(place, outcome)
        return ticket

    def fetch(
        self,
        names: Sequence[bytes],
        into: Sequence[Buffer],
        *,
        deadline_s: float | None = None,
        done: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Read records, several at a time; at once back with a ticket of one outcome for each.

        Parameters
        ----------
        names, into
            Records, and for each a writable contiguous buffer of exactly its payload's length. A buffer holds the
            payload if its outcome is `DONE`, and nothing to be used otherwise.
        deadline_s
            For all of them, from now on; what is not there by then is `LATE`.
        done
            As for `store_all`.

        Raises
        ------
        ValueError
            The lists differ in length, or a buffer cannot be written.
        """
        buffers = [memoryview(buffer).cast("B") for buffer in into]
        if len(names) != len(buffers):
            raise ValueError(f"{len(names)} names and {len(buffers)} buffers")
        if any(buffer.readonly for buffer in buffers):
            raise ValueError("a buffer to fetch into is read-only")
        ticket = Ticket(len(names), done)
        with self._lock:
            absent = Outcome.CLOSED if self._closed else Outcome.MISSING
            records = [
                None if self._closed else self._index.use(name, len(buffer))
                for name, buffer in zip(names, buffers, strict=True)
            ]
            self._fetches.update(absent for record in records if record is None)
        jobs = [
            _Read(self, record, buffer, ticket, place)
            for place, (record, buffer) in enumerate(zip(records, buffers, strict=True))
            if record is not None
        ]
        _start(self._reads, jobs, ticket, deadline_s=deadline_s)
        for place, record in enumerate(records):
            if record is None:
                ticket.settle(place, absent)
        return ticket

    def delete(self, name: bytes) -> bool:
        """Forget a record, also one whose store is not over; whether there was one. Its slots can be taken at once."""
        with self._lock:
            return self._index.delete(name)

    def __contains__(self, name: bytes) -> bool:
        with self._lock:
            return name in self._index

    def records(self) -> list[HeldRecord]:
        """What can be fetched, in the order in which it was stored."""
        with self._lock:
            return [HeldRecord(record.name, record.payload_bytes) for record in self._index.held]

    @property
    def lost(self) -> bool:
        """Whether the files have been deleted, and every record with them."""
        return self._lost

    def statistics(self) -> NvmeStatistics:
        """A consistent copy of the counters."""
        with self._lock:
            return NvmeStatistics(
                capacity_bytes=self.config.capacity_bytes,
                used_bytes=self._index.used_slots * (self.config.slot_bytes + HEADER_BYTES),
                records=self._index.count,
                stores=dict(self._stores),
                fetches=dict(self._fetches),
                troubles=self._troubles.counts,
                bytes_written=self._bytes_written,
                bytes_read=self._bytes_read,
                write_seconds=self._write_seconds,
                read_seconds=self._read_seconds,
            )

    def check_integrity(self) -> None:
        """Raise StoreAccountingError unless the books balance."""
        with self._lock:
            self._index.check_integrity()

    def flush(self) -> None:
        """Return when what is stored and deleted by now survives a loss of power. Blocks as long as the disk does."""
        try:
            with self._header_lock:
                with self._lock:
                    stale = np.flatnonzero(self._index.stale).tolist()
                for run in runs_of(stale):
                    self._erase(run)
            self._files.sync()
        except OSError as error:
            self._write_failed(error)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """End what is under way, flush, and let go of the directory.

        If the disk still blocks a thread after `timeout_s`, the directory stays locked until the process ends, since
        that thread may yet write to it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        end = time.monotonic() + timeout_s
        lanes = [lane.close(max(0.0, end - time.monotonic())) for lane in (self._reads, self._writes)]
        if all(lanes):
            self.flush()
            self._files.close()
        else:
            _log.warning(logfmt("nvme_store_left_open", directory=self.config.directory, waited_s=timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _buffers(self, count: int) -> list[memoryview]:
        record = slots_for(self.config.max_payload_bytes, self.config.slot_bytes) * self.config.slot_bytes
        return [memoryview(aligned_buffer(max(record, _IO_BYTES))) for _ in range(count)]

    def _load(self) -> Index:
        started = time.perf_counter()
        slots, slot_bytes = self.config.slots, self.config.slot_bytes
        found = scan(
            self._header_chunks(),
            fingerprint=self._fingerprint,
            slot_bytes=slot_bytes,
            max_payload_bytes=self.config.max_payload_bytes,
        )
        _log.info(
            logfmt(
                "nvme_store_opened",
                directory=self.config.directory,
                records=len(found.records),
                other_fingerprint_slots=found.foreign,
                slots=slots,
                direct=self._files.direct,
                seconds=time.perf_counter() - started,
            )
        )
        # The clock keeps sequences rising even where the highest headers cannot be read.
        sequence = max(found.next_sequence, time.time_ns())
        return Index.of(slots, slot_bytes, records=found.records, stale=found.stale, next_sequence=sequence)

    def _header_chunks(self) -> Iterator[bytes]:
        for first in range(0, self.config.slots, _SCAN_SLOTS):
            count = min(_SCAN_SLOTS, self.config.slots - first)
            try:
                yield self._files.read_headers(first, count)
            except OSError as error:
                self._troubles.add(Trouble.READ_ERROR, error)
                yield bytes(count * HEADER_BYTES)

    def _check(self, names: Sequence[bytes], payloads: Sequence[memoryview]) -> None:
        if len(names) != len(payloads):
            raise ValueError(f"{len(names)} names and {len(payloads)} payloads")
        for name, payload in zip(names, payloads, strict=True):
            if len(name) not in NAME_BYTES:
                raise ValueError(f"a name of {len(name)} bytes; it has to have one of {NAME_BYTES}")
            if (limit := self.config.max_payload_bytes) < len(payload):
                raise ValueError(f"a payload of {len(payload)} bytes; max_payload_bytes is {limit}")

    def _refusal(self) -> Outcome | None:
        if self._closed:
            return Outcome.CLOSED
        if self._lost or time.monotonic() < self._refuse_until:
            return Outcome.REFUSED
        return None

    def _write_failed(self, error: OSError) -> None:
        with self._lock:
            self._refuse_until = time.monotonic() + self.config.retry_s
        self._troubles.add(write_trouble(error), error)

    def _lose(self) -> None:
        """The files have been deleted: whoever did that wants their content gone and their space back."""
        with self._lock:
            if self._lost:
                return
            self._lost = True
            self._index.clear()
        self._troubles.add(Trouble.FILES_LOST)
        try:
            self._files.give_back_space()
        except OSError as error:
            self._troubles.add(Trouble.WRITE_ERROR, error)

    def _erase(self, run: Run) -> None:
        """Blank the headers of slots that are free or the caller's; the header lock is held."""
        self._files.write_headers(run.start, bytes(run.length * HEADER_BYTES))
        with self._lock:
            self._index.stale[run.start : run.stop] = False

    def _slot_span(self, record: Record) -> int:
        return sum(run.length for run in record.runs) * self.config.slot_bytes

    def _write(self, jobs: Sequence[_Write], buffer: memoryview) -> list[Outcome]:
        """Old headers off, payloads, new headers."""
        started = time.perf_counter()
        try:
            if self._files.lost:
                self._lose()
                return [Outcome.REFUSED] * len(jobs)
            with self._header_lock:
                for run in [run for job in jobs for run in job.record.runs]:
                    if self._index.stale[run.start : run.stop].any():
                        self._erase(run)
            for job in jobs:
                job.record.checksum = payload_checksum(job.payload)
            write_records(self._files, [job.record for job in jobs], [job.payload for job in jobs], buffer)
            with self._header_lock:
                write_headers(self._files, [job.record for job in jobs if job.wanted], self._fingerprint)
        except OSError as error:
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._write([job], buffer)]
            jobs[0].bad_place = error.errno == errno.EIO
            self._write_failed(error)
            return [Outcome.FAILED]
        with self._lock:
            self._bytes_written += sum(len(job.payload) for job in jobs)
            self._write_seconds += time.perf_counter() - started
        return [Outcome.DONE] * len(jobs)

    def _read(self, jobs: Sequence[_Read], buffer: memoryview) -> list[Outcome]:
        """Payloads into `buffer`."""
        started = time.perf_counter()
        try:
            if self._files.lost:
                self._lose()
                return [Outcome.MISSING] * len(jobs)
            payloads = read_records(self._files, [job.record for job in jobs], buffer)
        except OSError as error:
            if len(jobs) > 1:
                return self._read_one_by_one(jobs, buffer)
            jobs[0].bad_place = error.errno == errno.EIO
            self._troubles.add(Trouble.READ_ERROR, error)
            return [Outcome.FAILED]
        for job, payload in zip(jobs, payloads, strict=True):
            job.loaded = payload
        with self._lock:
            self._bytes_read += sum(map(len, payloads))
            self._read_seconds += time.perf_counter() - started
        return [Outcome.DONE] * len(jobs)

    def _read_one_by_one(self, jobs: Sequence[_Read], buffer: memoryview) -> list[Outcome]:
        outcomes = []
        for job in jobs:
            outcomes += self._read([job], buffer)
            buffer = buffer[job.weight :]
        return outcomes


class _Write(Job):
    """One record on its way to the disk."""

    def __init__(self, store: NvmeStore, record: Record, payload: memoryview, ticket: Ticket, place: int) -> None:
        super().__init__(weight=store._slot_span(record))
        self._store = store
        self.record = record
        self.payload = payload
        self.bad_place = False
        self._ticket = ticket
        self._place = place

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        index = self._store._index
        with self._store._lock:
            if wanted and outcome is Outcome.DONE and not index.commit(self.record):
                outcome = Outcome.CANCELLED
            if not wanted or outcome is not Outcome.DONE:
                index.drop(self.record, bad=self.bad_place)
            index.let_go(self.record)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        store = self._store
        if outcome is Outcome.LATE:
            store._troubles.add(Trouble.SLOW_WRITE)
        with store._lock:
            store._stores[outcome] += 1
            if outcome is not Outcome.DONE:
                store._index.drop(self.record)
        self._ticket.settle(self._place, outcome)


class _Read(Job):
    """One record on its way to the caller's buffer.

    It goes by way of a buffer of the reading thread's. That copy is the price of deadlines: a read that is late still
    writes to memory whenever the disk answers.
    """

    def __init__(self, store: NvmeStore, record: Record, into: memoryview, ticket: Ticket, place: int) -> None:
        super().__init__(weight=store._slot_span(record))
        self._store = store
        self.record = record
        self.loaded = memoryview(b"")
        self.bad_place = False
        self._into = into
        self._ticket = ticket
        self._place = place

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        if wanted and outcome is Outcome.DONE and checked_copy(self._into, self.loaded) != self.record.checksum:
            self._store._troubles.add(Trouble.CORRUPT)
            outcome = Outcome.CORRUPT
        with self._store._lock:
            if self.bad_place or outcome is Outcome.CORRUPT:
                self._store._index.drop(self.record, bad=self.bad_place)
            self._store._index.let_go(self.record)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        if outcome is Outcome.LATE:
            self._store._troubles.add(Trouble.SLOW_READ)
        with self._store._lock:
            self._store._fetches[outcome] += 1
        self._ticket.settle(self._place, outcome)


def _start(lane: Lane[J], jobs: list[J], ticket: Ticket, *, deadline_s: float | None) -> None:
    """Submit jobs that the ticket can cancel; where the lane takes none, they are late."""
    ticket.bind(lambda: [lane.abandon(job, Outcome.CANCELLED) for job in jobs])
    if not lane.submit(jobs, deadline_s=deadline_s):
        for job in jobs:
            lane.abandon(job, Outcome.LATE)
