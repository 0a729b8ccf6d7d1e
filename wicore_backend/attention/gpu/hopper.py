"""The prefill kernels for Hopper, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup

ROWS = 128
"""Of a tile of queries."""
WIDENED_BYTES = 2**28
"""For keys and values in float16, by default, where pools are in FP8."""
_LEAST_TILES = 4
"""Of queries, for each sequence, if its keys are to be widened for them: below, they are read too seldom."""
_WIDENED_VALUES = 2**14  # of a program of `widen_kernel`
_HEAD_AXIS = {LayerGroup.GLOBAL: 1, LayerGroup.LOCAL: 0}
"""Of the kernels' grids. In global layers programs work on one head at a time, whose keys are then read from memory
once: a card that power holds down gets 6 to 9% more of them done. A window's are in the cache either way."""
_PANEL = 64  # values of half a head; of 16 bits, a row of shared memory as the tensor cores read it


def fits(tiling: Tiling, pool: torch.dtype, queries: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are for such pools and queries on this device, with the tiles of each group of layers."""
    layout = tiling.layout
    launches = [tiling.tuning.prefill_of(group) for group in layout.groups]
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and queries.itemsize == 2
        and pool in (queries, FP8)
        and layout.head_dim == 128
        and layout.block_size >= 8
        and tiling.prefill_rows == ROWS
        and all(launch.hopper_stages is not None and launch.keys % layout.block_size == 0 for launch in launches)
    )


@dataclass(frozen=True, slots=True)
class Widening:
    """Which of a step's keys and values in FP8 are written as float16 first.

    Attributes
    ----------
    first_block, blocks
        Of the step's block tables, one after the other: those of the prefills.
    heads
        At once, as the memory for them allows.
    """

    first_block: int
    blocks: int
    heads: int


def widening(
    layout: KVLayout, *, first_block: int, blocks: int, tiles: int, sequences: int, programs: int, memory_bytes: int
) -> Widening | None:
    """How to widen a layer's keys and values for `tiles` tiles of queries of so many sequences; None if not at all.

    Each tile reads all the keys that it sees. To write them as float16 once is cheaper than to have each tile widen
    them, if there are several tiles, and if these, times the heads that are widened at once, fill the card: `programs`
    are at work at the same time.
    """
    if tiles < _LEAST_TILES * sequences:
        return None
    of_head = 2 * 2 * blocks * layout.block_size * layout.head_dim
    heads = layout.kv_heads
    while heads * of_head > memory_bytes:
        if heads % 2:
            return None
        heads //= 2
    if heads < layout.kv_heads and heads * tiles < 2 * programs:
        return None
    return Widening(first_block, blocks, heads)


class HopperPrefill:
    """`hopper_prefill_kernel` over `pools`, or over bytes of e4m3 `hopper_fp8_prefill_kernel`.

    Parameters
    ----------
    tiling
        One that `fits`.
    options
        By group, those of `prefill_kernel` that it has, too.
    widened_bytes
        Device memory for keys and values in float16, if the pools are bytes.
    """

    def __init__(
        self,
        tiling: Tiling,
        pools: Mapping[LayerGroup, Tensor],
        options: Mapping[LayerGroup, Mapping[str, Any]],
        *,
        widened_bytes: int,
    ) -> None:
        # Imported where it is used: the language is for such cards alone.
        from wicore_backend.attention.gpu.kernels.prefill_hopper import hopper_prefill_kernel
        from wicore_backend.attention.gpu.kernels.prefill_hopper_fp8 import hopper_fp8_prefill_kernel

        layout, tuning = tiling.layout, tiling.tuning
        some_pool = next(iter(pools.values()))
        self._from_bytes = some_pool.itemsize == 1
        self._kernel = hopper_prefill_kernel
        self._kernel_of_bytes = hopper_fp8_prefill_kernel
        self._layout = layout
        self._pools = pools
        self._boxes = {
            group: _in_boxes(pool.flatten(4).flatten(0, 3), layout.block_size) for group, pool in pools.items()
        }
        names = ("KV_HEADS", "GROUP", "GROUP_ROWS", "HEAD_DIM", "BLOCK_SIZE", "KEYS", "SOFTCAP", "scale", "softcap")
        self._options = {
            group: {name: of_group[name] for name in names}
            | {"STAGES": tuning.prefill_of(group).hopper_stages, "HEAD_AXIS": _HEAD_AXIS[group], "num_warps": 4}
            for group, of_group in options.items()
        }
        self.widened_bytes = widened_bytes if self._from_bytes else 0
        self._wide = torch.empty(self.widened_bytes // 2, dtype=torch.float16, device=some_pool.device)

    def __call__(
        self,
        group: LayerGroup,
        index: int,
        q: Tensor,
        out: Tensor,
        log_totals: Tensor,
        *plan: Tensor,
        num_items: int,
    ) -> None:
        """Attend in the group's layer number `index`; `plan` are the kernel's tiles, tables, lowers and uppers."""
        kernel = self._kernel_of_bytes if self._from_bytes else self._kernel
        rows = 2 * self._layout.block_size
        kernel[_grid(group, self._layout.kv_heads, num_items)](
            *(q, self._boxes[group], out, log_totals, *plan),
            layer_row=index * rows,
            rows_in_block=self._layout.layers_in[group] * rows,
            q_token=q.stride(0),
            q_head=q.stride(1),
            **self._options[group],
        )

    def widened(
        self,
        widening: Widening,
        places: Tensor,
        group: LayerGroup,
        index: int,
        q: Tensor,
        out: Tensor,
        log_totals: Tensor,
        tiles: Tensor,
        tables: Tensor,
        *bounds: Tensor,
        num_items: int,
    ) -> None:
        """The same over keys and values that are widened first, some heads at a time.

        Parameters
        ----------
        places
            int32, of each entry of `tables` which of the widened blocks it is.
        """
        from wicore_backend.attention.gpu.kernels.widen import widen_kernel

        layout, heads = self._layout, widening.heads
        pool, size, width = self._pools[group], layout.block_size, heads * layout.head_dim
        tokens = min(size, max(1, _WIDENED_VALUES // width))
        wide = self._wide[: widening.blocks * 2 * size * width]
        boxes = _in_boxes(wide.view(-1, width), size)
        of_head = q.shape[1] // layout.kv_heads
        for first_head in range(0, layout.kv_heads, heads):
            widen_kernel[widening.blocks, 2, size // tokens](
                *(pool, wide, tables, widening.first_block, first_head),
                layer_at=index * pool.stride(1),
                block_stride=pool.stride(0),
                KV_HEADS=layout.kv_heads,
                HEADS=heads,
                HEAD_DIM=layout.head_dim,
                BLOCK_SIZE=size,
                TOKENS=tokens,
                num_warps=8,
            )
            queries = slice(first_head * of_head, None)
            self._kernel[_grid(group, heads, num_items)](
                *(q[:, queries], boxes, out[:, first_head * of_head * layout.head_dim :], log_totals[:, queries]),
                *(tiles, places, *bounds),
                layer_row=0,
                rows_in_block=2 * size,
                q_token=q.stride(0),
                q_head=q.stride(1),
                **self._options[group],
            )


def _grid(group: LayerGroup, heads: int, items: int) -> tuple[int, int]:
    return (items, heads) if _HEAD_AXIS[group] else (heads, items)


def _in_boxes(rows: Tensor, block_size: int) -> Any:
    """A descriptor of rows, each a token's keys or values, for copies of half a head of a block."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    bits = 8 * rows.itemsize
    shared = NVMMASharedLayout(swizzle_byte_width=_PANEL * rows.itemsize, element_bitwidth=bits, rank=2)
    return TensorDescriptor.from_tensor(rows, [block_size, _PANEL], shared)
