"""What the store tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.trouble import Trouble


class HeldRecord(NamedTuple):
    """A record that can be fetched."""

    name: bytes
    payload_bytes: int


@dataclass(frozen=True)
class NvmeStatistics:
    """What a store holds, and what it has done since it was opened.

    Attributes
    ----------
    used_bytes
        Of all slots that are not free.
    stores, fetches
        Records asked for, by outcome.
    write_seconds, read_seconds
        Time in which `bytes_written` and `bytes_read` were moved and checked, added up over the threads.
    """

    capacity_bytes: int
    used_bytes: int
    records: int
    stores: dict[Outcome, int]
    fetches: dict[Outcome, int]
    troubles: dict[Trouble, int]
    bytes_written: int
    bytes_read: int
    write_seconds: float
    read_seconds: float
