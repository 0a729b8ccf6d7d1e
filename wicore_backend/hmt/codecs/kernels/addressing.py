"""Where in blocks and records a program finds its part."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_of(
    blocks,
    records,
    layer,
    LAYERS: tl.constexpr,
    VALUES: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Where the layer of that number, over all records, begins in its block, and where its record does."""
    block = (layer // LAYERS).to(tl.int64)
    record = tl.multiple_of(records + layer.to(tl.int64) * RECORD, ALIGNMENT)
    return blocks + (block * LAYERS + layer % LAYERS) * VALUES, record


@triton.jit
def tokens_of_head(head, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """int32 [TOKENS, DIM]: in keys or values [TOKENS, HEADS, DIM], those of one head."""
    tokens = tl.arange(0, TOKENS)[:, None]
    return (tokens * HEADS + head) * DIM + tl.arange(0, DIM)[None, :]
