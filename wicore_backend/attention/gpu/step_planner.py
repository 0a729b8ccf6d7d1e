"""Plans of single steps, each with memory of its own: work items go to the device in one copy."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.decode_planner import DecodePlanner
from wicore_backend.attention.gpu.hopper import Widening, widening
from wicore_backend.attention.gpu.masses import Measurements
from wicore_backend.attention.gpu.plans import MassMemory, Plan, Prefills, Scratch
from wicore_backend.attention.gpu.schedule import Ints, PrefillTiles
from wicore_backend.attention.gpu.tile_scheduler import Seen, TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.upload import Upload, put
from wicore_backend.hmt.layout import LayerGroup


class StepPlanner:
    """Makes plans of steps.

    Parameters
    ----------
    widened_bytes
        Memory for prompts' keys and values in float16, where pools are in FP8 on Hopper; 0 elsewhere.
    """

    def __init__(
        self,
        tiling: Tiling,
        scheduler: TileScheduler,
        decodes: DecodePlanner,
        *,
        device: torch.device,
        widened_bytes: int,
    ) -> None:
        self._tiling = tiling
        self._scheduler = scheduler
        self._decodes = decodes
        self._device = device
        self._widened_bytes = widened_bytes

    def plan(self, step: PackedStep, out: Tensor) -> Plan:
        """The plan of a step, whose layers' results go to `out` [T, query heads * d]."""
        scheduler, view = self._scheduler, self._scheduler.view(step)
        num_prefilled = len(step.positions) - step.decodes
        arrays: dict[Hashable, Ints] = {}
        tiles: dict[LayerGroup, PrefillTiles] = {}
        widenings: dict[LayerGroup, Widening] = {}
        for group, seen in view.groups.items():
            arrays[group, "tables"] = tables = seen.sequences.table
            if step.decodes:
                arrays[group, "decodes"] = self._decodes.records(group, seen, sequences=step.decodes)
            if num_prefilled:
                tiles[group] = scheduler.prefill_tiles(group, seen)
                arrays |= {(group, name): array for name, array in tiles[group].arrays().items()}
                if (of_group := self._widening(group, seen, tiles[group])) is not None:
                    widenings[group] = of_group
                    arrays[group, "places"] = np.arange(len(tables), dtype=np.int32) - of_group.first_block
        measurements = scheduler.measurements(view)
        if measurements is not None:
            arrays["decodes measured"] = np.stack(list(measurements.of_decodes.values()))
            arrays["prefills measured"] = measurements.of_prefills
        upload = put(arrays, self._device)
        return Plan(
            num_decodes=step.decodes,
            num_prefilled=num_prefilled,
            out=out,
            log_totals=torch.empty(num_prefilled, self._tiling.query_heads, device=self._device),
            decodes={
                group: self._decodes.plan(upload[group, "decodes"], upload[group, "tables"], sequences=step.decodes)
                for group in view.groups
                if step.decodes
            },
            prefills={
                group: self._prefills(upload, group, of_group, widenings.get(group))
                for group, of_group in tiles.items()
            },
            mass=None if measurements is None else self._mass_memory(upload, measurements),
            measurements=measurements,
            closed_up=view.closed_up,
        )

    def _widening(self, group: LayerGroup, seen: Seen, tiles: PrefillTiles) -> Widening | None:
        # A local layer's keys are seen by few tiles.
        if not self._widened_bytes or tiles.split or group is LayerGroup.LOCAL:
            return None
        first_block = int(seen.sequences.table_at[seen.step.decodes])
        return widening(
            self._tiling.layout,
            first_block=first_block,
            blocks=len(seen.sequences.table) - first_block,
            tiles=tiles.tiles,
            sequences=len(seen.step.query_lens) - seen.step.decodes,
            programs=self._tiling.processors,
            memory_bytes=self._widened_bytes,
        )

    def _prefills(self, upload: Upload, group: LayerGroup, tiles: PrefillTiles, widened: Widening | None) -> Prefills:
        scratch = None
        if tiles.split:
            rows = self._tiling.prefill_rows
            scratch = Scratch.empty(self._tiling, self._device, items=len(tiles.items), rows=rows, shared=tiles.tiles)
        return Prefills(
            tiles=upload[group, "tiles"],
            num_items=len(tiles.items),
            tables=upload[group, "tables"],
            lowers=upload[group, "lowers"],
            uppers=upload[group, "uppers"],
            slots=upload[group, "slots"],
            scratch=scratch,
            widening=widened,
            places=None if widened is None else upload[group, "places"],
        )

    def _mass_memory(self, upload: Upload, measurements: Measurements) -> MassMemory:
        return MassMemory(
            torch.empty(measurements.rows, self._tiling.query_heads, device=self._device),
            upload["decodes measured"],
            {layer: row for row, layer in enumerate(measurements.of_decodes)},
            upload["prefills measured"],
            measurements.in_prefills,
        )
