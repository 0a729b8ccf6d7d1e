"""Tensors from files to where they stay, as fast as the files can be read.

Several threads read pieces at once, which a fast disk needs to show its speed, and on CUDA into page-locked memory, out
of which each piece goes to the device while the next ones are read. A tensor alone leaves the disk idle while its last
pieces come and are taken: several should be copied at once, each by a thread.
"""

from __future__ import annotations

import json
import mmap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.weight_file import PAGE, WeightFile

_MEMORY_BYTES = 8 << 20
"""Of a piece: PyTorch rounds page-locked memory up to powers of two."""
_PIECE_BYTES = _MEMORY_BYTES - PAGE
"""Read into it at most, since bytes may begin anywhere in its first page."""
READING_THREADS = 16
"""With 8, a virtio disk gave 0.6 to 0.7 GB/s in direct reads; with 16, 0.8 to 1.1; with 32 and 64 no more."""
_PIECES = READING_THREADS + 8
_SMALL_BYTES = 256 << 10
"""What is no larger is read by who asks for it: it would wait behind pieces of large tensors."""
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

    @classmethod
    def make(cls, device: torch.device) -> _Piece:
        if device.type == "cuda":  # Page-locked memory begins with a page.
            return cls(torch.empty(_MEMORY_BYTES, dtype=torch.uint8, pin_memory=True))
        return cls(torch.frombuffer(mmap.mmap(-1, _MEMORY_BYTES), dtype=torch.uint8))

    def read(self, file: WeightFile, offset: int, size: int) -> Tensor:
        """Read from `file`; returns the part of `memory` that has the bytes."""
        if self.left is not None:
            self.left.synchronize()
        start = file.read(offset, size, self.memory.numpy().data)
        return self.memory[start : start + size]


class Uploader(AbstractContextManager["Uploader"]):
    """Reads stored tensors into tensors on `device`; several threads may call it.

    Parameters
    ----------
    progress
        Called with the bytes read since the last call, by one thread at a time.
    """

    def __init__(self, device: torch.device, *, progress: Callable[[int], object] = lambda _: None) -> None:
        self._device = device
        self._progress = progress
        self._lock = Lock()
        self._files: dict[Path, WeightFile] = {}
        self._readers = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read-weights")
        self._pieces = [_Piece.make(device) for _ in range(_PIECES)]
        self._free: SimpleQueue[_Piece] = SimpleQueue()
        for piece in self._pieces:
            self._free.put(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.shutdown(cancel_futures=True)
        for piece in self._pieces:  # The device reads them until then.
            if piece.left is not None:
                piece.left.synchronize()
        for file in self._files.values():
            file.close()

    def copy(self, stored: StoredTensor, into: Tensor) -> None:
        """Fill `into`, contiguous and of as many values, in its own type.

        On CUDA the copies are in the order of the current stream.

        Raises
        ------
        CheckpointError
            If the file cannot be read or ends before the tensor does.
        """
        file = self._file(stored.path)
        file.expect(stored.start, stored.nbytes + _AHEAD_BYTES)
        values = into.view(-1)
        coming: deque[_Coming] = deque()
        try:
            for first, last in _cuts(stored):
                while (piece := self._free_piece(wait=not coming)) is None:
                    self._take(stored, values, coming.popleft())
                coming.append(self._begin(file, stored, first, last, piece))
            while coming:
                self._take(stored, values, coming.popleft())
        finally:
            for left in coming:  # After an error nobody may write into the pieces any more.
                if not left.bytes.cancel():
                    left.bytes.exception()
                self._free.put(left.piece)

    def _free_piece(self, *, wait: bool) -> _Piece | None:
        """A piece that nobody uses; None if there is none and one is not to be waited for."""
        try:
            return self._free.get(block=wait)
        except Empty:
            return None

    def _begin(self, file: WeightFile, stored: StoredTensor, first: int, last: int, piece: _Piece) -> _Coming:
        if stored.nbytes > _SMALL_BYTES:
            return _Coming(first, last, piece, self._readers.submit(piece.read, file, first, last - first))
        read: Future[Tensor] = Future()
        try:
            read.set_result(piece.read(file, first, last - first))
        except OSError as error:
            read.set_exception(error)
        return _Coming(first, last, piece, read)

    def _file(self, path: Path) -> WeightFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = WeightFile(path)
            return self._files[path]

    def _take(self, stored: StoredTensor, values: Tensor, coming: _Coming) -> None:
        try:
            read = _as_values(coming.bytes.result(), stored.dtype)
            first = (coming.first - stored.start) // stored.dtype.itemsize
            # Across devices and types at once, PyTorch would convert on the CPU.
            values[first : first + len(read)].copy_(read.to(self._device, non_blocking=True))
            if self._device.type == "cuda":
                coming.piece.left = torch.cuda.Event()  # type: ignore[no-untyped-call]
                coming.piece.left.record()
        except OSError as error:
            raise CheckpointError(
                f"{stored.path} cannot be read at byte {coming.first:,}: {error.strerror or error}; download the "
                "checkpoint again, or look at the disk"
            ) from None
        finally:
            self._free.put(coming.piece)
        with self._lock:
            self._progress(coming.last - coming.first)


@dataclass(frozen=True, slots=True)
class _Coming:
    """Bytes `first` to `last` of a file, on their way into a piece."""

    first: int
    last: int
    piece: _Piece
    bytes: Future[Tensor]


def _cuts(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    """First and last byte in the file of each piece of a tensor.

    Pieces begin at whole multiples of their size, as far as values allow, so that no page is read twice.
    """
    start, end = stored.start, stored.start + stored.nbytes
    phase = start % stored.dtype.itemsize
    second = phase + ((start - phase) // _PIECE_BYTES + 1) * _PIECE_BYTES
    return pairwise((start, *range(second, end, _PIECE_BYTES), end)) if end > start else iter(())


def _as_values(read: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as values, which may begin at an address that is no multiple of their size."""
    if read.storage_offset() % dtype.itemsize:
        read = read.clone()
    return read.view(dtype)
