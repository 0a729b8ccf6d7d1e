"""Disks in trouble: every occurrence counted, the first of a kind logged."""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter
from enum import StrEnum
from pathlib import Path

from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)


class Trouble(StrEnum):
    """Kinds of trouble. Each is counted; the first of a kind is logged."""

    DISK_FULL = "disk_full"
    PERMISSION = "permission"
    READ_ERROR = "read_error"
    WRITE_ERROR = "write_error"
    SLOW_READ = "slow_read"
    SLOW_WRITE = "slow_write"
    CORRUPT = "corrupt"
    FILES_LOST = "files_lost"


_OF_ERRNO = {
    errno.ENOSPC: Trouble.DISK_FULL,
    errno.EDQUOT: Trouble.DISK_FULL,
    errno.EFBIG: Trouble.DISK_FULL,
    errno.EACCES: Trouble.PERMISSION,
    errno.EPERM: Trouble.PERMISSION,
    errno.EROFS: Trouble.PERMISSION,
}
_EFFECT = {
    Trouble.DISK_FULL: "stores are refused for a while",
    Trouble.PERMISSION: "stores are refused for a while",
    Trouble.READ_ERROR: "what could not be read counts as missing",
    Trouble.WRITE_ERROR: "stores are refused for a while",
    Trouble.SLOW_READ: "late records count as missing",
    Trouble.SLOW_WRITE: "late records are not stored",
    Trouble.CORRUPT: "the record counts as missing",
    Trouble.FILES_LOST: "the store is empty and refuses to store until it is opened again",
}


def write_trouble(error: OSError) -> Trouble:
    """The kind of a failed write."""
    return _OF_ERRNO.get(error.errno or 0, Trouble.WRITE_ERROR)


class Troubles:
    """Counts troubles with one directory. Safe on any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._counts: Counter[Trouble] = Counter()

    @property
    def counts(self) -> dict[Trouble, int]:
        """How often each kind was met."""
        with self._lock:
            return dict(self._counts)

    def add(self, trouble: Trouble, error: OSError | None = None) -> None:
        """Count one; log it if it is the first of its kind."""
        with self._lock:
            self._counts[trouble] += 1
            if self._counts[trouble] > 1:
                return
        _log.warning(
            logfmt(
                "nvme_store_trouble",
                kind=trouble,
                directory=self._directory,
                error=str(error) if error else None,
                effect=_EFFECT[trouble],
                more="counted, not logged",
            )
        )
