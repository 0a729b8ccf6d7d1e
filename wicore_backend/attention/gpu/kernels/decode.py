"""Decode attention: one query token a sequence, its keys shared out among many programs.

A work item is a stretch of one sequence's keys; a program takes an item and a KV head, whose query heads are the rows
of one small matrix, so that a key is read once for all of them. Whichever of a sequence's programs ends last puts their
results together, which saves a launch a layer.

The token's own key and value need not be in the pool: its last item takes them as they come, as what its softmax begins
with, and writes them there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wicore_backend.attention.gpu.kernels.tiles import (
    FLOOR,
    add_weighted,
    as_numbers,
    as_stored,
    capped,
    load_pairs,
    load_tile,
    operand_type,
    token_rows,
    weigh,
)
from wicore_backend.attention.gpu.schedule import ITEM_FIELDS

_ITEM = tl.constexpr(ITEM_FIELDS)
"""int32 of a work item: the sequence, or -1 if there is no work; its keys' start, a multiple of KEYS, and end; the
first key that is visible; the new key, which is the last; where the sequence's block table begins; the sequence's
first item, and how many it has."""


@triton.jit
def _as_kept(numbers, element: tl.constexpr):
    """float32 as they are read from the pool again."""
    return as_numbers(as_stored(numbers, element), tl.float32)


@triton.jit(do_not_specialize=["mass_row", "sequences"])
def decode_kernel(
    q, k, v, pool, out, items, tables, mass_at, mass, partial, stats, arrived,
    mass_row, sequences, scale, softcap, layer_at, block_stride,
    q_token, q_head, k_token, k_head, v_token, v_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, CELL: tl.constexpr,
    AT_ONCE: tl.constexpr, SOFTCAP: tl.constexpr, MEASURE: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Attention of one layer for all decodes of a step. Grid: KV heads, work items.

    Parameters
    ----------
    q, k, v
        [B, heads, HEAD_DIM] with any token and head strides.
    pool
        [blocks, layers, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM]; the layer's keys begin at `layer_at` of a block. Of the
        type of `k` and `v`, or uint8: e4m3 numbers.
    out
        [B, query heads * HEAD_DIM], contiguous.
    items, tables
        int32 [items, ITEM_FIELDS]; the sequences' block tables one after the other.
    mass_at, mass, mass_row, sequences
        If MEASURE: int32 [measured layers, sequences], of which `mass_row` is this layer: where in `mass`, float32
        [rows, query heads], the sequence's measurement begins, or -1. A measurement is, as powers of two, the weight of
        each cell of CELL keys without the new one, then that of the new key, then the total.
    partial, stats, arrived
        Scratch: float32 [items, KV_HEADS, GROUP, HEAD_DIM], float32 [2, items, KV_HEADS, GROUP], and int32
        [B, KV_HEADS], zero before and after.
    OVERLAPPED
        The kernel may start before the one before it ends (programmatic dependent launch), and so may the next. What
        the step's plan says has been there since before the step's first kernel.
    """
    if OVERLAPPED:
        gdc_launch_dependents()
    head, item = tl.program_id(0), tl.program_id(1)
    record = items + item * _ITEM
    sequence = tl.load(record)
    start, end = tl.load(record + 1), tl.load(record + 2)
    lowest, new = tl.load(record + 3), tl.load(record + 4)
    table = tables + tl.load(record + 5)
    first_item, count = tl.load(record + 6), tl.load(record + 7)
    if OVERLAPPED:
        gdc_wait()
    if sequence < 0:
        return

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    of_group, of_head = rows < GROUP, dims < HEAD_DIM
    of_queries = of_group[:, None] & of_head[None, :]
    query_rows = q + sequence * q_token + (head * GROUP + rows) * q_head
    operand: tl.constexpr = operand_type(q.dtype.element_ty, pool.dtype.element_ty)
    queries = tl.load(query_rows[:, None] + dims[None, :], mask=of_queries, other=0.0).to(operand)
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    VALUES: tl.constexpr = BLOCK_SIZE * ROW
    keys_at = pool + layer_at + head * HEAD_DIM

    MASS_ROW: tl.constexpr = KV_HEADS * GROUP
    cells = new // CELL + 1
    asked = of_group
    measured = mass + head * GROUP
    if MEASURE:
        measured_at = tl.load(mass_at + mass_row * sequences + sequence)
        asked = of_group & (measured_at >= 0)
        measured += measured_at * MASS_ROW

    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Of bytes, even and odd channels apart.
    PAIRS: tl.constexpr = (pool.dtype.element_ty == tl.uint8) and (HEAD_DIM % 2 == 0) and (DIMS >= 32)
    CHANNELS: tl.constexpr = DIMS // 2 if PAIRS else DIMS
    attended = tl.zeros([ROWS, CHANNELS], tl.float32)
    attended_odd = tl.zeros([ROWS, CHANNELS], tl.float32)
    if end > new:
        key = tl.load(k + sequence * k_token + head * k_head + dims, mask=of_head, other=0.0)
        value = tl.load(v + sequence * v_token + head * v_head + dims, mask=of_head, other=0.0)
        key, value = as_stored(key, pool.dtype.element_ty), as_stored(value, pool.dtype.element_ty)
        block = tl.load(table + new // BLOCK_SIZE).to(tl.int64)
        place = keys_at + block * block_stride + (new % BLOCK_SIZE) * ROW + dims
        tl.store(place, key, mask=of_head)
        tl.store(place + VALUES, value, mask=of_head)
        products = tl.sum(queries.to(tl.float32) * as_numbers(key, tl.float32)[None, :], 1)
        top = capped(products, scale, softcap, SOFTCAP)
        total += 1.0
        if PAIRS:
            even = v + sequence * v_token + head * v_head + 2 * tl.arange(0, CHANNELS)
            there = 2 * tl.arange(0, CHANNELS) < HEAD_DIM
            attended += _as_kept(tl.load(even, mask=there, other=0.0), pool.dtype.element_ty)[None, :]
            attended_odd += _as_kept(tl.load(even + 1, mask=there, other=0.0), pool.dtype.element_ty)[None, :]
        else:
            attended += as_numbers(value, tl.float32)[None, :]
        if MEASURE:
            tl.store(measured + cells * MASS_ROW + rows, top, mask=asked)

    for at in range(start, end, KEYS):
        at = tl.multiple_of(at, KEYS)
        positions = at + tl.arange(0, KEYS)
        there = (positions >= lowest) & (positions < new)
        tokens = token_rows(keys_at, table, at, there, block_stride, ROW, KEYS, BLOCK_SIZE, True)
        keys = load_tile(tokens, there, queries.dtype, HEAD_DIM, DIMS, True)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        top, total, weights, shrink = weigh(top, total, products, there[None, :], scale, softcap, SOFTCAP, True)
        if PAIRS:
            values, values_odd = load_pairs(tokens + VALUES, there, queries.dtype, HEAD_DIM, DIMS, True)
            attended_odd = add_weighted(attended_odd, shrink, weights, values_odd, PRECISION)
        else:
            values = load_tile(tokens + VALUES, there, queries.dtype, HEAD_DIM, DIMS, True)
        attended = add_weighted(attended, shrink, weights, values, PRECISION)
        if MEASURE:  # noqa: SIM102, only a kernel that measures knows where
            if measured_at >= 0:
                of_cells = tl.sum(tl.reshape(weights, (ROWS, KEYS // CELL, CELL)), 2)
                cell = at // CELL + tl.arange(0, KEYS // CELL)
                places = measured + cell[None, :] * MASS_ROW + rows[:, None]
                tl.store(places, top[:, None] + tl.log2(of_cells), mask=asked[:, None] & (cell < cells)[None, :])
    if PAIRS:
        attended = tl.interleave(attended, attended_odd)

    finished = out + (sequence * KV_HEADS + head) * (GROUP * HEAD_DIM)
    total_at = measured + (cells + 1) * MASS_ROW
    if count == 1:
        attended = attended / total[:, None]
        tl.store(
            finished + rows[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=of_queries
        )
        if MEASURE:
            tl.store(total_at + rows, top + tl.log2(total), mask=asked)
    else:
        mine = (item * KV_HEADS + head) * GROUP + rows
        totals_from = stats + tl.num_programs(1) * (KV_HEADS * GROUP)
        tl.store(stats + mine, top, mask=of_group)
        tl.store(totals_from + mine, total, mask=of_group)
        tl.store(partial + mine[:, None] * HEAD_DIM + dims[None, :], attended, mask=of_queries)
        tl.debug_barrier()  # All threads' results go before the one thread's arrival.
        counter = arrived + sequence * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            tl.store(counter, 0)
            members = tl.arange(0, GROUP_ROWS)
            of_members = members < GROUP
            best = tl.full([GROUP_ROWS], FLOOR, tl.float32)
            whole = tl.zeros([GROUP_ROWS], tl.float32)
            result = tl.zeros([GROUP_ROWS, DIMS], tl.float32)
            for part in range(0, count, AT_ONCE):
                parts = part + tl.arange(0, AT_ONCE)
                theirs = ((first_item + parts) * KV_HEADS + head)[:, None] * GROUP + members[None, :]
                given = (parts < count)[:, None] & of_members[None, :]
                # Not through the first-level cache, which knows nothing of other multiprocessors' writes.
                tops = tl.load(stats + theirs, mask=given, other=FLOOR, cache_modifier=".cg")
                totals = tl.load(totals_from + theirs, mask=given, other=0.0, cache_modifier=".cg")
                results = tl.load(
                    partial + theirs[:, :, None] * HEAD_DIM + dims[None, None, :],
                    mask=given[:, :, None] & of_head[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                higher = tl.maximum(best, tl.max(tops, 0))
                shrink, shares = tl.exp2(best - higher), tl.exp2(tops - higher[None, :])
                whole = whole * shrink + tl.sum(totals * shares, 0)
                result = result * shrink[:, None] + tl.sum(results * shares[:, :, None], 0)
                best = higher
            result = result / whole[:, None]
            tl.store(
                finished + members[:, None] * HEAD_DIM + dims[None, :],
                result.to(out.dtype.element_ty),
                mask=of_members[:, None] & of_head[None, :],
            )
            if MEASURE:
                tl.store(total_at + members, best + tl.log2(whole), mask=of_members & (measured_at >= 0))
