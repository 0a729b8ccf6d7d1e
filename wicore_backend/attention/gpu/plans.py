"""What a step's layers share on the device: the tensors that the kernels are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wicore_backend.attention.closing_up import ClosedUp
from wicore_backend.attention.gpu.hopper import Widening
from wicore_backend.attention.gpu.hopper_decode import HopperDecode
from wicore_backend.attention.gpu.masses import Measurements, PrefillRun
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.layout import LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """What the programs that share a sequence's or a tile's keys leave for the last of them; see the kernels."""

    partial: Tensor
    """float32 [items, KV heads, rows, d]."""
    stats: Tensor
    """float32 [2, items, KV heads, rows]."""
    arrived: Tensor
    """int32 [sequences or tiles, KV heads], 0 between launches."""

    @classmethod
    def empty(cls, tiling: Tiling, device: torch.device, *, items: int, rows: int, shared: int) -> Self:
        """For `items` items of `rows` rows, of `shared` sequences or tiles."""
        heads = tiling.layout.kv_heads
        return cls(
            torch.empty(items, heads, rows, tiling.layout.head_dim, device=device),
            torch.empty(2, items, heads, rows, device=device),
            torch.zeros(shared, heads, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class DecodeItems:
    """The decodes of one group of layers, for `decode_kernel`."""

    items: Tensor
    """int32 [num_items * ITEM_FIELDS]."""
    num_items: int
    tables: Tensor
    """int32, the sequences' blocks, one sequence after the other."""
    scratch: Scratch


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWork:
    """The decodes of one group of layers, for `HopperDecode`."""

    kernel: HopperDecode
    """It has what its programs leave for each other."""
    work: Tensor
    """int32 [(sequences + 1) * WORK_FIELDS]."""
    tables: Tensor
    """int32, the sequences' blocks, one sequence after the other."""


Decodes = DecodeItems | DecodeWork
"""As the kernel that takes them is told."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefills:
    """The prefills of one group of layers."""

    tiles: Tensor
    """int32 [num_items * TILE_FIELDS]."""
    num_items: int
    tables: Tensor
    """int32, the sequences' blocks, one sequence after the other."""
    lowers: Tensor
    uppers: Tensor
    slots: Tensor
    """Each int32 [tokens of the prefills]; see `PrefillTiles`."""
    scratch: Scratch | None = None
    """None if no tile's keys are shared out."""
    widening: Widening | None = None
    places: Tensor | None = None
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
        As in `Measurements`; None and none in a bucket for decodes.
    """

    values: Tensor
    decodes_at: Tensor
    rows: Mapping[int, int]
    prefills: Tensor | None
    in_prefills: Mapping[int, PrefillRun]


@dataclass(slots=True, eq=False)
class Plan:
    """What the layers of a step share, on the device, and what was asked of its attention mass.

    A step's own plan has memory of its own, and is good for that step. A *bucket's* plan has memory and grids that
    stay as they are: `measurements` and `closed_up` are those of the step that it was refreshed with last, and so are
    the contents of its tensors, once the copy on the stream has been made.
    """

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
    measurements: Measurements | None = None
    closed_up: ClosedUp | None = None
