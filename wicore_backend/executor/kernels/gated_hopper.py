"""Gate and up of many rows for Hopper: their products, GELU of one times the other, in one kernel.

cuBLAS' product is as fast by itself, but what it writes, twice the result's size, has to be read again. Here a program
has 128 rows of the result and 128 columns, for which it multiplies by as many columns of gate and of up: side by side
in shared memory, they are one operand of the tensor cores, and one accumulator holds both products.

Three parts of a program run beside each other. One warp has the bulk copy engine bring tiles into a ring; two
warpgroups have half of the rows each. They are out of step by up to the ring's length, so that one has the tensor cores
while the other is at its GELU. Programs stay on their multiprocessor and take tile after tile.

Written in Gluon, OpenAI Triton's language a level below, which no interpreter runs: where there is no GPU, tests see
only that it compiles.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, DEPTH, STAGES = 128, 128, 64, 4
"""Of the result and of the inner dimension, a tile; and tiles in the ring."""

ROW_TILES = 16
"""That are taken one after the other with the same columns: what programs read at the same time stays in the cache."""

_ROWS, _COLUMNS, _DEPTH, _STAGES, _ROW_TILES = map(gl.constexpr, (ROWS, COLUMNS, DEPTH, STAGES, ROW_TILES))


def fits(weight: Tensor) -> bool:
    """Whether `weight` [2 F, K], on Hopper, has a whole number of tiles."""
    columns, depth = weight.shape
    return weight.dtype.itemsize == 2 and columns % (2 * COLUMNS) == 0 and depth % DEPTH == 0


@gluon.jit
def _place(number, row_tiles, column_tiles):
    """A tile's row and column."""
    width = _ROW_TILES * column_tiles
    first = number // width * _ROW_TILES
    size = gl.minimum(row_tiles - first, _ROW_TILES)
    within = number % width
    return first + within % size, within // size


@gluon.jit
def _bring(x, weight, row_tiles, column_tiles, columns, depth, xs, weights, there, free):
    """Fill the ring, tile after tile of the result."""
    layout: gl.constexpr = weights.layout
    step = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(number, row_tiles, column_tiles)
        for at in range(0, depth, _DEPTH):
            stage = step % _STAGES
            phase = (step // _STAGES) & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(there.index(stage), (_ROWS + 2 * _COLUMNS) * _DEPTH * 2)
            tma.async_copy_global_to_shared(x, [row * _ROWS, at], there.index(stage), xs.index(stage))
            halves = weights.index(stage)._reinterpret(weight.dtype, [2, _COLUMNS, _DEPTH], layout)
            gate, up = column * _COLUMNS, columns + column * _COLUMNS
            tma.async_copy_global_to_shared(weight, [gate, at], there.index(stage), halves.index(0))
            tma.async_copy_global_to_shared(weight, [up, at], there.index(stage), halves.index(1))
            step += 1


@gluon.jit
def _multiply(
    out, rows, row_tiles, column_tiles, columns, depth, xs, weights, there, free,
    WARPGROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 rows of every tile."""
    of_sum: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _COLUMNS, 16])
    of_memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    step = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(number, row_tiles, column_tiles)
        total = gl.zeros([64, 2 * _COLUMNS], gl.float32, of_sum)
        for at in range(0, depth, _DEPTH):
            stage = step % _STAGES
            mbarrier.wait(there.index(stage), (step // _STAGES) & 1)
            mine = xs.index(stage).slice(WARPGROUP * 64, 64)
            total = warpgroup_mma(mine, weights.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            if at > 0:  # The product before is done, and so its tiles are read.
                tl.debug_barrier()
                mbarrier.arrive(free.index((step - 1) % _STAGES))
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        tl.debug_barrier()
        mbarrier.arrive(free.index((step - 1) % _STAGES))
        gate, up = gl.split(gl.permute(gl.reshape(total, [64, 2, _COLUMNS]), [0, 2, 1]))
        # GELU in its tanh form, as `small.gelu`.
        value = gate / (1.0 + gl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up
        value = gl.convert_layout(value.to(out.dtype.element_ty), of_memory)
        of_rows = row * _ROWS + WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, of_memory))
        of_columns = column * _COLUMNS + gl.arange(0, _COLUMNS, gl.SliceLayout(0, of_memory))
        places = out + of_rows.to(gl.int64)[:, None] * columns + of_columns[None, :]
        gl.store(places, value, mask=(of_rows < rows)[:, None])


@gluon.jit
def gated_kernel(x, weight, out, rows, row_tiles, column_tiles, columns, depth):
    """GELU(x G^T) times x U^T, [rows, columns]. Grid: as many programs as there are multiprocessors, at most.

    Parameters
    ----------
    x, weight
        Descriptors of [rows, depth] and of G and U, [2 columns, depth], in boxes of [ROWS or COLUMNS, DEPTH].
    """
    xs = gl.allocate_shared_memory(x.dtype, [_STAGES, _ROWS, _DEPTH], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [_STAGES, 2 * _COLUMNS, _DEPTH], weight.layout)
    there = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(there.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, rows, row_tiles, column_tiles, columns, depth, xs, weights, there, free, gl.constexpr(0)),
            ),
            (
                _multiply,
                (out, rows, row_tiles, column_tiles, columns, depth, xs, weights, there, free, gl.constexpr(1)),
            ),
            (_bring, (x, weight, row_tiles, column_tiles, columns, depth, xs, weights, there, free)),
        ],
        [4, 1],
        [240, 24],
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """GELU of x times the first half of `weight` [2 F, K], times x times the second: [T, F] of `x` [T, K].

    Of 16-bit values on Hopper; the weight `fits`.
    """
    rows, depth = x.shape
    columns = len(weight) // 2
    out = x.new_empty(rows, columns)
    row_tiles, column_tiles = triton.cdiv(rows, ROWS), columns // COLUMNS
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    gated_kernel[(min(_processors(x.device), row_tiles * column_tiles),)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH], layout),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH], layout),
        *(out, rows, row_tiles, column_tiles, columns, depth),
        num_warps=4,
    )
    return out
