"""Device memory of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.transfers import Route, Transfer


@dataclass(frozen=True, slots=True, eq=False)
class KVPools:
    """For each group with layers one tensor [blocks, layers of the group, 2 (K, V), block_size, KV heads, head dim].

    Block-major: a block holds all its group's layers contiguously, so that moving a block is one copy.
    Block 0 of each pool belongs to nobody: unused entries of block tables point at it.

    Attributes
    ----------
    tensors
        On the device.
    host
        The host tier's slots, of the same shape; page-locked if the device is a GPU.
    """

    layout: KVLayout
    tensors: Mapping[LayerGroup, Tensor]
    host: Mapping[LayerGroup, Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        layout: KVLayout,
        blocks: Mapping[LayerGroup, int],
        host_slots: Mapping[LayerGroup, int] = MappingProxyType({}),
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KVPools:
        """Zeroed pools of `blocks[group]` blocks each, block 0 included, and `host_slots[group]` slots."""
        tensors = {
            group: _zeros((blocks[group], *layout.block_shape(group)), device=device, dtype=dtype)
            for group in layout.groups
        }
        host = {
            group: _zeros((count, *layout.block_shape(group)), device=torch.device("cpu"), dtype=dtype)
            for group, count in host_slots.items()
            if count
        }
        if device.type == "cuda":
            host = {group: slots.pin_memory() for group, slots in host.items()}
        return cls(layout, tensors, host)

    def apply(self, transfers: Iterable[Transfer]) -> Callable[[], None] | None:
        """Make copies, in the order given. A block is contiguous, so each is one copy; on CUDA none is waited for.

        Returns
        -------
        A call that waits for them and for all before them, on any thread; None if they have been made.
        """
        ends = {
            Route.WITHIN_DEVICE: (self.tensors, self.tensors),
            Route.DEVICE_TO_HOST: (self.tensors, self.host),
            Route.HOST_TO_DEVICE: (self.host, self.tensors),
        }
        for transfer in transfers:
            source, target = ends[transfer.route]
            target[transfer.group][transfer.target].copy_(source[transfer.group][transfer.source], non_blocking=True)
        if next(iter(self.tensors.values())).device.type != "cuda":
            return None
        made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record()
        return made.synchronize

    def wait(self, layer: int | None = None) -> None:
        """Have the caller's stream wait for the copies that `layer`, or any layer, depends on. Takes no time itself."""

    def clear(self) -> None:
        """Zero every block."""
        for pool in self.tensors.values():
            pool.zero_()


def _zeros(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # NumPy's zeros come from the kernel, page by page as they are touched; PyTorch writes all of them at once.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
