"""What the launchers of all kernels have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from wicore_backend.hmt.codecs.base import BlockShape

_MOST_WARPS = 16
_MOST_VALUES = 2**15
"""Of a program, in its registers: 64 a thread."""


@dataclass(frozen=True)
class Blocks:
    """The blocks that a kernel is compiled for.

    Attributes
    ----------
    record
        Bytes of a layer's record.
    """

    shape: BlockShape
    dtype: torch.dtype
    record: int

    @property
    def layer(self) -> int:
        """Values of a layer, keys and values."""
        return prod(self.shape[1:])

    @property
    def alignment(self) -> int:
        """Bytes: what the records of all layers are aligned to, if the first is. At most 16, the widest access."""
        return gcd(self.record, 16)

    @property
    def by_heads(self) -> bool:
        """Whether a program can take a head's keys or values: a power of two of tokens and of channels."""
        _, _, tokens, _, dim = self.shape
        return _power_of_two(tokens) and _power_of_two(dim) and dim >= 16 and tokens * dim <= _MOST_VALUES


class CodecKernels:
    """`BlockKernels` of two kernels, compiled for blocks; one launch each.

    Parameters
    ----------
    encode, decode
        The kernels, of blocks and records, and of records and blocks.
    programs
        Of a block.
    options
        Constants and launch options of both kernels; `encode_options` are those that encode has besides.
    """

    def __init__(
        self,
        blocks: Blocks,
        encode: Any,
        decode: Any,
        *,
        programs: int,
        encode_options: dict[str, Any],
        **options: Any,
    ) -> None:
        self.alignment = blocks.alignment
        self._programs = programs
        self._encode, self._decode = encode, decode
        self._decode_options = options | {"ALIGNMENT": blocks.alignment, "enable_fp_fusion": False}
        self._encode_options = self._decode_options | encode_options

    def encode(self, blocks: Tensor, records: Tensor) -> None:
        """Write the records [N, ...] of the blocks."""
        with _on_device(blocks):
            self._encode[(len(records) * self._programs,)](blocks, records, **self._encode_options)

    def decode(self, records: Tensor, blocks: Tensor) -> None:
        """Write the blocks of the records [N, ...]."""
        with _on_device(blocks):
            self._decode[(len(records) * self._programs,)](records, blocks, **self._decode_options)


def largest_power_dividing(number: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `number`."""
    return min(number & -number, limit)


def warps(values: int, *, of_a_thread: int) -> int:
    """How many of them a program of so many values gets."""
    return min(max(values // (32 * of_a_thread), 1), _MOST_WARPS)


def _on_device(blocks: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of the blocks."""
    return torch.cuda.device(blocks.device) if blocks.is_cuda else nullcontext()


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
