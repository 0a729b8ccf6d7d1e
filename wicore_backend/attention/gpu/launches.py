"""A layer's launches: one for a step's decodes, which also writes their keys and values; its prefills are written, then
attended to, and then measured where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
from torch import Tensor

from wicore_backend.attention.gpu.hopper import HopperPrefill
from wicore_backend.attention.gpu.kernel_options import KernelOptions
from wicore_backend.attention.gpu.kernels.decode import decode_kernel
from wicore_backend.attention.gpu.kernels.prefill import prefill_kernel, prefill_mass_kernel, write_kernel
from wicore_backend.attention.gpu.plans import DecodeWork, Plan, Scratch
from wicore_backend.attention.gpu.tuning import MASS_KEYS, Tuning
from wicore_backend.hmt.layout import KVLayout, LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Where a layer's keys and values are."""

    group: LayerGroup
    index: int
    """In the group."""
    pool: Tensor
    where: Mapping[str, int]
    """Values from a block's beginning to the layer's, and from one block to the next."""


class Launches:
    """The kernels over a model's pools.

    Parameters
    ----------
    pools
        By group, [blocks, layers, 2, block_size, KV heads, d]; bytes if they are e4m3.
    hopper
        Takes prefills whose keys are not shared out, if there is one.
    """

    def __init__(
        self,
        layout: KVLayout,
        pools: Mapping[LayerGroup, Tensor],
        options: KernelOptions,
        tuning: Tuning,
        hopper: HopperPrefill | None,
    ) -> None:
        self._kv_heads = layout.kv_heads
        self._options = options
        self._tuning = tuning
        self._hopper = hopper
        self._layers = []
        for group, index in layout.layers:
            pool = pools[group]
            where = {"layer_at": index * pool.stride(1), "block_stride": pool.stride(0)}
            self._layers.append(_Layer(group, index, pool, where))

    def attend(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Attention.attend`.

        Raises
        ------
        ValueError
            If a head's values do not lie one after the other.
        """
        if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
            raise ValueError(f"q, k, v have strides {q.stride()}, {k.stride()}, {v.stride()}; the last ones must be 1")
        if plan.num_decodes:
            self._decodes(plan, layer, q, k, v)
        if plan.num_prefilled:
            rest = slice(plan.num_decodes, None)
            of_prefills = q[rest]
            self._write(plan, layer, k[rest], v[rest])
            self._prefills(plan, layer, of_prefills)
            self._measure_prefills(plan, layer, of_prefills)
        return plan.out

    def _decodes(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        of_layer = self._layers[layer]
        decodes = plan.decodes[of_layer.group]
        mass = plan.mass if plan.mass is not None and layer in plan.mass.rows else None
        if isinstance(decodes, DecodeWork):
            decodes.kernel(
                of_layer.group,
                plan.num_decodes,
                *(q, k, v, of_layer.pool, plan.out, decodes.work, decodes.tables),
                **of_layer.where,
                mass_at=None if mass is None else mass.decodes_at.view(-1, plan.num_decodes)[mass.rows[layer]],
                mass=None if mass is None else mass.values,
            )
            return
        scratch = decodes.scratch
        decode_kernel[self._kv_heads, decodes.num_items](
            *(q, k, v, of_layer.pool, plan.out, decodes.items, decodes.tables),
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
            **of_layer.where,
            **self._options.decode,
            MEASURE=mass is not None,
            num_stages=self._tuning.decode_stages(plan.num_decodes),
        )

    def _write(self, plan: Plan, layer: int, k: Tensor, v: Tensor) -> None:
        of_layer = self._layers[layer]
        write_kernel[(plan.num_prefilled,)](
            *(k, v, of_layer.pool, plan.prefills[of_layer.group].slots),
            k_token=k.stride(0),
            k_head=k.stride(1),
            v_token=v.stride(0),
            v_head=v.stride(1),
            **of_layer.where,
            **self._options.write,
        )

    def _prefills(self, plan: Plan, layer: int, q: Tensor) -> None:
        of_layer = self._layers[layer]
        prefills, out = plan.prefills[of_layer.group], plan.out[plan.num_decodes :]
        shares = (prefills.tiles, prefills.tables, prefills.lowers, prefills.uppers)
        if self._hopper is not None and prefills.scratch is None:
            work = (of_layer.group, of_layer.index, q, out, plan.log_totals, *shares)
            if prefills.widening is not None and prefills.places is not None:
                self._hopper.widened(prefills.widening, prefills.places, *work, num_items=prefills.num_items)
            else:
                self._hopper(*work, num_items=prefills.num_items)
            return
        scratch = prefills.scratch or Scratch(plan.log_totals, plan.log_totals, prefills.slots)
        prefill_kernel[self._kv_heads, prefills.num_items](
            *(q, of_layer.pool, out, plan.log_totals, *shares, scratch.partial, scratch.stats, scratch.arrived),
            q_token=q.stride(0),
            q_head=q.stride(1),
            **of_layer.where,
            **self._options.prefill[of_layer.group],
            SPLIT=prefills.scratch is not None,
        )

    def _measure_prefills(self, plan: Plan, layer: int, q: Tensor) -> None:
        mass = plan.mass
        run = None if mass is None else mass.in_prefills.get(layer)
        if mass is None or run is None:
            return
        of_layer = self._layers[layer]
        prefills = plan.prefills[of_layer.group]
        prefill_mass_kernel[self._kv_heads, run.count, triton.cdiv(run.most_keys, MASS_KEYS)](
            *(q, of_layer.pool, plan.log_totals, mass.prefills, prefills.tables, prefills.uppers, mass.values),
            first=run.first,
            q_token=q.stride(0),
            q_head=q.stride(1),
            **of_layer.where,
            **self._options.mass,
        )
