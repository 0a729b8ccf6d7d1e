"""Paged attention against dense attention worked out token by token, on random steps over a pool full of rubbish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wicore_backend.attention import torch_paged
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

LAYERS = (LayerGroup.LOCAL, LayerGroup.GLOBAL, LayerGroup.LOCAL)
HEAD_DIM = 8
SCALE = 0.3
RUBBISH = 1e3


@dataclass(frozen=True)
class Part:
    """A sequence's share of a step: `new` tokens after `past`, some of them an image (first new token, length)."""

    past: int
    new: int
    image: tuple[int, int] | None = None


@dataclass(frozen=True)
class Shape:
    """What the attention is set up with."""

    block_size: int = 4
    kv_heads: int = 2
    group_size: int = 2
    window: int = 10
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


def check(shape: Shape, parts: list[Part], *, seed: int = 0) -> None:
    """Run one step through all layers, compare it with dense attention, and see what was written where."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    layout = KVLayout.of(
        LAYERS,
        block_size=shape.block_size,
        kv_heads=shape.kv_heads,
        head_dim=HEAD_DIM,
        window=shape.window,
        bytes_per_value=shape.dtype.itemsize,
    )
    counts = [-(-(part.past + part.new) // shape.block_size) for part in parts]
    blocks = sum(counts) + 3
    pools = KVPools.allocate(layout, dict.fromkeys(LayerGroup, blocks), device=torch.device("cpu"), dtype=shape.dtype)
    for pool in pools.tensors.values():
        pool.fill_(RUBBISH)
    step = _step(shape, parts, counts, blocks, np.random.default_rng(seed))
    attention = TorchPagedAttention(pools, scale=SCALE, window=shape.window, softcap=shape.softcap)
    plan = attention.plan(step)
    tokens = int(step.query_lens.sum())
    for layer, (group, index) in enumerate(layout.layers):
        q = random(tokens, shape.kv_heads * shape.group_size, HEAD_DIM)
        # As an executor makes them: parts of one tensor.
        k, v = random(tokens, 2 * shape.kv_heads, HEAD_DIM).split(shape.kv_heads, 1)
        past = [random(2, part.past, shape.kv_heads, HEAD_DIM) for part in parts]
        expected_pool = pools.tensors[group]
        _store(expected_pool, index, step.block_tables[group], past, [0] * len(parts))
        expected_pool = expected_pool.clone()
        new = torch.stack((k, v)).split(step.query_lens.tolist(), 1)
        _store(expected_pool, index, step.block_tables[group], new, [part.past for part in parts])

        attended = attention.attend(plan, layer, q, k, v)

        keys_values = [torch.cat((old, fresh), 1) for old, fresh in zip(past, new, strict=True)]
        expected = _dense(shape, group, step, q, keys_values)
        tolerance = 1e-6 if shape.dtype is torch.float32 else 2e-2
        assert attended.shape == (tokens, shape.kv_heads * shape.group_size * HEAD_DIM)
        assert attended.dtype == shape.dtype
        assert (attended.double() - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(pools.tensors[group], expected_pool), "keys or values went elsewhere"


def _step(shape: Shape, parts: list[Part], counts: list[int], blocks: int, rng: np.random.Generator) -> PackedStep:
    positions, limits = [], []
    for part in parts:
        position = np.arange(part.past, part.past + part.new, dtype=np.int32)
        limit = position.copy()
        if part.image:
            first, length = part.image
            limit[first : first + length] = position[first + length - 1]
        positions.append(position)
        limits.append(limit)
    tables = {}
    for group in LayerGroup:
        shuffled = iter(rng.permutation(np.arange(1, blocks)).tolist())
        tables[group] = np.zeros((len(parts), max(counts) + 1), np.int32)
        for row, part, count in zip(tables[group], parts, counts, strict=True):
            row[:count] = [next(shuffled) for _ in range(count)]
            if group is LayerGroup.LOCAL:
                row[: max(0, part.past - shape.window + 1) // shape.block_size] = 0
    return PackedStep(
        positions=np.concatenate(positions),
        attend_limits=np.concatenate(limits),
        query_lens=np.array([part.new for part in parts], np.int32),
        decodes=next((i for i, part in enumerate(parts) if part.new > 1), len(parts)),
        block_tables=tables,
    )


def _store(pool: Tensor, layer: int, table: Any, keys_values: Any, starts: list[int]) -> None:
    """Write keys and values [2, tokens, heads, d] of each sequence by its block table, token by token."""
    size = pool.shape[3]
    for row, kv, start in zip(table, keys_values, starts, strict=True):
        for i in range(kv.shape[1]):
            if block := row[(start + i) // size]:  # Behind the window there is no block any more.
                pool[int(block), layer, :, (start + i) % size] = kv[:, i]


def _dense(shape: Shape, group: LayerGroup, step: PackedStep, q: Tensor, keys_values: list[Tensor]) -> Tensor:
    """The definition, in float64: one query head of one token at a time."""
    rows = []
    sequences = np.repeat(np.arange(len(keys_values)), step.query_lens)
    for query, sequence, position, limit in zip(q, sequences, step.positions, step.attend_limits, strict=True):
        first = max(0, int(position) - shape.window + 1) if group is LayerGroup.LOCAL else 0
        keys, values = keys_values[sequence][:, first : int(limit) + 1].double()
        for head, one in enumerate(query.double()):
            scores = keys[:, head // shape.group_size] @ one * SCALE
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            rows.append(scores.softmax(0) @ values[:, head // shape.group_size])
    return torch.stack(rows).view(len(q), -1)


DECODES = [Part(0, 1), Part(3, 1), Part(30, 1), Part(31, 1), Part(100, 1)]
PREFILLS = [Part(0, 9), Part(17, 13), Part(5, 12, image=(2, 6)), Part(0, 20, image=(0, 16))]


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (2, 2), (4, 1)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize("parts", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "both"])
def test_a_step_equals_dense_attention(parts: list[Part], heads: tuple[int, int], softcap: float | None) -> None:
    check(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_half_precision_is_near_dense_attention(dtype: torch.dtype, softcap: float | None) -> None:
    check(Shape(dtype=dtype, softcap=softcap), DECODES + PREFILLS)


@pytest.mark.parametrize("parts", [[Part(0, 1)], [Part(50, 1)], [Part(0, 1100)], [Part(100, 520, image=(505, 12))]])
def test_one_sequence_alone_in_tiles_where_it_is_long(parts: list[Part]) -> None:
    check(Shape(kv_heads=1, group_size=1, block_size=16), parts)


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = [5, 2000, 9, 1, 40, 1900, 70]
    check(Shape(kv_heads=1, group_size=2, window=600), [Part(length, 1) for length in lengths])


def test_decodes_beyond_the_scratch_budget_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paged, "_DECODE_SCRATCH_BYTES", 4096)
    check(Shape(), [Part(40 + i, 1) for i in range(9)])


parts_of_a_step = st.lists(st.builds(Part, st.integers(0, 40), st.just(1)), max_size=5).flatmap(
    lambda decodes: st.lists(
        st.builds(
            lambda past, new, at, length: Part(past, new, (min(at, new - 1), max(1, min(length, new - at)))),
            st.integers(0, 40),
            st.integers(2, 30),
            st.integers(0, 29),
            st.integers(1, 20),
        ),
        min_size=0 if decodes else 1,
        max_size=3,
    ).map(lambda prefills: decodes + prefills)
)


@settings(max_examples=60, deadline=None)
@given(
    parts=parts_of_a_step,
    block_size=st.sampled_from([1, 3, 8, 16]),
    window=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_random_steps_equal_dense_attention(parts: list[Part], block_size: int, window: int, seed: int) -> None:
    check(Shape(block_size=block_size, window=window), parts, seed=seed)
