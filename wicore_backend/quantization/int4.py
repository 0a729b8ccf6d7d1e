"""INT4: codes of four bits and, for each group of inputs of each output, a scale and perhaps a zero point.

Codes lie as the kernels in `executor/kernels/int4.py` read them, not as any file has them. A matrix [N, K] is cut into
tiles of `b` outputs and a span of `c` inputs, which are contiguous; a span is one or two groups. Within an output's
part of a tile, sixteen bits hold four codes that are a quarter of a span apart: the lowest four bits of half-word i are
the code of input i, the next those of input c / 4 + i, and so on. So one shift and one mask take from two adjacent
half-words the codes of two adjacent inputs, and each quarter of a span is a matrix of its own, in one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wicore_backend.quantization.fp8 import FP8, FP8_MAX, LEAST_SCALE, Fp8Matrix

LEVELS = 16
SYMMETRIC_ZERO = 8
"""The code of zero in a matrix without zero points."""
TILE_ROWS = 16
"""Outputs of a tile: as many as a tensor core's instruction takes (m16n8k16)."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """A `QuantizedMatrix` whose elements are (code - zero point) * scale."""

    codes: Tensor
    """int32 [N / b, K / c, b, c / 8]"""
    scales: Tensor
    """bfloat16 or float16 [N / b, K / c, b, groups of a span]"""
    zeros: Tensor | None
    """Like `scales`, whole numbers; None if all are 8."""
    dtype: torch.dtype

    @classmethod
    def packed(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Self:
        """The matrix of `codes` uint8 [N, K] under 16, and of `scales` and `zeros` [N, groups] of equal length."""
        rows, columns = codes.shape
        groups = scales.shape[1]
        in_span = 2 - groups % 2
        b, spans = TILE_ROWS if rows % TILE_ROWS == 0 else 1, groups // in_span
        span = columns // spans
        assert columns % groups == 0, f"{columns} inputs cannot be cut into {groups} equal groups"
        assert span % 8 == 0, f"a span of {span} inputs is no whole number of words"
        quarters = codes.to(torch.int16).view(rows, spans, 4, span // 4).unbind(2)
        words = sum(quarter << 4 * i for i, quarter in enumerate(quarters))
        assert isinstance(words, Tensor)

        def tiled(values: Tensor) -> Tensor:
            return values.reshape(rows // b, b, spans, -1).transpose(1, 2).contiguous()

        return cls(
            tiled(words.view(torch.int32)),
            tiled(scales),
            None if zeros is None or bool((zeros == SYMMETRIC_ZERO).all()) else tiled(zeros.to(scales.dtype)),
            dtype,
        )

    @property
    def shape(self) -> torch.Size:
        tile_rows, spans, rows, words = self.codes.shape
        return torch.Size((tile_rows * rows, spans * words * 8))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[3] * 8 // self.scales.shape[3]

    def tile_rows(self, first: int, last: int) -> Int4Matrix:
        """The tiles' rows from `first` up to `last`, without a copy."""
        zeros = None if self.zeros is None else self.zeros[first:last]
        return Int4Matrix(self.codes[first:last], self.scales[first:last], zeros, self.dtype)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes uint8 [N, K], scales [N, groups] and zeros [N, groups] or None, as `packed` takes them."""
        halves = self.codes.view(torch.int16)
        quarters = torch.stack([(halves >> 4 * i) & 15 for i in range(4)], -2).to(torch.uint8)
        return (
            quarters.flatten(-2).transpose(1, 2).reshape(self.shape),
            self._by_row(self.scales),
            None if self.zeros is None else self._by_row(self.zeros),
        )

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        codes, scales, zeros = self.unpacked()
        grouped = codes.view(*scales.shape, -1).float()
        grouped -= SYMMETRIC_ZERO if zeros is None else zeros.float()[:, :, None]
        return grouped.mul_(scales.float()[:, :, None]).view(self.shape).to(dtype or self.dtype)

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        dtype = parts[0].dtype
        if all(part.zeros is None for part in parts) and len({part.codes.shape[1:] for part in parts}) == 1:
            codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
            return cls(codes, scales, None, dtype)
        unpacked = [part.unpacked() for part in parts]
        zeros = [torch.full_like(scales, SYMMETRIC_ZERO) if z is None else z for _, scales, z in unpacked]
        codes, scales = torch.cat([codes for codes, _, _ in unpacked]), torch.cat([scales for _, scales, _ in unpacked])
        return cls.packed(codes, scales, torch.cat(zeros), dtype)

    def _by_row(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(self.shape[0], -1)


def fp8_scale(weight: Int4Matrix) -> Tensor:
    """float32 [N]: of each row, what makes 448 of the largest number that its codes could stand for."""
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros.float()
    below = torch.as_tensor(zeros, device=weight.device)
    largest = (weight.scales.float().abs() * torch.maximum(below, LEVELS - 1 - below)).amax((1, 3))
    return largest.flatten().mul_(1.0 / FP8_MAX).clamp_(min=LEAST_SCALE)


def in_fp8(weight: Int4Matrix) -> Fp8Matrix:
    """`weight` with each number rounded to FP8 under `fp8_scale`: what kernels multiply many rows by in FP8."""
    scale = fp8_scale(weight)
    return Fp8Matrix((weight.dequantized(torch.float32) * scale.reciprocal()[:, None]).to(FP8), scale, weight.dtype)
