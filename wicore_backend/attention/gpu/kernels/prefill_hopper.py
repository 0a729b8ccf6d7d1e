"""Prefill attention for Hopper: what `prefill.py` computes, at the speed that the card's own instructions allow.

A program has three parts that run beside each other. One warp has the bulk copy engine bring keys and values, a block
of the pool with each order, into a ring of tiles; it takes no registers and no arithmetic from the others. Two
warpgroups have half of the rows each: while one does its softmax the other has the tensor cores, and each gives them
the next product before it begins with the softmax of the last.

A warpgroup's rows are 64. So are the 16-bit values in a row of shared memory as the tensor cores read it, 128 bytes, so
that a head of 128 lies in two panels, one after the other: each is copied by itself, and both are one operand.

Written in Gluon, OpenAI Triton's language a level below, which no interpreter runs: where there is no GPU, tests see
only that it compiles.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from wicore_backend.attention.gpu.schedule import TILE_FIELDS

_TILE = gl.constexpr(TILE_FIELDS)
_FLOOR = gl.constexpr(-1e30)


@gluon.jit
def _bring(
    pool, table, start, end, layer_row, rows_in_block, head,
    keys, values, keys_there, values_there, keys_free, values_free,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles from `start` to `end`, block by block; a tile's last blocks may be some other's."""
    BLOCKS: gl.constexpr = KEYS // BLOCK_SIZE
    layout: gl.constexpr = keys.layout
    last_block = (end - 1) // BLOCK_SIZE
    for nth in range(gl.cdiv(end - start, KEYS)):
        stage = nth % STAGES
        phase = (nth // STAGES) & 1
        first_block = (start + nth * KEYS) // BLOCK_SIZE
        mbarrier.wait(keys_free.index(stage), phase ^ 1)
        mbarrier.expect(keys_there.index(stage), KEYS * HEAD_DIM * 2)
        boxes = keys.index(stage)._reinterpret(pool.dtype, [2 * BLOCKS, BLOCK_SIZE, 64], layout)
        for block in gl.static_range(BLOCKS):
            row = gl.load(table + gl.minimum(first_block + block, last_block)) * rows_in_block + layer_row
            for panel in gl.static_range(2):
                column = head * HEAD_DIM + panel * 64
                place = boxes.index(panel * BLOCKS + block)
                tma.async_copy_global_to_shared(pool, [row, column], keys_there.index(stage), place)
        mbarrier.wait(values_free.index(stage), phase ^ 1)
        mbarrier.expect(values_there.index(stage), KEYS * HEAD_DIM * 2)
        boxes = values.index(stage)._reinterpret(pool.dtype, [2 * BLOCKS, BLOCK_SIZE, 64], layout)
        for block in gl.static_range(BLOCKS):
            row = gl.load(table + gl.minimum(first_block + block, last_block)) * rows_in_block + layer_row + BLOCK_SIZE
            for panel in gl.static_range(2):
                column = head * HEAD_DIM + panel * 64
                place = boxes.index(panel * BLOCKS + block)
                tma.async_copy_global_to_shared(pool, [row, column], values_there.index(stage), place)


@gluon.jit
def _products(queries, keys, stage, WARPGROUP: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr):
    """Queries times keys [rows, KEYS], begun."""
    scores = gl.zeros([64, KEYS], gl.float32, layout)
    of_stage = keys.index(stage).permute((1, 0))
    return warpgroup_mma(queries.index(WARPGROUP), of_stage, scores, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    scores, top, total, at, lower, upper, full_from, full_to, scale, softcap,
    KEYS: gl.constexpr, SOFTCAP: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The running maximum and sum with a tile of scores, its weights, and what all before it shrink by."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (gl.exp2(scores * (scale * 2.8853900817779268)) + 1.0))
        factor = 1.0
    else:
        factor = scale
    if (at < full_from) | (at >= full_to):
        positions = (at + gl.arange(0, KEYS, gl.SliceLayout(0, layout)))[None, :]
        scores = gl.where((positions >= lower[:, None]) & (positions <= upper[:, None]), scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - higher[:, None])
    shrink = gl.exp2(top - higher)
    return higher, total * shrink + gl.sum(weights, 1), weights, shrink


@gluon.jit
def _clear_past(values, stage, valid, KEYS: gl.constexpr, layout: gl.constexpr):
    """Zero a tile's values from row `valid` on: what is there may be NaN, which no weight of 0 takes away.

    Both warpgroups do so, and write the same.
    """
    rows = gl.arange(0, 32, gl.SliceLayout(1, layout))[:, None]
    for part in gl.static_range(KEYS // 32):
        some = values.index(stage).slice(part * 32, 32)
        some.store(gl.where(rows + part * 32 < valid, some.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def attend_rows(
    q, out, log_totals, lowers, uppers, first_token, num_tokens, start, end, full_from, full_to, head,
    scale, softcap, q_token, q_head,
    keys, values, keys_there, values_there, keys_free, values_free, queries,
    WARPGROUP: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """A warpgroup's rows of the tile of queries; products are of the type of `keys` and `values`, of 16 bits."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_result, 2)
    of_memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = keys.dtype

    # Queries to shared memory.
    rows = WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, of_memory))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, of_memory))
    member = rows % GROUP_ROWS
    there = (rows // GROUP_ROWS < num_tokens) & (member < GROUP)
    token = (first_token + rows // GROUP_ROWS).to(gl.int64)
    from_rows = (q + token * q_token + (head * GROUP + member) * q_head)[:, None] + dims[None, :]
    queries.index(WARPGROUP).store(gl.load(from_rows, mask=there[:, None], other=0.0).to(dtype))
    fence_async_shared()

    score_rows = WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, of_scores))
    score_token = first_token + score_rows // GROUP_ROWS
    score_there = (score_rows // GROUP_ROWS < num_tokens) & (score_rows % GROUP_ROWS < GROUP)
    lower = gl.load(lowers + score_token, mask=score_there, other=0)
    upper = gl.load(uppers + score_token, mask=score_there, other=0)
    top = gl.full([64], _FLOOR, gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, of_scores))
    result = gl.zeros([64, HEAD_DIM], gl.float32, of_result)

    count = gl.cdiv(end - start, KEYS)
    mbarrier.wait(keys_there.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_products(queries, keys, 0, WARPGROUP, KEYS, of_scores)])
    tl.debug_barrier()
    mbarrier.arrive(keys_free.index(0))
    top, total, weights, shrink = _softmax(
        scores, top, total, start, lower, upper, full_from, full_to, scale, softcap, KEYS, SOFTCAP, of_scores
    )
    weights16 = gl.convert_layout(weights.to(dtype), of_weights)
    for nth in range(1, count):
        stage = nth % STAGES
        phase = (nth // STAGES) & 1
        before = (nth - 1) % STAGES
        phase_before = ((nth - 1) // STAGES) & 1
        mbarrier.wait(keys_there.index(stage), phase)
        begun = _products(queries, keys, stage, WARPGROUP, KEYS, of_scores)
        mbarrier.wait(values_there.index(before), phase_before)
        result_begun = warpgroup_mma(weights16, values.index(before), result, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[begun])
        tl.debug_barrier()
        mbarrier.arrive(keys_free.index(stage))
        top, total, weights, shrink = _softmax(
            scores, top, total, start + nth * KEYS, lower, upper, full_from, full_to, scale, softcap,
            KEYS, SOFTCAP, of_scores,
        )  # fmt: skip
        result, weights16 = warpgroup_mma_wait(0, deps=[result_begun, weights16])
        tl.debug_barrier()
        mbarrier.arrive(values_free.index(before))
        of_rows = gl.convert_layout(shrink, gl.SliceLayout(1, of_result))[:, None]
        result = result * of_rows
        weights16 = gl.convert_layout(weights.to(dtype), of_weights)
    final = (count - 1) % STAGES
    mbarrier.wait(values_there.index(final), ((count - 1) // STAGES) & 1)
    valid = end - start - (count - 1) * KEYS
    if valid < KEYS:
        _clear_past(values, final, valid, KEYS, of_memory)
    result = warpgroup_mma(weights16, values.index(final), result, is_async=True)
    result = warpgroup_mma_wait(0, deps=[result])

    score_at = (score_token.to(gl.int64) * KV_HEADS + head) * GROUP + score_rows % GROUP_ROWS
    gl.store(log_totals + score_at, top + gl.log2(total), mask=score_there)
    whole = gl.convert_layout(total, gl.SliceLayout(1, of_result))[:, None]
    to_rows = (out + ((token * KV_HEADS + head) * GROUP + member) * HEAD_DIM)[:, None] + dims[None, :]
    gl.store(to_rows, gl.convert_layout((result / whole).to(out.dtype.element_ty), of_memory), mask=there[:, None])


@gluon.jit
def hopper_prefill_kernel(
    q, pool, out, log_totals, tiles, tables, lowers, uppers, scale, softcap, layer_row, rows_in_block, q_token, q_head,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, HEAD_AXIS: gl.constexpr,
):  # fmt: skip
    """What `prefill_kernel` is with ROWS = 128, HEAD_DIM = 128, 16-bit values and nothing shared out.

    Grid: one axis KV heads, `HEAD_AXIS`, the other items. With heads last all programs at work have the same head, of
    which each key then comes from memory once, not once for each of them.

    Parameters
    ----------
    pool
        A descriptor of the pool as [rows, KV_HEADS * HEAD_DIM], a token's keys or values each, in boxes of
        [BLOCK_SIZE, 64].
    layer_row, rows_in_block
        The layer's first row in a block, and the rows of a block.
    """
    head, item = gl.program_id(HEAD_AXIS), gl.program_id(1 - HEAD_AXIS)
    record = tiles + item * _TILE
    first_token, num_tokens = gl.load(record), gl.load(record + 1)
    start, end = gl.load(record + 2), gl.load(record + 3)
    full_from, full_to = gl.load(record + 4), gl.load(record + 5)
    table = tables + gl.load(record + 6)

    shared: gl.constexpr = pool.layout
    queries = gl.allocate_shared_memory(pool.dtype, [2, 64, HEAD_DIM], shared)
    keys = gl.allocate_shared_memory(pool.dtype, [STAGES, KEYS, HEAD_DIM], shared)
    values = gl.allocate_shared_memory(pool.dtype, [STAGES, KEYS, HEAD_DIM], shared)
    keys_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_there.index(stage), count=1)
        mbarrier.init(values_there.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2)
        mbarrier.init(values_free.index(stage), count=2)
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
                _bring,
                (
                    pool, table, start, end, layer_row, rows_in_block, head,
                    keys, values, keys_there, values_there, keys_free, values_free,
                    HEAD_DIM, BLOCK_SIZE, KEYS, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
