"""Gate and up of many rows for Hopper: their products, GELU of one times the other, in one kernel.

cuBLAS' product is as fast by itself, but what it writes, twice the result's size, has to be read again. Here a program
has 128 rows of the result and 128 columns, for which it multiplies by as many columns of gate and of up: side by side
in shared memory, they are one operand of the tensor cores, and one accumulator holds both products.

Three parts of a program run beside each other. One warp has the bulk copy engine bring tiles into a ring; two
warpgroups have half of the rows each. They are out of step by up to the ring's length, so that one has the tensor cores
while the other is at its GELU. Programs stay on their multiprocessor and take tile after tile (`shared_tiles.py`).

Written in Gluon, OpenAI Triton's language a level below, which no interpreter runs: where there is no GPU, tests see
only that it compiles.
"""

from __future__ import annotations

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

from wicore_backend.executor.kernels.shared_tiles import COLUMNS, DEPTH, ROWS, Shares, place, sum_parts
from wicore_backend.executor.kernels.small import gelu, processors
from wicore_backend.quantization.int4 import Int4Matrix

STAGES = 4
"""Tiles in the ring."""

_ROWS, _COLUMNS, _DEPTH, _STAGES = map(gl.constexpr, (ROWS, COLUMNS, DEPTH, STAGES))


def fits(weight: Tensor | Int4Matrix) -> bool:
    """Whether `weight` [2 F, K], on Hopper, as it is or widened, has a whole number of tiles."""
    columns, depth = weight.shape
    return weight.dtype.itemsize == 2 and columns % (2 * COLUMNS) == 0 and depth % DEPTH == 0


@gluon.jit
def _unit(number, shared, splits, depth):
    """A unit's tile, and from where to where in the inner dimension it multiplies."""
    steps = depth // _DEPTH
    part = number % splits
    whole = number >= shared * splits
    tile = gl.where(whole, number - shared * (splits - 1), number // splits)
    start = gl.where(whole, 0, steps * part // splits)
    end = gl.where(whole, steps, steps * (part + 1) // splits)
    return tile, start * _DEPTH, end * _DEPTH


@gluon.jit
def _bring(x, weight, row_tiles, column_tiles, columns, depth, shared, splits, units, xs, weights, there, free):
    """Fill the ring, unit after unit."""
    layout: gl.constexpr = weights.layout
    step = 0
    for number in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, start, end = _unit(number, shared, splits, depth)
        row, column = place(tile, row_tiles, column_tiles)
        for at in range(start, end, _DEPTH):
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
    out, parts, rows, row_tiles, column_tiles, columns, depth, shared, splits, units, xs, weights, there, free,
    out_stride, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 rows of every unit."""
    of_sum: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _COLUMNS, 16])
    of_memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    step = 0
    for number in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, start, end = _unit(number, shared, splits, depth)
        row, column = place(tile, row_tiles, column_tiles)
        total = gl.zeros([64, 2 * _COLUMNS], gl.float32, of_sum)
        for at in range(start, end, _DEPTH):
            stage = step % _STAGES
            mbarrier.wait(there.index(stage), (step // _STAGES) & 1)
            mine = xs.index(stage).slice(WARPGROUP * 64, 64)
            total = warpgroup_mma(mine, weights.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            if at > start:  # The product before is done, and so its tiles are read.
                tl.debug_barrier()
                mbarrier.arrive(free.index((step - 1) % _STAGES))
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        tl.debug_barrier()
        mbarrier.arrive(free.index((step - 1) % _STAGES))
        if number < shared * splits:
            sum_rows = number * _ROWS + WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, of_sum))
            sum_columns = gl.arange(0, 2 * _COLUMNS, gl.SliceLayout(0, of_sum))
            gl.store(parts + sum_rows[:, None] * (2 * _COLUMNS) + sum_columns[None, :], total)
        else:
            gate, up = gl.split(gl.permute(gl.reshape(total, [64, 2, _COLUMNS]), [0, 2, 1]))
            value = gl.convert_layout((gelu(gate) * up).to(out.dtype.element_ty), of_memory)
            of_rows = row * _ROWS + WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, of_memory))
            of_columns = column * _COLUMNS + gl.arange(0, _COLUMNS, gl.SliceLayout(0, of_memory))
            stride = columns if out_stride is None else out_stride
            places = out + of_rows.to(gl.int64)[:, None] * stride + of_columns[None, :]
            gl.store(places, value, mask=(of_rows < rows)[:, None])


@gluon.jit(do_not_specialize=["rows", "row_tiles", "column_tiles", "shared", "splits", "units"])
def gated_kernel(
    x, weight, out, parts, rows, row_tiles, column_tiles, columns, depth, shared, splits, units, out_stride=None
):  # fmt: skip
    """GELU(x G^T) times x U^T, [rows, columns]. Grid: as many programs as there are multiprocessors, at most.

    Parameters
    ----------
    x, weight
        Descriptors of [rows, depth] and of G and U, [2 columns, depth], in boxes of [ROWS or COLUMNS, DEPTH].
    parts
        float32 [shared, splits, ROWS, 2, COLUMNS]: of the tiles that are shared out, the parts' sums, gate and up.
    shared, splits, units
        See `Shares`.
    out_stride
        From a row of the result to the next; its columns if None.
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
                (
                    out, parts, rows, row_tiles, column_tiles, columns, depth, shared, splits, units,
                    xs, weights, there, free, out_stride, gl.constexpr(0),
                ),
            ),
            (
                _multiply,
                (
                    out, parts, rows, row_tiles, column_tiles, columns, depth, shared, splits, units,
                    xs, weights, there, free, out_stride, gl.constexpr(1),
                ),
            ),
            (
                _bring,
                (
                    x, weight, row_tiles, column_tiles, columns, depth, shared, splits, units,
                    xs, weights, there, free,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def gated_product(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """GELU of x times the first half of `weight` [2 F, K], times x times the second: [T, F] of `x` [T, K].

    Of 16-bit values on Hopper; the weight `fits`. `out` may be some columns of a longer row, from a multiple of 8 on.
    """
    rows, depth = x.shape
    columns = len(weight) // 2
    if out is None:
        out = x.new_empty(rows, columns)
    stride = None if out.stride(0) == columns else out.stride(0)
    row_tiles, column_tiles = triton.cdiv(rows, ROWS), columns // COLUMNS
    programs = processors(x.device)
    shares = Shares.of(row_tiles * column_tiles, steps=depth // DEPTH, programs=programs)
    parts = x.new_empty(shares.shared * shares.splits, ROWS, 2, COLUMNS, dtype=torch.float32)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    gated_kernel[(min(programs, shares.units),)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH], layout),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH], layout),
        *(out, parts, rows, row_tiles, column_tiles, columns, depth, shares.shared, shares.splits, shares.units),
        out_stride=stride,
        num_warps=4,
    )
    if shares.shared:
        sum_parts(parts, out, shares)
    return out
