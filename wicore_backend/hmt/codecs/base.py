"""What all codecs have in common: checks, chunks, and steps that several of them take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wicore_backend.errors import InvalidArgumentError

CodecName = Literal["exact", "fp8", "q8", "q4"]
BlockShape = tuple[int, int, int, int, int]
"""[layers of the group, 2 (K, V), block_size, KV heads, head dim]"""

LEAST = 2.0**-149
"""The smallest float32 above 0: what 0 is divided by instead of 0."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK_VALUES = 2**19
"""Worked on at once: 2 MiB in float32. With q8 at 2**17, calling operators takes a third of the time."""


class Codec(ABC):
    """Encodes blocks of one shape and dtype, on the device where they are.

    Attributes
    ----------
    encoded_bytes
        Size of every encoded block.
    """

    name: ClassVar[CodecName]
    version: ClassVar[int] = 1
    """Grows with every change of what is written."""

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        if len(shape) != 5 or min(shape) < 1 or shape[1] != 2:
            raise InvalidArgumentError(
                f"a block of shape {tuple(shape)} is not [layers, 2 (K, V), block_size, KV heads, head dim]"
            )
        if dtype not in _DTYPES:
            raise InvalidArgumentError(f"blocks of {dtype} cannot be encoded, only those of {_DTYPES}")
        self.shape = shape
        self.dtype = dtype
        self.encoded_bytes = shape[0] * self._layer_bytes()

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
        self._check("blocks", blocks, self.shape, self.dtype, blocks)
        if out is None:
            out = torch.empty(len(blocks), self.encoded_bytes, dtype=torch.uint8, device=blocks.device)
        self._check("out", out, (self.encoded_bytes,), torch.uint8, blocks)
        with torch.inference_mode():
            for layers, records, scratch in self._chunks(blocks, out):
                self._pack(layers, records, scratch)
        return out

    def decode(self, encoded: Tensor, *, out: Tensor) -> None:
        """Decode uint8 [N, encoded_bytes] into `out` [N, *shape], which may be consecutive blocks of a pool.

        The bytes must be whole: any bytes decode to something.

        Raises
        ------
        InvalidArgumentError
            If a tensor is not contiguous, or of another shape, dtype or device.
        """
        self._check("encoded", encoded, (self.encoded_bytes,), torch.uint8, out)
        self._check("out", out, self.shape, self.dtype, encoded)
        with torch.inference_mode():
            for layers, records, scratch in self._chunks(out, encoded):
                self._unpack(records, layers, scratch)

    def _chunks(self, blocks: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layers [n, 2, block_size, heads, d], their records [n, bytes of one] and scratch float32 [2, like layers].

        One scratch for all: memory that is allocated for each chunk, the system takes back and gives anew, page by
        page, which takes longer than the work on it.
        """
        count = len(blocks) * self.shape[0]
        size = min(count, max(1, _CHUNK_VALUES // prod(self.shape[1:])))
        scratch = torch.empty(2, size, *self.shape[1:], dtype=torch.float32, device=blocks.device)
        layers, records = blocks.view(count, *self.shape[1:]), encoded.view(count, self._layer_bytes())
        for start in range(0, count, size or 1):
            part = slice(start, start + size)
            yield layers[part], records[part], scratch[:, : min(size, count - start)]

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, peer: Tensor) -> None:
        wanted = (len(peer), *shape)
        if tensor.shape != wanted or tensor.dtype != dtype or tensor.device != peer.device:
            raise InvalidArgumentError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"{self.name} takes {dtype} {list(wanted)} on {peer.device}"
            )
        if not tensor.is_contiguous():
            raise InvalidArgumentError(f"{name} has strides {tensor.stride()}; pass it contiguous")

    @abstractmethod
    def _layer_bytes(self) -> int:
        """Bytes of one layer of a block, keys and values."""

    @abstractmethod
    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        """Write `layers` to `records`."""

    @abstractmethod
    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        """Write what `records` hold to `layers`."""


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
