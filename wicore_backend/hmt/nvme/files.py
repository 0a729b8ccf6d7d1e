"""The store's three files: a lock, an index of headers, and the slots. Blocking calls; every failure is an OSError.

The slots are read and written past the page cache (O_DIRECT) where the file system takes that: a cold tier must not
push the rest of the machine out of memory. Elsewhere they go through the page cache, and every 64 MiB written are
followed by fdatasync, so that no more than that is ever dirty and a failing disk says so early.

Headers go through the page cache in both cases: 128 bytes each, many to a page. They reach the disk when the kernel
writes them back, or at `sync`. No order between a header and its slot is asked of the disk, and none is needed: a
header whose slot did not make it does not match the slot's bytes.

Threads with blocking calls, rather than io_uring: see docs/benchmarks/nvme-store.md for the comparison.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

from wicore_backend.errors import WicoreError
from wicore_backend.hmt.nvme.record import HEADER_BYTES
from wicore_backend.hmt.nvme.space import Run

PAGE = 4096
"""Bytes to which offsets, lengths and memory addresses of direct I/O are aligned; no disk in use asks for more."""

_SYNC_EVERY = 64 << 20
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class StoreUnusableError(WicoreError):
    """The directory cannot hold the store: its text says why and what to change."""


class StoreInUseError(StoreUnusableError):
    """Another process has the directory open."""


class StoreFiles:
    """The open files of one store directory, locked against other processes until `close`.

    Parameters
    ----------
    directory
        Made, readable to its owner only, if it is not there.
    slots, slot_bytes
        Shape of the data file; `slot_bytes` is a multiple of `PAGE`. Files of another length are cut or grown to it.
    preallocate
        Take the whole space from the file system now, instead of slot by slot.

    Raises
    ------
    StoreInUseError
        Another process has the directory.
    StoreUnusableError
        The files cannot be made, opened or given their size.
    """

    def __init__(self, directory: Path, *, slots: int, slot_bytes: int, preallocate: bool) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._unsynced = 0
        self._count = threading.Lock()
        with contextlib.ExitStack() as opened:
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _opened(directory / "lock", 0, opened)
                self._index = _opened(directory / "index", 0, opened)
                self._data, self.direct = _opened_data(directory / "slots", opened)
                for fd in (self._lock, self._data):  # The slots too, since anybody may remove a file called lock.
                    _flock(fd, directory, self._lock)
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)
                sizes = {self._data: slots * slot_bytes, self._index: slots * HEADER_BYTES}
                if preallocate:
                    _check_space(sizes)
                for fd, size in sizes.items():
                    _resize(fd, size, preallocate=preallocate)
            except OSError as error:
                raise StoreUnusableError(_explain(directory, error, slots * (slot_bytes + HEADER_BYTES))) from error
            opened.pop_all()

    @property
    def lost(self) -> bool:
        """Whether somebody has deleted the files; what is written then will be found by nobody."""
        return os.fstat(self._data).st_nlink == 0 or os.fstat(self._index).st_nlink == 0

    def read(self, run: Run, into: memoryview) -> None:
        """Fill `into`, aligned to `PAGE` and at most as long as the run, from the run's first byte onwards."""
        offset = run.start * self.slot_bytes
        while into:
            count = os.preadv(self._data, [into], offset)
            if count == 0:
                raise OSError(errno.EIO, "the file of slots is shorter than it was made")
            into = into[count:]
            offset += count

    def write(self, run: Run, pieces: list[memoryview]) -> None:
        """Write `pieces`, each aligned to `PAGE`, one after the other from the run's first byte onwards."""
        offset = run.start * self.slot_bytes
        while pieces:
            count = os.pwritev(self._data, pieces, offset)
            self._written(count)
            offset += count
            while pieces and count >= len(pieces[0]):
                count -= len(pieces[0])
                pieces = pieces[1:]
            if count:
                pieces = [pieces[0][count:], *pieces[1:]]

    def write_headers(self, slot: int, headers: bytes) -> None:
        """Put whole headers, of `slot` onwards, into the index."""
        if os.pwrite(self._index, headers, slot * HEADER_BYTES) != len(headers):
            raise OSError(errno.ENOSPC, "the index took only part of a header")

    def read_headers(self, first: int, count: int) -> bytes:
        """The headers of `count` slots from `first` onwards."""
        size = count * HEADER_BYTES
        return os.pread(self._index, size, first * HEADER_BYTES).ljust(size, b"\0")

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        for fd in (self._data, self._index):
            os.fdatasync(fd)

    def give_back_space(self) -> None:
        """After `lost`: free the deleted files' space, which would otherwise stay taken until `close`."""
        for fd in (self._data, self._index):
            os.ftruncate(fd, 0)

    def close(self) -> None:
        """Close the files and let go of the lock; nobody may be reading or writing."""
        for fd in (self._data, self._index, self._lock):
            os.close(fd)

    def _written(self, count: int) -> None:
        if self.direct:
            return
        with self._count:
            self._unsynced += count
            if self._unsynced < _SYNC_EVERY:
                return
            self._unsynced = 0
        os.fdatasync(self._data)


def aligned_buffer(size: int) -> mmap.mmap:
    """Anonymous memory that starts at a page, of at least `size` bytes and whole pages."""
    return mmap.mmap(-1, max(PAGE, -(-size // PAGE) * PAGE))


def _opened(path: Path, flags: int, opened: contextlib.ExitStack) -> int:
    fd = os.open(path, _OPEN_FLAGS | flags, 0o600)
    opened.callback(os.close, fd)
    return fd


def _opened_data(path: Path, opened: contextlib.ExitStack) -> tuple[int, bool]:
    """The file of slots, and whether its I/O is direct: file systems refuse at the opening or at the first read."""
    try:
        fd = _opened(path, os.O_DIRECT, opened)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return _opened(path, 0, opened), False
    try:
        os.preadv(fd, [aligned_buffer(PAGE)], 0)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        return fd, False
    return fd, True


def _flock(fd: int, directory: Path, lock: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StoreInUseError(
            f"{directory} is in use by another process (pid {holder}); give every server a directory of its own"
        ) from error


def _check_space(sizes: dict[int, int]) -> None:
    """Look before asking: a file system may hand out all that it has before it finds that this is too little."""
    missing = sum(size - min(size, os.fstat(fd).st_blocks * 512) for fd, size in sizes.items())
    system = os.fstatvfs(next(iter(sizes)))
    if missing > (free := system.f_bavail * system.f_frsize):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {missing:,} bytes wanted, {free:,} free")


def _resize(fd: int, size: int, *, preallocate: bool) -> None:
    before = os.fstat(fd).st_size
    os.ftruncate(fd, size)
    if preallocate:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.ftruncate(fd, min(before, size))
            raise


def _explain(directory: Path, error: OSError, wanted: int) -> str:
    reason = f"{directory} cannot hold an NVMe store of {wanted:,} bytes: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{reason}; lower its capacity or free space there"
    return f"{reason}; name a directory that this user can write"
