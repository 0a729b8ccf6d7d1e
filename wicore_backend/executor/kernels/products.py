"""Products of a few rows with a matrix, at the speed at which memory gives the matrix, in OpenAI Triton.

A decode step reads every weight once for a handful of rows, so that its products last as long as that reading. cuBLAS
leaves a tenth of the memory's speed on the table there: its blocks come in waves, the last of which does not fill the
card, and between kernels nothing is read. These kernels keep several tiles of the matrix in flight a multiprocessor,
and start before the kernel that they follow has ended: when its result is there, their first tiles are too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wicore_backend.executor.kernels.small import gelu, overlaps

MAX_ROWS = 64
"""Beyond these a product is bound by arithmetic and by reading its rows, and cuBLAS is faster."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut.

    Attributes
    ----------
    columns, depth
        Of the result's columns (the matrix's rows) and of the inner dimension that a program takes at once.
    stages
        Tiles in flight.
    first
        Depth of the first tile, which is loaded into registers before the kernel's input is there.
    splits
        Programs that share the inner dimension, each giving a part of the sum.
    dot
        Whether tensor cores multiply; if not, and only for one row, the ordinary units do.
    """

    columns: int
    depth: int
    stages: int
    first: int
    warps: int = 4
    splits: int = 1
    dot: bool = True

    def fits(self, weight: Tensor, *, gated: bool = False) -> bool:
        """Whether `weight` [N, K], or [2 N, K] if `gated`, has a whole number of tiles."""
        columns, depth = weight.shape
        after_first = depth // self.splits - self.first
        whole_columns = columns // (1 + gated) % self.columns == 0
        return whole_columns and depth % self.splits == 0 and after_first >= 0 and after_first % self.depth == 0


@triton.jit
def one_row(
    x, tile, up_tile, first, first_up, inner, rest, part,
    FIRST: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One row's products [COLUMNS] with a tile by ordinary arithmetic, and if GATED those with up's: `part` deep.

    The first FIRST of the depth, at `inner` in x, are in `first` and `first_up`; from `rest` on, the others are at
    `tile` and `up_tile`.
    """
    first_x = tl.load(x + inner).to(tl.float32)[None, :]
    total = tl.sum(first.to(tl.float32) * first_x, 1)
    total_up = total
    wide = tl.zeros([first.shape[0], DEPTH], tl.float32)
    if GATED:
        total_up = tl.sum(first_up.to(tl.float32) * first_x, 1)
        wide_up = tl.zeros([first.shape[0], DEPTH], tl.float32)
    for _ in tl.range(FIRST, part, DEPTH, num_stages=STAGES):
        vector = tl.load(x + rest).to(tl.float32)[None, :]
        wide += tl.load(tile).to(tl.float32) * vector
        if GATED:
            wide_up += tl.load(up_tile).to(tl.float32) * vector
            up_tile += DEPTH
        tile += DEPTH
        rest += DEPTH
    total += tl.sum(wide, 1)
    if GATED:
        total_up += tl.sum(wide_up, 1)
    return total, total_up


@triton.jit(do_not_specialize=["rows"])
def _product(
    x,
    weight,
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
    part = depth // SPLITS
    # The first tile is on its way before what this kernel follows has ended: weights do not change.
    inner = split * part + tl.arange(0, FIRST)
    tile = weight + column[:, None].to(tl.int64) * depth + inner[None, :]
    first = tl.load(tile)
    first_up = first
    if GATED:
        first_up = tl.load(tile + columns.to(tl.int64) * depth)
    if OVERLAPPED:
        gdc_wait()
    rest = split * part + FIRST + tl.arange(0, DEPTH)
    tile = weight + column[:, None].to(tl.int64) * depth + rest[None, :]
    up_tile = tile + columns.to(tl.int64) * depth
    if ROWS == 1:
        total, total_up = one_row(x, tile, up_tile, first, first_up, inner, rest, part, FIRST, DEPTH, STAGES, GATED)
        total, total_up = total[:, None], total_up[:, None]
    else:
        first_x = tl.load(x + row[None, :] * x_stride + inner[:, None], mask=(row < rows)[None, :], other=0.0)
        total = tl.dot(first, first_x)
        if GATED:
            total_up = tl.dot(first_up, first_x)
        for _ in tl.range(FIRST, part, DEPTH, num_stages=STAGES):
            x_tile = tl.load(x + row[None, :] * x_stride + rest[:, None], mask=(row < rows)[None, :], other=0.0)
            total = tl.dot(tl.load(tile), x_tile, total)
            if GATED:
                total_up = tl.dot(tl.load(up_tile), x_tile, total_up)
                up_tile += DEPTH
            tile += DEPTH
            rest += DEPTH
    if GATED:
        total = gelu(total) * total_up
    at = out + (split * rows + row[None, :]) * columns + column[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :])


def product(
    x: Tensor, weight: Tensor, tile: Tile, *, gated: bool = False, result_type: torch.dtype | None = None
) -> Tensor:
    """x W^T of `x` [T, K], T <= `MAX_ROWS`, and `weight` [N, K]: [T, N], or its parts, float32 [tile.splits, T, N].

    Parameters
    ----------
    gated
        The weight is [2 N, K], gate and up: the result is GELU of the gate's product times the up's.
    result_type
        Of a result that is not in parts; that of `x` if it is None.
    """
    rows, depth = x.shape
    columns = len(weight) // (1 + gated)
    split = tile.splits > 1
    assert not (split and gated), "GELU needs whole sums"
    if split:
        out = x.new_empty(tile.splits, rows, columns, dtype=torch.float32)
    else:
        out = x.new_empty(rows, columns, dtype=result_type or x.dtype)
    overlapped = overlaps(x)
    tile_rows = max(16, int(triton.next_power_of_2(rows))) if tile.dot else 1
    _product[(columns // tile.columns, tile.splits)](
        *(x, weight, out, rows, columns, depth, x.stride(0)),
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
