"""Memory of the KV cache: the device's blocks and the host tier's slots, and the copies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wicore_backend.hmt.codecs import Codec, CodecName, make_codec
from wicore_backend.hmt.host_memory import HostMemory
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.transfers import Route, Transfer

if TYPE_CHECKING:
    from wicore_backend.hmt.streamed_copies import StreamedCopies

_STAGING_SHARE = 16
_MOST_STAGING_BYTES = 2**30


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
        The host tier's slots, page-locked if the device is a GPU: of the same shape, or, where a codec writes them,
        uint8 [slots, codec.encoded_bytes].
    codecs
        For the groups whose slots hold blocks that are encoded.
    """

    layout: KVLayout
    tensors: Mapping[LayerGroup, Tensor]
    host: Mapping[LayerGroup, Tensor] = field(default_factory=dict)
    codecs: Mapping[LayerGroup, Codec] = field(default_factory=dict)
    _copies: StreamedCopies | None = None
    _memory: tuple[HostMemory, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values on the device."""
        return next(iter(self.tensors.values())).dtype

    @classmethod
    def allocate(
        cls,
        layout: KVLayout,
        blocks: Mapping[LayerGroup, int],
        host_slots: Mapping[LayerGroup, int] = MappingProxyType({}),
        *,
        device: torch.device,
        dtype: torch.dtype,
        host_codec: CodecName = "exact",
    ) -> KVPools:
        """Zeroed pools of `blocks[group]` blocks each, block 0 included, and `host_slots[group]` slots.

        On CUDA, `staging_bytes` of device memory are taken besides. To be closed at the end.

        Raises
        ------
        InvalidArgumentError
            If the host's memory for the slots cannot be had.
        """
        tensors = {
            group: _zeros((blocks[group], *layout.block_shape(group)), device=device, dtype=dtype)
            for group in layout.groups
        }
        records = {g: make_codec(host_codec, layout.block_shape(g), dtype) for g in layout.groups if host_slots.get(g)}
        memory: list[HostMemory] = []
        try:
            for group, codec in records.items():
                memory.append(HostMemory(host_slots[group] * codec.encoded_bytes, locked=device.type == "cuda"))
            slots = {
                group: taken.tensor.view(-1, codec.encoded_bytes)
                for taken, (group, codec) in zip(memory, records.items(), strict=True)
            }
            codecs = records if host_codec != "exact" else {}
            copies = _streamed_copies(layout, tensors, slots, codecs) if device.type == "cuda" else None
        except BaseException:
            _unlock(memory)
            raise
        host = slots
        if host_codec == "exact":
            host = {group: rows.view(dtype).view(-1, *layout.block_shape(group)) for group, rows in slots.items()}
        return cls(layout, tensors, host, codecs, copies, tuple(memory))

    def apply(self, transfers: Iterable[Transfer]) -> Callable[[], None] | None:
        """Make copies, as if in the order given; on CUDA beside the steps, as `hmt/transfers.py` says.

        Called on the thread, and on CUDA with the current stream, that runs the steps.

        Returns
        -------
        A call that waits for them and for all before them, on any thread; None if they have been made.
        """
        if self._copies is not None:
            return self._copies.apply(transfers)
        for transfer in transfers:
            self._copy(transfer)
        return None

    def wait(self, layer: int | None = None) -> None:
        """Have the current stream wait for the copies that a layer, or any layer, depends on.

        To be called before a step's attention of that layer, or before any of its work that no call can come between,
        as in a CUDA graph. Takes no time itself.
        """
        if self._copies is not None:
            self._copies.wait(layer)

    def clear(self) -> None:
        """Zero every block, after all copies that have been issued."""
        self.wait()
        for pool in self.tensors.values():
            pool.zero_()

    def close(self) -> None:
        """Wait for all copies and unlock the host's memory. Nothing is to be copied after that."""
        try:
            if self._copies is not None:
                torch.cuda.synchronize(next(iter(self.tensors.values())).device)
        finally:
            _unlock(self._memory)

    def _copy(self, transfer: Transfer) -> None:
        group, source, target = transfer.group, transfer.source, transfer.target
        blocks, codec = self.tensors[group], self.codecs.get(group)
        match transfer.route:
            case Route.WITHIN_DEVICE:
                blocks[target].copy_(blocks[source])
            case Route.DEVICE_TO_HOST if codec is not None:
                codec.encode(blocks[source : source + 1], out=self.host[group][target : target + 1])
            case Route.DEVICE_TO_HOST:
                self.host[group][target].copy_(blocks[source])
            case Route.HOST_TO_DEVICE if codec is not None:
                codec.decode(self.host[group][source : source + 1], out=blocks[target : target + 1])
            case Route.HOST_TO_DEVICE:
                blocks[target].copy_(self.host[group][source])


def _unlock(memory: Iterable[HostMemory]) -> None:
    for taken in memory:
        taken.close()


def staging_bytes(pool_bytes: int) -> int:
    """Device memory that blocks on their way to and from the host tier take beside pools of so many bytes, about."""
    return min(_MOST_STAGING_BYTES, pool_bytes // _STAGING_SHARE)


def slot_bytes(layout: KVLayout, codec: CodecName, dtype: torch.dtype) -> Mapping[LayerGroup, int]:
    """For each group with layers the size of a slot of the host tier."""
    return {group: make_codec(codec, layout.block_shape(group), dtype).encoded_bytes for group in layout.groups}


def _streamed_copies(
    layout: KVLayout,
    tensors: Mapping[LayerGroup, Tensor],
    slots: Mapping[LayerGroup, Tensor],
    codecs: Mapping[LayerGroup, Codec],
) -> StreamedCopies:
    # Here, since a machine without a GPU need not have OpenAI Triton.
    from wicore_backend.hmt.row_copies import copy_rows
    from wicore_backend.hmt.streamed_copies import StreamedCopies
    from wicore_backend.hmt.streams import CudaStreams

    copies = StreamedCopies(
        layout,
        tensors,
        slots,
        codecs,
        streams=CudaStreams(next(iter(tensors.values())).device),
        copy_rows=copy_rows,
        staging_bytes=staging_bytes(sum(tensor.nbytes for tensor in tensors.values())) if slots else 0,
    )
    copies.warm_up()
    return copies


def _zeros(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # NumPy's zeros come from the kernel, page by page as they are touched; PyTorch writes all of them at once.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
