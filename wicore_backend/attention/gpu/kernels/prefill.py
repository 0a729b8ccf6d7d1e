"""Prefill attention: tiles of a sequence's queries over its prefix and the step's own tokens, which are written first.

The rows of a tile are tokens times the query heads of one KV head. Most of the keys of a tile are seen by all its
tokens, so they are taken without masks; those at the edges of the window, and near and past the diagonal, with.

Where there are too few tiles to fill the card (a short question after a long prefix), a tile's keys are shared out
among several programs, the last of which to end puts the results together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from wicore_backend.attention.gpu.kernels.tiles import (
    FLOOR,
    add_weighted,
    as_stored,
    capped,
    load_tile,
    operand_type,
    token_rows,
    weigh,
)
from wicore_backend.attention.gpu.masses import MEASUREMENT_FIELDS
from wicore_backend.attention.gpu.schedule import TILE_FIELDS

_TILE = tl.constexpr(TILE_FIELDS)
"""int32 of a work item: its first token's row and how many tokens it has; its keys' start, a multiple of KEYS, and end;
of these, from and to which all its tokens see all keys, multiples of KEYS; where the sequence's block table begins;
the tile's first item, how many it has, and the tile's number."""
_MEASUREMENT = tl.constexpr(MEASUREMENT_FIELDS)
"""int32 of a measurement: see `Measurements.of_prefills`."""


@triton.jit
def write_kernel(
    k, v, pool, slots, layer_at, block_stride, k_token, k_head, v_token, v_head,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Writes keys and values [T, KV_HEADS, HEAD_DIM] to the pool; `slots` int32 [T] is block * BLOCK_SIZE + place.

    A token whose slot is -1 is left out. OVERLAPPED says that it is launched before what it follows has ended. Grid:
    tokens.
    """
    if OVERLAPPED:
        gdc_wait()
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    heads, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, DIMS)[None, :]
    given = (heads < KV_HEADS) & (dims < HEAD_DIM) & (slot >= 0)
    place = pool + layer_at + (slot // BLOCK_SIZE).to(tl.int64) * block_stride
    place += (slot % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM) + heads * HEAD_DIM + dims
    token = token.to(tl.int64)
    key = tl.load(k + token * k_token + heads * k_head + dims, mask=given, other=0.0)
    value = tl.load(v + token * v_token + heads * v_head + dims, mask=given, other=0.0)
    tl.store(place, as_stored(key, pool.dtype.element_ty), mask=given)
    tl.store(place + BLOCK_SIZE * KV_HEADS * HEAD_DIM, as_stored(value, pool.dtype.element_ty), mask=given)


@triton.jit
def _attend_tile(
    at, top, total, attended, queries, keys_at, table, lower, upper, end, scale, softcap, block_stride,
    ROW: tl.constexpr, VALUES: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax with the KEYS keys from `at` on, of which row r sees those from lower[r] to upper[r]."""
    at = tl.multiple_of(at, KEYS)
    positions = at + tl.arange(0, KEYS)
    there = positions < end
    tokens = token_rows(keys_at, table, at, there, block_stride, ROW, KEYS, BLOCK_SIZE, MASKED)
    keys = load_tile(tokens, there, queries.dtype, HEAD_DIM, DIMS, MASKED)
    products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    visible = (positions[None, :] >= lower[:, None]) & (positions[None, :] <= upper[:, None])
    values = load_tile(tokens + VALUES, there, queries.dtype, HEAD_DIM, DIMS, MASKED, True)
    top, total, weights, shrink = weigh(top, total, products, visible, scale, softcap, SOFTCAP, MASKED)
    return top, total, add_weighted(attended, shrink, weights, values, PRECISION)


@triton.jit
def prefill_kernel(
    q, pool, out, log_totals, tiles, tables, lowers, uppers, partial, stats, arrived,
    scale, softcap, layer_at, block_stride, q_token, q_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one layer for a step's prefills. Grid: KV heads, work items.

    Parameters
    ----------
    q
        [T, query heads, HEAD_DIM] with any token and head strides.
    pool
        As for `decode_kernel`; it has the step's own keys and values.
    out, log_totals
        [T, query heads * HEAD_DIM] and float32 [T, query heads]: the log2 of the sums of the weights.
    tiles, tables
        int32 [items, TILE_FIELDS]; the sequences' block tables one after the other.
    lowers, uppers
        int32 [T], the first and the last key that each token sees.
    partial, stats, arrived
        Scratch, if SPLIT: float32 [items, KV_HEADS, ROWS, HEAD_DIM], float32 [2, items, KV_HEADS, ROWS], and
        int32 [tiles, KV_HEADS], zero before and after.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    record = tiles + item * _TILE
    first_token, num_tokens = tl.load(record), tl.load(record + 1)
    start, end = tl.load(record + 2), tl.load(record + 3)
    full_from, full_to = tl.load(record + 4), tl.load(record + 5)
    table = tables + tl.load(record + 6)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    member = rows % GROUP_ROWS
    of_rows = (rows // GROUP_ROWS < num_tokens) & (member < GROUP)
    of_head = dims < HEAD_DIM
    of_queries = of_rows[:, None] & of_head[None, :]
    token = (first_token + rows // GROUP_ROWS).to(tl.int64)
    query_rows = q + token * q_token + (head * GROUP + member) * q_head
    operand: tl.constexpr = operand_type(q.dtype.element_ty, pool.dtype.element_ty)
    queries = tl.load(query_rows[:, None] + dims[None, :], mask=of_queries, other=0.0).to(operand)
    lower = tl.load(lowers + token, mask=of_rows, other=0)
    upper = tl.load(uppers + token, mask=of_rows, other=0)
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    VALUES: tl.constexpr = BLOCK_SIZE * ROW
    keys_at = pool + layer_at + head * HEAD_DIM

    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIMS], tl.float32)
    for at in range(full_from, full_to, KEYS):
        top, total, attended = _attend_tile(
            at, top, total, attended, queries, keys_at, table, lower, upper, end, scale, softcap, block_stride,
            ROW, VALUES, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    before = (full_from - start) // KEYS
    after = tl.cdiv(end - full_to, KEYS)
    for edge in range(before + after):
        at = tl.where(edge < before, start + edge * KEYS, full_to + (edge - before) * KEYS)
        top, total, attended = _attend_tile(
            at, top, total, attended, queries, keys_at, table, lower, upper, end, scale, softcap, block_stride,
            ROW, VALUES, HEAD_DIM, DIMS, BLOCK_SIZE, KEYS, SOFTCAP, True, PRECISION,
        )  # fmt: skip

    is_last = True
    if SPLIT:
        first_item, count = tl.load(record + 7), tl.load(record + 8)
        if count > 1:
            mine = (item * KV_HEADS + head) * ROWS + rows
            totals_from = stats + tl.num_programs(1) * (KV_HEADS * ROWS)
            tl.store(stats + mine, top)
            tl.store(totals_from + mine, total)
            tl.store(partial + mine[:, None] * HEAD_DIM + dims[None, :], attended, mask=of_head[None, :])
            tl.debug_barrier()  # All threads' results go before the one thread's arrival.
            counter = arrived + tl.load(record + 9) * KV_HEADS + head
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
            if is_last:
                tl.store(counter, 0)
                top = tl.full([ROWS], FLOOR, tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                attended = tl.zeros([ROWS, DIMS], tl.float32)
                for part in range(first_item, first_item + count):
                    theirs = (part * KV_HEADS + head) * ROWS + rows
                    # Not through the first-level cache, which knows nothing of other multiprocessors' writes.
                    tops = tl.load(stats + theirs, cache_modifier=".cg")
                    totals = tl.load(totals_from + theirs, cache_modifier=".cg")
                    results = tl.load(
                        partial + theirs[:, None] * HEAD_DIM + dims[None, :],
                        mask=of_head[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    higher = tl.maximum(top, tops)
                    shrink, share = tl.exp2(top - higher), tl.exp2(tops - higher)
                    total = total * shrink + totals * share
                    attended = attended * shrink[:, None] + results * share[:, None]
                    top = higher
    if is_last:
        places = (token * KV_HEADS + head) * GROUP + member
        tl.store(log_totals + places, top + tl.log2(total), mask=of_rows)
        tl.store(
            out + places[:, None] * HEAD_DIM + dims[None, :],
            (attended / total[:, None]).to(out.dtype.element_ty),
            mask=of_queries,
        )


@triton.jit(do_not_specialize=["first"])
def prefill_mass_kernel(
    q, pool, log_totals, measurements, tables, uppers, mass, first, scale, softcap, layer_at, block_stride,
    q_token, q_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, CELL: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention mass of some last tokens of prefills in a global layer. Grid: KV heads, measurements, key tiles.

    With the sums of the weights known (`log_totals`), a weight takes its key alone: the values are not read. `mass` is
    as for `decode_kernel`: the mean over tokens and the heads of a KV head, given to each of these; the new key's is
    0, the total 1. Measurements are taken from number `first` on; tiles past the end of a shorter one are left alone.
    """
    head, tile = tl.program_id(0), tl.program_id(2)
    record = measurements + (first + tl.program_id(1)) * _MEASUREMENT
    first_token, num_tokens, end = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    table = tables + tl.load(record + 3)
    measured = mass + tl.load(record + 4) * (KV_HEADS * GROUP) + head * GROUP
    if tile * KEYS >= end:
        return
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    keys_at = pool + layer_at + head * HEAD_DIM
    at = tl.multiple_of(tile * KEYS, KEYS)
    positions = at + tl.arange(0, KEYS)
    there = positions < end
    tokens = token_rows(keys_at, table, at, there, block_stride, ROW, KEYS, BLOCK_SIZE, True)
    operand: tl.constexpr = operand_type(q.dtype.element_ty, pool.dtype.element_ty)
    keys = load_tile(tokens, there, operand, HEAD_DIM, DIMS, True)
    rows, dims = tl.arange(0, TOKENS * GROUP_ROWS), tl.arange(0, DIMS)
    member = rows % GROUP_ROWS
    weights = tl.zeros([KEYS], tl.float32)
    for done in range(0, num_tokens, TOKENS):
        nth = done + rows // GROUP_ROWS
        of_rows = (nth < num_tokens) & (member < GROUP)
        token = (first_token + nth).to(tl.int64)
        query_rows = q + token * q_token + (head * GROUP + member) * q_head
        of_queries = of_rows[:, None] & (dims < HEAD_DIM)[None, :]
        queries = tl.load(query_rows[:, None] + dims[None, :], mask=of_queries, other=0.0).to(operand)
        log_total = tl.load(log_totals + (token * KV_HEADS + head) * GROUP + member, mask=of_rows, other=0.0)
        upper = tl.load(uppers + token, mask=of_rows, other=-1)
        scores = capped(tl.dot(queries, tl.trans(keys), input_precision=PRECISION), scale, softcap, SOFTCAP)
        visible = positions[None, :] <= upper[:, None]
        weights += tl.sum(tl.where(visible, tl.exp2(scores - log_total[:, None]), 0.0), 0)
    of_cells = tl.log2(tl.sum(tl.reshape(weights, (KEYS // CELL, CELL)), 1) / (num_tokens * GROUP))
    cell, cells = tile * (KEYS // CELL) + tl.arange(0, KEYS // CELL), tl.cdiv(end, CELL)
    members = tl.arange(0, GROUP_ROWS)
    of_members = members < GROUP
    MASS_ROW: tl.constexpr = KV_HEADS * GROUP
    places = measured + cell[:, None] * MASS_ROW + members[None, :]
    of_heads = tl.broadcast_to(of_cells[:, None], (KEYS // CELL, GROUP_ROWS))
    tl.store(places, of_heads, mask=(cell < cells)[:, None] & of_members[None, :])
    if tile == 0:
        tl.store(measured + cells * MASS_ROW + members, members * 0.0 - float("inf"), mask=of_members)
        tl.store(measured + (cells + 1) * MASS_ROW + members, members * 0.0, mask=of_members)
