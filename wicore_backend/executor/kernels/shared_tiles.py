"""How the tiles of a large product are shared out among programs, and the sums of those that several had a part in.

Programs that stay on their multiprocessor take tile after tile. Those that are left over when all have as many as each
other would keep a few busy and the others waiting: 12 of 672 tiles on 132 multiprocessors would make it six turns in
place of five. So their depth is shared out: each program multiplies a part of such a tile, first of all, and leaves its
sum. The parts of a tile are added in their order, so that a product is the same each time: of many rows by a kernel,
when all is done; of few by whichever of a tile's programs ends its part last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps, processors

ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of the result, a tile; and of the inner dimension."""

_ROW_TILES = tl.constexpr(16)
"""That are taken one after the other with the same columns: what programs read at the same time stays in the cache."""
FEW_PARTS = 4
"""Of a tile, at most, where a program adds them: written out, since a loop with another in it is not pipelined."""
LEAST_STEPS = 4
"""Of the inner dimension, in a part of a tile: what it costs to leave a sum and to add it has to be worth it."""
_FEW_PARTS = tl.constexpr(FEW_PARTS)
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
    def of(cls, tiles: int, *, steps: int, programs: int, most_parts: int | None = None) -> Shares:
        """Of so many tiles, each of `steps` tiles of the inner dimension, among `programs`."""
        left = tiles % programs
        splits = min(programs // left, steps // LEAST_STEPS, most_parts or programs) if left else 1
        return cls(tiles, left, splits) if splits > 1 else cls(tiles, 0, 1)


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_MOST_SHARED = 4096
"""Tiles that may be shared out at once: more than a card has programs at a time."""


@cache
def arrivals(device: torch.device) -> Tensor:
    """int32, zero before and after each kernel: for each tile that is shared out, how many of its parts are done.

    For all products of a device, so these have to be on one stream, or on streams that wait for each other.
    """
    return torch.zeros(_MOST_SHARED, dtype=torch.int32, device=device)


def resident_launch(
    tiles: int, *, steps: int, resident: int, values: int, device: torch.device
) -> tuple[tuple[int], tuple[Tensor, Tensor, int, int, int]]:
    """The grid of programs that stay and add parts themselves, `resident` a multiprocessor, and what they are given.

    That is memory for the sums of parts, of so many `values` each; `arrivals`; and how many of the tiles, each of
    `steps` tiles of the inner dimension, are shared out, in how many parts each, and all units.
    """
    programs = resident * processors(device)
    shares = Shares.of(tiles, steps=steps, programs=programs, most_parts=FEW_PARTS)
    parts = torch.empty(shares.shared * shares.splits, values, dtype=torch.float32, device=device)
    return (min(programs, shares.units),), (parts, arrivals(device), shares.shared, shares.splits, shares.units)


@triton.jit
def share_of(program, programs, shared, splits, units, steps):
    """What a program has of the units: the first step of its part of a tile, how many such steps, and all its steps.

    A program that has no part has 0 of the second. `steps` are those of a whole tile.
    """
    has_part = program < shared * splits
    part = program % splits
    start = tl.where(has_part, steps * part // splits, 0)
    end = tl.where(has_part, steps * (part + 1) // splits, 0)
    wholes = (units - program + programs - 1) // programs - has_part.to(tl.int32)
    return start, end - start, end - start + wholes * steps


@triton.jit
def at_step(nth, program, programs, shared, splits, start, part_steps, steps):
    """Where a program is at its `nth` step: the tile, the step in it, whether in a part, whether at the unit's end."""
    in_part = nth < part_steps
    after = nth - part_steps
    number = program + (after // steps + (part_steps > 0).to(tl.int32)) * programs
    tile = tl.where(in_part, program // splits, number - shared * (splits - 1))
    step = tl.where(in_part, start + nth, after % steps)
    return tile, step, in_part, tl.where(in_part, nth + 1 == part_steps, (after + 1) % steps == 0)


@triton.jit
def _all_threads_are_here(number):
    """A barrier among a program's threads. With the language's own, a loop around it is not pipelined."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def last_to_arrive(arrived, tile, splits):
    """Whether all other parts of a tile had been stored when this program's, which has just been, was."""
    _all_threads_are_here(splits)  # All threads' sums go before the one thread's arrival.
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrived + tile, 0)
    return last


@triton.jit
def sum_of_parts(at, size, splits, like):
    """The sum of a tile's parts, `size` apart and FEW_PARTS at most, in the shape of `like`."""
    total = tl.zeros_like(like)
    for part in tl.static_range(_FEW_PARTS):
        # Not through the first-level cache, which knows nothing of other multiprocessors' writes.
        total += tl.load(at + part * size, mask=part < splits, other=0.0, cache_modifier=".cg")
    return total


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
