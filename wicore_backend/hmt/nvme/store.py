"""The NVMe store: the package's docstring says what it promises."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from wicore_backend.hmt.nvme.config import NvmeConfig
from wicore_backend.hmt.nvme.files import StoreFiles, aligned_buffer
from wicore_backend.hmt.nvme.jobs import ReadJob, WriteJob
from wicore_backend.hmt.nvme.lane import J, Lane
from wicore_backend.hmt.nvme.ledger import Ledger
from wicore_backend.hmt.nvme.mover import Mover
from wicore_backend.hmt.nvme.opening import read_index
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import NAME_BYTES, Record, fingerprint_of, slots_for
from wicore_backend.hmt.nvme.statistics import HeldRecord, NvmeStatistics
from wicore_backend.hmt.nvme.tickets import Ticket
from wicore_backend.hmt.nvme.trouble import Troubles
from wicore_backend.observability.logfmt import logfmt

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)
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
        self._files = open_files(
            config.directory, slots=config.slots, slot_bytes=config.slot_bytes, preallocate=config.preallocate
        )
        fingerprint = fingerprint_of(config.fingerprint, slot_bytes=config.slot_bytes)
        troubles = Troubles(config.directory)
        index = read_index(self._files, config, fingerprint, troubles)
        self._ledger = Ledger(index, troubles, retry_s=config.retry_s)
        self._mover = Mover(self._files, self._ledger, fingerprint)
        self._reads = Lane(
            "nvme-read",
            self._mover.read,
            _buffers(config, config.read_threads),
            enough=_IO_BYTES,
            work_deadline_s=config.read_deadline_s,
        )
        self._writes = Lane(
            "nvme-write",
            self._mover.write,
            _buffers(config, config.write_threads),
            enough=_IO_BYTES,
            work_deadline_s=config.write_deadline_s,
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
        room = self.config.store_limit - self._writes.queued
        reserved = self._ledger.reserve(names, [len(view) for view in views], most=room)
        jobs = [
            WriteJob(self._ledger, record, view, ticket, place, weight=self._slot_span(record))
            for place, (record, view) in enumerate(zip(reserved, views, strict=True))
            if isinstance(record, Record)
        ]
        _start(self._writes, jobs, ticket, deadline_s=self.config.write_deadline_s)
        _settle_at_once(ticket, reserved)
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
        records = self._ledger.use(names, [len(buffer) for buffer in buffers])
        jobs = [
            ReadJob(self._ledger, record, buffer, ticket, place, weight=self._slot_span(record))
            for place, (record, buffer) in enumerate(zip(records, buffers, strict=True))
            if isinstance(record, Record)
        ]
        _start(self._reads, jobs, ticket, deadline_s=deadline_s)
        _settle_at_once(ticket, records)
        return ticket

    def delete(self, name: bytes) -> bool:
        """Forget a record, also one whose store is not over; whether there was one. Its slots can be taken at once."""
        return self._ledger.delete(name)

    def __contains__(self, name: bytes) -> bool:
        return name in self._ledger

    def records(self) -> list[HeldRecord]:
        """What can be fetched, in the order in which it was stored."""
        return self._ledger.records()

    @property
    def lost(self) -> bool:
        """Whether the files have been deleted, and every record with them."""
        return self._ledger.lost

    def statistics(self) -> NvmeStatistics:
        """A consistent copy of the counters."""
        return self._ledger.statistics(capacity_bytes=self.config.capacity_bytes, slot_bytes=self.config.slot_bytes)

    def check_integrity(self) -> None:
        """Raise StoreAccountingError unless the books balance."""
        self._ledger.check_integrity()

    def flush(self) -> None:
        """Return when what is stored and deleted by now survives a loss of power. Blocks as long as the disk does."""
        self._mover.flush()

    def close(self, *, timeout_s: float = 10.0) -> None:
        """End what is under way, flush, and let go of the directory.

        If the disk still blocks a thread after `timeout_s`, the directory stays locked until the process ends, since
        that thread may yet write to it.
        """
        if not self._ledger.close():
            return
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

    def _check(self, names: Sequence[bytes], payloads: Sequence[memoryview]) -> None:
        if len(names) != len(payloads):
            raise ValueError(f"{len(names)} names and {len(payloads)} payloads")
        for name, payload in zip(names, payloads, strict=True):
            if len(name) not in NAME_BYTES:
                raise ValueError(f"a name of {len(name)} bytes; it has to have one of {NAME_BYTES}")
            if (limit := self.config.max_payload_bytes) < len(payload):
                raise ValueError(f"a payload of {len(payload)} bytes; max_payload_bytes is {limit}")

    def _slot_span(self, record: Record) -> int:
        return sum(run.length for run in record.runs) * self.config.slot_bytes


def _start(lane: Lane[J], jobs: list[J], ticket: Ticket, *, deadline_s: float | None) -> None:
    """Submit jobs that the ticket can cancel; where the lane takes none, they are late."""
    ticket.bind(lambda: [lane.abandon(job, Outcome.CANCELLED) for job in jobs])
    if not lane.submit(jobs, deadline_s=deadline_s):
        for job in jobs:
            lane.abandon(job, Outcome.LATE)


def _settle_at_once(ticket: Ticket, answers: Sequence[Record | Outcome]) -> None:
    """Tell of what needs no work."""
    for place, answer in enumerate(answers):
        if isinstance(answer, Outcome):
            ticket.settle(place, answer)


def _buffers(config: NvmeConfig, count: int) -> list[memoryview]:
    record = slots_for(config.max_payload_bytes, config.slot_bytes) * config.slot_bytes
    return [memoryview(aligned_buffer(max(record, _IO_BYTES))) for _ in range(count)]
