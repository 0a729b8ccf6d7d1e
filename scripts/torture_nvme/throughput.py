"""The store against plain direct I/O of the same bytes, taken in turns."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.torture_nvme.records import NAME_BYTES
from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore, Outcome
from wicore_backend.hmt.nvme.files import aligned_buffer


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
