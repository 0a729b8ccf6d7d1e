"""kill -9 at random moments under write load, reopen, read back."""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.torture_nvme.records import NAME_BYTES, content_of, fetch_all, shape
from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore, Outcome, StoreUnusableError, Ticket
from wicore_backend.hmt.nvme.files import aligned_buffer


@dataclass
class KillReport:
    """What `kill_rounds` saw.

    Attributes
    ----------
    killed_opening
        Kills before the store was open.
    acknowledged
        Stores that were told to be done.
    read_back
        Records read after a restart.
    corrupt
        Records that a restart found and that failed their checksum: misses, but none should be left by a dead process.
    lost
        Records acknowledged and not deleted that were not there after the restart.
    wrong, unopened
        Records with a wrong byte; stores that could not be opened. The promise is none.
    """

    rounds: int = 0
    killed_opening: int = 0
    acknowledged: int = 0
    read_back: int = 0
    corrupt: int = 0
    lost: int = 0
    wrong: int = 0
    unopened: int = 0

    @property
    def broken(self) -> bool:
        return bool(self.wrong or self.unopened or self.lost)


def kill_rounds(directory: Path, *, rounds: int, seed: int, capacity_bytes: int = 8 << 20) -> KillReport:
    """Run a writer, kill it, read back; the store lives through a hundred rounds, then starts anew."""
    rng = np.random.default_rng(seed)
    report = KillReport()
    held: set[bytes] = set()
    for number in range(rounds):
        if number % 100 == 0:
            shutil.rmtree(directory, ignore_errors=True)
            held = set()
        config = shape(directory, capacity_bytes)
        told = _killed(config, seed=int(rng.integers(1 << 62)), after_s=float(rng.uniform(0, 0.15)))
        report.rounds += 1
        report.killed_opening += not told.opened
        report.acknowledged += len(told.stored)
        report.wrong += told.wrong
        try:
            store = NvmeStore(config)
        except StoreUnusableError:
            report.unopened += 1
            continue
        with store:
            store.check_integrity()
            names = [record.name for record in store.records()]
            report.lost += len(((held | told.stored) - told.deleted).difference(names))
            for name, (outcome, buffer) in fetch_all(store, names).items():
                report.read_back += 1
                report.corrupt += outcome is not Outcome.DONE
                report.wrong += outcome is Outcome.DONE and buffer != content_of(name)
            held = {record.name for record in store.records()}
    return report


@dataclass
class _Told:
    """What a writer said before it died."""

    opened: bool = False
    stored: set[bytes] = field(default_factory=set)
    deleted: set[bytes] = field(default_factory=set)
    wrong: int = 0


def _killed(config: NvmeConfig, *, seed: int, after_s: float) -> _Told:
    """Let a writer of its own process run for `after_s`; nothing that it says is lost."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _write_for_ever(config, seed, writing)
        finally:
            os._exit(1)
    os.close(writing)
    said = bytearray()
    end = time.monotonic() + after_s
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            said += os.read(reading, 1 << 16)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(reading, 1 << 16):
        said += chunk
    os.close(reading)
    told = _Told()
    for at in range(0, len(said), 1 + NAME_BYTES):
        word, name = said[at : at + 1], bytes(said[at + 1 : at + 1 + NAME_BYTES])
        match bytes(word):
            case b"O":
                told.opened = True
            case b"S":
                told.stored.add(name)
            case b"D":
                told.deleted.add(name)
            case _:
                told.wrong += 1
    return told


def _write_for_ever(config: NvmeConfig, seed: int, pipe: int) -> None:
    """Store, delete when full, read back and flush now and then, with up to eight stores in flight."""

    def tell(word: bytes, name: bytes) -> None:
        os.write(pipe, word + name)

    rng = np.random.default_rng(seed)
    store = NvmeStore(config)
    tell(b"O", bytes(NAME_BYTES))
    held = [record.name for record in store.records()]
    slots = threading.Semaphore(8)

    def write(name: bytes) -> Outcome | None:
        content = content_of(name)
        payload = memoryview(content)
        if name[1] % 2:
            payload = memoryview(aligned_buffer(len(content)))[: len(content)]
            payload[:] = content

        def done(ticket: Ticket) -> None:
            slots.release()
            if ticket.outcomes[0] is Outcome.DONE:
                held.append(name)
                tell(b"S", name)

        slots.acquire()
        return store.store(name, payload, done=done).outcomes[0]

    while True:
        name = rng.bytes(NAME_BYTES)
        while write(name) is Outcome.FULL:
            if held:
                victim = held.pop(int(rng.integers(len(held))))
                tell(b"D", victim)
                store.delete(victim)
        chance = rng.random()
        if chance < 0.1 and held:
            some = [held[int(at)] for at in rng.integers(len(held), size=3)]
            for name, (outcome, buffer) in fetch_all(store, some).items():
                if outcome is Outcome.DONE and buffer != content_of(name):
                    tell(b"W", name)
        elif chance < 0.12:
            store.flush()
