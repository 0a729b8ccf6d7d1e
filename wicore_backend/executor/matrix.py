"""A matrix on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.kernels.products import MAX_ROWS, Tile, product
from wicore_backend.executor.kernels.small import gated

Use = Literal["whole", "parts", "gated"]
"""What is wanted of a product: itself; parts of a sum that the next kernel takes; GELU of one half times the other."""

TILES: dict[tuple[Use, int], tuple[Tile, ...]] = {
    ("whole", 1): (Tile(8, 256, 4, 1024, dot=False),),
    ("parts", 1): (Tile(8, 512, 3, 1024, dot=False), Tile(8, 256, 4, 256, dot=False)),
    ("gated", 1): (Tile(4, 256, 6, 512, dot=False),),
}
"""By use and largest number of rows: the tilings that are faster than cuBLAS, the fastest first.

Measured on an H200 at the shapes of Gemma-3-27B (docs/benchmarks/hopper.md).
"""


class Matrix:
    """x W^T + b for x [T, K], `weight` [N, K] and `bias` [N] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, use: Use = "whole") -> None:
        self._weight = weight
        self._bias = bias
        self._use = use
        self._streamed = weight.dtype.itemsize == 2 and bias is None
        self._choices: dict[int, Tile | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N], or what `use` says: float32 [S, T, N], whose sum over S it is, or [T, N / 2]."""
        tile = self._tile(len(x))
        if tile is None:
            whole = F.linear(x, self._weight, self._bias)
            return gated(whole) if self._use == "gated" else whole
        return product(x, self._weight, tile, gated=self._use == "gated")

    def _tile(self, rows: int) -> Tile | None:
        if not self._streamed or rows > MAX_ROWS:
            return None
        if rows not in self._choices:
            self._choices[rows] = self._choose(rows)
        return self._choices[rows]

    def _choose(self, rows: int) -> Tile | None:
        for (use, most), tiles in sorted(TILES.items(), key=lambda item: item[0][1]):
            if use == self._use and rows <= most:
                return next((t for t in tiles if t.fits(self._weight, gated=use == "gated")), None)
        return None
