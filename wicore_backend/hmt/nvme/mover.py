"""What a lane's thread does with the jobs that it has taken: their blocking part, between memory and files."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence

from wicore_backend.hmt.nvme.files import StoreFiles
from wicore_backend.hmt.nvme.jobs import ReadJob, WriteJob
from wicore_backend.hmt.nvme.ledger import Ledger
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import HEADER_BYTES, payload_checksum
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.nvme.transfer import read_records, write_headers, write_records
from wicore_backend.hmt.nvme.trouble import Trouble


class Mover:
    """Writes and reads records, several at a time; one by one, where several together fail. Safe on any thread.

    Parameters
    ----------
    fingerprint
        What the headers of records have, as `fingerprint_of` makes it.
    """

    def __init__(self, files: StoreFiles, ledger: Ledger, fingerprint: bytes) -> None:
        self._files = files
        self._ledger = ledger
        self._fingerprint = fingerprint
        self._headers = threading.Lock()
        """Held while headers are written, so that blank ones are never written over new ones."""

    def write(self, jobs: Sequence[WriteJob], buffer: memoryview) -> list[Outcome]:
        """Old headers off, payloads, new headers."""
        started = time.perf_counter()
        records = [job.record for job in jobs]
        try:
            if self._files_lost():
                return [Outcome.REFUSED] * len(jobs)
            with self._headers:
                for run in [run for record in records for run in record.runs]:
                    if self._ledger.is_stale(run):
                        self._erase(run)
            for job in jobs:
                job.record.checksum = payload_checksum(job.payload)
            write_records(self._files, records, [job.payload for job in jobs], buffer)
            with self._headers:
                write_headers(self._files, [job.record for job in jobs if job.wanted], self._fingerprint)
        except OSError as error:
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self.write([job], buffer)]
            jobs[0].bad_place = error.errno == errno.EIO
            self._ledger.write_failed(error)
            return [Outcome.FAILED]
        self._ledger.moved_down(sum(len(job.payload) for job in jobs), time.perf_counter() - started)
        return [Outcome.DONE] * len(jobs)

    def read(self, jobs: Sequence[ReadJob], buffer: memoryview) -> list[Outcome]:
        """Payloads into `buffer`."""
        started = time.perf_counter()
        try:
            if self._files_lost():
                return [Outcome.MISSING] * len(jobs)
            payloads = read_records(self._files, [job.record for job in jobs], buffer)
        except OSError as error:
            if len(jobs) > 1:
                return self._read_one_by_one(jobs, buffer)
            jobs[0].bad_place = error.errno == errno.EIO
            self._ledger.troubles.add(Trouble.READ_ERROR, error)
            return [Outcome.FAILED]
        for job, payload in zip(jobs, payloads, strict=True):
            job.loaded = payload
        self._ledger.moved_up(sum(map(len, payloads)), time.perf_counter() - started)
        return [Outcome.DONE] * len(jobs)

    def flush(self) -> None:
        """Return when what is stored and deleted by now survives a loss of power, or has failed to."""
        try:
            with self._headers:
                for run in self._ledger.stale_runs():
                    self._erase(run)
            self._files.sync()
        except OSError as error:
            self._ledger.write_failed(error)

    def _read_one_by_one(self, jobs: Sequence[ReadJob], buffer: memoryview) -> list[Outcome]:
        outcomes = []
        for job in jobs:
            outcomes += self.read([job], buffer)
            buffer = buffer[job.weight :]
        return outcomes

    def _files_lost(self) -> bool:
        """Whether somebody has deleted the files: who does that wants their content gone and their space back."""
        if not self._files.lost:
            return False
        if self._ledger.lose():
            try:
                self._files.give_back_space()
            except OSError as error:
                self._ledger.troubles.add(Trouble.WRITE_ERROR, error)
        return True

    def _erase(self, run: Run) -> None:
        """Blank the headers of slots that are free or the caller's; the lock of headers is held."""
        self._files.write_headers(run.start, bytes(run.length * HEADER_BYTES))
        self._ledger.erased(run)
