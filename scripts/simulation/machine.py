"""One H200 that serves Gemma-3-27B in bf16: how long its steps take, what its memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from wicore_backend.engine.step_time import Coefficients, StepShape
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.budget import divide_memory
from wicore_backend.hmt.layout import KVLayout, LayerGroup

_LAYERS = [LayerGroup.LOCAL if (layer + 1) % 6 else LayerGroup.GLOBAL for layer in range(62)]
"""Of Gemma-3-27B: 52 local, 10 global."""

H200_BF16 = Coefficients(step=15e-3, sequence=82e-6, prefill_token=82e-6, key=21.6e-9, pair=0.35e-9, mixed=8e-3)
"""Seconds. docs/benchmarks/scheduler.md has what they are fitted to, and how well."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the simulation knows of the device, and the scheduler has to find out.

    Attributes
    ----------
    noise
        Standard deviation of a step's duration, as a share of it.
    kv_bytes
        Of an H200's 141 GB, the weights take 54.
    """

    coefficients: Coefficients = H200_BF16
    noise: float = 0.03
    kv_bytes: int = 75 * 10**9
    max_model_len: int = 131_072

    def seconds(self, shape: StepShape, random: Random) -> float:
        """How long a step takes this time."""
        return self.coefficients.seconds(shape) * max(0.5, random.gauss(1.0, self.noise))

    def blocks(self, *, block_size: int, max_running: int, max_batch_tokens: int) -> BlockManager:
        """The books of this machine's memory, divided as the engine divides it."""
        layout = KVLayout.of(_LAYERS, block_size=block_size, kv_heads=16, head_dim=128, window=1024, bytes_per_value=2)
        counts: Mapping[LayerGroup, int] = divide_memory(
            layout,
            memory_bytes=self.kv_bytes,
            max_sequences=max_running,
            max_tokens=self.max_model_len,
            max_chunk=max_batch_tokens,
        )
        return BlockManager(layout, counts, max_chunk=max_batch_tokens)
