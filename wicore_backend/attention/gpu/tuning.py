"""Shapes of the attention kernels' tiles: the fastest of those measured in docs/benchmarks/attention-on-gpu.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """The launches of both kernels."""

    decode: Launch
    prefill: PrefillLaunch

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> Tuning:
        """For a head size and the type of the queries."""
        if dtype.itemsize > 2:
            return cls(Launch(32, 4, 2, 4), PrefillLaunch(32, 4, 1, 2, rows=32))
        if head_dim > 128:
            return cls(Launch(32, 4, 3, 4), PrefillLaunch(64, 8, 2, 1, rows=128))
        return cls(Launch(32, 2, 5, 4), PrefillLaunch(64, 8, 5, 1, rows=128, hopper_stages=4))
