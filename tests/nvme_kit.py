"""A small NVMe store, its records, and files that fail: what the tests of the store share."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from wicore_backend.hmt.nvme import (
    NvmeConfig,
    NvmeStore,
    Outcome,
    StoreFiles,
)
from wicore_backend.hmt.nvme.files import PAGE

SLOT = 8192


MAX = 5 * SLOT


SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, SLOT, SLOT + 1, 3 * SLOT, MAX - 1, MAX]


def config(directory: Path, **changes) -> NvmeConfig:
    values = {
        "directory": directory,
        "capacity_bytes": 1 << 20,
        "slot_bytes": SLOT,
        "max_payload_bytes": MAX,
        "fingerprint": b"gemma3 float32",
        "read_threads": 2,
        "write_threads": 2,
    }
    return NvmeConfig(**{**values, **changes})


def name(number: int, length: int = 16) -> bytes:
    return number.to_bytes(length, "little")


def payload(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(store: NvmeStore, number: int, size: int = SLOT) -> Outcome:
    ticket = store.store(name(number), payload(number, size))
    assert ticket.wait(10)
    (outcome,) = ticket.outcomes
    assert outcome is not None
    return outcome


def get(store: NvmeStore, number: int, size: int = SLOT) -> Outcome:
    """The outcome of a fetch, after a look at the buffer: right if done, untouched unless it was corrupt."""
    before = b"\xaa" * size
    buffer = bytearray(before)
    ticket = store.fetch([name(number)], [buffer])
    assert ticket.wait(10)
    (outcome,) = ticket.outcomes
    assert outcome is not None
    if outcome is not Outcome.CORRUPT:
        assert buffer == (payload(number, size) if outcome is Outcome.DONE else before)
    return outcome


def taken(directory: Path) -> int:
    """Bytes of the store's files, each in whole pages."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in directory.iterdir())


class FaultyFiles(StoreFiles):
    """Files that fail, or wait until `go` is set, when told to."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.errors: dict[str, int] = {}
        self.blocked: set[str] = set()
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)

    def meet(self, what: str) -> None:
        if what in self.blocked:
            self.entered.release()
            assert self.go.wait(30)
        if what in self.errors:
            raise OSError(self.errors[what], os.strerror(self.errors[what]))

    def read(self, run, into):
        self.meet("read")
        super().read(run, into)

    def write(self, run, pieces):
        self.meet("write")
        super().write(run, pieces)

    def write_headers(self, slot, headers):
        self.meet("headers")
        super().write_headers(slot, headers)

    def read_headers(self, first, count):
        self.meet("scan")
        return super().read_headers(first, count)

    def sync(self):
        self.meet("sync")
        super().sync()


@contextmanager
def faulty_store(directory: Path, *, read_deadline_s: float = 1.0) -> Iterator[tuple[NvmeStore, FaultyFiles]]:
    """A store on faulty files, and the files."""
    opened = []

    def open_files(*args, **kwargs):
        opened.append(FaultyFiles(*args, **kwargs))
        return opened[-1]

    shape = config(directory / "store", retry_s=3600.0, read_deadline_s=read_deadline_s, write_deadline_s=1.0)
    with NvmeStore(shape, open_files=open_files) as store:
        yield store, opened[0]
        opened[0].errors.clear()
        opened[0].go.set()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
