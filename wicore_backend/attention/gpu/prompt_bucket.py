"""A plan for whatever prompt by itself fits: its memory and its grids stay as they are while its contents change."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.closing_up import ClosedUp
from wicore_backend.attention.gpu.masses import MASS_TAIL, MEASUREMENT_FIELDS, Measurements, PrefillRun
from wicore_backend.attention.gpu.plans import MassMemory, Plan, Prefills
from wicore_backend.attention.gpu.schedule import TILE_FIELDS, Ints, PrefillTiles, Sequences
from wicore_backend.attention.gpu.upload import Upload
from wicore_backend.hmt.layout import KVLayout, LayerGroup


class Shared(NamedTuple):
    """A step's work in one group of layers."""

    step: PackedStep
    """As the group sees it."""
    sequences: Sequences
    tiles: PrefillTiles


class PromptBucket:
    """See the module's docstring; made by `GpuPagedAttention.prompt_bucket`.

    Parameters
    ----------
    max_keys
        Of the sequence, its prefix and the step's own.
    tile_tokens, cell
        Of a tile of queries; keys of a cell of attention mass.
    measured
        Layers whose attention mass may be asked for.
    out
        [tokens, query heads * d], each layer's result in its turn.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        max_keys: int,
        window: int,
        tile_tokens: int,
        cell: int,
        query_heads: int,
        measured: Sequence[int],
        out: Tensor,
    ) -> None:
        tokens, size, device = len(out), layout.block_size, out.device
        self.tokens, self.max_keys = tokens, max_keys
        self._cell = cell
        self._items = -(-tokens // tile_tokens)
        self._measured = {layer: row for row, layer in enumerate(measured)}
        sizes: dict[Hashable, int] = {"measured": len(measured) * MEASUREMENT_FIELDS}
        for group in layout.groups:
            keys = min(max_keys, window + tokens) if group is LayerGroup.LOCAL else max_keys
            sizes |= {(group, name): tokens for name in ("lowers", "uppers", "slots")}
            sizes[group, "tiles"] = self._items * TILE_FIELDS
            sizes[group, "tables"] = -(-keys // size) + 1
        self._upload = upload = Upload(sizes, device)
        self._groups = layout.groups
        mass = None
        if measured:
            rows = len(measured) * (-(-max_keys // cell) + MASS_TAIL)
            mass = MassMemory(
                torch.empty(rows, query_heads, device=device),
                upload["measured"],
                {},
                upload["measured"],
                {layer: PrefillRun(row, 1, max_keys) for layer, row in self._measured.items()},
            )
        self.plan = Plan(
            num_decodes=0,
            num_prefilled=tokens,
            out=out,
            log_totals=torch.zeros(tokens, query_heads, device=device),
            decodes={},
            prefills={
                group: Prefills(
                    num_items=self._items,
                    **{name: upload[group, name] for name in ("tiles", "tables", "lowers", "uppers", "slots")},
                    scratch=None,
                    widening=None,
                    places=None,
                )
                for group in layout.groups
            },
            mass=mass,
            measurements=None,
            closed_up=None,
        )
        self._idle = self._without_work()
        upload.put(self._idle)

    def refresh(self, shared: Mapping[LayerGroup, Shared], closed_up: ClosedUp | None) -> Plan:
        """Make the plan that of a step: one copy to the device on the current stream, which nobody waits for.

        Raises
        ------
        ValueError
            If the step is more than one prompt, or does not fit.
        """
        arrays, plan = {name: array.copy() for name, array in self._idle.items()}, self.plan
        measurements = None
        for group, (step, sequences, tiles) in shared.items():
            count, keys = len(step.positions), int(step.attend_limits.max()) + 1
            if step.decodes or len(step.query_lens) > 1:
                raise ValueError(f"a bucket for a prompt by itself was given {len(step.query_lens)} sequences")
            if tiles.split or count > self.tokens or (group is LayerGroup.GLOBAL and keys > self.max_keys):
                raise ValueError(
                    f"{count} tokens of {keys} keys, {len(tiles.items)} work items, do not fit a bucket of "
                    f"{self.tokens} tokens, {self.max_keys} keys, {self._items} items"
                )
            arrays[group, "tiles"][: len(tiles.items)] = tiles.items
            arrays[group, "tables"] = sequences.table
            for name in ("lowers", "uppers", "slots"):
                arrays[group, name][:count] = getattr(tiles, name)
            if group is LayerGroup.GLOBAL and step.measured:
                measurements = Measurements.of(step, sequences.table_at, cell=self._cell)
                rows = [self._measured[layer] for layer in measurements.in_prefills]
                arrays["measured"][rows] = measurements.of_prefills
        self._upload.put(arrays)
        plan.measurements, plan.closed_up = measurements, closed_up
        return plan

    def _without_work(self) -> dict[Hashable, Ints]:
        """Contents without work: tiles of no tokens, which look at one key, and tokens that are written nowhere."""
        arrays: dict[Hashable, Ints] = {"measured": np.zeros((len(self._measured), MEASUREMENT_FIELDS), np.int32)}
        numbers, none = np.arange(self._items), np.zeros(self._items, np.int64)
        fields = (none, none, none, none + 1, none, none, none, numbers, none + 1, numbers)
        for group in self._groups:
            arrays[group, "tiles"] = np.stack(fields, 1).astype(np.int32)
            arrays[group, "tables"] = np.zeros(1, np.int32)
            arrays |= {(group, name): np.zeros(self.tokens, np.int32) for name in ("lowers", "uppers")}
            arrays[group, "slots"] = np.full(self.tokens, -1, np.int32)
        return arrays
