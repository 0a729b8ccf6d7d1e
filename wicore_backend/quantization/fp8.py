"""FP8: a sign, four bits of exponent, three of fraction (E4M3, up to 448), and a scale for each output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wicore_backend.quantization.base import PLAIN_TYPES, Stored

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest value of E4M3 without infinities (OCP 8-bit Floating Point Specification, 5.2)."""

LEAST_SCALE = 2.0**-120
"""Of a row: its inverse is a float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """A `QuantizedMatrix` whose row n is `values[n] * scale[n]`."""

    values: Tensor
    """float8_e4m3fn [N, K]"""
    scale: Tensor
    """float32 [N]"""
    dtype: torch.dtype
    """Computed in."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def rows(self, first: int, last: int) -> Fp8Matrix:
        """The rows from `first` up to `last`, without a copy."""
        return Fp8Matrix(self.values[first:last], self.scale[first:last], self.dtype)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.float().mul_(self.scale[:, None]).to(dtype or self.dtype)

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        # Bytes, since not every build concatenates this type.
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(FP8)
        return cls(values, torch.cat([part.scale for part in parts]), parts[0].dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Rows:
    """Rows, one a token, whose row t is `values[t] * scale[t]`."""

    values: Tensor
    """float8_e4m3fn [T, K]"""
    scale: Tensor
    """float32 [T]"""

    def __len__(self) -> int:
        return len(self.values)

    def dequantized(self) -> Tensor:
        """float32 [T, K]"""
        return self.values.float().mul_(self.scale[:, None])


Rows = Tensor | Fp8Rows
"""What a matrix multiplies, [T, K]; only an FP8 matrix is given other rows than a tensor's."""


def quantized_rows(x: Tensor) -> Fp8Rows:
    """`x` [T, K] in FP8: the largest magnitude of each row becomes 448, the rest is rounded to nearest."""
    wide = x.float()
    largest = wide.abs().amax(1)
    # By an inverse, as CUDA divides by a number in any case: the same on every device.
    scale = largest.mul(1.0 / FP8_MAX).clamp_(min=LEAST_SCALE)
    scale.masked_fill_(largest == 0, 1.0)  # A row of zeros is one whatever its scale.
    return Fp8Rows((wide * scale.reciprocal()[:, None]).to(FP8), scale)


def quantized_fp8(matrix: Tensor) -> Fp8Matrix:
    """`matrix` [N, K] in FP8, row by row; products with it are computed in its type."""
    rows = quantized_rows(matrix)
    return Fp8Matrix(rows.values, rows.scale, matrix.dtype)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """`WeightFormat` of compressed-tensors' "float-quantized": values, and a scale for each row or for all of them.

    A scale for activations that was measured when the checkpoint was made is left aside: theirs are taken from each
    token's own values, which is more exact.
    """

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, Stored]:
        rows = shape[0]
        return {
            "weight": Stored((shape,), ("F8_E4M3",)),
            "weight_scale": Stored(((rows, 1), (rows,), (1,), ()), PLAIN_TYPES),
            "input_scale": Stored(((1,), ()), PLAIN_TYPES, optional=True),
        }

    def matrix(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], *, dtype: torch.dtype) -> Fp8Matrix:
        scale = tensors["weight_scale"].float().flatten()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError("a weight_scale that is negative or not finite")
        return Fp8Matrix(tensors["weight"], scale.expand(shape[0]).contiguous(), dtype)


def fp8_tensors(matrix: Fp8Matrix) -> dict[str, Tensor]:
    """`matrix` as `Fp8Format` stores it, by names after the module's."""
    return {"weight": matrix.values, "weight_scale": matrix.scale[:, None]}
