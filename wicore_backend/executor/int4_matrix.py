"""An INT4 matrix on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.fp8_matrix import CublasProducts
from wicore_backend.executor.int4_rows import rows_product
from wicore_backend.executor.int4_wide import wide_product
from wicore_backend.executor.kernels import fp8_rows
from wicore_backend.executor.kernels.fp8_rows import Unscaled
from wicore_backend.executor.kernels.int4 import MAX_ROWS, Int4Tile, int4_product
from wicore_backend.executor.kernels.int4_codes import dequantize, takes
from wicore_backend.executor.kernels.shared_tiles import COLUMNS, parts_bytes
from wicore_backend.executor.kernels.small import gated, overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.executor.tile_choice import TileChoice
from wicore_backend.quantization.fp8 import FP8, Fp8Matrix, Fp8Rows, Rows
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix, fp8_scale

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

_WIDENED_AT_ONCE = 2**27
"""Elements of a matrix that are widened for cuBLAS at a time, at most: 256 MiB in 16 bits."""

_ONE_KERNEL_ROWS = 512
"""From as many on, four tiles of rows, `gated_hopper` fills the card with half of the columns at a time, too, and is
quicker than cuBLAS with GELU after it: measured as the tilings were."""

_PLAIN_WIDENING_BYTES = 16
"""For each element of a matrix that the kernels do not take, at most, while it is widened by PyTorch's operators."""


def multiplies_in_fp8(weight: Int4Matrix) -> bool:
    """Whether cuBLAS multiplies what `weight` is widened to in FP8: in bfloat16, on Ada and later cards."""
    on_card = weight.dtype is torch.bfloat16 and weight.codes.is_cuda and takes(weight)
    return on_card and torch.cuda.get_device_capability(weight.device) >= (8, 9)


def widened_bytes(weight: Int4Matrix, *, fp8_prefill: bool = False) -> int:
    """Memory that a product of more rows than the kernels take has besides its operands and its result.

    In FP8, with `fp8_prefill`, a matrix is widened whole. The rows that are quantised for it have room in what
    `needs.activation_bytes` counts, where GELU's result is not there yet or gate's and up's product not any more.
    """
    rows, columns = weight.shape
    if not takes(weight):
        return rows * columns * _PLAIN_WIDENING_BYTES
    in_parts = min(rows, _widened_tiles(columns) * TILE_ROWS) * columns * weight.dtype.itemsize
    if overlaps(weight.codes):
        in_parts += parts_bytes(weight.device)  # Of the kernel for gate and up.
    return max(in_parts, rows * columns * FP8.itemsize) if fp8_prefill else in_parts


def _widened_tiles(columns: int) -> int:
    """Of a matrix of so many columns, the tiles' rows that are widened at a time."""
    return max(1, _WIDENED_AT_ONCE // columns // TILE_ROWS)


class Int4GpuMatrix:
    """`Matrix` of an `Int4Matrix`: few rows by kernels that read its codes, more by what they stand for, widened.

    That is multiplied in 16 bits by cuBLAS, part by part; gate and up of many rows on Hopper in one kernel with GELU.

    Parameters
    ----------
    tiles
        By the largest number of rows, the tiling to take on any card; by default, on Hopper, those of `INT4_TILES`.
    fp8_prefill
        Of more rows than `MAX_ROWS`, if it `multiplies_in_fp8` and is not the head, both are multiplied in FP8, each
        with a scale of its row: at twice the rate, each weight rounded once more, by 2.6% beside INT4's 10%.
    """

    def __init__(
        self,
        role: Role,
        weight: Int4Matrix,
        bias: Tensor | None = None,
        *,
        tiles: Mapping[int, Int4Tile] | None = None,
        fp8_prefill: bool = False,
    ) -> None:
        self._role = role
        self._weight = weight
        self._bias = bias
        self._by_kernels = (tiles is not None or weight.codes.is_cuda) and takes(weight)
        self._rows_product = rows_product(role, weight) if bias is None and tiles is None else None
        self._wide_product = wide_product(role, weight) if bias is None and tiles is None else None
        # The tilings were chosen on Hopper, and other cards have less shared memory than some of them take.
        streamed = self._by_kernels and bias is None and (tiles is not None or overlaps(weight.codes))
        tiles = INT4_TILES[role] if tiles is None else tiles
        of_rows = {most: (tile,) for most, tile in tiles.items()} if streamed else {}
        self._tile = TileChoice(of_rows, lambda tile: tile.fits(weight))

        self._fp8_scale: Tensor | None = None
        self._products = CublasProducts(role, bias, weight.device)
        if fp8_prefill and role != "head" and multiplies_in_fp8(weight):
            self._fp8_scale = fp8_scale(weight)
        self._gated: Callable[..., Tensor] | None = None
        if self._by_kernels and bias is None and role == "gate_up" and overlaps(weight.codes):
            # Imported where it is used: it is written in a language for such cards alone.
            from wicore_backend.executor.kernels.gated_hopper import fits, gated_product

            self._gated = gated_product if fits(weight) else None

    def takes_fp8(self, rows: int) -> bool:
        """Whether a product with so many rows is of rows in FP8, which this quantises unless they already are."""
        return self._fp8_scale is not None and rows > MAX_ROWS

    def __call__(self, x: Rows) -> Tensor:
        if self._fp8_scale is not None and self.takes_fp8(len(x)):
            product = self._products.scaled(self._read(x), self._in_fp8(self._fp8_scale))
            return gated(product) if self._role == "gate_up" else product
        assert isinstance(x, Tensor), "only a product in FP8 is given rows in FP8"
        for own in (self._rows_product, self._wide_product):
            if own is not None and own.takes(x):
                return own(x)
        tile = self._tile(len(x))
        if tile is not None:
            result_type = torch.float32 if self._role == "head" else x.dtype
            return int4_product(x, self._weight, tile, gated=self._role == "gate_up", result_type=result_type)
        if self._gated is not None and len(x) >= _ONE_KERNEL_ROWS:
            return self._gated_in_parts(x, self._gated)
        whole = self._whole(x)
        if self._role == "gate_up":
            return gated(whole)
        return whole.float() if self._role == "head" else whole

    def gated(self, x: Rows, *, reader: Int4GpuMatrix) -> Rows:
        """What a call gives, gate and up; in FP8 if that is what both it and `reader` take."""
        if self.takes_fp8(len(x)) and reader.takes_fp8(len(x)):
            return fp8_rows.gated(self.unscaled(x))
        return self(x)

    def unscaled(self, x: Rows) -> Tensor | Unscaled:
        """What a call gives but for GELU in FP8, then without its scales where that is quicker."""
        scale = self._fp8_scale
        if scale is None or not self.takes_fp8(len(x)):
            return self(x)
        return self._products.unscaled(self._read(x), self._in_fp8(scale))

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

    def _read(self, x: Rows) -> Fp8Rows:
        return fp8_rows.quantize_rows(x) if isinstance(x, Tensor) else x

    def _in_fp8(self, scale: Tensor) -> Fp8Matrix:
        """The matrix, widened under `scale`."""
        values = torch.empty(self._weight.shape, dtype=torch.uint8, device=scale.device)
        dequantize(self._weight, values, scale=scale)
        return Fp8Matrix(values.view(FP8), scale, self._weight.dtype)
