"""Tensors from files to where they stay, as fast as the files can be read.

Several threads read pieces of a tensor at once, which a fast disk needs to show its speed, and on CUDA into
page-locked memory, out of which each piece goes to the device while the next ones are read. What follows in the file is
asked of the kernel ahead. Reads go through the page cache: an engine that starts again finds its weights there.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from wicore_backend.errors import CheckpointError

_PIECE_BYTES = 8 << 20
_THREADS = 8
_PIECES = 2 * _THREADS
_AHEAD_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file, row-major.

    Attributes
    ----------
    start
        Byte of the file at which it begins.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class _Piece:
    """Memory for a piece of a file; `left` when the device has taken what was in it last."""

    memory: Tensor
    left: torch.cuda.Event | None = None


class Uploader(AbstractContextManager["Uploader"]):
    """Reads stored tensors into tensors on `device`; one thread at a time may call it.

    Attributes
    ----------
    bytes_read
        Since it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._files: dict[Path, int] = {}
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-weights")
        locked = device.type == "cuda"
        self._pieces = [_Piece(torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=locked)) for _ in range(_PIECES)]
        self._next_piece = cycle(self._pieces)
        self.bytes_read = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.shutdown(cancel_futures=True)
        for piece in self._pieces:  # The device reads them until then.
            if piece.left is not None:
                piece.left.synchronize()
        for file in self._files.values():
            os.close(file)

    def copy(self, stored: StoredTensor, into: Tensor) -> None:
        """Fill `into`, contiguous and of as many values, in its own type.

        On CUDA the copies are in the order of the current stream.

        Raises
        ------
        CheckpointError
            If the file cannot be read or ends before the tensor does.
        """
        values, width = into.view(-1), stored.dtype.itemsize
        file, size = self._file(stored.path), values.numel() * width
        os.posix_fadvise(file, stored.start, size + _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        reading: deque[tuple[int, int, _Piece, Future[None]]] = deque()
        try:
            for begin in range(0, size, _PIECE_BYTES):
                if len(reading) == _PIECES:
                    self._take(stored, values, *reading.popleft())
                end, piece = min(begin + _PIECE_BYTES, size), next(self._next_piece)
                job = self._readers.submit(_read, file, stored.start + begin, piece, end - begin)
                reading.append((begin // width, end // width, piece, job))
            while reading:
                self._take(stored, values, *reading.popleft())
        finally:
            for _, _, _, job in reading:  # After an error nobody may write into the pieces any more.
                if not job.cancel():
                    job.exception()
        self.bytes_read += size

    def _file(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
        return self._files[path]

    def _take(
        self, stored: StoredTensor, values: Tensor, first: int, last: int, piece: _Piece, job: Future[None]
    ) -> None:
        try:
            job.result()
        except OSError as error:
            raise CheckpointError(
                f"{stored.path} cannot be read at byte {stored.start + first * stored.dtype.itemsize:,}: "
                f"{error.strerror or error}; download the checkpoint again, or look at the disk"
            ) from None
        read = piece.memory[: (last - first) * stored.dtype.itemsize].view(stored.dtype)
        # Across devices and types at once, PyTorch would convert on the CPU.
        values[first:last].copy_(read.to(self._device, non_blocking=True))
        if self._device.type == "cuda":
            piece.left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            piece.left.record()


def _read(file: int, offset: int, piece: _Piece, size: int) -> None:
    if piece.left is not None:
        piece.left.synchronize()
    into = piece.memory.numpy().data[:size]
    while into:
        count = os.preadv(file, [into], offset)
        if count == 0:
            raise OSError(f"the file ends {len(into):,} bytes before the tensor does")
        into, offset = into[count:], offset + count
