"""Products of a few rows with an FP8 matrix, at the speed at which memory gives the matrix, in OpenAI Triton.

As in `products`, whose tiles they are cut by: several tiles in flight a multiprocessor, the first of which are there
when the kernel before has ended. One row is multiplied as it is, by ordinary arithmetic: values are widened in
registers, and nothing is lost of x. Several rows are quantised too, each by its own largest value, and go with the
matrix to the tensor cores, which multiply FP8 as it is: so nothing has to be widened.

Rows may be quantised here, too, as they are read. Their largest values are known then from what wrote them, or each
program finds those of its part of the depth: it has a scale of its own for each row, which loses no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wicore_backend.executor.kernels.fp8_rows import row_scale_of
from wicore_backend.executor.kernels.products import Tile, one_row
from wicore_backend.executor.kernels.shared_tiles import FEW_PARTS, arrivals, last_to_arrive, sum_of_parts
from wicore_backend.executor.kernels.small import gelu, overlaps
from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of
from wicore_backend.quantization.fp8 import FP8_MAX, LEAST_SCALE, Fp8Matrix, Fp8Rows, Rows

_LARGEST, _LEAST = tl.constexpr(FP8_MAX), tl.constexpr(LEAST_SCALE)
_MEASURED = 1024  # of the depth, at once


@triton.jit
def _largest_of(x, part, keep, MEASURED: tl.constexpr):
    """The largest magnitude of each row [ROWS], `part` long, from `x` [1, ROWS] on."""
    largest = tl.zeros_like(keep.to(tl.float32))
    inner = tl.arange(0, MEASURED)[:, None]
    for at in range(0, part, MEASURED):
        some = tl.load(x + at + inner, mask=keep & (at + inner < part), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(some).to(tl.float32), 0)[None, :])
    return largest


@triton.jit
def _rows_at(at, keep, inverse, NARROWS: tl.constexpr):
    """Some of the depth of the rows in FP8."""
    rows = tl.load(at, mask=keep, other=0.0)
    if NARROWS:
        rows = e4m3_of(rows.to(tl.float32) * inverse).to(tl.float8e4nv, bitcast=True)
    return rows


@triton.jit(do_not_specialize=["rows"])
def _fp8_product(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    largest,
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
    NARROWS: tl.constexpr = False,
    MEASURED: tl.constexpr = 0,
    parts=None,
    arrived=None,
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
        row_scale, inverse = 1.0, 1.0
        if NARROWS:
            if MEASURED:
                most = _largest_of(x + row[None, :] * x_stride + split * part, part, keep, MEASURED)
            else:
                most = tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
            row_scale, inverse = row_scale_of(most, _LARGEST, _LEAST)
        first_x = _rows_at(x + row[None, :] * x_stride + inner[:, None], keep, inverse, NARROWS)
        total = tl.dot(first, first_x)
        if GATED:
            total_up = tl.dot(first_up, first_x)
        for _ in tl.range(FIRST, part, DEPTH, num_stages=STAGES):
            x_tile = _rows_at(x + row[None, :] * x_stride + rest[:, None], keep, inverse, NARROWS)
            total = tl.dot(tl.load(tile), x_tile, total)
            if GATED:
                total_up = tl.dot(tl.load(up_tile), x_tile, total_up)
                up_tile += DEPTH
            tile += DEPTH
            rest += DEPTH
        if not NARROWS:
            row_scale = tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
        total *= scale[:, None] * row_scale
        if GATED:
            total_up *= scale_up[:, None] * row_scale
    if GATED:
        total = gelu(total) * total_up
    first_row = split * rows
    if parts is not None:
        # Whichever of a tile's programs ends last adds what all of them have stored, in their order.
        SIZE: tl.constexpr = COLUMNS * ROWS
        of_tile = parts + tl.program_id(0) * (SPLITS * SIZE) + tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
        tl.store(of_tile + split * SIZE, total)
        if not last_to_arrive(arrived, tl.program_id(0), SPLITS):
            return
        total = sum_of_parts(of_tile, SIZE, SPLITS, total)
        first_row = 0
    at = out + (first_row + row[None, :]) * columns + column[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :])
    if largest is not None:
        # Of numbers that are not negative, integers of the same bits are in the same order.
        most = tl.max(tl.abs(total.to(out.dtype.element_ty).to(tl.float32)), 0).to(tl.int32, bitcast=True)
        tl.atomic_max(largest + row, most, mask=row < rows, sem="relaxed")


def fp8_product(
    x: Rows,
    weight: Fp8Matrix,
    tile: Tile,
    *,
    gated: bool = False,
    result_type: torch.dtype | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """x W^T of x [T, K] and `weight` [N, K]: [T, N], or its parts, float32 [tile.splits, T, N].

    Parameters
    ----------
    x
        A tensor of one row where the tile is for ordinary arithmetic; of any where it narrows, measured or not; else
        quantised rows.
    gated
        The weight is [2 N, K], gate and up: the result is GELU of the gate's product times the up's.
    result_type
        Of a result that is not in parts; the weight's type of computing if it is None.
    largest
        float32 [T or more], zero before: the largest magnitudes of the result's rows are put there. Of tensor cores.
    """
    if isinstance(x, Tensor):
        values, scale = x, weight.scale  # Of which nothing is read.
    else:
        values, scale = x.values, x.scale if isinstance(x, Fp8Rows) else x.largest
    assert isinstance(x, Fp8Rows) == (tile.dot and not tile.narrows)
    rows, depth = values.shape
    columns = len(weight.values) // (1 + gated)
    split = tile.splits > 1
    assert not (split and gated), "GELU needs whole sums"
    assert not tile.summed or tile.splits <= FEW_PARTS
    tile_rows = max(16, int(triton.next_power_of_2(rows))) if tile.dot else 1
    parts, arrived = None, None
    if tile.summed:
        sums = (columns // tile.columns, tile.splits, tile.columns, tile_rows)
        parts, arrived = torch.empty(sums, dtype=torch.float32, device=values.device), arrivals(values.device)
    if split and not tile.summed:
        out = torch.empty(tile.splits, rows, columns, dtype=torch.float32, device=values.device)
    else:
        out = torch.empty(rows, columns, dtype=result_type or weight.dtype, device=values.device)
    overlapped = overlaps(values)
    _fp8_product[(columns // tile.columns, tile.splits)](
        *(values, scale, weight.values, weight.scale, out, None if largest is None else largest.view(torch.int32)),
        *(rows, columns, depth, values.stride(0)),
        ROWS=tile_rows,
        COLUMNS=tile.columns,
        FIRST=tile.first,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        SPLITS=tile.splits,
        GATED=gated,
        OVERLAPPED=overlapped,
        NARROWS=tile.narrows,
        MEASURED=_MEASURED if tile.narrows and isinstance(x, Tensor) else 0,
        parts=parts,
        arrived=arrived,
        num_warps=tile.warps,
        launch_pdl=overlapped,
    )
    return out
