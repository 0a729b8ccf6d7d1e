"""Steps of every kind, run once over small pools of their own where none is recorded.

A kernel is compiled when it is first launched, which takes seconds. Where steps are recorded as CUDA graphs, what they
launch is compiled then, as the model is loaded; without graphs a request would wait for each kernel in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.engine.computation import LOGPROB_ROWS
from wicore_backend.engine.graphs import bucket_sizes
from wicore_backend.engine.segments import token_counts
from wicore_backend.executor.base import Executor
from wicore_backend.executor.upload import to_device
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.rope import RotaryTables

_log = logging.getLogger(__name__)

_BLOCK = 1
"""That all tokens are written to: what is there matters to nobody."""


def rehearse(
    executor: Executor,
    attention_over: Callable[[KVPools], Attention[Any]],
    pools: KVPools,
    rotary: RotaryTables,
    *,
    max_sequences: int,
    max_tokens: int,
) -> None:
    """Compute steps of all sizes whose kernels differ, on the executor's device. A failure is logged, and no more.

    Parameters
    ----------
    attention_over
        Makes attention over other pools, like `pools`, which stay as they are.
    max_sequences, max_tokens
        Of a step.
    """
    try:
        layout, one_of_each = pools.layout, pools.layout.one_of_each
        blocks = dict.fromkeys(layout.groups, _BLOCK + 1)
        small = KVPools.allocate(one_of_each, blocks, device=executor.device, dtype=pools.dtype)
        attention = attention_over(small)
        for step in rehearsed_steps(one_of_each, max_sequences=max_sequences, max_tokens=max_tokens):
            _compute(executor, attention, rotary, layout, one_of_each, step)
    except Exception:
        _log.exception("steps cannot be rehearsed; the first ones will show why")


def rehearsed_steps(layout: KVLayout, *, max_sequences: int, max_tokens: int) -> Iterator[PackedStep]:
    """Decodes of every number that a graph would have been recorded for, and prompts; the fewest and the most decodes,
    whose kernels may differ, and the longest prompt are measured."""
    counts = bucket_sizes(max_sequences)
    for count in reversed(counts):
        yield _step(layout, decodes=count, measured=count in (counts[0], counts[-1]))
    for count in sorted({*token_counts(max_tokens), max_tokens}, reverse=True):
        yield _step(layout, tokens=count, measured=count == max_tokens)


def _step(layout: KVLayout, *, decodes: int = 0, tokens: int = 0, measured: bool) -> PackedStep:
    """Of so many sequences that decode at position 0, or of one prompt of so many tokens."""
    positions = np.zeros(decodes, np.int32) if decodes else np.arange(tokens, dtype=np.int32)
    sequences = decodes or 1
    table = np.full((sequences, layout.blocks_for(int(positions.max()) + 1)), _BLOCK, np.int32)
    layers = [i for i, (group, _) in enumerate(layout.layers) if group is LayerGroup.GLOBAL]
    return PackedStep(
        positions=positions,
        attend_limits=positions,
        query_lens=np.ones(decodes, np.int32) if decodes else np.array([tokens], np.int32),
        decodes=decodes,
        block_tables=dict.fromkeys(layout.groups, table),
        measured={layer: [0] for layer in layers} if measured else {},
    )


def _compute(
    executor: Executor,
    attention: Attention[Any],
    rotary: RotaryTables,
    layout: KVLayout,
    one_of_each: KVLayout,
    step: PackedStep,
) -> None:
    """All of a step but the attention of layers beyond the first of each group."""
    device, tokens = executor.device, len(step.positions)
    hidden = executor.embed(torch.zeros(tokens, dtype=torch.int64, device=device), None, None)
    rope = rotary.lookup(to_device(step.positions, device))
    groups = [group for group, _ in layout.layers]
    plan = attention.plan(step)
    q, k, v = executor.first(hidden, *rope[groups[0]])
    for layer in range(len(one_of_each.layers)):
        attended = attention.attend(plan, layer, q, k, v)
    attention.collect(plan)
    for layer, following in enumerate(groups[1:]):
        hidden, _ = executor.mid(layer, hidden, attended, *rope[following])
    rows = step.decodes or min(tokens, LOGPROB_ROWS)
    executor.last(hidden, attended, torch.arange(rows, device=device))
