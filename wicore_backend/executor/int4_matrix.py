"""An INT4 matrix on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.kernels.fp8_rows import quantize_rows
from wicore_backend.executor.kernels.int4 import Int4Tile, int4_product
from wicore_backend.executor.kernels.int4_codes import dequantize, fp8_scale, takes
from wicore_backend.executor.kernels.shared_tiles import COLUMNS
from wicore_backend.executor.kernels.small import gated, overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.executor.tile_choice import TileChoice
from wicore_backend.quantization.fp8 import FP8, Rows
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

INT4_TILES: Mapping[Role, Mapping[int, Int4Tile]] = {
    "qkv": {
        8: Int4Tile(16, 4, parts=4),
        16: Int4Tile(32, 3, parts=4),
        32: Int4Tile(64, 4),
        64: Int4Tile(64, 4, early=True, scaled=True),
        128: Int4Tile(64, 3, early=True, scaled=True),
    },
    "out": {
        8: Int4Tile(16, 4, parts=4),
        32: Int4Tile(64, 3, splits=4),
        64: Int4Tile(64, 3, splits=2, early=True, scaled=True),
        128: Int4Tile(128, 3, warps=8, splits=2, early=True, scaled=True),
    },
    "gate_up": {
        8: Int4Tile(16, 4, warps=2, parts=2),
        16: Int4Tile(128, 3),
        32: Int4Tile(64, 3),
        64: Int4Tile(64, 3, scaled=True),
        128: Int4Tile(128, 3, warps=8, scaled=True),
    },
    "down": {
        8: Int4Tile(32, 3, warps=2, parts=2, splits=3),
        16: Int4Tile(128, 4, splits=6),
        32: Int4Tile(128, 3, warps=8, splits=6, scaled=True),
        128: Int4Tile(128, 3, warps=8, splits=3, early=True, scaled=True),
    },
    "head": {8: Int4Tile(64, 3, warps=2), 16: Int4Tile(64, 3), 64: Int4Tile(64, 3, scaled=True)},
}
"""For each role, by the largest number of rows, the tiling that is fastest; none beyond, where cuBLAS is.

Measured on an H200 at the shapes of Gemma-3-27B (docs/benchmarks/int4.md); `scripts/benchmark_int4_tiles.py` measures
them again.
"""

Prompts = Literal["plain", "one kernel", "fp8"]
"""How more rows than the kernels take are multiplied by a matrix that is widened first.

In 16 bits by cuBLAS; likewise, but gate and up in one kernel with GELU, as 16-bit weights are (`gated_hopper.py`); or
in FP8, rows, too: twice the tensor cores' rate, and each weight is rounded once more, by 2.6% on average beside the 10%
that it lost when it became INT4.
"""

_WIDENED_AT_ONCE = 2**27
"""Elements of a matrix that are widened for cuBLAS at a time, at most: 256 MiB in 16 bits."""

_ONE_KERNEL_ROWS = 512
"""From as many on, four tiles of rows, `gated_hopper` fills the card with half of the columns at a time, too."""

_PLAIN_WIDENING_BYTES = 16
"""For each element of a matrix that the kernels do not take, at most, while it is widened by PyTorch's operators."""


def widened_bytes(weight: Int4Matrix) -> int:
    """Memory that a product of more rows than the kernels take has besides its operands and its result."""
    rows, columns = weight.shape
    if not takes(weight):
        return rows * columns * _PLAIN_WIDENING_BYTES
    return min(rows, _widened_tiles(columns) * TILE_ROWS) * columns * weight.dtype.itemsize


def _widened_tiles(columns: int) -> int:
    """Of a matrix of so many columns, the tiles' rows that are widened at a time."""
    return max(1, _WIDENED_AT_ONCE // columns // TILE_ROWS)


class Int4GpuMatrix:
    """`Matrix` of an `Int4Matrix`: few rows by kernels that read its codes, more by cuBLAS on what they stand for.

    Parameters
    ----------
    tiles
        By the largest number of rows, the tiling to take on any card; by default, on Hopper, those of `INT4_TILES`.
    prompts
        For more rows than that.
    """

    def __init__(
        self,
        role: Role,
        weight: Int4Matrix,
        bias: Tensor | None = None,
        *,
        tiles: Mapping[int, Int4Tile] | None = None,
        prompts: Prompts = "plain",
    ) -> None:
        self._role = role
        self._weight = weight
        self._bias = bias
        self._by_kernels = (tiles is not None or weight.codes.is_cuda) and takes(weight)
        # The tilings were chosen on Hopper, and other cards have less shared memory than some of them take.
        streamed = self._by_kernels and bias is None and (tiles is not None or overlaps(weight.codes))
        tiles = INT4_TILES[role] if tiles is None else tiles
        of_rows = {most: (tile,) for most, tile in tiles.items()} if streamed else {}
        self._tile = TileChoice(of_rows, lambda tile: tile.fits(weight))

        self._gated: Callable[..., Tensor] | None = None
        self._fp8_scale: Tensor | None = None
        if self._by_kernels and bias is None and overlaps(weight.codes) and role != "head":
            if prompts == "fp8" and weight.dtype is torch.bfloat16:
                self._fp8_scale = fp8_scale(weight)
            elif prompts == "one kernel" and role == "gate_up":
                # Imported where it is used: it is written in a language for such cards alone.
                from wicore_backend.executor.kernels.gated_hopper import fits, gated_product

                self._gated = gated_product if fits(weight) else None

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor), "only an FP8 matrix is given rows in FP8"
        tile = self._tile(len(x))
        if tile is not None:
            result_type = torch.float32 if self._role == "head" else x.dtype
            return int4_product(x, self._weight, tile, gated=self._role == "gate_up", result_type=result_type)
        if self._gated is not None and len(x) >= _ONE_KERNEL_ROWS:
            return self._gated_in_parts(x, self._gated)
        whole = self._whole(x) if self._fp8_scale is None else self._whole_in_fp8(x, self._fp8_scale)
        if self._role == "gate_up":
            return gated(whole)
        return whole.float() if self._role == "head" else whole

    def _whole(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N], of the widened matrix."""
        if not self._by_kernels:
            return F.linear(x, self._weight.dequantized(), self._bias)
        rows, columns = self._weight.shape
        at_once = _widened_tiles(columns)
        product = x.new_empty(len(x), rows)
        widened = x.new_empty(min(rows, at_once * TILE_ROWS), columns)
        for start in range(0, rows // TILE_ROWS, at_once):
            part = self._weight.tile_rows(start, start + at_once)
            into = widened[: part.shape[0]]
            dequantize(part, into)
            first = start * TILE_ROWS
            torch.mm(x, into.T, out=product[:, first : first + len(into)])
        return product if self._bias is None else product.add_(self._bias)

    def _gated_in_parts(self, x: Tensor, gated_product: Callable[..., Tensor]) -> Tensor:
        """GELU of the gate's product times the up's, [T, F], of as many columns of both at a time as may be widened."""
        rows, columns = self._weight.shape
        features = rows // 2
        at_once = max(1, _WIDENED_AT_ONCE // (2 * COLUMNS * columns)) * COLUMNS
        out = x.new_empty(len(x), features)
        widened = x.new_empty(2 * min(features, at_once), columns)
        for first in range(0, features, at_once):
            last = min(first + at_once, features)
            both = widened[: 2 * (last - first)]
            for half, into in zip((0, features), both.chunk(2), strict=True):
                dequantize(self._weight.tile_rows((half + first) // TILE_ROWS, (half + last) // TILE_ROWS), into)
            gated_product(x, both, out=out[:, first:last])
        return out

    def _whole_in_fp8(self, x: Tensor, scale: Tensor) -> Tensor:
        """x W^T, [T, N], of rows and a matrix in FP8: of the layers', the largest is 231 MB."""
        values = torch.empty(self._weight.shape, dtype=torch.uint8, device=x.device)
        dequantize(self._weight, values, scale=scale)
        rows = quantize_rows(x)
        return torch._scaled_mm(
            *(rows.values, values.view(FP8).T),
            scale_a=rows.scale[:, None],
            scale_b=scale[None, :],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
