"""What an opened directory is found to hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from wicore_backend.hmt.nvme.config import NvmeConfig
from wicore_backend.hmt.nvme.files import StoreFiles
from wicore_backend.hmt.nvme.index import Index
from wicore_backend.hmt.nvme.record import HEADER_BYTES, scan
from wicore_backend.hmt.nvme.trouble import Trouble, Troubles
from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)
_SCAN_SLOTS = 1 << 16


def read_index(files: StoreFiles, config: NvmeConfig, fingerprint: bytes, troubles: Troubles) -> Index:
    """The books of the records that the files hold. Headers that cannot be read are records that are missing.

    Parameters
    ----------
    fingerprint
        Of the records, as `fingerprint_of` makes it.
    """
    started = time.perf_counter()
    found = scan(
        _header_chunks(files, config.slots, troubles),
        fingerprint=fingerprint,
        slot_bytes=config.slot_bytes,
        max_payload_bytes=config.max_payload_bytes,
    )
    _log.info(
        logfmt(
            "nvme_store_opened",
            directory=config.directory,
            records=len(found.records),
            other_fingerprint_slots=found.foreign,
            slots=config.slots,
            direct=files.direct,
            seconds=time.perf_counter() - started,
        )
    )
    # The clock keeps sequences rising even where the highest headers cannot be read.
    sequence = max(found.next_sequence, time.time_ns())
    return Index.of(config.slots, config.slot_bytes, records=found.records, stale=found.stale, next_sequence=sequence)


def _header_chunks(files: StoreFiles, slots: int, troubles: Troubles) -> Iterator[bytes]:
    for first in range(0, slots, _SCAN_SLOTS):
        count = min(_SCAN_SLOTS, slots - first)
        try:
            yield files.read_headers(first, count)
        except OSError as error:
            troubles.add(Trouble.READ_ERROR, error)
            yield bytes(count * HEADER_BYTES)
