"""Copies of a layer's keys and values in FP8 as float16, for kernels that read them many times."""

from __future__ import annotations

import triton
import triton.language as tl

from wicore_backend.attention.gpu.kernels.tiles import as_numbers


@triton.jit(do_not_specialize=["first_block", "first_head"])
def widen_kernel(
    pool, wide, tables, first_block, first_head, layer_at, block_stride,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks, keys and values, groups of TOKENS of a block's tokens.

    Parameters
    ----------
    pool, layer_at
        As for `decode_kernel`, in e4m3.
    wide
        float16 [blocks, 2, BLOCK_SIZE, HEADS, HEAD_DIM]: of the blocks that `tables` names from number `first_block`
        on, the heads from `first_head` on.
    """
    nth, half = tl.program_id(0), tl.program_id(1)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    tokens = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    rows = half * BLOCK_SIZE + tokens
    block = tl.load(tables + first_block + nth).to(tl.int64)
    source = pool + layer_at + block * block_stride + first_head * HEAD_DIM + rows * (KV_HEADS * HEAD_DIM) + columns
    target = wide + nth.to(tl.int64) * (2 * BLOCK_SIZE * WIDTH) + rows * WIDTH + columns
    tl.store(target, as_numbers(tl.load(source), tl.float16))
