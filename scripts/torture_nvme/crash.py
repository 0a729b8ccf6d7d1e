"""What a disk may hold after power was lost at any byte, read back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.torture_nvme.records import NAME_BYTES, SLOT, content_of, fetch_all, shape
from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore, Outcome, StoreFiles, StoreUnusableError
from wicore_backend.hmt.nvme.record import HEADER_BYTES
from wicore_backend.hmt.nvme.space import Run


@dataclass
class CrashReport:
    """What `crash_rounds` saw.

    Attributes
    ----------
    found, served
        Records that the headers told of; those that were served.
    wrong, unopened
        Records served with a wrong byte; stores that could not be opened. The promise is none.
    """

    rounds: int = 0
    found: int = 0
    served: int = 0
    wrong: int = 0
    unopened: int = 0

    @property
    def broken(self) -> bool:
        return bool(self.wrong or self.unopened)


class _Recorder(StoreFiles):
    """Files that remember what was written where, in order."""

    def __init__(self, directory: Path, *, slots: int, slot_bytes: int, preallocate: bool) -> None:
        super().__init__(directory, slots=slots, slot_bytes=slot_bytes, preallocate=preallocate)
        self.log: list[_Writing] = []

    def write(self, run: Run, pieces: list[memoryview]) -> None:
        self.log.append(_Writing("slots", run.start * self.slot_bytes, b"".join(pieces)))
        super().write(run, pieces)

    def write_headers(self, slot: int, headers: bytes) -> None:
        self.log.append(_Writing("index", slot * HEADER_BYTES, headers))
        super().write_headers(slot, headers)


class _Writing(NamedTuple):
    file: str
    at: int
    content: bytes

    def reach(self, files: dict[str, bytearray], begin: int, end: int) -> None:
        """Let bytes `begin` to `end` - 1 of it reach the disk."""
        part = self.content[begin:end]
        files[self.file][self.at + begin : self.at + begin + len(part)] = part


def crash_rounds(directory: Path, *, rounds: int, seed: int) -> CrashReport:
    """Rebuild what a disk may hold after power was lost at a random moment of one busy run, and read it.

    The last write reaches the disk up to a random byte. Of the thirty before it, each is there, or is not, or is there
    in some of its sectors.
    """
    rng = np.random.default_rng(seed)
    config = shape(directory, 1 << 20)
    log = _busy_run(config, rng)
    report = CrashReport()
    for _ in range(rounds):
        files = {"index": bytearray(config.slots * HEADER_BYTES), "slots": bytearray(config.slots * SLOT)}
        last = int(rng.integers(len(log)))
        for number, writing in enumerate(log[:last]):
            fate = rng.choice(["whole", "lost", "torn"]) if number >= last - 30 else "whole"
            if fate == "whole":
                writing.reach(files, 0, len(writing.content))
            elif fate == "torn":
                for sector in range(0, len(writing.content), 512):
                    if rng.random() < 0.5:
                        writing.reach(files, sector, sector + 512)
        log[last].reach(files, 0, int(rng.integers(len(log[last].content))))
        for file, state in files.items():
            (directory / file).write_bytes(state)
        report.rounds += 1
        try:
            store = NvmeStore(config)
        except StoreUnusableError:
            report.unopened += 1
            continue
        with store:
            names = [record.name for record in store.records()]
            for name, (outcome, buffer) in fetch_all(store, names).items():
                report.found += 1
                report.served += outcome is Outcome.DONE
                report.wrong += outcome is Outcome.DONE and buffer != content_of(name)
            store.check_integrity()
    return report


def _busy_run(config: NvmeConfig, rng: np.random.Generator) -> list[_Writing]:
    """Fill a small store many times over; what was written."""
    opened: list[_Recorder] = []

    def open_files(directory: Path, **changes: Any) -> StoreFiles:
        opened.append(_Recorder(directory, **changes))
        return opened[-1]

    with NvmeStore(config, open_files=open_files) as store:
        for _ in range(300):
            name = rng.bytes(NAME_BYTES)
            while (ticket := store.store(name, content_of(name))).outcomes[0] is Outcome.FULL:
                if held := store.records():
                    store.delete(held[int(rng.integers(len(held)))].name)
                else:
                    time.sleep(0.001)
            if rng.random() < 0.5:
                ticket.wait()
            if rng.random() < 0.05:
                store.flush()
    return opened[0].log
