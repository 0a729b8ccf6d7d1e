"""Reads of a file of weights: from the page cache what is in it, straight from the disk what is not.

Through the page cache each page is set up, filled and copied once more: two and a half times the processor's work,
which bounds what a fast disk gives (docs/benchmarks/loading-and-pictures.md). Nor does a model that stays on a device
gain by a second copy in host memory, which others want. So what is not there already is read by direct I/O.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from wicore_backend.errors import CheckpointError

PAGE = mmap.PAGESIZE
"""Places in the file, sizes and memory of direct I/O are multiples of it, as every disk wants them."""

_libc = ctypes.CDLL(None, use_errno=True)


class WeightFile:
    """An open file; its reads may be made by several threads at once.

    Raises
    ------
    CheckpointError
        If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
        self._direct: int | None = None
        self._pages = _ResidentPages(self._cached)
        # Of a file that the process may not write to, the kernel does not tell what is in the page cache.
        if os.access(path, os.W_OK):
            with suppress(OSError):  # Not every file system has it.
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def close(self) -> None:
        self._pages.close()
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def expect(self, offset: int, size: int) -> None:
        """What will be read: where all goes through the page cache, the kernel is asked to bring it there."""
        if self._direct is None:
            os.posix_fadvise(self._cached, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int, memory: memoryview) -> int:
        """Read `size` bytes from `offset` on into `memory`; returns where in it they begin.

        Parameters
        ----------
        memory
            Bytes, from an address that is a multiple of `PAGE` on, with room for the whole pages of the file in which
            the bytes are.

        Raises
        ------
        OSError
            If they cannot be read, or the file ends before.
        """
        if self._direct is not None and not self._pages.are_there(offset, size):
            before = offset % PAGE
            whole = -(-(before + size) // PAGE) * PAGE
            # A disk may want larger multiples, and memory may be of a kind that it cannot write to.
            with suppress(OSError):
                _fill(self._direct, offset - before, memory[:whole], wanted=before + size)
                return before
        _fill(self._cached, offset, memory[:size])
        return 0


class _ResidentPages:
    """Which pages of a file are in the page cache."""

    def __init__(self, file: int) -> None:
        self._mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ) if os.fstat(file).st_size else None

    def are_there(self, offset: int, size: int) -> bool:
        """Whether most of them are; True where that cannot be known."""
        if self._mapping is None:
            return True
        first = offset // PAGE * PAGE
        length = min(offset + size, len(self._mapping)) - first
        if length <= 0:
            return True
        resident = np.zeros(-(-length // PAGE), np.uint8)
        address = np.frombuffer(self._mapping, np.uint8).ctypes.data + first
        asked = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(resident.ctypes.data))
        return bool(asked != 0 or 2 * np.count_nonzero(resident & 1) >= len(resident))

    def close(self) -> None:
        if self._mapping is not None:
            self._mapping.close()


def _fill(file: int, offset: int, into: memoryview, *, wanted: int | None = None) -> None:
    """Read into all of `into`, or at least into its first `wanted` bytes: a file's last page is not whole."""
    left = len(into) if wanted is None else wanted
    while left > 0:
        count = os.preadv(file, [into], offset)
        if count == 0:
            raise OSError(f"the file ends {left:,} bytes before the tensor does")
        into, offset, left = into[count:], offset + count, left - count
