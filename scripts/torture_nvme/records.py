"""Records whose bytes follow from their names, and a small store for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wicore_backend.hmt.nvme import NvmeConfig, NvmeStore, Outcome

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
