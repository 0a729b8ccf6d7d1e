"""Paged attention by OpenAI Triton kernels over the pools, read in place.

A layer is one launch for a step's decodes, which also writes their keys and values, and two for its prefills: they are
written, then attended to. What the layers of a group share is worked out in `plan` with NumPy (`schedule.py`) and goes
to the device in one copy.

A step's own plan has memory of its own. A `DecodeBucket` is a plan whose memory and grids stay as they are while its
contents change, so that a CUDA graph that was captured with it is good for every step that fits it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.closing_up import ClosedUp, close_up
from wicore_backend.attention.gpu import hopper
from wicore_backend.attention.gpu.hopper import HopperPrefill, Widening, widening
from wicore_backend.attention.gpu.kernels.decode import decode_kernel
from wicore_backend.attention.gpu.kernels.prefill import prefill_kernel, prefill_mass_kernel, write_kernel
from wicore_backend.attention.gpu.masses import MASS_TAIL, Measurements
from wicore_backend.attention.gpu.plans import DecodeBucket, Decodes, MassMemory, Plan, Prefills, Scratch
from wicore_backend.attention.gpu.prompt_bucket import PromptBucket, Shared
from wicore_backend.attention.gpu.rehearsal import rehearse
from wicore_backend.attention.gpu.schedule import (
    ITEM_FIELDS,
    Ints,
    PrefillTiles,
    Sequences,
    decode_capacity,
    decode_items,
    prefill_tiles,
    slots_of,
)
from wicore_backend.attention.gpu.tuning import MASS_KEYS, Tuning
from wicore_backend.attention.gpu.upload import Upload, put
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.pool import KVPools

_log = logging.getLogger(__name__)

_LOG2_E = 1.4426950408889634
_MASS_ROWS = 64  # of its queries, at least
_COMBINED_AT_ONCE = 4096  # values of partial results that a program holds while it puts them together

Masses = Mapping[int, NDArray[np.float32]]


class GpuPagedAttention:
    """`Attention` over `pools` on a CUDA device; on a CPU, for tests, under OpenAI Triton's interpreter.

    What `attend` returns belongs to the plan: the next layer's overwrites it. All work of one attention goes to one
    stream, or to streams that wait for each other.

    Parameters
    ----------
    query_heads
        Of the model, a multiple of its KV heads.
    scale, window, softcap, dtype
        As for `TorchPagedAttention`.
    tuning
        Shapes of tiles; by default those that were measured to be the fastest for the head size and the type.
    processors
        Multiprocessors to fill; by default those of the device.
    widened_bytes
        Device memory, for pools in FP8 on Hopper, where prompts' keys and values are float16 while they are attended
        to; without enough of it they are widened for each tile of queries.
    """

    def __init__(
        self,
        pools: KVPools,
        *,
        query_heads: int,
        scale: float,
        window: int,
        softcap: float | None,
        dtype: torch.dtype | None = None,
        tuning: Tuning | None = None,
        processors: int | None = None,
        widened_bytes: int = hopper.WIDENED_BYTES,
    ) -> None:
        layout = pools.layout
        if query_heads % layout.kv_heads:
            raise ValueError(f"query_heads = {query_heads} must be a multiple of the {layout.kv_heads} KV heads")
        self._layout = layout
        # OpenAI Triton has FP8 for some cards only; kernels are given bytes.
        self._pools = {
            group: pool.view(torch.uint8) if pool.dtype == FP8 else pool for group, pool in pools.tensors.items()
        }
        self._device = next(iter(pools.tensors.values())).device
        self._shared_masses = torch.empty(0, query_heads, device=self._device)
        self._dtype = pools.dtype if dtype is None else dtype
        self._like = partial(
            GpuPagedAttention,
            query_heads=query_heads,
            scale=scale,
            window=window,
            softcap=softcap,
            dtype=self._dtype,
            tuning=tuning,
        )
        self._kv_pools = pools
        self._window = window
        self._query_heads = query_heads
        self._tuning = tuning = tuning or tuning_for(layout.head_dim, self._dtype, pools.dtype, self._device)
        if processors is None:
            processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._processors = processors
        self._decode_fill = max(1, processors * tuning.decode.fill // layout.kv_heads)
        self._prefill_fill = max(1, processors * tuning.prefill.fill // layout.kv_heads)

        group = query_heads // layout.kv_heads
        group_rows = triton.next_power_of_2(group)
        self._group = group
        self._tile_tokens = max(1, tuning.prefill.rows // group_rows)
        self._cell = min(layout.block_size & -layout.block_size, tuning.decode.keys, MASS_KEYS)
        dims = max(16, triton.next_power_of_2(layout.head_dim))
        heads: dict[str, Any] = {
            "KV_HEADS": layout.kv_heads,
            "HEAD_DIM": layout.head_dim,
            "DIMS": dims,
            "BLOCK_SIZE": layout.block_size,
        }
        scoring = heads | {
            "GROUP": group,
            "GROUP_ROWS": group_rows,
            # Scores are powers of two; see `capped` in the kernels.
            "scale": scale * _LOG2_E if softcap is None else scale / softcap,
            "softcap": 0.0 if softcap is None else softcap * _LOG2_E,
            "SOFTCAP": softcap is not None,
            "PRECISION": "ieee",
        }
        # Programmatic dependent launch came with Hopper.
        overlapped = self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (9, 0)
        self._write_options = heads | {
            "HEADS": triton.next_power_of_2(layout.kv_heads),
            "OVERLAPPED": overlapped,
            "launch_pdl": overlapped,
        }
        self._decode_options = scoring | {
            "OVERLAPPED": overlapped,
            "ROWS": max(16, group_rows),
            "KEYS": tuning.decode.keys,
            "CELL": self._cell,
            "AT_ONCE": max(1, _COMBINED_AT_ONCE // (group_rows * dims)),
            "num_warps": tuning.decode.warps,
            "launch_pdl": overlapped,
            "num_stages": tuning.decode.stages,
        }
        self._prefill_rows = rows = self._tile_tokens * group_rows
        launches = {group: tuning.prefill_of(group) for group in layout.groups}
        self._prefill_options = {
            group: scoring | {"ROWS": rows, "KEYS": launch.keys, "num_warps": launch.warps, "num_stages": launch.stages}
            for group, launch in launches.items()
        }
        self._hopper: HopperPrefill | None = None
        stages = {group: launch.hopper_stages for group, launch in launches.items() if launch.hopper_stages is not None}
        fitting = partial(hopper.fits, layout, pools.dtype, self._dtype, self._device, rows=rows)
        if all(group in stages and fitting(keys=launch.keys) for group, launch in launches.items()):
            self._hopper = HopperPrefill(
                layout, self._pools, self._prefill_options, stages=stages, widened_bytes=widened_bytes
            )
        self._mass_options = scoring | {
            "TOKENS": max(1, _MASS_ROWS // group_rows),
            "KEYS": MASS_KEYS,
            "CELL": self._cell,
        }

    # ---- Attention

    def plan(self, step: PackedStep, *, out: Tensor | None = None) -> Plan:
        """As `Attention.plan`. `attend` returns the first rows of `out` [T or more, query heads * d] if it is given."""
        tokens_in_all = len(step.positions)
        if out is None:
            out = self._empty(tokens_in_all, self._query_heads * self._layout.head_dim, dtype=self._dtype)
        closed_up = self._close_up(step)
        arrays: dict[Hashable, Ints] = {}
        tiles: dict[LayerGroup, PrefillTiles] = {}
        widenings: dict[LayerGroup, Widening] = {}
        measurements = None
        for group in self._layout.groups:
            of_step, sequences = self._seen_by(group, step, closed_up)
            arrays[group, "tables"] = sequences.table
            if step.decodes:
                arrays[group, "items"] = self._decode_items(group, of_step, sequences)
            if step.decodes < len(step.query_lens):
                tiles[group] = self._prefill_tiles(group, of_step, sequences)
                arrays |= {(group, name): array for name, array in tiles[group].arrays().items()}
                if (widening := self._widening(group, of_step, sequences, tiles[group])) is not None:
                    widenings[group] = widening
                    arrays[group, "places"] = np.arange(len(sequences.table), dtype=np.int32) - widening.first_block
            if group is LayerGroup.GLOBAL and step.measured:
                measurements = Measurements.of(of_step, sequences.table_at, cell=self._cell)
                arrays["decodes measured"] = np.stack(list(measurements.of_decodes.values()))
                arrays["prefills measured"] = measurements.of_prefills
        upload = put(arrays, self._device)

        tokens = len(step.positions) - step.decodes
        mass = None
        if measurements is not None:
            mass = MassMemory(
                self._empty(measurements.rows, self._query_heads),
                upload["decodes measured"],
                {layer: row for row, layer in enumerate(measurements.of_decodes)},
                upload["prefills measured"],
                measurements.in_prefills,
            )
        return Plan(
            num_decodes=step.decodes,
            num_prefilled=tokens,
            out=out[:tokens_in_all],
            log_totals=self._empty(tokens, self._query_heads),
            decodes={
                group: self._decodes(upload, group, len(arrays[group, "items"]), step.decodes)
                for group in self._layout.groups
                if step.decodes
            },
            prefills={
                group: self._prefills(upload, group, of_group, widenings.get(group))
                for group, of_group in tiles.items()
            },
            mass=mass,
            measurements=measurements,
            closed_up=closed_up,
        )

    def attend(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
            raise ValueError(f"q, k, v have strides {q.stride()}, {k.stride()}, {v.stride()}; the last ones must be 1")
        group, index = self._layout.layers[layer]
        pool = self._pools[group]
        where = {"layer_at": index * pool.stride(1), "block_stride": pool.stride(0)}
        if plan.num_decodes:
            self._attend_decodes(plan, plan.decodes[group], layer, pool, where, q, k, v)
        if plan.num_prefilled:
            rest = slice(plan.num_decodes, None)
            self._attend_prefills(plan, plan.prefills[group], layer, pool, where, q[rest], k[rest], v[rest])
        return plan.out

    def mass(self, plan: Plan) -> Masses:
        return self.collect(plan)()

    def collect(self, plan: Plan) -> Callable[[], Masses]:
        """As `Attention.collect`, on the stream of the step's layers; its result outlives what is in the plan now."""
        measurements, closed_up = plan.measurements, plan.closed_up
        if measurements is None or plan.mass is None or not measurements.all:
            return dict
        totals = put({"totals": measurements.totals()}, self._device)["totals"]
        values = plan.mass.values[: measurements.rows]
        shares = (values - values.index_select(0, totals)).exp2_().mean(1)
        on_host = torch.empty(shares.shape, dtype=shares.dtype, pin_memory=shares.is_cuda)
        on_host.copy_(shares, non_blocking=True)
        arrived = None
        if shares.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()

        def wait() -> Masses:
            if arrived is not None:
                arrived.synchronize()
            masses = measurements.by_block(on_host.numpy(), cells_in_block=self._layout.block_size // self._cell)
            if closed_up is None:
                return masses
            return {sequence: closed_up.spread(sequence, mass) for sequence, mass in masses.items()}

        return wait

    def rehearse(self) -> None:
        """Compile what no bucket launches, and steps may: see `rehearsal.py`."""
        own = {"query_heads": self._query_heads, "tile_tokens": self._tile_tokens, "dtype": self._dtype}
        try:
            rehearse(self._kv_pools, self._like, **own)
        except Exception:
            _log.exception("long prompts' attention cannot be rehearsed; the first one will show why")

    # ---- Plans for captured graphs

    def decode_bucket(self, *, sequences: int, max_keys: int, measures: bool = True) -> DecodeBucket:
        """A plan for steps of up to `sequences` decodes of up to `max_keys` keys, their own included; see `refresh`.

        Its addresses and the grids of its launches never change. Rows of `q`, `k`, `v` past a step's decodes are left
        alone, and so are their results, which are finite.

        Parameters
        ----------
        measures
            Whether attention mass may be asked of its steps: of as many pairs of sequence and layer as it has
            sequences. Its memory is shared with other buckets of the attention, so `collect` it before their next step.
        """
        size = self._layout.block_size
        num_items, sizes, tables = {}, dict[Hashable, int](), dict[Hashable, int]()
        for group in self._layout.groups:
            keys = min(max_keys, self._window) if group is LayerGroup.LOCAL else max_keys
            num_items[group] = decode_capacity(
                sequences=sequences, most_keys=keys, keys=self._tuning.decode.keys, items=self._decode_fill
            )
            sizes[group, "items"] = num_items[group] * ITEM_FIELDS
            tables[group, "tables"] = sequences * (-(-keys // size) + 1)
        layers = [i for i, (group, _) in enumerate(self._layout.layers) if group is LayerGroup.GLOBAL and measures]
        sizes["decodes measured"] = len(layers) * sequences
        upload = Upload(sizes | dict(sorted(tables.items(), key=lambda table: table[1])), self._device)
        mass = None
        if layers:
            rows = sequences * (-(-max_keys // self._cell) + MASS_TAIL)
            at = upload["decodes measured"]
            mass = MassMemory(self._bucket_masses(rows), at, {layer: i for i, layer in enumerate(layers)}, None, {})
        plan = Plan(
            num_decodes=sequences,
            num_prefilled=0,
            out=self._empty(sequences, self._query_heads * self._layout.head_dim, dtype=self._dtype).zero_(),
            log_totals=self._empty(0, self._query_heads),
            decodes={group: self._decodes(upload, group, count, sequences) for group, count in num_items.items()},
            prefills={},
            mass=mass,
            measurements=None,
            closed_up=None,
        )
        bucket = DecodeBucket(plan, upload, sequences, max_keys)
        upload.put(self._idle(bucket))
        return bucket

    def refresh(self, bucket: DecodeBucket, step: PackedStep) -> Plan:
        """Make `bucket.plan` that of `step`: one copy to the device on the current stream, which nobody waits for.

        Raises
        ------
        ValueError
            If the step has prefills or does not fit the bucket.
        """
        count, plan = len(step.query_lens), bucket.plan
        if step.decodes < count:
            raise ValueError(f"{count - step.decodes} of the step's sequences are prefills; plan the step instead")
        if count > bucket.sequences:
            raise ValueError(f"{count} decodes do not fit a bucket of {bucket.sequences}; take a larger one")
        closed_up = self._close_up(step)
        arrays = self._idle(bucket)
        measurements = None
        for group in self._layout.groups:
            of_step, sequences = self._seen_by(group, step, closed_up)
            longest = int(of_step.positions.max()) + 1
            if group is LayerGroup.GLOBAL and longest > bucket.max_keys:
                raise ValueError(f"a sequence of {longest} keys does not fit a bucket of {bucket.max_keys}")
            arrays[group, "tables"] = sequences.table
            items = self._decode_items(group, of_step, sequences)
            arrays[group, "items"][: len(items)] = items
            if group is LayerGroup.GLOBAL and step.measured:
                measurements = Measurements.of(of_step, sequences.table_at, cell=self._cell)
        if measurements is not None:
            if plan.mass is None or len(measurements.all) > bucket.sequences:
                room = 0 if plan.mass is None else bucket.sequences
                raise ValueError(
                    f"{len(measurements.all)} measurements of mass do not fit a bucket with room for {room}"
                )
            for layer, places in measurements.of_decodes.items():
                arrays["decodes measured"][plan.mass.rows[layer], :count] = places
        bucket.upload.put(arrays)
        plan.measurements, plan.closed_up = measurements, closed_up
        return plan

    def prompt_bucket(self, *, max_keys: int, out: Tensor, measures: bool = True) -> PromptBucket:
        """A plan for a prompt by itself of up to as many tokens as `out` [tokens, query heads * d] has rows.

        Its addresses and the grids of its launches never change; see `refresh_prompt`. Rows of `q`, `k`, `v` past a
        step's tokens are left alone, and so are their results.

        Parameters
        ----------
        max_keys
            Of the sequence, those of the step included.
        measures
            Whether attention mass may be asked of its steps.
        """
        layers = [i for i, (group, _) in enumerate(self._layout.layers) if group is LayerGroup.GLOBAL and measures]
        return PromptBucket(
            self._layout,
            max_keys=max_keys,
            window=self._window,
            tile_tokens=self._tile_tokens,
            cell=self._cell,
            query_heads=self._query_heads,
            measured=layers,
            out=out,
        )

    def refresh_prompt(self, bucket: PromptBucket, step: PackedStep) -> Plan:
        """Make `bucket.plan` that of `step`: one copy to the device on the current stream, which nobody waits for.

        Raises
        ------
        ValueError
            If the step is not one prompt by itself, or does not fit the bucket.
        """
        closed_up = self._close_up(step)
        shared: dict[LayerGroup, Shared] = {}
        alike = closed_up is None and int(step.positions.max()) < self._window
        for group in self._layout.groups:
            of_step, sequences = self._seen_by(group, step, closed_up)
            if alike and shared:  # All that one group sees so does the other, from blocks of its own.
                other = next(iter(shared.values()))
                slots = slots_of(step, sequences, block_size=self._layout.block_size)
                tiles = PrefillTiles(
                    other.tiles.items, other.tiles.tiles, other.tiles.lowers, other.tiles.uppers, slots
                )
            else:
                tiles = self._prefill_tiles(group, of_step, sequences)
            shared[group] = Shared(of_step, sequences, tiles)
        return bucket.refresh(shared, closed_up)

    def _idle(self, bucket: DecodeBucket) -> dict[Hashable, Ints]:
        """The contents of a bucket without work."""
        arrays: dict[Hashable, Ints] = {
            (group, "items"): np.full((of_group.num_items, ITEM_FIELDS), -1, np.int32)
            for group, of_group in bucket.plan.decodes.items()
        }
        rows = 0 if bucket.plan.mass is None else len(bucket.plan.mass.rows)
        arrays["decodes measured"] = np.full((rows, bucket.sequences), -1, np.int32)
        return arrays

    def _bucket_masses(self, rows: int) -> Tensor:
        """Memory for so many rows of masses, the same for all buckets but those made before a larger one was."""
        if len(self._shared_masses) < rows:
            self._shared_masses = self._empty(rows, self._query_heads)
        return self._shared_masses

    # ---- Parts of a plan

    def _close_up(self, step: PackedStep) -> ClosedUp | None:
        local = [layer for layer in step.measured if self._layout.layers[layer][0] is not LayerGroup.GLOBAL]
        if local:
            raise ValueError(f"attention mass is asked of layers {local}, which are local; ask global ones")
        return close_up(step, self._layout.block_size) if LayerGroup.GLOBAL in self._layout.groups else None

    def _seen_by(self, group: LayerGroup, step: PackedStep, closed_up: ClosedUp | None) -> tuple[PackedStep, Sequences]:
        if group is LayerGroup.GLOBAL and closed_up is not None:
            step = closed_up.step
        return step, Sequences.of(step, group, block_size=self._layout.block_size, window=self._window)

    def _decode_items(self, group: LayerGroup, step: PackedStep, sequences: Sequences) -> Ints:
        return decode_items(
            step, group, sequences, window=self._window, keys=self._tuning.decode.keys, items=self._decode_fill
        )

    def _prefill_tiles(self, group: LayerGroup, step: PackedStep, sequences: Sequences) -> PrefillTiles:
        return prefill_tiles(
            step,
            group,
            sequences,
            block_size=self._layout.block_size,
            window=self._window,
            tokens=self._tile_tokens,
            keys=self._tuning.prefill_of(group).keys,
            items=self._prefill_fill,
            least_keys=self._tuning.prefill.least_keys,
        )

    def _widening(
        self, group: LayerGroup, step: PackedStep, sequences: Sequences, tiles: PrefillTiles
    ) -> Widening | None:
        # A local layer's keys are seen by few tiles.
        if self._hopper is None or not self._hopper.widened_bytes or tiles.split or group is LayerGroup.LOCAL:
            return None
        first_block = int(sequences.table_at[step.decodes])
        return widening(
            self._layout,
            first_block=first_block,
            blocks=len(sequences.table) - first_block,
            tiles=tiles.tiles,
            sequences=len(step.query_lens) - step.decodes,
            programs=self._processors,
            memory_bytes=self._hopper.widened_bytes,
        )

    def _decodes(self, upload: Upload, group: LayerGroup, num_items: int, sequences: int) -> Decodes:
        scratch = self._scratch(num_items, self._group, sequences)
        return Decodes(upload[group, "items"], num_items, upload[group, "tables"], scratch)

    def _prefills(self, upload: Upload, group: LayerGroup, tiles: PrefillTiles, widening: Widening | None) -> Prefills:
        return Prefills(
            tiles=upload[group, "tiles"],
            num_items=len(tiles.items),
            tables=upload[group, "tables"],
            lowers=upload[group, "lowers"],
            uppers=upload[group, "uppers"],
            slots=upload[group, "slots"],
            scratch=self._scratch(len(tiles.items), self._prefill_rows, tiles.tiles) if tiles.split else None,
            widening=widening,
            places=None if widening is None else upload[group, "places"],
        )

    def _scratch(self, items: int, rows: int, shared: int) -> Scratch:
        """For `items` items of `rows` rows, of `shared` sequences or tiles."""
        heads = self._layout.kv_heads
        return Scratch(
            self._empty(items, heads, rows, self._layout.head_dim),
            self._empty(2, items, heads, rows),
            torch.zeros(shared, heads, dtype=torch.int32, device=self._device),
        )

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    # ---- Launches

    def _attend_decodes(
        self,
        plan: Plan,
        decodes: Decodes,
        layer: int,
        pool: Tensor,
        where: Mapping[str, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        mass = plan.mass if plan.mass is not None and layer in plan.mass.rows else None
        scratch = decodes.scratch
        decode_kernel[self._layout.kv_heads, decodes.num_items](
            *(q, k, v, pool, plan.out, decodes.items, decodes.tables),
            mass_at=decodes.items if mass is None else mass.decodes_at,
            mass=scratch.stats if mass is None else mass.values,
            mass_row=0 if mass is None else mass.rows[layer],
            sequences=plan.num_decodes,
            partial=scratch.partial,
            stats=scratch.stats,
            arrived=scratch.arrived,
            q_token=q.stride(0),
            q_head=q.stride(1),
            k_token=k.stride(0),
            k_head=k.stride(1),
            v_token=v.stride(0),
            v_head=v.stride(1),
            **where,
            **self._decode_options,
            MEASURE=mass is not None,
        )

    def _attend_prefills(
        self,
        plan: Plan,
        prefills: Prefills,
        layer: int,
        pool: Tensor,
        where: Mapping[str, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        heads = self._layout.kv_heads
        write_kernel[(plan.num_prefilled,)](
            *(k, v, pool, prefills.slots),
            k_token=k.stride(0),
            k_head=k.stride(1),
            v_token=v.stride(0),
            v_head=v.stride(1),
            **where,
            **self._write_options,
        )
        strides = {"q_token": q.stride(0), "q_head": q.stride(1)}
        group, index = self._layout.layers[layer]
        out, shares = plan.out[plan.num_decodes :], (prefills.tiles, prefills.tables, prefills.lowers, prefills.uppers)
        if self._hopper is not None and prefills.scratch is None:
            of_layer = (group, index, q, out, plan.log_totals, *shares)
            if prefills.widening is not None and prefills.places is not None:
                self._hopper.widened(prefills.widening, prefills.places, *of_layer, num_items=prefills.num_items)
            else:
                self._hopper(*of_layer, num_items=prefills.num_items)
        else:
            scratch = prefills.scratch or Scratch(plan.log_totals, plan.log_totals, prefills.slots)
            prefill_kernel[heads, prefills.num_items](
                *(q, pool, out, plan.log_totals, *shares, scratch.partial, scratch.stats, scratch.arrived),
                **strides,
                **where,
                **self._prefill_options[group],
                SPLIT=prefills.scratch is not None,
            )
        run = None if plan.mass is None else plan.mass.in_prefills.get(layer)
        if plan.mass is not None and run is not None:
            prefill_mass_kernel[heads, run.count, triton.cdiv(run.most_keys, MASS_KEYS)](
                *(q, pool, plan.log_totals, plan.mass.prefills, prefills.tables, prefills.uppers, plan.mass.values),
                first=run.first,
                **strides,
                **where,
                **self._mass_options,
            )


def tuning_for(head_dim: int, dtype: torch.dtype, pool: torch.dtype, device: torch.device) -> Tuning:
    """`Tuning.of` heads of this size, queries of `dtype` and pools of type `pool`, with the device's shared memory."""
    if device.type != "cuda":
        return Tuning.of(head_dim, dtype, pool)
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Tuning.of(head_dim, dtype, pool, shared)
