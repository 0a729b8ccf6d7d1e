"""Products of a few rows with an FP8 matrix, at the speed at which memory gives the matrix, in OpenAI Triton.

As in `products`, whose tiles they are cut by: several tiles in flight a multiprocessor, the first of which are there
when the kernel before has ended. One row is multiplied as it is, by ordinary arithmetic: values are widened in
registers, and nothing is lost of x. Several rows are quantised too, each by its own largest value, and go with the
matrix to the tensor cores, which multiply FP8 as it is: so nothing has to be widened.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wicore_backend.executor.kernels.products import Tile, one_row
from wicore_backend.executor.kernels.small import gelu, overlaps
from wicore_backend.quantization.fp8 import Fp8Matrix, Fp8Rows, Rows


@triton.jit(do_not_specialize=["rows"])
def _fp8_product(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    rows,
    columns,
    depth,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    split = tl.program_id(1)
    part = tl.multiple_of(depth // SPLITS, 16)  # Whole vectors of weights.
    # The first tile is on its way before what this kernel follows has ended: weights do not change.
    inner = split * part + tl.arange(0, FIRST)
    tile = weight + column[:, None].to(tl.int64) * depth + inner[None, :]
    first = tl.load(tile)
    first_up = first
    scale = tl.load(weight_scale + column)
    if GATED:
        first_up = tl.load(tile + columns.to(tl.int64) * depth)
        scale_up = tl.load(weight_scale + columns + column)
    if OVERLAPPED:
        gdc_wait()
    rest = split * part + FIRST + tl.arange(0, DEPTH)
    tile = weight + column[:, None].to(tl.int64) * depth + rest[None, :]
    up_tile = tile + columns.to(tl.int64) * depth
    if ROWS == 1:
        total, total_up = one_row(x, tile, up_tile, first, first_up, inner, rest, part, FIRST, DEPTH, STAGES, GATED)
        total = (total * scale)[:, None]
        if GATED:
            total_up = (total_up * scale_up)[:, None]
    else:
        keep = (row < rows)[None, :]
        first_x = tl.load(x + row[None, :] * x_stride + inner[:, None], mask=keep, other=0.0)
        total = tl.dot(first, first_x)
        if GATED:
            total_up = tl.dot(first_up, first_x)
        for _ in tl.range(FIRST, part, DEPTH, num_stages=STAGES):
            x_tile = tl.load(x + row[None, :] * x_stride + rest[:, None], mask=keep, other=0.0)
            total = tl.dot(tl.load(tile), x_tile, total)
            if GATED:
                total_up = tl.dot(tl.load(up_tile), x_tile, total_up)
                up_tile += DEPTH
            tile += DEPTH
            rest += DEPTH
        row_scale = tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
        total *= scale[:, None] * row_scale
        if GATED:
            total_up *= scale_up[:, None] * row_scale
    if GATED:
        total = gelu(total) * total_up
    at = out + (split * rows + row[None, :]) * columns + column[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :])


def fp8_product(
    x: Rows,
    weight: Fp8Matrix,
    tile: Tile,
    *,
    gated: bool = False,
    result_type: torch.dtype | None = None,
) -> Tensor:
    """x W^T of x [T, K] and `weight` [N, K]: [T, N], or its parts, float32 [tile.splits, T, N].

    Parameters
    ----------
    x
        A tensor of one row where the tile is for ordinary arithmetic; else quantised rows.
    gated
        The weight is [2 N, K], gate and up: the result is GELU of the gate's product times the up's.
    result_type
        Of a result that is not in parts; the weight's type of computing if it is None.
    """
    assert isinstance(x, Fp8Rows) == tile.dot
    values, scale = (x.values, x.scale) if isinstance(x, Fp8Rows) else (x, weight.scale)  # Which is not read then.
    rows, depth = values.shape
    columns = len(weight.values) // (1 + gated)
    split = tile.splits > 1
    assert not (split and gated), "GELU needs whole sums"
    tile_rows = max(16, int(triton.next_power_of_2(rows))) if tile.dot else 1
    if split:
        out = torch.empty(tile.splits, rows, columns, dtype=torch.float32, device=values.device)
    else:
        out = torch.empty(rows, columns, dtype=result_type or weight.dtype, device=values.device)
    overlapped = overlaps(values)
    _fp8_product[(columns // tile.columns, tile.splits)](
        *(values, scale, weight.values, weight.scale, out, rows, columns, depth, values.stride(0)),
        ROWS=tile_rows,
        COLUMNS=tile.columns,
        FIRST=tile.first,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        SPLITS=tile.splits,
        GATED=gated,
        OVERLAPPED=overlapped,
        num_warps=tile.warps,
        launch_pdl=overlapped,
    )
    return out
