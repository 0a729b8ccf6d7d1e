"""Paged attention by OpenAI Triton kernels over the pools, read in place.

A step is viewed by each group of layers, and cut into the kernels' work items (`tile_scheduler.py`, NumPy alone), its
decodes into those of the kernel that takes them (`decode_planner.py`). What its layers share goes to the device in
one copy, as a `Plan`: one of memory of its own (`step_planner.py`), or that of a bucket, whose memory and grids stay as
they are, so that a CUDA graph that was captured with it is good for every step that fits (`decode_bucket.py`,
`prompt_bucket.py`). A layer is then a few launches (`launches.py`), and the attention masses that these leave go to the
host once the step has been computed (`mass_collection.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.attention.gpu import hopper, hopper_decode
from wicore_backend.attention.gpu.decode_bucket import DecodeBucket, SharedMasses
from wicore_backend.attention.gpu.decode_planner import DecodePlanner
from wicore_backend.attention.gpu.kernel_options import KernelOptions
from wicore_backend.attention.gpu.launches import Launches
from wicore_backend.attention.gpu.mass_collection import Masses, collect
from wicore_backend.attention.gpu.plans import Plan
from wicore_backend.attention.gpu.prompt_bucket import PromptBucket
from wicore_backend.attention.gpu.rehearsal import rehearse
from wicore_backend.attention.gpu.step_planner import StepPlanner
from wicore_backend.attention.gpu.tile_scheduler import TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import Tuning, tuning_for
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.pool import KVPools

_log = logging.getLogger(__name__)


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
        layout, device = pools.layout, next(iter(pools.tensors.values())).device
        dtype = pools.dtype if dtype is None else dtype
        if processors is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        tuning = tuning or tuning_for(layout.head_dim, dtype, pools.dtype, device)
        tiling = Tiling(layout, query_heads, tuning, processors)
        # Programmatic dependent launch came with Hopper.
        overlapped = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        options = KernelOptions.of(tiling, scale=scale, softcap=softcap, overlapped=overlapped)
        # OpenAI Triton has FP8 for some cards only; kernels are given bytes.
        held = {group: pool.view(torch.uint8) if pool.dtype == FP8 else pool for group, pool in pools.tensors.items()}
        prefill = None
        if hopper.fits(tiling, pools.dtype, dtype, device):
            prefill = hopper.HopperPrefill(tiling, held, options.prefill, widened_bytes=widened_bytes)
        form = hopper_decode.form_of(tiling, pools.dtype, dtype, capped=softcap is not None)
        decode = hopper_decode.hopper_decode(form, processors=processors, scale=options.decode["scale"], device=device)

        self._pools = pools
        self._settings: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "tuning": tuning}
        self._dtype = dtype
        self._tiling = tiling
        self._measurable = tuple(i for i, (group, _) in enumerate(layout.layers) if group is LayerGroup.GLOBAL)
        self._scheduler = TileScheduler(tiling, window=window)
        self._decodes = DecodePlanner(tiling, self._scheduler, decode)
        self._planner = StepPlanner(
            tiling,
            self._scheduler,
            self._decodes,
            device=device,
            widened_bytes=0 if prefill is None else prefill.widened_bytes,
        )
        self._launches = Launches(layout, held, options, tuning, prefill)
        self._masses = SharedMasses(query_heads, device)
        self._device = device

    # ---- Attention

    def plan(self, step: PackedStep, *, out: Tensor | None = None) -> Plan:
        """As `Attention.plan`. `attend` returns the first rows of `out` [T or more, query heads * d] if it is given."""
        tokens = len(step.positions)
        return self._planner.plan(step, self._results(tokens) if out is None else out[:tokens])

    def attend(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._launches.attend(plan, layer, q, k, v)

    def mass(self, plan: Plan) -> Masses:
        return self.collect(plan)()

    def collect(self, plan: Plan) -> Callable[[], Masses]:
        """As `Attention.collect`, on the stream of the step's layers; its result outlives what is in the plan now."""
        return collect(plan, cells_in_block=self._tiling.cells(self._tiling.layout.block_size))

    def rehearse(self) -> None:
        """Compile what no bucket launches, and steps may: see `rehearsal.py`."""
        try:
            rehearse(self._pools, self._like, tiling=self._tiling, dtype=self._dtype)
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
        return DecodeBucket(
            self._tiling,
            self._scheduler,
            self._decodes,
            max_keys=max_keys,
            measured=self._measurable if measures else (),
            masses=self._masses,
            out=self._results(sequences).zero_(),
        )

    def refresh(self, bucket: DecodeBucket, step: PackedStep) -> Plan:
        """Make `bucket.plan` that of `step`; see `DecodeBucket.refresh`."""
        return bucket.refresh(step)

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
        measured = self._measurable if measures else ()
        return PromptBucket(self._tiling, self._scheduler, max_keys=max_keys, measured=measured, out=out)

    def refresh_prompt(self, bucket: PromptBucket, step: PackedStep) -> Plan:
        """Make `bucket.plan` that of `step`; see `PromptBucket.refresh`."""
        return bucket.refresh(step)

    def _results(self, rows: int) -> Tensor:
        width = self._tiling.query_heads * self._tiling.layout.head_dim
        return torch.empty(rows, width, dtype=self._dtype, device=self._device)

    def _like(self, pools: KVPools, /, *, processors: int | None, widened_bytes: int) -> Attention[Any]:
        """The same over other pools."""
        return GpuPagedAttention(
            pools,
            query_heads=self._tiling.query_heads,
            dtype=self._dtype,
            processors=processors,
            widened_bytes=widened_bytes,
            **self._settings,
        )
