"""A plan for whatever prompt by itself fits: its memory and its grids stay as they are while its contents change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.masses import MASS_TAIL, MEASUREMENT_FIELDS, PrefillRun
from wicore_backend.attention.gpu.plans import MassMemory, Plan, Prefills
from wicore_backend.attention.gpu.schedule import TILE_FIELDS, Ints
from wicore_backend.attention.gpu.tile_scheduler import TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.upload import Upload
from wicore_backend.hmt.layout import LayerGroup


class PromptBucket:
    """See the module's docstring; made by `GpuPagedAttention.prompt_bucket`.

    Parameters
    ----------
    max_keys
        Of the sequence, its prefix and the step's own.
    measured
        Layers whose attention mass may be asked for.
    out
        [tokens, query heads * d], each layer's result in its turn.
    """

    def __init__(
        self, tiling: Tiling, scheduler: TileScheduler, *, max_keys: int, measured: Sequence[int], out: Tensor
    ) -> None:
        tokens, device, groups = len(out), out.device, tiling.layout.groups
        self.tokens, self.max_keys = tokens, max_keys
        self._scheduler = scheduler
        self._items = -(-tokens // tiling.tile_tokens)
        self._measured = {layer: row for row, layer in enumerate(measured)}
        sizes: dict[Hashable, int] = {"measured": len(measured) * MEASUREMENT_FIELDS}
        for group in groups:
            sizes |= {(group, name): tokens for name in ("lowers", "uppers", "slots")}
            sizes[group, "tiles"] = self._items * TILE_FIELDS
            sizes[group, "tables"] = scheduler.table_blocks(group, max_keys=max_keys, tokens=tokens)
        self._upload = upload = Upload(sizes, device)
        mass = None
        if measured:
            rows = len(measured) * (tiling.cells(max_keys) + MASS_TAIL)
            mass = MassMemory(
                torch.empty(rows, tiling.query_heads, device=device),
                upload["measured"],
                {},
                upload["measured"],
                {layer: PrefillRun(row, 1, max_keys) for layer, row in self._measured.items()},
            )
        self.plan = Plan(
            num_decodes=0,
            num_prefilled=tokens,
            out=out,
            log_totals=torch.zeros(tokens, tiling.query_heads, device=device),
            decodes={},
            prefills={
                group: Prefills(
                    tiles=upload[group, "tiles"],
                    num_items=self._items,
                    tables=upload[group, "tables"],
                    lowers=upload[group, "lowers"],
                    uppers=upload[group, "uppers"],
                    slots=upload[group, "slots"],
                )
                for group in groups
            },
            mass=mass,
        )
        self._idle = self._without_work(groups)
        upload.put(self._idle)

    def refresh(self, step: PackedStep) -> Plan:
        """Make the plan that of a step: one copy to the device on the current stream, which nobody waits for.

        Raises
        ------
        ValueError
            If the step is not one prompt by itself, or does not fit; the plan is what it was.
        """
        if step.decodes or len(step.query_lens) > 1:
            raise ValueError(f"a bucket for a prompt by itself was given {len(step.query_lens)} sequences")
        view = self._scheduler.view(step)
        tiles = self._scheduler.prompt_tiles(view)
        arrays, plan = {name: array.copy() for name, array in self._idle.items()}, self.plan
        for group, seen in view.groups.items():
            of_group, count, keys = tiles[group], len(step.positions), int(seen.step.attend_limits.max()) + 1
            if of_group.split or count > self.tokens or (group is LayerGroup.GLOBAL and keys > self.max_keys):
                raise ValueError(
                    f"{count} tokens of {keys} keys, {len(of_group.items)} work items, do not fit a bucket of "
                    f"{self.tokens} tokens, {self.max_keys} keys, {self._items} items"
                )
            arrays[group, "tiles"][: len(of_group.items)] = of_group.items
            arrays[group, "tables"] = seen.sequences.table
            for name in ("lowers", "uppers", "slots"):
                arrays[group, name][:count] = getattr(of_group, name)
        measurements = self._scheduler.measurements(view)
        if measurements is not None:
            if not self._measured.keys() >= measurements.in_prefills.keys():
                asked = sorted(measurements.in_prefills)
                raise ValueError(
                    f"attention mass is asked of layers {asked}; a bucket has room for {[*self._measured]}"
                )
            rows = [self._measured[layer] for layer in measurements.in_prefills]
            arrays["measured"][rows] = measurements.of_prefills
        self._upload.put(arrays)
        plan.measurements, plan.closed_up = measurements, view.closed_up
        return plan

    def _without_work(self, groups: Sequence[LayerGroup]) -> dict[Hashable, Ints]:
        """Contents without work: tiles of no tokens, which look at one key, and tokens that are written nowhere."""
        arrays: dict[Hashable, Ints] = {"measured": np.zeros((len(self._measured), MEASUREMENT_FIELDS), np.int32)}
        numbers, none = np.arange(self._items), np.zeros(self._items, np.int64)
        fields = (none, none, none, none + 1, none, none, none, numbers, none + 1, numbers)
        for group in groups:
            arrays[group, "tiles"] = np.stack(fields, 1).astype(np.int32)
            arrays[group, "tables"] = np.zeros(1, np.int32)
            arrays |= {(group, name): np.zeros(self.tokens, np.int32) for name in ("lowers", "uppers")}
            arrays[group, "slots"] = np.full(self.tokens, -1, np.int32)
        return arrays
