"""FP8: a sign, four bits of exponent, three of fraction (E4M3, up to 448), and a scale for each output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest value of E4M3 without infinities (OCP 8-bit Floating Point Specification, 5.2)."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """A `QuantizedMatrix` whose row n is `values[n] * scale[n]`."""

    values: Tensor
    """float8_e4m3fn [N, K]"""
    scale: Tensor
    """float32 [N]"""
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.float().mul_(self.scale[:, None]).to(dtype or self.dtype)

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        # Bytes, since not every build concatenates this type.
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(FP8)
        return cls(values, torch.cat([part.scale for part in parts]), parts[0].dtype)


def quantized_fp8(matrix: Tensor) -> Fp8Matrix:
    """`matrix` [N, K] in FP8: the largest magnitude of each row becomes 448, the rest is rounded to nearest.

    Products with it are computed in the type of `matrix`.
    """
    wide = matrix.float()
    scale = wide.abs().amax(1).div_(FP8_MAX)
    scale.masked_fill_(scale == 0, 1.0)  # A row of zeros is one whatever its scale.
    return Fp8Matrix((wide / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale, matrix.dtype)
