"""Random steps of paged attention over a pool full of rubbish, against dense attention worked out token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import MEASURED_QUERIES, PackedStep
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

LAYERS = (LayerGroup.LOCAL, LayerGroup.GLOBAL, LayerGroup.LOCAL, LayerGroup.GLOBAL)
GLOBAL_LAYERS = (1, 3)
HEAD_DIM = 8
SCALE = 0.3
RUBBISH = math.nan


@dataclass(frozen=True)
class Part:
    """A sequence's share of a step: `new` tokens after `past`, some of them an image (first new token, length)."""

    past: int
    new: int
    image: tuple[int, int] | None = None
    gone: frozenset[int] = frozenset()
    """Blocks that have left the global group; those that the step writes stay."""

    def has_left(self, block: int, block_size: int) -> bool:
        return block in self.gone and block < self.past // block_size


@dataclass(frozen=True)
class Shape:
    """What the attention is set up with."""

    block_size: int = 4
    kv_heads: int = 2
    group_size: int = 2
    window: int = 10
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    """Of the pools, if not `dtype`."""

    @property
    def stored(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


Masses = Mapping[int, NDArray[np.floating[Any]]]


@dataclass
class Checked:
    """What a step gave, known to be right: by layer the attention, and the masses, ours and by definition."""

    attended: list[Tensor] = field(default_factory=list)
    mass: Masses = field(default_factory=dict)
    expected_mass: Masses = field(default_factory=dict)


def check(
    shape: Shape, parts: list[Part], *, seed: int = 0, measured: Mapping[int, Sequence[int]] | None = None
) -> Checked:
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
        bytes_per_value=shape.stored.itemsize,
    )
    counts = [-(-(part.past + part.new) // shape.block_size) for part in parts]
    blocks = sum(counts) + 3
    pools = KVPools.allocate(layout, dict.fromkeys(LayerGroup, blocks), device=torch.device("cpu"), dtype=shape.stored)
    for pool in pools.tensors.values():
        pool.fill_(RUBBISH)
    step = step_of(shape, parts, counts, blocks, np.random.default_rng(seed), measured or {})
    attention = TorchPagedAttention(pools, scale=SCALE, window=shape.window, softcap=shape.softcap, dtype=shape.dtype)
    plan = attention.plan(step)
    tokens = int(step.query_lens.sum())
    checked = Checked()
    shares: dict[int, list[NDArray[np.floating[Any]]]] = {}
    for layer, (group, index) in enumerate(layout.layers):
        q = random(tokens, shape.kv_heads * shape.group_size, HEAD_DIM)
        # As an executor makes them: parts of one tensor.
        k, v = random(tokens, 2 * shape.kv_heads, HEAD_DIM).split(shape.kv_heads, 1)
        past = [random(2, part.past, shape.kv_heads, HEAD_DIM) for part in parts]
        expected_pool = pools.tensors[group]
        store(expected_pool, index, step.block_tables[group], past, [0] * len(parts))
        expected_pool = expected_pool.clone()
        new = torch.stack((k, v)).split(step.query_lens.tolist(), 1)
        store(expected_pool, index, step.block_tables[group], new, [part.past for part in parts])

        attended = attention.attend(plan, layer, q, k, v)

        keys_values = [
            torch.cat((old, fresh), 1).to(shape.stored).to(shape.dtype) for old, fresh in zip(past, new, strict=True)
        ]
        expected, weights = _dense(shape, group, step, parts, q, keys_values)
        tolerance = 1e-6 if shape.dtype is torch.float32 else 2e-2
        assert attended.shape == (tokens, shape.kv_heads * shape.group_size * HEAD_DIM)
        assert attended.dtype == shape.dtype
        assert (attended.double() - expected).norm() <= tolerance * expected.norm()
        stored, expected_bytes = pools.tensors[group].view(torch.uint8), expected_pool.view(torch.uint8)
        assert torch.equal(stored, expected_bytes), "keys or values went elsewhere"
        checked.attended.append(attended)
        for sequence in step.measured.get(layer, ()):
            shares.setdefault(sequence, []).append(_by_block(shape, parts[sequence], weights[sequence]))
    checked.mass = attention.mass(plan)
    checked.expected_mass = {sequence: np.mean(layers, 0) for sequence, layers in shares.items()}
    return checked


def step_of(
    shape: Shape,
    parts: list[Part],
    counts: list[int],
    blocks: int,
    rng: np.random.Generator,
    measured: Mapping[int, Sequence[int]],
) -> PackedStep:
    """The step of the `parts`, of `counts` blocks each, which lie anywhere in a pool of `blocks`."""
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
            if group is LayerGroup.GLOBAL:
                row[[part.has_left(block, shape.block_size) for block in range(len(row))]] = 0
            if group is LayerGroup.LOCAL:
                row[: max(0, part.past - shape.window + 1) // shape.block_size] = 0
    return PackedStep(
        positions=np.concatenate(positions),
        attend_limits=np.concatenate(limits),
        query_lens=np.array([part.new for part in parts], np.int32),
        decodes=next((i for i, part in enumerate(parts) if part.new > 1), len(parts)),
        block_tables=tables,
        measured=measured,
    )


def store(pool: Tensor, layer: int, table: Any, keys_values: Any, starts: list[int]) -> None:
    """Write keys and values [2, tokens, heads, d] of each sequence by its block table."""
    size, dtype, pool = pool.shape[3], pool.dtype, bits(pool)
    for row, kv, start in zip(table, keys_values, starts, strict=True):
        positions = np.arange(start, start + kv.shape[1])
        blocks = row[positions // size]
        held = blocks.nonzero()[0]  # Behind the window there is no block any more.
        blocks, places, held = (
            torch.from_numpy(x).to(pool.device) for x in (blocks[held], positions[held] % size, held)
        )
        pool[blocks.long(), layer, :, places] = bits(kv[:, held].transpose(0, 1).to(dtype))


def bits(pool: Tensor) -> Tensor:
    """A pool of FP8 as its bytes, since PyTorch does little with such numbers; any other as it is."""
    return pool.view(torch.uint8) if pool.dtype == FP8 else pool


def _dense(
    shape: Shape, group: LayerGroup, step: PackedStep, parts: list[Part], q: Tensor, keys_values: list[Tensor]
) -> tuple[Tensor, list[list[Tensor]]]:
    """The definition, in float64, one query head of one token at a time.

    Attention [T, query heads * d], and of each token of each sequence the weights [query heads, keys of the sequence].
    """
    rows: list[Tensor] = []
    weights: list[list[Tensor]] = [[] for _ in keys_values]
    there = [
        torch.tensor([not part.has_left(i // shape.block_size, shape.block_size) for i in range(part.past + part.new)])
        for part in parts
    ]
    sequences = np.repeat(np.arange(len(keys_values)), step.query_lens)
    for query, sequence, position, limit in zip(q, sequences, step.positions, step.attend_limits, strict=True):
        keys, values = keys_values[sequence].double()
        at = torch.arange(keys.shape[0])
        visible = at <= int(limit)
        if group is LayerGroup.GLOBAL:
            visible &= there[sequence]
        if group is LayerGroup.LOCAL:
            visible &= at > int(position) - shape.window
        of_token = torch.zeros(len(query), len(at), dtype=torch.float64)
        for head, one in enumerate(query.double()):
            scores = keys[visible, head // shape.group_size] @ one * SCALE
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            of_token[head, visible] = scores.softmax(0)
            rows.append(of_token[head] @ values[:, head // shape.group_size])
        weights[sequence].append(of_token)
    return torch.stack(rows).view(len(q), -1), weights


def _by_block(shape: Shape, part: Part, weights: list[Tensor]) -> NDArray[np.float64]:
    """Mean over the last queries and all heads of the weights that fall on each block."""
    of_key = torch.stack(weights[-MEASURED_QUERIES:]).mean((0, 1)).numpy()
    edges = np.arange(0, part.past + part.new, shape.block_size)
    return np.add.reduceat(of_key, edges)


DECODES = [Part(0, 1), Part(3, 1), Part(30, 1), Part(31, 1), Part(100, 1)]
PREFILLS = [Part(0, 9), Part(17, 13), Part(5, 12, image=(2, 6)), Part(0, 20, image=(0, 16))]


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
parts_with_holes = st.builds(
    lambda parts, gone: [replace(part, gone=blocks) for part, blocks in zip(parts, gone, strict=False)],
    parts_of_a_step,
    st.lists(st.frozensets(st.integers(0, 20)), min_size=8, max_size=8),
)
