"""Device memory of the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from wicore_backend.hmt.blocks import BlockCopy
from wicore_backend.hmt.layout import KVLayout, LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class KVPools:
    """For each group with layers one tensor [blocks, layers of the group, 2 (K, V), block_size, KV heads, head dim].

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
            group: _zeros((blocks[group], *layout.block_shape(group)), device=device, dtype=dtype)
            for group in layout.groups
        }
        return cls(layout, tensors)

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks within their pools; no target is also a source."""
        for copy in copies:
            pool = self.tensors[copy.group]
            pool[copy.target].copy_(pool[copy.source])

    def clear(self) -> None:
        """Zero every block."""
        for pool in self.tensors.values():
            pool.zero_()


def _zeros(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # NumPy's zeros come from the kernel, page by page as they are touched; PyTorch writes all of them at once.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
