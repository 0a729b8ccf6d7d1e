"""How the tiles of a large product are shared out among programs, and the sums of those that several had a part in.

Programs that stay on their multiprocessor take tile after tile. Those that are left over when all have as many as each
other would keep a few busy and the others waiting: 12 of 672 tiles on 132 multiprocessors would make it six turns in
place of five. So their depth is shared out: each program multiplies a part of such a tile, first of all, and leaves its
sum. When all is done a kernel adds the parts of each tile in their order, so that a product is the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps, processors

ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of the result, a tile; and of the inner dimension."""

_ROW_TILES = tl.constexpr(16)
"""That are taken one after the other with the same columns: what programs read at the same time stays in the cache."""
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


def parts_bytes(device: torch.device) -> int:
    """Of the sums at most: each program has one part."""
    return processors(device) * ROWS * 2 * COLUMNS * torch.float32.itemsize


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
    parts, out, rows, row_tiles, column_tiles, columns, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED_ROWS: tl.constexpr, OVERLAPPED: tl.constexpr, out_stride=None,
):  # fmt: skip
    """GELU of gate times up, of the tiles that were shared out. Grid: [shared, ROWS / SUMMED_ROWS]."""
    tile = tl.program_id(0)
    tile_row, tile_column = place(tile, row_tiles, column_tiles)
    row = tl.program_id(1) * SUMMED_ROWS + tl.arange(0, SUMMED_ROWS)
    column = tl.arange(0, COLUMNS)
    follow(OVERLAPPED)
    at = parts + (tile * splits * ROWS + row[:, None]) * (2 * COLUMNS) + column[None, :]
    gate = tl.zeros([SUMMED_ROWS, COLUMNS], tl.float32)
    up = tl.zeros([SUMMED_ROWS, COLUMNS], tl.float32)
    for _ in range(splits):
        gate += tl.load(at)
        up += tl.load(at + COLUMNS)
        at += ROWS * 2 * COLUMNS
    row += tile_row * ROWS
    stride = columns if out_stride is None else out_stride
    places = out + row.to(tl.int64)[:, None] * stride + (tile_column * COLUMNS + column)[None, :]
    tl.store(places, (gelu(gate) * up).to(out.dtype.element_ty), mask=(row < rows)[:, None])


def sum_parts(parts: Tensor, out: Tensor, shares: Shares) -> None:
    """GELU of gate times up into `out` [T, F], of the tiles that were shared out.

    `parts` is float32 [shared, splits, ROWS, 2, COLUMNS]: the sums of the tiles' parts, of gate and of up.
    """
    rows, columns = out.shape
    overlapped = overlaps(out)
    sum_kernel[(shares.shared, ROWS // _SUMMED_ROWS)](
        *(parts, out, rows, triton.cdiv(rows, ROWS), columns // COLUMNS, columns, shares.splits),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        SUMMED_ROWS=_SUMMED_ROWS,
        OVERLAPPED=overlapped,
        out_stride=None if out.stride(0) == columns else out.stride(0),
        launch_pdl=overlapped,
    )
