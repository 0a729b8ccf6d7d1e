"""Tries to make the NVMe store lie, and times it. Prints one JSON object.

    python -m scripts.torture_nvme kill          kill -9 at random moments under write load, reopen, read back
    python -m scripts.torture_nvme crash         what a disk may hold after power was lost at any byte, read back
    python -m scripts.torture_nvme damage        random bit flips, truncations, misplaced and torn writes, read back
    python -m scripts.torture_nvme throughput    against a plain direct-I/O copy of the same size, taken in turns
    python -m scripts.torture_nvme opening       the index of a large store, from a cold cache

What a record holds follows from its name, so that every byte can be checked without remembering any. `--directory` is
on the disk in question; what is put there is removed. The exit code is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore, Outcome, StoreFiles, StoreUnusableError, Ticket
from wicore_backend.hmt.nvme.files import aligned_buffer
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record, fingerprint_of, scan
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.policy.a2cr import A2CR

NAME_BYTES = 16
SLOT = 4096
SIZES = [SLOT - 100, SLOT, 10 * SLOT, 10 * SLOT - 1, 52 * SLOT - 1000, 52 * SLOT]
"""Like a global block, a local one ten to fifty-two as in Gemma-3-27B, and odd ends."""


def size_of(name: bytes) -> int:
    """The length of the record of that name."""
    return SIZES[name[0] % len(SIZES)]


def content_of(name: bytes) -> bytes:
    """The bytes of the record of that name."""
    return np.random.Generator(np.random.SFC64(int.from_bytes(name, "little"))).bytes(size_of(name))


def shape(directory: Path, capacity_bytes: int) -> NvmeConfig:
    """A store whose records `content_of` tells."""
    return NvmeConfig(
        directory=directory,
        capacity_bytes=capacity_bytes,
        slot_bytes=SLOT,
        max_payload_bytes=max(SIZES),
        fingerprint=b"torture",
        read_threads=2,
        read_deadline_s=60.0,
        write_deadline_s=60.0,
    )


def fetch_all(store: NvmeStore, names: Sequence[bytes]) -> dict[bytes, tuple[Outcome, bytearray]]:
    """Each record's outcome, and the buffer it was fetched into."""
    buffers = [bytearray(size_of(name)) for name in names]
    ticket = store.fetch(names, buffers)
    ticket.wait()
    outcomes = [outcome for outcome in ticket.outcomes if outcome is not None]
    return {name: (outcome, buffer) for name, outcome, buffer in zip(names, outcomes, buffers, strict=True)}


# kill -9


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


# Loss of power


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


# Damage


@dataclass
class DamageReport:
    """What `damage_rounds` saw.

    Attributes
    ----------
    rounds
        By kind of damage.
    read, refused
        Records asked for; those of them that were not served.
    wrong
        Records served with a wrong byte. The promise is none.
    collateral
        Records not served although no byte of theirs was damaged. The promise is none.
    unopened
        Damaged stores that could not be opened. The promise is none.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    read: int = 0
    refused: int = 0
    wrong: int = 0
    collateral: int = 0
    unopened: int = 0

    @property
    def broken(self) -> bool:
        return bool(self.wrong or self.collateral or self.unopened)


class _Victim:
    """A store's files as they were, and who has which slot."""

    def __init__(self, directory: Path, rng: np.random.Generator) -> None:
        self.config = shape(directory, 1 << 20)
        shutil.rmtree(directory, ignore_errors=True)
        with NvmeStore(self.config) as store:
            while store.store(name := rng.bytes(NAME_BYTES), content_of(name)).outcomes[0] is not Outcome.FULL:
                pass
        with NvmeStore(self.config) as store:
            names = [record.name for record in store.records()]
            for name in names[::5]:  # So that later records lie in pieces.
                store.delete(name)
            for _ in range(200):
                store.store(name := rng.bytes(NAME_BYTES), content_of(name)).wait()
        with NvmeStore(self.config) as store:
            self.names = [record.name for record in store.records()]
        self.content = {name: content_of(name) for name in self.names}
        self.files = {"index": HEADER_BYTES, "slots": SLOT}
        self.bytes = {file: (directory / file).read_bytes() for file in self.files}
        found = scan(
            [self.bytes["index"]],
            fingerprint=fingerprint_of(self.config.fingerprint, slot_bytes=SLOT),
            slot_bytes=SLOT,
            max_payload_bytes=max(SIZES),
        )
        runs = [(record.name, run) for record in found.records for run in record.runs]
        self.owner = {slot: name for name, run in runs for slot in range(run.start, run.stop)}

    def put_back(self) -> None:
        for file, content in self.bytes.items():
            path = self.config.directory / file
            if path.read_bytes() != content:
                with path.open("r+b") as stream:
                    stream.write(content)
                    stream.truncate()

    def damage(self, kind: str, rng: np.random.Generator) -> set[bytes]:
        """Do it; the names of records that may now be gone."""
        file = str(rng.choice(list(self.files)))
        unit, size = self.files[file], len(self.bytes[file])
        damaged: list[tuple[int, int]] = []
        with (self.config.directory / file).open("r+b", buffering=0) as stream:

            def write(at: int, content: bytes) -> None:
                stream.seek(at)
                stream.write(content)
                damaged.append((at, at + len(content)))

            match kind:
                case "flip":
                    for bit in rng.integers(size * 8, size=int(rng.integers(1, 9))).tolist():
                        before = self.bytes[file][bit // 8]
                        write(bit // 8, bytes([before ^ 1 << bit % 8]))
                case "truncation":
                    stream.truncate(at := int(rng.integers(size)))
                    damaged.append((at, size))
                case "zeros" | "noise":
                    at = int(rng.integers(size))
                    length = int(min(size - at, rng.integers(1, 4 * unit)))
                    write(at, bytes(length) if kind == "zeros" else rng.bytes(length))
                case _:  # A write that went to another unit's place.
                    source, target = (int(place) * unit for place in rng.integers(size // unit, size=2))
                    write(target, self.bytes[file][source : source + unit])
        slots = {slot for start, stop in damaged for slot in range(start // unit, -(-stop // unit))}
        return {self.owner[slot] for slot in slots if slot in self.owner}


def damage_rounds(directory: Path, *, rounds: int, seed: int) -> DamageReport:
    """Damage a good store before it is opened or while it is open, and read every record."""
    rng = np.random.default_rng(seed)
    victim = _Victim(directory, rng)
    report = DamageReport()
    kinds = {"flip": 0.6, "truncation": 0.25, "zeros": 0.05, "noise": 0.05, "misplaced": 0.05}
    for _ in range(rounds):
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        report.rounds[kind] = report.rounds.get(kind, 0) + 1
        victim.put_back()
        live = rng.random() < 0.5
        hurt = set() if live else victim.damage(kind, rng)
        try:
            store = NvmeStore(victim.config)
        except StoreUnusableError:
            report.unopened += 1
            continue
        with store:
            if live:
                hurt = victim.damage(kind, rng)
            for name, (outcome, buffer) in fetch_all(store, victim.names).items():
                report.read += 1
                report.refused += outcome is not Outcome.DONE
                report.wrong += outcome is Outcome.DONE and buffer != victim.content[name]
                report.collateral += outcome is not Outcome.DONE and name not in hurt
            store.check_integrity()
    return report


# Time


def throughput(directory: Path, *, rounds: int, total_bytes: int, payload_bytes: int, threads: int) -> dict[str, Any]:
    """GB/s of the store, and of plain direct I/O with one and with `threads` in flight, all of the same bytes."""
    count = total_bytes // payload_bytes
    memory = np.frombuffer(aligned_buffer(count * payload_bytes), np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    before = memory.copy()
    records = [part.data.cast("B") for part in np.split(memory, count)]
    plain = directory / "plain"
    slot_bytes = min(payload_bytes, 128 << 10)
    slots = count * -(-payload_bytes // slot_bytes)
    config = NvmeConfig(
        directory=directory / "store",
        capacity_bytes=int(slots * slot_bytes * 1.01) + (1 << 20),
        slot_bytes=slot_bytes,
        max_payload_bytes=payload_bytes,
        fingerprint=b"throughput",
        read_threads=threads,
        write_threads=threads,
        read_deadline_s=60.0,
        write_deadline_s=600.0,
        store_limit=count,
    )
    speeds: dict[str, list[float]] = {}

    def timed(what: str, run: Callable[[], None]) -> None:
        began = time.perf_counter()
        run()
        speeds.setdefault(what, []).append(count * payload_bytes / (time.perf_counter() - began) / 1e9)

    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, count * payload_bytes)
    names = [number.to_bytes(NAME_BYTES, "little") for number in range(count)]

    def store_all(store: NvmeStore) -> None:
        ticket = store.store_all(names, records)
        assert ticket.wait()
        assert set(ticket.outcomes) == {Outcome.DONE}

    def fetch_all_records(store: NvmeStore) -> None:
        ticket = store.fetch(names, records)
        assert ticket.wait()
        assert set(ticket.outcomes) == {Outcome.DONE}

    with NvmeStore(config) as store:
        for _ in range(rounds + 1):  # The first round lays the files out and is left out.
            for name in names:
                store.delete(name)
            timed("plain_write_1", lambda: _plain(fd, records, os.pwritev, 1))
            timed("store_write", lambda: store_all(store))
            timed("plain_write_n", lambda: _plain(fd, records, os.pwritev, threads))
            memory[:] = 0
            timed("plain_read_1", lambda: _plain(fd, records, os.preadv, 1))
            assert np.array_equal(memory, before)
            memory[:] = 0
            timed("store_read", lambda: fetch_all_records(store))
            assert np.array_equal(memory, before)
            timed("plain_read_n", lambda: _plain(fd, records, os.preadv, threads))
    os.close(fd)
    medians = {what: statistics.median(values[1:]) for what, values in speeds.items()}
    ratios = {}
    for way in ("write", "read"):
        for count_of in ("1", "n"):
            pairs = zip(speeds[f"store_{way}"][1:], speeds[f"plain_{way}_{count_of}"][1:], strict=True)
            ratios[f"{way}_to_plain_{count_of}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return {"payload_bytes": payload_bytes, "records": count, "threads": threads, "rounds": rounds} | {
        what: round(value, 3) for what, value in (medians | ratios).items()
    }


def _plain(
    fd: int, records: Sequence[memoryview], call: Callable[[int, list[memoryview], int], int], count: int
) -> None:
    """Copy the records to or from one place after the other of a file, with `count` calls in flight."""

    def move(first: int) -> None:
        for number in range(first, len(records), count):
            assert call(fd, [records[number]], number * len(records[number])) == len(records[number])

    if count == 1:
        move(0)
        return
    threads = [threading.Thread(target=move, args=(first,)) for first in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def opening(directory: Path, *, capacity_bytes: int, slot_bytes: int, slots_a_record: int) -> dict[str, Any]:
    """Seconds to open a store with every slot taken, its index not in memory, and to make a cold tier's books over it.

    Its slots are a hole, never read.
    """
    config = NvmeConfig(
        directory=directory,
        capacity_bytes=capacity_bytes,
        slot_bytes=slot_bytes,
        max_payload_bytes=slot_bytes * slots_a_record,
        fingerprint=b"opening",
        read_threads=1,
        write_threads=1,
        preallocate=False,
    )
    NvmeStore(config).close()
    mark = fingerprint_of(config.fingerprint, slot_bytes=slot_bytes)
    rng = np.random.default_rng(0)
    count = config.slots // slots_a_record
    with (directory / "index").open("r+b") as stream:
        for number in range(count):
            runs = (Run(number * slots_a_record, slots_a_record),)
            name = record_name((LayerGroup.GLOBAL, rng.bytes(NAME_BYTES)))
            record = Record(name, slot_bytes * slots_a_record, number + 1, bytes(16), runs)
            for headers in record.headers(mark):
                stream.write(headers)
        stream.flush()
        os.fsync(stream.fileno())
    seconds: dict[str, float] = {}
    for cache in ("cold", "warm"):
        with (directory / "index").open("rb") as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        store = NvmeStore(config)
        seconds[cache] = round(time.perf_counter() - began, 2)
        assert len(store.records()) == count
        if cache == "warm":
            began = time.perf_counter()
            ColdBooks(store, {LayerGroup.GLOBAL: slot_bytes * slots_a_record}, A2CR)
            seconds["books"] = round(time.perf_counter() - began, 2)
        store.close()
    return {
        "capacity_bytes": capacity_bytes,
        "slot_bytes": slot_bytes,
        "records": count,
        "index_bytes": config.slots * HEADER_BYTES,
        "seconds": seconds,
    }


class _Run(Protocol):
    def __call__(self, directory: Path, *, rounds: int, seed: int) -> KillReport | CrashReport | DamageReport: ...


@contextmanager
def _place(parent: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="torture-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk in question")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in (("kill", 3_000), ("crash", 5_000), ("damage", 12_500)):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("throughput")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--total-mib", type=int, default=256)
    command.add_argument("--payload-kib", type=int, nargs="+", default=[128, 640, 1280, 6656])
    command.add_argument("--threads", type=int, nargs="+", default=[4])
    command = commands.add_parser("opening")
    command.add_argument("--capacity-gb", type=int, default=100)
    command.add_argument("--slot-kib", type=int, default=128)
    command.add_argument("--slots-a-record", type=int, nargs="+", default=[10, 1])
    options = parser.parse_args(arguments)

    began = time.perf_counter()
    broken = False
    result: Any
    runs: dict[str, _Run] = {"kill": kill_rounds, "crash": crash_rounds, "damage": damage_rounds}
    with _place(options.directory) as place:
        match options.command:
            case "kill" | "crash" | "damage":
                report = runs[options.command](place / "store", rounds=options.rounds, seed=options.seed)
                result, broken = asdict(report), report.broken
            case "throughput":
                result = [
                    throughput(
                        place / f"{size}-{threads}",
                        rounds=options.rounds,
                        total_bytes=options.total_mib << 20,
                        payload_bytes=size << 10,
                        threads=threads,
                    )
                    for size in options.payload_kib
                    for threads in options.threads
                ]
            case _:
                result = [
                    opening(
                        place / str(slots),
                        capacity_bytes=options.capacity_gb * 10**9,
                        slot_bytes=options.slot_kib << 10,
                        slots_a_record=slots,
                    )
                    for slots in options.slots_a_record
                ]
    about = {
        "command": options.command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}",
        "seconds": round(time.perf_counter() - began, 1),
        "broken": broken,
    }
    print(json.dumps(about | {"result": result}, indent=2))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
