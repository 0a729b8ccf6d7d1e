"""Codecs of a byte a value, in units of the largest magnitude near it."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wicore_backend.hmt.codecs.base import (
    LEAST,
    BlockKernels,
    Codec,
    bytes_of,
    copy_finite,
    divisor_up_to,
    numbers_of,
)

if TYPE_CHECKING:
    from wicore_backend.hmt.codecs.kernels.launching import Blocks

_FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
_Q8_GROUP = 64
"""A 16-bit scale for 64 values makes 1.94 times smaller; for 32, 1.88."""


class _ScaledCodec(Codec):
    """A byte a value, in units of the largest magnitude of its group; that is stored in the dtype, so it is exact.

    A record is the bytes of all values and then the groups' magnitudes.
    """

    grouped: ClassVar[tuple[int, ...]]
    """Axes of `_groups()` that a group extends over."""

    @abstractmethod
    def _groups(self) -> tuple[int, ...]:
        """The shape of a layer's groups."""

    @abstractmethod
    def _store(self, units: Tensor, codes: Tensor) -> None:
        """Write float32 [n, values], from -1 to 1, as uint8. May use `units` as scratch."""

    @abstractmethod
    def _load(self, codes: Tensor, scales: Tensor, values: Tensor) -> None:
        """Write what uint8 codes [n, values] stand for to `values` float32 [groups], in units of float32 `scales`."""

    def _scales_shape(self) -> tuple[int, ...]:
        return tuple(1 if axis in self.grouped else size for axis, size in enumerate(self._groups(), 1))

    def _layer_bytes(self) -> int:
        return prod(self.shape[1:]) + prod(self._scales_shape()) * self.dtype.itemsize

    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        values, units = (part.view(-1, *self._groups()) for part in scratch)
        copy_finite(layers, scratch[0])
        torch.abs(values, out=units)
        scales = units.amax(self.grouped, keepdim=True)
        torch.div(values, scales.clamp(min=LEAST), out=units)
        codes, stored = records.split_with_sizes(self._sections(), 1)
        self._store(units.view(len(layers), -1), codes)
        stored.copy_(bytes_of(scales.to(self.dtype)))

    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        codes, stored = records.split_with_sizes(self._sections(), 1)
        scales = numbers_of(stored, self.dtype).view(-1, *self._scales_shape())
        self._load(codes, scales, scratch[0].view(-1, *self._groups()))
        layers.copy_(scratch[0])

    def _sections(self) -> list[int]:
        values = prod(self.shape[1:])
        return [values, self._layer_bytes() - values]


class Fp8Codec(_ScaledCodec):
    """e4m3. Error of a value x in a head whose largest magnitude is m: at most |x| / 16, or m / 458,752 if that is
    more, and half a unit in the dtype's last place."""

    name = "fp8"
    grouped = (2, 4)  # Tokens and channels of [2, block_size, heads, d].

    def _groups(self) -> tuple[int, ...]:
        return self.shape[1:]

    def _store(self, units: Tensor, codes: Tensor) -> None:
        codes.copy_(units.mul_(_FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8))

    def _load(self, codes: Tensor, scales: Tensor, values: Tensor) -> None:
        values.view(len(codes), -1).copy_(codes.view(torch.float8_e4m3fn))
        values.div_(_FP8_MAX).mul_(scales)

    def _make_kernels(self, blocks: Blocks) -> BlockKernels | None:
        from wicore_backend.hmt.codecs.kernels.scaled import Fp8Kernels

        return Fp8Kernels.for_blocks(blocks)


class Q8Codec(_ScaledCodec):
    """Error of a value in a group whose largest magnitude is m: at most m / 254 and half a unit in the dtype's last
    place."""

    name = "q8"
    grouped = (2,)

    def _groups(self) -> tuple[int, ...]:
        size = divisor_up_to(prod(self.shape[1:]), _Q8_GROUP)
        return (prod(self.shape[1:]) // size, size)

    def _store(self, units: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(units.mul_(127).round_())

    def _load(self, codes: Tensor, scales: Tensor, values: Tensor) -> None:
        values.view(len(codes), -1).copy_(codes.view(torch.int8))
        if self.dtype.itemsize == 2:
            # To divide the values takes as long as all else. c * (m / 127) is within 2**-22 of (c / 127) * m, and since
            # 127 is a prime, neither is so near to the middle of two neighbours among the numbers of 16 bits: rounded,
            # they are the same. tests/test_codecs.py compares them for every c and m.
            scales = scales / 127
        else:
            values.div_(127)
        values.mul_(scales)

    def _make_kernels(self, blocks: Blocks) -> BlockKernels | None:
        from wicore_backend.hmt.codecs.kernels.scaled import Q8Kernels

        return Q8Kernels.for_blocks(blocks)
