"""Blocks between slots and records, in memory that is taken once.

Where a slot's bytes are its record, nothing is in between: the store reads and writes the slot itself, on its own
threads, which saves a copy of every byte on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod

import torch
from torch import Tensor

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import Codec
from wicore_backend.hmt.codecs.exact import ExactCodec
from wicore_backend.hmt.nvme.files import aligned_buffer

_STAGED_BYTES = 1 << 20
"""Blocks in scattered slots are gathered this much at a time, so that a codec's operators are called once for many
small blocks: with blocks of 32 KiB, q8 is 6 times faster that way."""


class Stage:
    """Encodes one group's slots into consecutive records, and decodes them back, unless they are `as_it_is`.

    Keeps nothing from call to call, so that several threads may use it, each with staging memory of its own.

    Parameters
    ----------
    slots
        On the CPU: [slots, *codec.shape], or uint8 [slots, codec.encoded_bytes] if blocks lie there encoded already;
        then their bytes are the records.

    Attributes
    ----------
    block_bytes
        Of a block that is not encoded.
    as_it_is
        Whether a slot's bytes are its record.
    """

    def __init__(self, codec: Codec, slots: Tensor) -> None:
        encoded = slots.dtype == torch.uint8
        shape = (codec.encoded_bytes,) if encoded else codec.shape
        dtype = torch.uint8 if encoded else codec.dtype
        if slots.shape[1:] != shape or slots.dtype != dtype or slots.device.type != "cpu":
            raise InvalidArgumentError(
                f"slots are {slots.dtype} {list(slots.shape)} on {slots.device}; "
                f"{codec.name} takes {codec.dtype} [slots, {', '.join(map(str, codec.shape))}] on the CPU, "
                f"or torch.uint8 [slots, {codec.encoded_bytes}] of encoded blocks"
            )
        if not slots.is_contiguous():
            raise InvalidArgumentError(f"slots have strides {slots.stride()}; pass them contiguous")
        self.slots = slots
        self.codec = codec
        self.block_bytes = prod(codec.shape) * codec.dtype.itemsize
        # PyTorch gathers bytes where it does not gather every type of number.
        self._slot_bytes = slots.flatten(1).view(torch.uint8)
        self._slot_memory = self._slot_bytes.numpy().data
        self.as_it_is = encoded or isinstance(codec, ExactCodec)
        self._at_once = max(1, _STAGED_BYTES // self.block_bytes)

    def record(self, slot: int) -> memoryview:
        """The bytes of a slot, which are its record if that is `as_it_is`."""
        return self._slot_memory[slot : slot + 1].cast("B")

    def encode(self, slots: Sequence[int], records: Tensor, staging: Tensor) -> None:
        """Encode the blocks in `slots` into uint8 [len(slots), encoded_bytes]."""
        for start in range(0, len(slots), self._at_once):
            part = slots[start : start + self._at_once]
            if _consecutive(part):
                blocks = self.slots[part[0] : part[0] + len(part)]
            else:
                blocks, raw = self._staged(staging, len(part))
                torch.index_select(self._slot_bytes, 0, torch.tensor(part), out=raw)
            self.codec.encode(blocks, out=records[start : start + len(part)])

    def decode(self, records: Tensor, slots: Sequence[int], staging: Tensor) -> None:
        """Decode uint8 [len(slots), encoded_bytes] into `slots`."""
        for start in range(0, len(slots), self._at_once):
            part = slots[start : start + self._at_once]
            encoded = records[start : start + len(part)]
            if _consecutive(part):
                self.codec.decode(encoded, out=self.slots[part[0] : part[0] + len(part)])
            else:
                blocks, raw = self._staged(staging, len(part))
                self.codec.decode(encoded, out=blocks)
                self._slot_bytes.index_copy_(0, torch.tensor(part), raw)

    def decode_to_nowhere(self, records: Tensor, staging: Tensor) -> None:
        """Take the time of decoding uint8 [records, encoded_bytes]."""
        for start in range(0, len(records), self._at_once):
            encoded = records[start : start + self._at_once]
            blocks, _ = self._staged(staging, len(encoded))
            self.codec.decode(encoded, out=blocks)

    def _staged(self, staging: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Room for blocks in the staging memory: as they are, and as bytes [count, bytes of one]."""
        raw = staging[: count * self.block_bytes].view(count, self.block_bytes)
        return raw.view(self.codec.dtype).view(count, *self.codec.shape), raw


def staging_for(stages: Iterable[Stage]) -> Tensor:
    """One thread's memory for blocks of scattered slots: uint8, enough for what any of the stages does at once."""
    return torch.empty(max(_STAGED_BYTES, *(stage.block_bytes for stage in stages)), dtype=torch.uint8)


class Tray:
    """Memory for the records of one batch, page-aligned; from the system as it is used first."""

    def __init__(self, size: int) -> None:
        memory = aligned_buffer(size)
        self.size = size
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Part:
    """Records of one group in a tray, one after the other.

    Attributes
    ----------
    first
        Which record of the batch is the part's first.
    records
        uint8 [count, encoded_bytes].
    """

    stage: Stage
    first: int
    records: Tensor


def laid_out(
    tray: Tray, blocks: Sequence[tuple[Stage, int]], *, in_slots: bool = True
) -> tuple[list[Part], list[memoryview]]:
    """Where the records of blocks lie: those that are in a tray by group, and all of them one by one.

    Parameters
    ----------
    blocks
        Of each its stage, equal ones beside each other, and its slot.
    in_slots
        Whether records that may lie in slots do.
    """
    parts: list[Part] = []
    views: list[memoryview] = []
    at = 0
    for stage, same in groupby(blocks, key=lambda block: block[0]):
        slots = [slot for _, slot in same]
        if stage.as_it_is and in_slots:
            views += map(stage.record, slots)
            continue
        count, size = len(slots), stage.codec.encoded_bytes
        records = tray.tensor[at : at + count * size].view(count, size)
        parts.append(Part(stage, len(views), records))
        views += [tray.view[start : start + size] for start in range(at, at + count * size, size)]
        at += count * size
    return parts, views


def _consecutive(slots: Sequence[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(slots))
