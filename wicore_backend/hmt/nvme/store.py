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
from wicore_backend.hmt.nvme.files import PAGE, StoreFiles, aligned_buffer
from wicore_backend.hmt.nvme.index import Index
from wicore_backend.hmt.nvme.lane import Job, Lane
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import HEADER_BYTES, NAME_BYTES, Record, fingerprint_of, payload_checksum, scan
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.nvme.statistics import HeldRecord, NvmeStatistics
from wicore_backend.hmt.nvme.tickets import Ticket
from wicore_backend.hmt.nvme.trouble import Trouble, Troubles, write_trouble
from wicore_backend.observability.logfmt import logfmt

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)
_SCAN_SLOTS = 1 << 16


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
        self._reads = self._lane("nvme-read", config.read_threads, config.read_deadline_s)
        self._writes = self._lane("nvme-write", config.write_threads, config.write_deadline_s)

    def store(self, name: bytes, payload: Buffer, *, done: Callable[[Ticket], None] | None = None) -> Ticket:
        """Write a record; at once back with a ticket of one outcome.

        Parameters
        ----------
        name
            16 or 32 bytes that stand for these bytes and no others.
        payload
            Contiguous, at most `max_payload_bytes`; not to be changed before the ticket is done. Memory aligned to 4096
            bytes is written as it lies, other memory is copied first, by the writing thread.
        done
            Called once with the ticket, on a thread of the store's or on this one before `store` returns. It must be
            quick.

        Raises
        ------
        ValueError
            The name or the payload has a length that the store does not take.
        """
        view = memoryview(payload).cast("B")
        if len(name) not in NAME_BYTES:
            raise ValueError(f"a name of {len(name)} bytes; it has to have one of {NAME_BYTES}")
        if len(view) > self.config.max_payload_bytes:
            raise ValueError(f"a payload of {len(view)} bytes; max_payload_bytes is {self.config.max_payload_bytes}")
        ticket = Ticket(1, done)
        with self._lock:
            reserved = self._refusal() or self._index.reserve(name, len(view))
        if isinstance(reserved, Outcome):
            self._settle(self._stores, ticket, 0, reserved)
            return ticket
        job = _Write(self, reserved, view, ticket)
        ticket.bind(lambda: self._writes.abandon(job, Outcome.CANCELLED))
        if not self._writes.submit([job], deadline_s=self.config.write_deadline_s):
            self._writes.abandon(job, Outcome.LATE)
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
            payload if its outcome is `DONE`, and is untouched otherwise.
        deadline_s
            For all of them, from now on; what is not there by then is `LATE`.
        done
            As for `store`.

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
            closed = self._closed
            records = [
                None if closed else self._index.use(name, len(buffer))
                for name, buffer in zip(names, buffers, strict=True)
            ]
        jobs = [
            _Read(self, record, buffer, ticket, index)
            for index, (record, buffer) in enumerate(zip(records, buffers, strict=True))
            if record is not None
        ]
        ticket.bind(lambda: [self._reads.abandon(job, Outcome.CANCELLED) for job in jobs])
        if not self._reads.submit(jobs, deadline_s=deadline_s):
            for job in jobs:
                self._reads.abandon(job, Outcome.LATE)
        for index, record in enumerate(records):
            if record is None:
                self._settle(self._fetches, ticket, index, Outcome.CLOSED if closed else Outcome.MISSING)
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
                    stale = np.flatnonzero(self._index.stale)
                for slots in np.split(stale, np.flatnonzero(np.diff(stale) != 1) + 1):
                    if len(slots):
                        self._erase(int(slots[0]), len(slots))
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

    def _lane(self, name: str, threads: int, deadline_s: float) -> Lane:
        buffers = [memoryview(aligned_buffer(self.config.max_payload_bytes)) for _ in range(threads)]
        return Lane(name, buffers, work_deadline_s=deadline_s)

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

    def _refusal(self) -> Outcome | None:
        if self._closed:
            return Outcome.CLOSED
        if self._lost or time.monotonic() < self._refuse_until:
            return Outcome.REFUSED
        if self._writes.queued >= self.config.store_limit:
            return Outcome.BUSY
        return None

    def _settle(self, counter: Counter[Outcome], ticket: Ticket, index: int, outcome: Outcome) -> None:
        with self._lock:
            counter[outcome] += 1
        ticket.settle(index, outcome)

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

    def _erase(self, start: int, length: int) -> None:
        """Blank the headers of slots; the header lock is held, and either they are free or the caller's."""
        self._files.write_headers(start, bytes(length * HEADER_BYTES))
        with self._lock:
            self._index.stale[start : start + length] = False


class _Write(Job):
    """Brings one payload to its slots: old headers off, payload, new headers."""

    def __init__(self, store: NvmeStore, record: Record, payload: memoryview, ticket: Ticket) -> None:
        super().__init__()
        self._store = store
        self._record = record
        self._payload = payload
        self._ticket = ticket
        self._bad = False

    def work(self, buffer: memoryview) -> Outcome:
        store, record, files = self._store, self._record, self._store._files
        started = time.perf_counter()
        try:
            if files.lost:
                store._lose()
                return Outcome.REFUSED
            with store._header_lock:
                for run in record.runs:
                    if store._index.stale[run.start : run.stop].any():
                        store._erase(run.start, run.length)
            record.checksum = payload_checksum(self._payload)
            for run, pieces in _pieces(record.runs, store.config.slot_bytes, self._payload, buffer):
                files.write(run, pieces)
            with store._header_lock:
                if self.wanted:
                    for slot, headers in record.headers(store._fingerprint):
                        files.write_headers(slot, headers)
        except OSError as error:
            self._bad = error.errno == errno.EIO
            store._write_failed(error)
            return Outcome.FAILED
        with store._lock:
            store._bytes_written += record.payload_bytes
            store._write_seconds += time.perf_counter() - started
        return Outcome.DONE

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        index = self._store._index
        with self._store._lock:
            if wanted and outcome is Outcome.DONE and not index.commit(self._record):
                outcome = Outcome.CANCELLED
            if not wanted or outcome is not Outcome.DONE:
                index.drop(self._record, bad=self._bad)
            index.let_go(self._record)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        if outcome is Outcome.LATE:
            self._store._troubles.add(Trouble.SLOW_WRITE)
        if outcome is not Outcome.DONE:
            with self._store._lock:
                self._store._index.drop(self._record)
        self._store._settle(self._store._stores, self._ticket, 0, outcome)


class _Read(Job):
    """Brings one payload from its slots to the thread's buffer, and from there, if it is right and in time, to the
    caller's.

    The way over a buffer of its own is the price of deadlines: a read that is late may still write to memory whenever
    the disk answers.
    """

    def __init__(self, store: NvmeStore, record: Record, into: memoryview, ticket: Ticket, index: int) -> None:
        super().__init__()
        self._store = store
        self._record = record
        self._into = into
        self._ticket = ticket
        self._place = index
        self._loaded = memoryview(b"")
        self._bad = False

    def work(self, buffer: memoryview) -> Outcome:
        store, record, files = self._store, self._record, self._store._files
        started = time.perf_counter()
        try:
            if files.lost:
                store._lose()
                return Outcome.MISSING
            at, end = 0, _whole_pages(record.payload_bytes)
            for run in record.runs:
                size = min(run.length * store.config.slot_bytes, end - at)
                files.read(run, buffer[at : at + size])
                at += size
        except OSError as error:
            self._bad = error.errno == errno.EIO
            store._troubles.add(Trouble.READ_ERROR, error)
            return Outcome.FAILED
        self._loaded = buffer[: record.payload_bytes]
        if payload_checksum(self._loaded) != record.checksum:
            store._troubles.add(Trouble.CORRUPT)
            return Outcome.CORRUPT
        with store._lock:
            store._bytes_read += record.payload_bytes
            store._read_seconds += time.perf_counter() - started
        return Outcome.DONE

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        if wanted and outcome is Outcome.DONE:
            _copy(self._into, self._loaded)
        with self._store._lock:
            if self._bad or outcome is Outcome.CORRUPT:
                self._store._index.drop(self._record, bad=self._bad)
            self._store._index.let_go(self._record)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        if outcome is Outcome.LATE:
            self._store._troubles.add(Trouble.SLOW_READ)
        self._store._settle(self._store._fetches, self._ticket, self._place, outcome)


def _pieces(
    runs: Sequence[Run], slot_bytes: int, payload: memoryview, buffer: memoryview
) -> Iterator[tuple[Run, list[memoryview]]]:
    """The payload cut for its runs, in aligned pieces: where it lies if that is aligned, else copied to `buffer`."""
    size = len(payload)
    tail = size % PAGE
    if _address(payload) % PAGE:
        _copy(buffer[:size], payload)
        payload = buffer[:size]
    last = buffer[size - tail : _whole_pages(size)]
    if tail:
        _copy(last[:tail], payload[size - tail :])
        last[tail:] = bytes(PAGE - tail)
    at = 0
    for run in runs:
        end = min(at + run.length * slot_bytes, size - tail)
        pieces = [payload[at:end]] if end > at else []
        yield run, [*pieces, last] if tail and run is runs[-1] else pieces
        at = end


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _address(view: memoryview) -> int:
    return int(np.asarray(view).__array_interface__["data"][0])


def _copy(into: memoryview, source: memoryview) -> None:
    """By way of numpy, which lets other threads run meanwhile."""
    np.asarray(into)[:] = np.asarray(source)
