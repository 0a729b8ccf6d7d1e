"""Several records' payloads between memory and slots in as few I/Os as their places allow. Blocking.

Records that were stored one after the other mostly lie one after the other, and are wanted together again: neighbours
are moved by one call. A buffer here is aligned, and holds each record from where the slots of the former one end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from wicore_backend.hmt.nvme.files import PAGE, StoreFiles
from wicore_backend.hmt.nvme.record import Record, slots_for
from wicore_backend.hmt.nvme.space import Run

_CACHED_BYTES = 1 << 20  # What stays in the caches of a core between its checksum and its copy.


def read_records(files: StoreFiles, records: Sequence[Record], buffer: memoryview) -> list[memoryview]:
    """Read the records' payloads, unchecked, into `buffer`; each one's part of it."""
    reads: list[tuple[Run, int, int]] = []
    payloads = [buffer[:0]] * len(records)
    at = 0
    for index in _by_place(records):
        record = records[index]
        payloads[index] = buffer[at : at + record.payload_bytes]
        end = at + whole_pages(record.payload_bytes)
        for run in record.runs:
            stop = at + run.length * files.slot_bytes
            last, begin, _ = reads[-1] if reads else (run, at, at)
            if reads and last.stop == run.start:
                reads[-1] = Run(last.start, last.length + run.length), begin, min(stop, end)
            else:
                reads.append((run, at, min(stop, end)))
            at = stop
    for run, begin, end in reads:
        files.read(run, buffer[begin:end])
    return payloads


def write_records(
    files: StoreFiles, records: Sequence[Record], payloads: Sequence[memoryview], buffer: memoryview
) -> None:
    """Write payloads to the slots of their records, from where they lie if that is aligned, else by way of `buffer`."""
    writes: list[tuple[Run, list[memoryview]]] = []
    at = 0
    for index in _by_place(records):
        record, payload = records[index], payloads[index]
        size = slots_for(len(payload), files.slot_bytes) * files.slot_bytes
        for run, pieces in _pieces(record.runs, files.slot_bytes, payload, buffer[at : at + size]):
            last, before = writes[-1] if writes else (run, [])
            full = sum(map(len, before)) == last.length * files.slot_bytes
            if writes and last.stop == run.start and full:
                writes[-1] = Run(last.start, last.length + run.length), before + pieces
            else:
                writes.append((run, pieces))
        at += size
    for run, pieces in writes:
        files.write(run, pieces)


def write_headers(files: StoreFiles, records: Sequence[Record], fingerprint: bytes) -> None:
    """Write the headers of records."""
    writes: list[tuple[Run, bytes]] = []
    for index in _by_place(records):
        record = records[index]
        for run, headers in zip(record.runs, record.headers(fingerprint), strict=True):
            last, before = writes[-1] if writes else (run, b"")
            if writes and last.stop == run.start:
                writes[-1] = Run(last.start, last.length + run.length), before + headers
            else:
                writes.append((run, headers))
    for run, headers in writes:
        files.write_headers(run.start, headers)


def checked_copy(into: memoryview, source: memoryview) -> bytes:
    """Copy bytes; the `payload_checksum` of what was copied. In pieces, so that memory is read once and not twice."""
    digest = xxhash.xxh3_128()
    for at in range(0, len(source), _CACHED_BYTES):
        piece = source[at : at + _CACHED_BYTES]
        digest.update(piece)
        copy(into[at : at + _CACHED_BYTES], piece)
    return digest.digest()


def copy(into: memoryview, source: memoryview) -> None:
    """Copy bytes, by way of numpy, which lets other threads run meanwhile."""
    np.asarray(into)[:] = np.asarray(source)


def whole_pages(size: int) -> int:
    """`size` bytes rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _by_place(records: Sequence[Record]) -> list[int]:
    """The records' indices by where they begin: neighbours are also asked for the last one first, as they left."""
    return sorted(range(len(records)), key=lambda index: records[index].runs[0].start)


def _pieces(
    runs: Sequence[Run], slot_bytes: int, payload: memoryview, buffer: memoryview
) -> Iterator[tuple[Run, list[memoryview]]]:
    """The payload cut for its runs into aligned pieces, the last of them filled up to a page."""
    size = len(payload)
    tail = size % PAGE
    if _address(payload) % PAGE:
        copy(buffer[:size], payload)
        payload = buffer[:size]
    last = buffer[size - tail : whole_pages(size)]
    if tail:
        copy(last[:tail], payload[size - tail :])
        last[tail:] = bytes(PAGE - tail)
    at = 0
    for run in runs:
        end = min(at + run.length * slot_bytes, size - tail)
        pieces = [payload[at:end]] if end > at else []
        yield run, [*pieces, last] if tail and run is runs[-1] else pieces
        at = end


def _address(view: memoryview) -> int:
    return int(np.asarray(view).__array_interface__["data"][0])
