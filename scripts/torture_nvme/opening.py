"""The index of a large store, from a cold cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.torture_nvme.records import NAME_BYTES
from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record, fingerprint_of
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.policy.a2cr import A2CR


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
