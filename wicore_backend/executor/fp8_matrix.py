"""An FP8 matrix on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wicore_backend.executor.kernels import fp8_rows
from wicore_backend.executor.kernels.fp8_products import fp8_product
from wicore_backend.executor.kernels.fp8_rows import Unscaled
from wicore_backend.executor.kernels.products import Tile
from wicore_backend.executor.kernels.small import gated, overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.executor.tile_choice import TileChoice
from wicore_backend.quantization.fp8 import Fp8Matrix, Fp8Rows, Rows

FP8_TILES: Mapping[Role, Mapping[int, tuple[Tile, ...]]] = {
    "qkv": {
        1: (Tile(8, 512, 4, 256, dot=False), Tile(8, 256, 6, 256, dot=False)),
        16: (Tile(64, 512, 4, 256), Tile(64, 128, 8, 256)),
        64: (Tile(64, 128, 8, 256),),
    },
    "out": {
        1: (Tile(2, 1024, 1, 4096, warps=2, dot=False), Tile(8, 512, 4, 512, dot=False)),
        16: (Tile(64, 128, 4, 256, splits=4),),
    },
    "gate_up": {1: (Tile(8, 256, 8, 256, dot=False),), 16: (Tile(64, 128, 3, 128),)},
    "down": {
        1: (Tile(2, 1024, 6, 1024, warps=2, dot=False), Tile(8, 512, 4, 512, dot=False)),
        16: (Tile(64, 128, 4, 256, splits=4),),
    },
    "head": {1: (Tile(8, 256, 8, 256, dot=False),), 16: (Tile(64, 256, 4, 256),)},
}
"""For each role, by the largest number of rows, the tilings that are faster than cuBLAS: the first that fits is taken.

Measured on an H200 at the shapes of Gemma-3-27B (docs/benchmarks/fp8.md).
"""

UNSCALED_ROWS: Mapping[Role, int] = {"gate_up": 256, "out": 2048, "down": 2048}
"""Up to how many rows cuBLAS is quicker without scales of rows and columns: measured likewise."""

_ALIGNED = 16
"""Both sides of a matrix must be multiples of it for cuBLAS to take it in FP8."""

_WIDENED_AT_ONCE = 2**25
"""Elements of a matrix that are widened at a time, at most, where cuBLAS does not take FP8: 192 MiB, with the float32
that they pass through."""


def widened_bytes(weight: Fp8Matrix) -> int:
    """Memory that a product of more rows than the kernels take has besides its operands and its result."""
    if weight.dtype is torch.bfloat16 and _cublas_takes(weight):
        return 0
    rows, columns = weight.shape
    return min(rows, _widened_rows(columns)) * columns * (torch.float32.itemsize + weight.dtype.itemsize)


def _widened_rows(columns: int) -> int:
    """Of a matrix of so many columns, the rows that are widened at a time."""
    return max(1, _WIDENED_AT_ONCE // columns)


class CublasProducts:
    """x W^T + b of rows and a matrix in FP8, each with a scale of its row, by cuBLAS: what a role's matrices share."""

    def __init__(self, role: Role, bias: Tensor | None, device: torch.device) -> None:
        self._bias = bias
        self._one = torch.ones((), device=device)
        self._most_unscaled = UNSCALED_ROWS.get(role, 0) if bias is None else 0

    def scaled(self, rows: Fp8Rows, weight: Fp8Matrix) -> Tensor:
        """[T, N]."""
        product = _scaled_mm(rows, weight, rows.scale[:, None], weight.scale[None, :])
        return product if self._bias is None else product.add_(self._bias)

    def unscaled(self, rows: Fp8Rows, weight: Fp8Matrix) -> Tensor | Unscaled:
        """The same, without its scales where it is quicker so."""
        if len(rows) > self._most_unscaled:
            return self.scaled(rows, weight)
        return Unscaled(_scaled_mm(rows, weight, self._one, self._one), rows.scale, weight.scale)


def _scaled_mm(rows: Fp8Rows, weight: Fp8Matrix, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    return torch._scaled_mm(
        *(rows.values, weight.values.T),
        scale_a=of_rows,
        scale_b=of_columns,
        out_dtype=weight.dtype,
        use_fast_accum=True,
    )


class Fp8GpuMatrix:
    """`Matrix` of an `Fp8Matrix`.

    One row is multiplied as it is, by a tiling that fits. All else is quantised, each row by its own largest value, for
    tensor cores: streamed while rows are few, by cuBLAS beyond. Where neither can be, the matrix is widened each time,
    part by part.

    Parameters
    ----------
    tiles
        By the largest number of rows, tilings to choose from on any card; by default, on Hopper, those of `FP8_TILES`.
    """

    def __init__(
        self,
        role: Role,
        weight: Fp8Matrix,
        bias: Tensor | None = None,
        *,
        tiles: Mapping[int, tuple[Tile, ...]] | None = None,
    ) -> None:
        self._role = role
        self._weight = weight
        self._bias = bias
        # The tilings were chosen on Hopper, and other cards have less shared memory than some of them take.
        hopper = tiles is not None or overlaps(weight.values)
        streamed = weight.dtype.itemsize == 2 and bias is None and hopper
        tiles = FP8_TILES[role] if tiles is None else tiles
        self._tile = TileChoice(
            tiles if streamed else {}, lambda tile: tile.fits(weight.values, gated=role == "gate_up")
        )
        self._by_cublas = weight.dtype is torch.bfloat16 and _cublas_takes(weight)
        self._products = CublasProducts(role, bias, weight.device)

    def takes_fp8(self, rows: int) -> bool:
        """Whether a product with so many rows is of rows in FP8, which this quantises unless they already are."""
        tile = self._tile(rows)
        return self._by_cublas if tile is None else tile.dot

    def __call__(self, x: Rows) -> Tensor:
        if self._role == "gate_up":
            return gated(self._scaled(self._read(x))) if self._tile(len(x)) is None else self._streamed_product(x)
        if self._tile(len(x)) is not None:
            return self._streamed_product(x)
        whole = self._scaled(self._read(x))
        return whole.float() if self._role == "head" else whole

    def gated(self, x: Rows, *, reader: Fp8GpuMatrix) -> Rows:
        """What a call gives, gate and up; in FP8 if that costs nothing and is what `reader` takes."""
        rows = len(x)
        if self._tile(rows) is None and self._by_cublas and reader.takes_fp8(rows):
            return fp8_rows.gated(self.unscaled(x))
        return self(x)

    def unscaled(self, x: Rows) -> Tensor | Unscaled:
        """What a call gives but for GELU, without its scales where it is quicker so."""
        if self._tile(len(x)) is not None:
            return self._streamed_product(x)
        x = self._read(x)
        return self._products.unscaled(x, self._weight) if isinstance(x, Fp8Rows) else self._widened(x)

    def _read(self, x: Rows) -> Rows:
        return fp8_rows.quantize_rows(x) if isinstance(x, Tensor) and self.takes_fp8(len(x)) else x

    def _streamed_product(self, x: Rows) -> Tensor:
        tile = self._tile(len(x))
        assert tile is not None
        result_type = torch.float32 if self._role == "head" else None
        return fp8_product(self._read(x), self._weight, tile, gated=self._role == "gate_up", result_type=result_type)

    def _scaled(self, x: Rows) -> Tensor:
        return self._widened(x) if isinstance(x, Tensor) else self._products.scaled(x, self._weight)

    def _widened(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N], of the widened matrix."""
        rows, columns = self._weight.shape
        at_once = _widened_rows(columns)
        product = x.new_empty(len(x), rows)
        for first in range(0, rows, at_once):
            part = self._weight.rows(first, first + at_once).dequantized()
            torch.mm(x, part.T, out=product[:, first : first + len(part)])
        return product if self._bias is None else product.add_(self._bias)


def _cublas_takes(weight: Fp8Matrix) -> bool:
    """Ada's tensor cores were the first with FP8."""
    aligned = all(side % _ALIGNED == 0 for side in weight.shape)
    return aligned and weight.values.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 9)
