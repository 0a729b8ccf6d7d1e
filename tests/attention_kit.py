"""The GPU's paged attention and its plain twin over the same keys and values, for tests that compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.paged_steps import LAYERS, SCALE, Part, Shape, bits, step_of, store
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.attention.gpu.tuning import Launch, PrefillLaunch, Tuning
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

NAN = 0x7F
"""Of e4m3."""
SMALL = Tuning(Launch(16, 4, 2, 1), PrefillLaunch(16, 4, 1, 1, rows=16, least_keys=16))
"""Small tiles, so that short sequences have several."""


@dataclass
class Bench:
    """The GPU's attention and its twin over pools with the same keys and values."""

    shape: Shape
    parts: list[Part]
    device: torch.device
    head_dim: int = 16
    tuning: Tuning | None = SMALL
    processors: int | None = 4
    layers: Sequence[LayerGroup] = LAYERS
    widened_bytes: int = 2**28
    pool_blocks: int | None = None
    """Of each pool; by default what the parts take."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.layout = KVLayout.of(
            self.layers,
            block_size=self.shape.block_size,
            kv_heads=self.shape.kv_heads,
            head_dim=self.head_dim,
            window=self.shape.window,
            bytes_per_value=self.shape.stored.itemsize,
        )
        self.blocks = sum(self.counts) + 3 if self.pool_blocks is None else self.pool_blocks
        self.expected_pools, self.pools = self._pools(torch.float32), self._pools(self.shape.stored)
        self.empty()
        settings: dict[str, Any] = {"scale": SCALE, "window": self.shape.window, "softcap": self.shape.softcap}
        self.twin = TorchPagedAttention(self.expected_pools, **settings)
        self.attention = self.over(self.pools, processors=self.processors, widened_bytes=self.widened_bytes)

    @property
    def counts(self) -> list[int]:
        """Of each part the blocks."""
        return [-(-(part.past + part.new) // self.shape.block_size) for part in self.parts]

    def over(self, pools: KVPools, /, *, processors: int | None, widened_bytes: int) -> GpuPagedAttention:
        return GpuPagedAttention(
            pools,
            query_heads=self.shape.kv_heads * self.shape.group_size,
            scale=SCALE,
            window=self.shape.window,
            softcap=self.shape.softcap,
            dtype=self.shape.dtype,
            tuning=self.tuning,
            processors=processors,
            widened_bytes=widened_bytes,
        )

    def _pools(self, dtype: torch.dtype) -> KVPools:
        return KVPools.allocate(self.layout, dict.fromkeys(LayerGroup, self.blocks), device=self.device, dtype=dtype)

    def empty(self) -> None:
        """Leave nothing in the pools."""
        for expected, pool in zip(self.expected_pools.tensors.values(), self.pools.tensors.values(), strict=True):
            expected.zero_()
            bits(pool).fill_(NAN if pool.dtype == FP8 else torch.nan)

    def random(self, *size: int) -> Tensor:
        random = torch.randn(*size, generator=self.generator, device=self.device)
        return random.to(self.shape.dtype)

    def stored(self, numbers: Tensor) -> Tensor:
        """float32, as the pools hold them."""
        return (to_fp8(numbers) if self.shape.stored == FP8 else numbers).float()

    def step(self, measured: Mapping[int, Sequence[int]] | None = None, *, seed: int = 0) -> PackedStep:
        """The parts' step, over whose past the pools are filled."""
        step = step_of(self.shape, self.parts, self.counts, self.blocks, np.random.default_rng(seed), measured or {})
        for group, index in self.layout.layers:
            if group not in self.layout.groups:
                continue
            past = [self.stored(self.random(2, part.past, self.shape.kv_heads, self.head_dim)) for part in self.parts]
            for pools in (self.expected_pools, self.pools):
                store(pools.tensors[group], index, step.block_tables[group], past, [0] * len(past))
        return step

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """As an executor makes them: parts of one tensor."""
        heads = self.shape.kv_heads
        fused = self.random(tokens, heads * (self.shape.group_size + 2), self.head_dim)
        queries = heads * self.shape.group_size
        return fused[:, :queries], fused[:, queries:-heads], fused[:, -heads:]

    def check(self, step: PackedStep, plan, *, rows: int | None = None) -> list[Tensor]:
        """Attend in all layers, by `plan`, of which the step's rows are the first; returns each layer's result."""
        tokens = len(step.positions)
        expected_plan = self.twin.plan(step)
        results = []
        for layer, (group, _) in enumerate(self.layout.layers):
            q, k, v = self.qkv(rows or tokens)
            attended = self.attention.attend(plan, layer, q, k, v)
            new = (self.stored(x[:tokens]) for x in (k, v))
            expected = self.twin.attend(expected_plan, layer, q[:tokens].float(), *new)
            error = (attended[:tokens].float() - expected).norm() / expected.norm()
            assert error <= (1e-5 if self.shape.dtype is torch.float32 else 1e-2), f"layer {layer}: {error}"
            assert attended.isfinite().all()
            pool, expected_pool = self.pools.tensors[group].float(), self.expected_pools.tensors[group]
            written = ~pool.isnan()
            assert torch.equal(pool[written], expected_pool[written])
            assert (expected_pool[~written] == 0).all(), "keys or values have not been written"
            results.append(attended.clone())
        self.check_mass(self.attention.mass(plan), self.twin.mass(expected_plan))
        return results

    def check_mass(
        self, masses: Mapping[int, NDArray[np.float32]], expected: Mapping[int, NDArray[np.float32]]
    ) -> None:
        assert masses.keys() == expected.keys()
        for sequence, mass in masses.items():
            assert mass.dtype == np.float32
            np.testing.assert_allclose(
                mass, expected[sequence], atol=1e-5 if self.shape.dtype is torch.float32 else 1e-2
            )
            assert mass.sum() == pytest.approx(1, abs=1e-4 if self.shape.dtype is torch.float32 else 1e-2)


HOLES = [
    Part(31, 1, gone=frozenset({2, 3, 5})),
    Part(33, 1),
    Part(100, 1, gone=frozenset(range(1, 24))),
    Part(64, 1, gone=frozenset(range(16))),
    Part(32, 9, gone=frozenset(range(8))),
    Part(25, 12, image=(2, 6), gone=frozenset({1, 4})),
]
