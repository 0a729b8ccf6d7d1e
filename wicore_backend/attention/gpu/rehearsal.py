"""Steps whose kernels no recorded graph has, run once over small pools of their own.

A kernel is compiled when it is first launched, which takes seconds. Graphs for decodes and for short prompts are
recorded when a model is loaded, and what they launch is compiled then. What is left are few tokens after many keys,
which are shared out among programs, and prompts whose keys and values in FP8 are widened first, some heads at a time.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.hmt.pool import KVPools

_KEYS, _TILES = 1024, 4
"""So many are shared out, or widened."""


class Make(Protocol):
    def __call__(self, pools: KVPools, /, *, processors: int | None, widened_bytes: int) -> Attention[Any]:
        """Attention over `pools`; see `GpuPagedAttention`."""


def rehearse(pools: KVPools, make: Make, *, tiling: Tiling, dtype: torch.dtype) -> None:
    """Run such steps in a layer of each group, by attentions that `make` makes over pools like `pools`.

    Parameters
    ----------
    tiling
        Of these attentions, but for the processors.
    dtype
        Of queries.
    """
    layout, device = pools.layout, next(iter(pools.tensors.values())).device
    one_of_each = layout.one_of_each
    blocks = dict.fromkeys(layout.groups, -(-_KEYS // layout.block_size) + 1)
    small = KVPools.allocate(one_of_each, blocks, device=device, dtype=pools.dtype)
    heads = tiling.query_heads + 2 * layout.kv_heads
    tokens = _TILES * tiling.tile_tokens
    some = torch.zeros(tokens, heads, layout.head_dim, dtype=dtype, device=device)
    of_head = 2 * -(-tokens // layout.block_size) * layout.block_size * layout.head_dim * torch.float16.itemsize
    steps: list[tuple[Attention[Any], int, int]] = [(make(small, processors=None, widened_bytes=0), _KEYS - 1, 1)]
    if pools.dtype.itemsize < dtype.itemsize:
        at_once = (layout.kv_heads >> nth for nth in range(layout.kv_heads.bit_length()))
        steps += [(make(small, processors=1, widened_bytes=count * of_head), 0, tokens) for count in at_once]
    for attention, past, new in steps:
        plan = attention.plan(_step(past, new, one_of_each))
        q, k, v = torch.split(some[:new], [tiling.query_heads, layout.kv_heads, layout.kv_heads], 1)
        for layer in range(len(one_of_each.layers)):
            attention.attend(plan, layer, q, k, v)


def _step(past: int, new: int, layout: KVLayout) -> PackedStep:
    """A prompt's `new` tokens after `past`."""
    table = np.arange(1, -(-(past + new) // layout.block_size) + 1, dtype=np.int32)[None]
    positions = np.arange(past, past + new, dtype=np.int32)
    return PackedStep(
        positions=positions,
        attend_limits=positions,
        query_lens=np.array([new], np.int32),
        decodes=0,
        block_tables=dict.fromkeys(layout.groups, table),
    )
