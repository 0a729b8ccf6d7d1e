"""What the store's files say about a record: one header for each slot of it, found again by scanning headers alone.

A record of n payload bytes takes `slots_for(n)` slots anywhere in the data file. The index file has 128 bytes for every
slot, all in one piece; each of the record's slots has there the record's whole header and which part of it the slot is.
So

- a header that was torn, or belongs to another place, another format or another fingerprint, fails its own checks;
- a record some of whose headers are missing is not a record;
- the payload's checksum, in every header, covers the parts together and in order.

The checksums are XXH3 (64 bits for a header, 128 for a payload): they find accidents, not forgery. Whoever can write
the files can make them say anything.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from wicore_backend.hmt.nvme.space import Run, runs_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT_VERSION = 1
HEADER_BYTES = 128
NAME_BYTES = (16, 32)
"""Lengths that a name can have."""

_MAGIC = int.from_bytes(b"WicoKV" + FORMAT_VERSION.to_bytes(2, "little"), "little")
_FIELDS = struct.Struct("<Q16s32s16sQQQIII12x")
_CHECKSUM = struct.Struct("<Q")
_HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("fingerprint", "<u8", 2),
        ("name", "<u8", 4),
        ("checksum", "<u8", 2),
        ("sequence", "<u8"),
        ("payload_bytes", "<u8"),
        ("slot", "<u8"),
        ("part", "<u4"),
        ("parts", "<u4"),
        ("name_bytes", "<u4"),
        ("padding", "V12"),
        ("header_checksum", "<u8"),
    ]
)


def fingerprint_of(content: bytes, *, slot_bytes: int) -> bytes:
    """16 bytes that differ where the caller's fingerprint or the shape of the data file does."""
    text = b"%d %d %d " % (FORMAT_VERSION, HEADER_BYTES, slot_bytes)
    return hashlib.blake2b(text + content, digest_size=16).digest()


def payload_checksum(payload: Buffer) -> bytes:
    """XXH3-128 of the payload; releases the GIL."""
    return xxhash.xxh3_128_digest(payload)


@dataclass(slots=True, eq=False)
class Record:
    """A payload on disk, or on its way there.

    Attributes
    ----------
    sequence
        Rises with every record; of two records of one name the later holds.
    checksum
        Of the payload, `payload_checksum`.
    runs
        The slots in order of the payload.
    """

    name: bytes
    payload_bytes: int
    sequence: int
    checksum: bytes
    runs: tuple[Run, ...]

    def headers(self, fingerprint: bytes) -> Iterator[bytes]:
        """For each run the headers of its slots."""
        parts = sum(run.length for run in self.runs)
        part = 0
        for run in self.runs:
            packed = bytearray()
            for slot in range(run.start, run.stop):
                body = _FIELDS.pack(
                    _MAGIC,
                    fingerprint,
                    self.name,
                    self.checksum,
                    self.sequence,
                    self.payload_bytes,
                    slot,
                    part,
                    parts,
                    len(self.name),
                )
                packed += body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))
                part += 1
            yield bytes(packed)


@dataclass(frozen=True)
class Scan:
    """What the index file holds.

    Attributes
    ----------
    records
        Whole records of this fingerprint, oldest first, each name once.
    stale
        Bool [slots]: no record has the slot, although its header is not blank.
    foreign
        How many of those have another fingerprint.
    next_sequence
        Higher than any seen.
    """

    records: list[Record]
    stale: NDArray[np.bool_]
    foreign: int
    next_sequence: int


def scan(chunks: Iterable[bytes], *, fingerprint: bytes, slot_bytes: int, max_payload_bytes: int) -> Scan:
    """Read the headers of slots 0 onwards, given in chunks of whole headers; longer payloads are not records."""
    ours = np.frombuffer(fingerprint, "<u8")
    found = [np.empty(0, _HEADER)]
    stale = [np.empty(0, np.bool_)]
    foreign = 0
    first = 0
    for chunk in chunks:
        headers = np.frombuffer(chunk, _HEADER)
        stale.append(np.frombuffer(chunk, np.uint64).reshape(len(headers), -1).any(axis=1))
        known = headers["magic"] == _MAGIC
        mine = known & (headers["fingerprint"] == ours).all(axis=1)
        foreign += int((known & ~mine).sum())
        places = np.flatnonzero(mine & (headers["slot"] == np.arange(first, first + len(headers), dtype=np.uint64)))
        found.append(headers[places[_checksums_hold(chunk, headers, places)]])
        first += len(headers)
    valid = np.concatenate(found)
    valid = valid[np.lexsort((valid["part"], valid["sequence"]))]
    newest = {record.name: record for record in _records(valid, slot_bytes, max_payload_bytes)}
    records = sorted(newest.values(), key=lambda record: record.sequence)
    left = np.concatenate(stale)
    for record in records:
        for start, length in record.runs:
            left[start : start + length] = False
    last = int(valid["sequence"][-1]) if len(valid) else 0
    return Scan(records, left, foreign, last + 1)


def _checksums_hold(chunk: bytes, headers: NDArray[Any], places: NDArray[np.intp]) -> NDArray[np.bool_]:
    """For each of `places` whether the header there has the checksum that it says."""
    view = memoryview(chunk)
    digest = xxhash.xxh3_64_intdigest
    size = HEADER_BYTES - _CHECKSUM.size
    seen = [digest(view[at : at + size]) for at in (places * HEADER_BYTES).tolist()]
    holds: NDArray[np.bool_] = np.equal(np.asarray(seen, np.uint64), headers["header_checksum"][places])
    return holds


def _records(headers: NDArray[Any], slot_bytes: int, max_payload_bytes: int) -> Iterator[Record]:
    """The whole records among `headers`, which are in order of sequence and part."""
    if not len(headers):
        return
    starts = np.flatnonzero(np.diff(headers["sequence"], prepend=headers["sequence"][:1] + 1))
    counts = np.diff(starts, append=len(headers))
    heads = headers[starts]
    good = np.arange(len(headers)) - np.repeat(starts, counts) == headers["part"]
    for field in ("name", "checksum", "name_bytes", "payload_bytes", "parts"):
        agrees = headers[field] == np.repeat(heads[field], counts, axis=0)
        good &= agrees if agrees.ndim == 1 else agrees.all(axis=1)
    slots = np.maximum(1, -(-heads["payload_bytes"].astype(np.int64) // slot_bytes))
    whole = np.logical_and.reduceat(good, starts) & (counts == heads["parts"]) & (counts == slots)
    whole &= np.isin(heads["name_bytes"], NAME_BYTES) & (heads["payload_bytes"] <= max_payload_bytes)
    heads = np.ascontiguousarray(heads[whole])
    names = heads["name"].tobytes()
    checksums = heads["checksum"].tobytes()
    slots_of = headers["slot"].tolist()
    for place, (size, sequence, name_bytes, start, count) in enumerate(
        zip(
            heads["payload_bytes"].tolist(),
            heads["sequence"].tolist(),
            heads["name_bytes"].tolist(),
            starts[whole].tolist(),
            counts[whole].tolist(),
            strict=True,
        )
    ):
        name = names[32 * place : 32 * place + name_bytes]
        checksum = checksums[16 * place : 16 * place + 16]
        yield Record(name, size, sequence, checksum, tuple(runs_of(slots_of[start : start + count])))


def slots_for(payload_bytes: int, slot_bytes: int) -> int:
    """How many slots a payload takes; an empty one takes one too."""
    return max(1, -(-payload_bytes // slot_bytes))
