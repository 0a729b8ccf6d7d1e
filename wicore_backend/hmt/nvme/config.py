"""The shape and the limits of an NVMe store."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.nvme.files import PAGE
from wicore_backend.hmt.nvme.record import HEADER_BYTES, slots_for

_MAX_SLOTS = 1 << 28
_BESIDE_SLOTS = 2 * PAGE
"""The lock file, and the end of the last page of headers."""


@dataclass(frozen=True, kw_only=True)
class NvmeConfig:
    """How large a store is and how patient.

    Attributes
    ----------
    directory
        The store's own; made if it is not there.
    capacity_bytes
        All that the store's files may ever take: the operator's `nvme_cache_bytes`, by which errors name it.
    slot_bytes
        Unit of space, a multiple of 4096. A record takes whole slots, so choose one that divides the payloads well: the
        encoded bytes of one layer, say. Smaller slots waste less, larger ones keep records in fewer pieces.
    max_payload_bytes
        Of the largest record.
    fingerprint
        Everything that changes what the bytes mean: model weights, dtype, block size, RoPE, codec. Records of another
        fingerprint do not exist.
    read_threads, write_threads
        Reads and writes at once; reads never wait behind writes. More than the disk needs to be busy: while a thread
        checks what it has read, others have to be reading. Each has a buffer of `max_payload_bytes`, but at least
        4 MiB, whose memory is taken as it is used first.
    read_deadline_s, write_deadline_s
        For one record, from when a thread takes it.
    store_limit
        Stores that may be waiting; one more is refused.
    retry_s
        How long stores are refused after a failed write.
    preallocate
        Take the capacity from the file system when the store is made. Without, space is taken as it is used, and a full
        disk shows as refused stores.
    """

    directory: Path
    capacity_bytes: int
    slot_bytes: int
    max_payload_bytes: int
    fingerprint: bytes
    read_threads: int = 8
    write_threads: int = 8
    read_deadline_s: float = 1.0
    write_deadline_s: float = 5.0
    store_limit: int = 256
    retry_s: float = 5.0
    preallocate: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise InvalidArgumentError(f"NVMe store: {field.name} is {value}; it has to be above 0")
        if self.slot_bytes % PAGE:
            raise InvalidArgumentError(
                f"NVMe store: slot_bytes is {self.slot_bytes}; it has to be a multiple of {PAGE}"
            )
        least, most = (
            slots * (self.slot_bytes + HEADER_BYTES) + _BESIDE_SLOTS
            for slots in (slots_for(self.max_payload_bytes, self.slot_bytes), _MAX_SLOTS)
        )
        if not least <= self.capacity_bytes <= most:
            raise InvalidArgumentError(
                f"nvme_cache_bytes is {self.capacity_bytes:,}, but this model's blocks need from {least:,}, which hold "
                f"one, to {most:,}, beyond which they are not counted; set it between, to many times the former"
            )

    @property
    def slots(self) -> int:
        """Slots that fit the capacity, their headers and the lock file included."""
        usable = self.capacity_bytes - _BESIDE_SLOTS
        return max(0, usable // (self.slot_bytes + HEADER_BYTES))
