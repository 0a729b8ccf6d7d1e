"""What a step's layers share on the device: the tensors that the kernels are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from wicore_backend.attention.closing_up import ClosedUp
from wicore_backend.attention.gpu.hopper import Widening
from wicore_backend.attention.gpu.masses import Measurements, PrefillRun
from wicore_backend.attention.gpu.upload import Upload
from wicore_backend.hmt.layout import LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """What the programs that share a sequence's or a tile's keys leave for the last of them; see the kernels."""

    partial: Tensor
    stats: Tensor
    arrived: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    items: Tensor
    num_items: int
    tables: Tensor
    scratch: Scratch


@dataclass(frozen=True, slots=True, eq=False)
class Prefills:
    tiles: Tensor
    num_items: int
    tables: Tensor
    lowers: Tensor
    uppers: Tensor
    slots: Tensor
    scratch: Scratch | None
    """None if no tile's keys are shared out."""
    widening: Widening | None
    places: Tensor | None
    """With `widening`: int32, of each of `tables` which of the widened blocks it is."""


@dataclass(frozen=True, slots=True, eq=False)
class MassMemory:
    """Where the kernels put attention masses.

    Attributes
    ----------
    values
        float32 [rows, query heads].
    decodes_at
        int32 [measured layers, decodes], where in `values` each one's measurement begins, or -1.
    rows
        By layer that of `decodes_at`.
    prefills, in_prefills
        As in `Measurements`; None and none in a bucket.
    """

    values: Tensor
    decodes_at: Tensor
    rows: Mapping[int, int]
    prefills: Tensor | None
    in_prefills: Mapping[int, PrefillRun]


@dataclass(slots=True, eq=False)
class Plan:
    """What the layers of a step share, on the device, and what was asked of its attention mass."""

    num_decodes: int
    num_prefilled: int
    """Tokens of the prefills, whose rows come after the decodes'."""
    out: Tensor
    """[T, query heads * d], each layer's result in its turn."""
    log_totals: Tensor
    """float32 [tokens of the prefills, query heads], each layer's in its turn: log2 of the sums of the weights."""
    decodes: Mapping[LayerGroup, Decodes]
    prefills: Mapping[LayerGroup, Prefills]
    mass: MassMemory | None
    measurements: Measurements | None
    closed_up: ClosedUp | None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeBucket:
    """Memory and grids for whatever steps of decodes fit; see `GpuPagedAttention.decode_bucket`."""

    plan: Plan
    upload: Upload
    sequences: int
    max_keys: int
