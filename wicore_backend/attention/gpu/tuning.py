"""Shapes of the attention kernels' tiles: the fastest of those measured in docs/benchmarks/attention-on-gpu.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup

HOPPER_SHARED_BYTES = 232_448
"""What a program may have of a multiprocessor's shared memory on an H100 or H200, ..."""
_AMPERE_SHARED_BYTES = 166_912
"""... on an A100, ..."""
_ADA_SHARED_BYTES = 101_376
"""... and on an RTX 4090, L20 or L4. A T10 has 65,536."""


MASS_KEYS = 64
"""Of a tile of `prefill_mass_kernel`."""

CROWDED = 32
"""Decodes from which on `Tuning.crowded_stages` is taken."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled and how much of it is put on a multiprocessor.

    Attributes
    ----------
    keys
        Of a tile, a power of two.
    warps, stages
        Of OpenAI Triton: warps of a program, and tiles of keys that are loaded ahead.
    fill
        Programs for each multiprocessor, so far as there is work for them.
    """

    keys: int
    warps: int
    stages: int
    fill: int


@dataclass(frozen=True, slots=True)
class PrefillLaunch(Launch):
    """A prefill kernel's.

    Attributes
    ----------
    rows
        Of a tile of queries: its tokens times the query heads of a KV head.
    least_keys
        Of a program, where a tile's keys are shared out among several.
    hopper_stages
        Tiles that the kernel for Hopper loads ahead, on such a card; None leaves all to the one for every card.
    """

    rows: int
    least_keys: int = 512
    hopper_stages: int | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """The launches of both kernels.

    Attributes
    ----------
    local_prefill
        That of local layers, with tiles of as many rows, if it is another.
    crowded_stages
        Of the decode kernel with `CROWDED` sequences or more, if it is another number: so many programs hide each
        other's waits, and with less memory for each more of them run at once.
    """

    decode: Launch
    prefill: PrefillLaunch
    local_prefill: PrefillLaunch | None = None
    crowded_stages: int | None = None

    def decode_stages(self, sequences: int) -> int:
        """The decode kernel's for so many sequences."""
        crowded = self.crowded_stages if sequences >= CROWDED else None
        return crowded or self.decode.stages

    def prefill_of(self, group: LayerGroup) -> PrefillLaunch:
        """The prefill kernel's in the layers of a group."""
        return self.local_prefill or self.prefill if group is LayerGroup.LOCAL else self.prefill

    @classmethod
    def of(
        cls,
        head_dim: int,
        dtype: torch.dtype,
        pool: torch.dtype | None = None,
        shared_bytes: int = HOPPER_SHARED_BYTES,
    ) -> Tuning:
        """For a head size, the type of the queries, that of the pools if it is another, and a card's shared memory for
        one program.

        Measured on Hopper; on cards with less of it, tiles are what fits (tests/compile_attention.py says what does).
        """
        if dtype.itemsize > 2:
            return cls(Launch(32, 4, 2, 4), PrefillLaunch(32, 4, 1, 2, rows=32))
        if shared_bytes < _ADA_SHARED_BYTES:
            return cls(Launch(32, 4, 2, 4), PrefillLaunch(32, 4, 2, 1, rows=64 if head_dim <= 128 else 32))
        if head_dim > 128:
            if shared_bytes < _AMPERE_SHARED_BYTES:
                return cls(Launch(32, 4, 3, 4), PrefillLaunch(32, 4, 2, 1, rows=64))
            return cls(Launch(32, 4, 3, 4), PrefillLaunch(64, 8, 2, 1, rows=128))
        if head_dim == 128 and shared_bytes >= HOPPER_SHARED_BYTES:
            prefill = PrefillLaunch(128, 8, 2, 1, rows=128, hopper_stages=2)
            if pool == FP8:
                return cls(Launch(32, 1, 5, 8), prefill)
            # A window's edges lie in tiles of keys that not all tokens see: smaller ones waste less.
            local_prefill = PrefillLaunch(64, 8, 5, 1, rows=128, hopper_stages=4)
            return cls(Launch(32, 2, 5, 4), prefill, local_prefill, crowded_stages=3)
        return cls(Launch(32, 2, 5, 4), PrefillLaunch(64, 8, 5, 1, rows=128, hopper_stages=4))


def tuning_for(head_dim: int, dtype: torch.dtype, pool: torch.dtype, device: torch.device) -> Tuning:
    """`Tuning.of` heads of this size, queries of `dtype` and pools of type `pool`, with the device's shared memory."""
    if device.type != "cuda":
        return Tuning.of(head_dim, dtype, pool)
    import triton  # Where there is a device only: it takes a second.

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Tuning.of(head_dim, dtype, pool, shared)
