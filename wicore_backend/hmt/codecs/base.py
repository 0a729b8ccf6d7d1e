"""What all codecs have in common: checks, chunks, and steps that several of them take."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from wicore_backend.errors import InvalidArgumentError

if TYPE_CHECKING:
    from wicore_backend.hmt.codecs.kernels.launching import Blocks

CodecName = Literal["exact", "fp8", "q8", "q4"]
BlockShape = tuple[int, int, int, int, int]
"""[layers of the group, 2 (K, V), block_size, KV heads, head dim]"""

LEAST = 2.0**-149
"""The smallest float32 above 0: what 0 is divided by instead of 0."""

NUMBERS = (torch.bfloat16, torch.float16, torch.float32)
"""Types of blocks that lossy codecs round; in others blocks are kept as they are."""
_CHUNK_VALUES = 2**19
"""Worked on at once: 2 MiB in float32. With q8 at 2**17, calling operators takes a third of the time."""
_DEVICE_CHUNK_VALUES = 2**24
"""The same on a GPU without kernels, where launching operators takes as long as their work on 2**21 values."""
_ALIGNMENT = 16
"""Bytes: of the blocks that kernels are compiled for. Whatever PyTorch allocates has it."""


class BlockKernels(Protocol):
    """What does a codec's work in one launch each way, on records at multiples of `alignment` bytes."""

    alignment: int

    def encode(self, blocks: Tensor, records: Tensor) -> None:
        """Write the records [N, ...] of the blocks."""

    def decode(self, records: Tensor, blocks: Tensor) -> None:
        """Write the blocks of the records [N, ...]."""


class Codec(ABC):
    """Encodes blocks of one shape and dtype, on the device where they are.

    On a CUDA device that takes one kernel launch, which neither allocates nor waits, where OpenAI Triton is installed
    and the shape is one that models have (powers of two of tokens a block and of channels a head); otherwise PyTorch's
    operators. There, records may also lie in page-locked memory of the host; whoever reads or writes them on the host
    minds the stream.

    Attributes
    ----------
    encoded_bytes
        Size of every encoded block.
    """

    name: ClassVar[CodecName]
    version: ClassVar[int] = 1
    """Grows with every change of what is written."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = NUMBERS
    """Of blocks."""

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        if len(shape) != 5 or min(shape) < 1 or shape[1] != 2:
            raise InvalidArgumentError(
                f"a block of shape {tuple(shape)} is not [layers, 2 (K, V), block_size, KV heads, head dim]"
            )
        if dtype not in self.dtypes:
            raise InvalidArgumentError(f"{self.name} cannot encode blocks of {dtype}, only those of {self.dtypes}")
        self.shape = shape
        self.dtype = dtype
        self.encoded_bytes = shape[0] * self._layer_bytes()
        self._of_thread = threading.local()

    @property
    def fingerprint(self) -> bytes:
        """Differs between codecs whose bytes mean different things."""
        return f"{self.name}/{self.version} {tuple(self.shape)} {self.dtype}".encode()

    @property
    def ratio(self) -> float:
        """How many times smaller a block gets."""
        return prod(self.shape) * self.dtype.itemsize / self.encoded_bytes

    def encode(self, blocks: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Encode blocks [N, *shape].

        Returns
        -------
        uint8 [N, encoded_bytes], which is `out` if that is given.

        Raises
        ------
        InvalidArgumentError
            If a tensor is not contiguous, or of another shape, dtype or device.
        """
        self._check_blocks("blocks", blocks)
        out = self._check_records("out", out, len(blocks), blocks.device)
        self._encode(blocks, out)
        return out

    def decode(self, encoded: Tensor, *, out: Tensor) -> None:
        """Decode uint8 [N, encoded_bytes] into `out` [N, *shape], which may be consecutive blocks of a pool.

        The bytes must be whole: any bytes decode to something.

        Raises
        ------
        InvalidArgumentError
            If a tensor is not contiguous, or of another shape, dtype or device.
        """
        self._check_blocks("out", out)
        self._check_records("encoded", encoded, len(out), out.device)
        self._decode(encoded, out)

    def prepare(self, device: torch.device) -> None:
        """Compile the kernels for a device now, for the first use of each takes a second."""
        if device.type == "cuda" and self._kernels is not None:
            pool = torch.zeros(1, *self.shape, dtype=self.dtype, device=device)
            self.decode(self.encode(pool), out=pool)

    def _encode(self, blocks: Tensor, records: Tensor) -> None:
        if (kernels := self._kernels_for(blocks, records)) is not None:
            kernels.encode(blocks, records)
        else:
            self._encode_plain(blocks, records)

    def _decode(self, records: Tensor, blocks: Tensor) -> None:
        if (kernels := self._kernels_for(blocks, records)) is not None:
            kernels.decode(records, blocks)
        else:
            self._decode_plain(records, blocks)

    @torch.inference_mode()
    def _encode_plain(self, blocks: Tensor, records: Tensor) -> None:
        if records.device != blocks.device:
            near = torch.empty_like(records, device=blocks.device)
            self._encode_plain(blocks, near)
            records.copy_(near, non_blocking=True)
        else:
            for layers, part, scratch in self._chunks(blocks, records):
                self._pack(layers, part, scratch)

    @torch.inference_mode()
    def _decode_plain(self, records: Tensor, blocks: Tensor) -> None:
        if records.device != blocks.device:
            self._decode_plain(records.to(blocks.device, non_blocking=True), blocks)
        else:
            for layers, part, scratch in self._chunks(blocks, records):
                self._unpack(part, layers, scratch)

    def _kernels_for(self, blocks: Tensor, records: Tensor) -> BlockKernels | None:
        if not blocks.is_cuda or not len(records) or (kernels := self._kernels) is None:
            return None
        aligned = blocks.data_ptr() % _ALIGNMENT == 0 and records.data_ptr() % kernels.alignment == 0
        return kernels if aligned else None

    @cached_property
    def _kernels(self) -> BlockKernels | None:
        if importlib.util.find_spec("triton") is None:
            return None
        from wicore_backend.hmt.codecs.kernels.launching import Blocks

        return self._make_kernels(Blocks(self.shape, self.dtype, self._layer_bytes()))

    def _chunks(self, blocks: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layers [n, 2, block_size, heads, d], their records [n, bytes of one] and scratch float32 [2, like layers]."""
        count = len(blocks) * self.shape[0]
        most = max(1, _chunk_values(blocks.device) // prod(self.shape[1:]))
        size = min(count, most)
        scratch = self._scratch(most)[:, :size] if blocks.device.type == "cpu" else self._room(size, blocks.device)
        layers, records = blocks.view(count, *self.shape[1:]), encoded.view(count, self._layer_bytes())
        for start in range(0, count, size or 1):
            part = slice(start, start + size)
            yield layers[part], records[part], scratch[:, : min(size, count - start)]

    def _scratch(self, layers: int) -> Tensor:
        """The calling thread's scratch on the CPU, which it keeps: memory that is allocated for each block, the system
        takes back and gives anew, page by page, which takes a fifth of the time of decoding."""
        kept: Tensor | None = getattr(self._of_thread, "scratch", None)
        if kept is None:
            kept = self._of_thread.scratch = self._room(layers, torch.device("cpu"))
        return kept

    def _room(self, layers: int, device: torch.device) -> Tensor:
        return torch.empty(2, layers, *self.shape[1:], dtype=torch.float32, device=device)

    def _check_blocks(self, name: str, blocks: Tensor) -> None:
        if blocks.shape[1:] != self.shape or blocks.dtype != self.dtype:
            raise InvalidArgumentError(
                f"{name} is {blocks.dtype} {list(blocks.shape)}; {self.name} takes {self.dtype} [N, "
                f"{', '.join(map(str, self.shape))}]"
            )
        _check_contiguous(name, blocks)

    def _check_records(self, name: str, records: Tensor | None, count: int, device: torch.device) -> Tensor:
        """The records, or room for them."""
        if records is None:
            return torch.empty(count, self.encoded_bytes, dtype=torch.uint8, device=device)
        near = records.device == device or (device.type == "cuda" and records.is_pinned())
        if records.shape != (count, self.encoded_bytes) or records.dtype != torch.uint8 or not near:
            raise InvalidArgumentError(
                f"{name} is {records.dtype} {list(records.shape)} on {records.device}; "
                f"{self.name} takes torch.uint8 {[count, self.encoded_bytes]} on {device}"
                f"{' or in page-locked memory' if device.type == 'cuda' else ''}"
            )
        _check_contiguous(name, records)
        return records

    @abstractmethod
    def _layer_bytes(self) -> int:
        """Bytes of one layer of a block, keys and values."""

    @abstractmethod
    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        """Write `layers` to `records`."""

    @abstractmethod
    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        """Write what `records` hold to `layers`."""

    @abstractmethod
    def _make_kernels(self, blocks: Blocks) -> BlockKernels | None:
        """Kernels that do the same; none for shapes that they are not for. Imports triton."""


def _chunk_values(device: torch.device) -> int:
    return _CHUNK_VALUES if device.type == "cpu" else _DEVICE_CHUNK_VALUES


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InvalidArgumentError(f"{name} has strides {tensor.stride()}; pass it contiguous")


def copy_finite(layers: Tensor, values: Tensor) -> Tensor:
    """Write `layers` as finite float32 to `values`, which is returned."""
    largest = torch.finfo(layers.dtype).max
    return values.copy_(layers).nan_to_num_(0.0, posinf=largest, neginf=-largest)


def bytes_of(numbers: Tensor) -> Tensor:
    """uint8 [n, ...] of numbers [n, ...]."""
    return numbers.reshape(len(numbers), -1).view(torch.uint8)


def numbers_of(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 of numbers stored by `bytes_of`, wherever in memory they lie."""
    return stored.clone(memory_format=torch.contiguous_format).view(dtype).to(torch.float32)


def divisor_up_to(number: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if number % size == 0)
