"""Device memory of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wicore_backend.hmt.layout import KVLayout, LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class KVPools:
    """For each group one tensor [blocks, layers of the group, 2 (K, V), block_size, KV heads, head dim].

    Block-major: a block holds all its group's layers contiguously, so that moving a block is one copy.
    Block 0 of each pool belongs to nobody: unused entries of block tables point at it.
    """

    layout: KVLayout
    tensors: Mapping[LayerGroup, Tensor]

    @classmethod
    def allocate(
        cls, layout: KVLayout, blocks: Mapping[LayerGroup, int], *, device: torch.device, dtype: torch.dtype
    ) -> KVPools:
        """Zeroed pools of `blocks[group]` blocks each, block 0 included."""
        tensors = {
            group: torch.zeros((blocks[group], *layout.block_shape(group)), device=device, dtype=dtype)
            for group in LayerGroup
        }
        return cls(layout, tensors)
