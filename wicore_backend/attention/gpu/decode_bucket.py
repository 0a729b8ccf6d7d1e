"""A plan for whatever decodes fit: its memory and its grids stay as they are while its contents change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.decode_planner import DecodePlanner
from wicore_backend.attention.gpu.masses import MASS_TAIL
from wicore_backend.attention.gpu.plans import MassMemory, Plan
from wicore_backend.attention.gpu.schedule import Ints
from wicore_backend.attention.gpu.tile_scheduler import TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.upload import Upload
from wicore_backend.hmt.layout import LayerGroup


class SharedMasses:
    """Memory for the masses of several buckets: each is collected before the next step of any of them."""

    def __init__(self, query_heads: int, device: torch.device) -> None:
        self._values = torch.empty(0, query_heads, device=device)

    def rows(self, count: int) -> Tensor:
        """float32 [`count` or more, query heads], the same for all buckets but those made before a larger one was."""
        if len(self._values) < count:
            self._values = torch.empty(count, self._values.shape[1], device=self._values.device)
        return self._values


class DecodeBucket:
    """See the module's docstring; made by `GpuPagedAttention.decode_bucket`.

    Parameters
    ----------
    max_keys
        Of a sequence, its new one included.
    measured
        Layers whose attention mass may be asked for, of as many pairs of sequence and layer as `out` has rows.
    masses
        Memory for that.
    out
        [sequences, query heads * d], finite: each layer's result in its turn.
    """

    def __init__(
        self,
        tiling: Tiling,
        scheduler: TileScheduler,
        decodes: DecodePlanner,
        *,
        max_keys: int,
        measured: Sequence[int],
        masses: SharedMasses,
        out: Tensor,
    ) -> None:
        sequences, groups = len(out), tiling.layout.groups
        self.sequences, self.max_keys = sequences, max_keys
        self._scheduler, self._decodes = scheduler, decodes
        self._idle: dict[Hashable, Ints] = {
            (group, "decodes"): decodes.idle(group, sequences=sequences, max_keys=max_keys) for group in groups
        }
        self._idle["decodes measured"] = np.full((len(measured), sequences), -1, np.int32)
        tables = {(g, "tables"): sequences * scheduler.table_blocks(g, max_keys=max_keys) for g in groups}
        sizes = {name: array.size for name, array in self._idle.items()}
        self._upload = upload = Upload(sizes | dict(sorted(tables.items(), key=lambda table: table[1])), out.device)
        mass = None
        if measured:
            rows = {layer: row for row, layer in enumerate(measured)}
            values = masses.rows(sequences * (tiling.cells(max_keys) + MASS_TAIL))
            mass = MassMemory(values, upload["decodes measured"], rows, None, {})
        self.plan = Plan(
            num_decodes=sequences,
            num_prefilled=0,
            out=out,
            log_totals=torch.empty(0, tiling.query_heads, device=out.device),
            decodes={
                group: decodes.plan(upload[group, "decodes"], upload[group, "tables"], sequences=sequences)
                for group in groups
            },
            prefills={},
            mass=mass,
        )
        upload.put(self._idle)

    def refresh(self, step: PackedStep) -> Plan:
        """Make the plan that of a step: one copy to the device on the current stream, which nobody waits for.

        Raises
        ------
        ValueError
            If the step has prefills or does not fit; the plan is what it was.
        """
        count, plan = len(step.query_lens), self.plan
        if step.decodes < count:
            raise ValueError(f"{count - step.decodes} of the step's sequences are prefills; plan the step instead")
        if count > self.sequences:
            raise ValueError(f"{count} decodes do not fit a bucket of {self.sequences}; take a larger one")
        view = self._scheduler.view(step)
        arrays = {name: array.copy() for name, array in self._idle.items()}
        for group, seen in view.groups.items():
            longest = int(seen.step.positions.max()) + 1
            if group is LayerGroup.GLOBAL and longest > self.max_keys:
                raise ValueError(f"a sequence of {longest} keys does not fit a bucket of {self.max_keys}")
            records = self._decodes.records(group, seen, sequences=self.sequences)
            arrays[group, "decodes"][: len(records)] = records
            arrays[group, "tables"] = seen.sequences.table
        measurements = self._scheduler.measurements(view)
        if measurements is not None:
            room = 0 if plan.mass is None else self.sequences
            if plan.mass is None or len(measurements.all) > room:
                raise ValueError(
                    f"{len(measurements.all)} measurements of mass do not fit a bucket with room for {room}"
                )
            for layer, places in measurements.of_decodes.items():
                arrays["decodes measured"][plan.mass.rows[layer], :count] = places
        self._upload.put(arrays)
        plan.measurements, plan.closed_up = measurements, view.closed_up
        return plan
