"""Tensors from files to where they stay, as fast as the files can be read.

Several threads read pieces of a tensor at once, which a fast disk needs to show its speed, and on CUDA into
page-locked memory, out of which each piece goes to the device while the next ones are read. What follows in the file is
asked of the kernel ahead. Reads go through the page cache: an engine that starts again finds its weights there.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from wicore_backend.errors import CheckpointError

_PIECE_BYTES = 8 << 20
_THREADS = 8
_PIECES = 2 * _THREADS
_AHEAD_BYTES = 512 << 20
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file, row-major and little-endian.

    Attributes
    ----------
    start
        Byte of the file at which it begins.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor lies in a safetensors file that the library has opened, and so has checked, before.

    The format: https://github.com/huggingface/safetensors#format. Tensors of types that PyTorch has not are left out.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: StoredTensor(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), _TYPES[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _TYPES
    }


@dataclass(slots=True, eq=False)
class _Piece:
    """Memory for a piece of a file; `left` when the device has taken what was in it last."""

    memory: Tensor
    left: torch.cuda.Event | None = None


class Uploader(AbstractContextManager["Uploader"]):
    """Reads stored tensors into tensors on `device`; one thread at a time may call it.

    Parameters
    ----------
    progress
        Called with the bytes read since the last call.
    """

    def __init__(self, device: torch.device, *, progress: Callable[[int], object] = lambda _: None) -> None:
        self._device = device
        self._progress = progress
        self._files: dict[Path, int] = {}
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-weights")
        locked = device.type == "cuda"
        self._pieces = [_Piece(torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=locked)) for _ in range(_PIECES)]
        self._next_piece = cycle(self._pieces)

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
        values, width, size = into.view(-1), stored.dtype.itemsize, stored.nbytes
        file = self._file(stored.path)
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
        self._progress(read.nbytes)
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
