"""Prefill attention for Hopper over keys and values in FP8.

As `prefill_hopper.py`, but that the warpgroup that brings tiles also widens them: e4m3 bytes come into a ring of their
own, and go on as float16, which holds them exactly, to the ring that the tensor cores read. These could multiply e4m3
itself at twice the rate, but queries and weights would have to be rounded to it, too, and values transposed.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from wicore_backend.attention.gpu.kernels.prefill_hopper import attend_rows
from wicore_backend.attention.gpu.schedule import TILE_FIELDS

_TILE = gl.constexpr(TILE_FIELDS)
_RAW = gl.constexpr(3)
"""Tiles of keys or of values that are on their way: as many as fit beside two stages of 128 keys."""
_PART = gl.constexpr(32)
"""Rows that are widened at once."""


@gluon.jit
def _order(
    pool, table, job, begin, last_block, layer_row, rows_in_block, head, raw, raw_there,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Have a tile brought, block by block: of even jobs keys, of odd ones the same tokens' values."""
    BLOCKS: gl.constexpr = KEYS // BLOCK_SIZE
    there = raw_there.index(job % _RAW)
    first_block = begin + job // 2 * BLOCKS
    first_row = layer_row + job % 2 * BLOCK_SIZE
    mbarrier.expect(there, KEYS * HEAD_DIM)
    for block in gl.static_range(BLOCKS):
        row = gl.load(table + gl.minimum(first_block + block, last_block)) * rows_in_block + first_row
        for panel in gl.static_range(2):
            tile = raw.index(job % _RAW * 2 + panel)._reinterpret(pool.dtype, [BLOCKS, BLOCK_SIZE, 64], raw.layout)
            tma.async_copy_global_to_shared(pool, [row, head * HEAD_DIM + panel * 64], there, tile.index(block))


@gluon.jit
def _widen(job, stage, raw, raw_there, wide, wide_there, wide_free, wide_phase, KEYS: gl.constexpr):
    """Write a job's bytes of e4m3 as float16, once they are there and what they are written over is free."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    mbarrier.wait(raw_there.index(job % _RAW), (job // _RAW) & 1)
    mbarrier.wait(wide_free.index(stage), wide_phase ^ 1)
    panels = wide.index(stage)._reinterpret(gl.float16, [2, KEYS, 64], wide.layout)
    for panel in gl.static_range(2):
        narrow = raw.index(job % _RAW * 2 + panel)
        target = panels.index(panel)
        for part in gl.static_range(KEYS // _PART):
            stored = narrow.slice(part * _PART, _PART).load(layout)
            numbers = stored.to(gl.float8e4nv, bitcast=True).to(gl.float16)
            target.slice(part * _PART, _PART).store(numbers)
    fence_async_shared()
    tl.debug_barrier()
    mbarrier.arrive(wide_there.index(stage))


@gluon.jit
def _bring_and_widen(
    pool, table, start, end, layer_row, rows_in_block, head,
    keys, values, keys_there, values_there, keys_free, values_free, raw, raw_there,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the tiles from `start` to `end`; a tile's last blocks may be some other's."""
    begin, last_block = start // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
    count = gl.cdiv(end - start, KEYS)
    for job in range(gl.minimum(_RAW, 2 * count)):
        _order(
            pool, table, job, begin, last_block, layer_row, rows_in_block, head, raw, raw_there,
            HEAD_DIM, BLOCK_SIZE, KEYS,
        )  # fmt: skip
    for nth in range(count):
        stage, phase = nth % STAGES, (nth // STAGES) & 1
        _widen(2 * nth, stage, raw, raw_there, keys, keys_there, keys_free, phase, KEYS)
        if 2 * nth + _RAW < 2 * count:
            _order(
                pool, table, 2 * nth + _RAW, begin, last_block, layer_row, rows_in_block, head, raw, raw_there,
                HEAD_DIM, BLOCK_SIZE, KEYS,
            )  # fmt: skip
        _widen(2 * nth + 1, stage, raw, raw_there, values, values_there, values_free, phase, KEYS)
        if 2 * nth + 1 + _RAW < 2 * count:
            _order(
                pool, table, 2 * nth + 1 + _RAW, begin, last_block, layer_row, rows_in_block, head, raw, raw_there,
                HEAD_DIM, BLOCK_SIZE, KEYS,
            )  # fmt: skip


@gluon.jit
def hopper_fp8_prefill_kernel(
    q, pool, out, log_totals, tiles, tables, lowers, uppers, scale, softcap, layer_row, rows_in_block, q_token, q_head,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, HEAD_AXIS: gl.constexpr,
):  # fmt: skip
    """`hopper_prefill_kernel` over bytes of e4m3; `pool` describes them in the same boxes."""
    head, item = gl.program_id(HEAD_AXIS), gl.program_id(1 - HEAD_AXIS)
    record = tiles + item * _TILE
    first_token, num_tokens = gl.load(record), gl.load(record + 1)
    start, end = gl.load(record + 2), gl.load(record + 3)
    full_from, full_to = gl.load(record + 4), gl.load(record + 5)
    table = tables + gl.load(record + 6)

    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(gl.float16, [2, 64, HEAD_DIM], shared)
    keys = gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, HEAD_DIM], shared)
    values = gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, HEAD_DIM], shared)
    raw = gl.allocate_shared_memory(pool.dtype, [2 * _RAW, KEYS, 64], pool.layout)
    keys_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw_there = gl.allocate_shared_memory(gl.int64, [_RAW, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_there.index(stage), count=1)
        mbarrier.init(values_there.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2)
        mbarrier.init(values_free.index(stage), count=2)
    for slot in gl.static_range(_RAW):
        mbarrier.init(raw_there.index(slot), count=1)
    fence_async_shared()
    # Written out, since constants that are put into a variable are constants no longer.
    gl.warp_specialize(
        [
            (
                attend_rows,
                (
                    q, out, log_totals, lowers, uppers, first_token, num_tokens, start, end, full_from, full_to, head,
                    scale, softcap, q_token, q_head,
                    keys, values, keys_there, values_there, keys_free, values_free, queries,
                    gl.constexpr(0), KV_HEADS, GROUP, GROUP_ROWS, HEAD_DIM, KEYS, STAGES, SOFTCAP,
                ),
            ),
            (
                attend_rows,
                (
                    q, out, log_totals, lowers, uppers, first_token, num_tokens, start, end, full_from, full_to, head,
                    scale, softcap, q_token, q_head,
                    keys, values, keys_there, values_there, keys_free, values_free, queries,
                    gl.constexpr(1), KV_HEADS, GROUP, GROUP_ROWS, HEAD_DIM, KEYS, STAGES, SOFTCAP,
                ),
            ),
            (
                _bring_and_widen,
                (
                    pool, table, start, end, layer_row, rows_in_block, head,
                    keys, values, keys_there, values_there, keys_free, values_free, raw, raw_there,
                    HEAD_DIM, BLOCK_SIZE, KEYS, STAGES,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip
