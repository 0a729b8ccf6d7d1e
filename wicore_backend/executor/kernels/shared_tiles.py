"""How the tiles of a large product are shared out among programs, and the sums of those that several had a part in.

A program is here a cluster of two multiprocessors, which stays and takes tile after tile (`wide_product.cu`). Tiles
that are left over when all programs have as many as each other would keep a few busy and the others waiting: 6 of 336
tiles on 66 programs would make it six turns in place of five. So their depth is shared out: each program multiplies a
part of such a tile, first of all, and leaves its sum. When all is done a kernel adds the parts of each tile in their
order, so that a product is the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps, processors

ROWS, WEIGHT_ROWS, DEPTH = 256, 256, 64
"""Of x and of the weight, a tile; and of the inner dimension, a step."""

ROW_TILES = 8
"""That are taken one after the other with the same columns: what programs read at the same time stays in the cache."""
_ROW_TILES = tl.constexpr(ROW_TILES)
_LEAST_STEPS = 4
"""Of the inner dimension, in a part of a tile: what it costs to leave a sum and to add it has to be worth it."""
_SUMMED_ROWS = 8  # of a tile, that a program adds


@dataclass(frozen=True, slots=True)
class Shares:
    """How tiles are shared out among programs.

    Units of work are numbered: first the `splits` parts of each of the `shared` tiles, then the tiles that are one.
    """

    tiles: int
    shared: int
    splits: int

    @property
    def units(self) -> int:
        return self.shared * self.splits + self.tiles - self.shared

    @classmethod
    def of(cls, tiles: int, *, steps: int, programs: int) -> Shares:
        """Of so many tiles, each of `steps` tiles of the inner dimension, among `programs`."""
        left = tiles % programs
        splits = min(programs // left, steps // _LEAST_STEPS) if left else 1
        return cls(tiles, left, splits) if splits > 1 else cls(tiles, 0, 1)


def programs(device: torch.device) -> int:
    """Clusters of two that run at the same time."""
    return max(1, processors(device) // 2)


def tile_columns(*, gated: bool) -> int:
    """Of the result, a tile's: gated, half of its weight rows are the gate's."""
    return WEIGHT_ROWS // 2 if gated else WEIGHT_ROWS


def parts_bytes(device: torch.device) -> int:
    """Of the sums at most: each program has one part."""
    return programs(device) * ROWS * WEIGHT_ROWS * torch.float32.itemsize


@triton.jit
def place(number, row_tiles, column_tiles):
    """A tile's row and column."""
    width = _ROW_TILES * column_tiles
    first = number // width * _ROW_TILES
    size = tl.minimum(row_tiles - first, _ROW_TILES)
    within = number % width
    return first + within % size, within // size


@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles", "splits"])
def sum_kernel(
    parts, out, rows, row_tiles, column_tiles, splits, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED_ROWS: tl.constexpr, GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """The tiles that were shared out; GATED, GELU of gate times up. Grid: [shared, ROWS / SUMMED_ROWS]."""
    tile = tl.program_id(0)
    tile_row, tile_column = place(tile, row_tiles, column_tiles)
    row = tl.program_id(1) * SUMMED_ROWS + tl.arange(0, SUMMED_ROWS)
    column = tl.arange(0, COLUMNS)
    weight_rows: tl.constexpr = COLUMNS * (1 + GATED)
    follow(OVERLAPPED)
    at = parts + (tile * splits * ROWS + row[:, None]) * weight_rows + column[None, :]
    value = tl.zeros([SUMMED_ROWS, COLUMNS], tl.float32)
    up = tl.zeros([SUMMED_ROWS, COLUMNS], tl.float32)
    for _ in range(splits):
        value += tl.load(at)
        if GATED:
            up += tl.load(at + COLUMNS)
        at += ROWS * weight_rows
    if GATED:
        value = gelu(value) * up
    row += tile_row * ROWS
    places = out + row.to(tl.int64)[:, None] * out_stride + (tile_column * COLUMNS + column)[None, :]
    tl.store(places, value.to(out.dtype.element_ty), mask=(row < rows)[:, None])


def sum_parts(parts: Tensor, out: Tensor, shares: Shares, *, row_tiles: int, gated: bool) -> None:
    """Into `out` [T, N] the tiles that were shared out, of so many rows of tiles; if `gated`, GELU of gate times up.

    `parts` is float32 [shared, splits, ROWS, WEIGHT_ROWS], the sums of the tiles' parts: gated, of the gate and then
    of up, half of the last dimension each.
    """
    rows, columns = out.shape
    of_tile = tile_columns(gated=gated)
    overlapped = overlaps(out)
    sum_kernel[(shares.shared, ROWS // _SUMMED_ROWS)](
        *(parts, out, rows, row_tiles, columns // of_tile, shares.splits, out.stride(0)),
        ROWS=ROWS,
        COLUMNS=of_tile,
        SUMMED_ROWS=_SUMMED_ROWS,
        GATED=gated,
        OVERLAPPED=overlapped,
        launch_pdl=overlapped,
    )
