"""The prefill kernels for Hopper, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup

ROWS = 128
"""Of a tile of queries."""
_PANEL = 64  # 16-bit values in a row of shared memory as the tensor cores read it


def fits(
    layout: KVLayout, pool: torch.dtype, queries: torch.dtype, device: torch.device, *, rows: int, keys: int
) -> bool:
    """Whether a kernel is for such pools and queries on this device, with tiles of so many rows and keys."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and queries.itemsize == 2
        and pool in (queries, FP8)
        and layout.head_dim == 128
        and layout.block_size >= 8
        and keys % layout.block_size == 0
        and rows == ROWS
    )


class HopperPrefill:
    """`hopper_prefill_kernel` over `pools`, or over bytes of e4m3 `hopper_fp8_prefill_kernel`.

    Parameters
    ----------
    options
        Those of `prefill_kernel` that it has, too.
    stages
        Tiles of keys that are loaded ahead.
    """

    def __init__(
        self, layout: KVLayout, pools: Mapping[LayerGroup, Tensor], options: Mapping[str, Any], *, stages: int
    ) -> None:
        # Imported where it is used: the language is for such cards alone.
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from wicore_backend.attention.gpu.kernels.prefill_hopper import hopper_prefill_kernel
        from wicore_backend.attention.gpu.kernels.prefill_hopper_fp8 import hopper_fp8_prefill_kernel

        size = next(iter(pools.values())).itemsize
        self._kernel = hopper_fp8_prefill_kernel if size == 1 else hopper_prefill_kernel
        self._layout = layout
        shared = NVMMASharedLayout(swizzle_byte_width=_PANEL * size, element_bitwidth=8 * size, rank=2)
        self._pools = {
            group: TensorDescriptor.from_tensor(pool.flatten(4).flatten(0, 3), [layout.block_size, _PANEL], shared)
            for group, pool in pools.items()
        }
        names = ("KV_HEADS", "GROUP", "GROUP_ROWS", "HEAD_DIM", "BLOCK_SIZE", "KEYS", "SOFTCAP", "scale", "softcap")
        self._options = {name: options[name] for name in names} | {"STAGES": stages, "num_warps": 4}

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
        rows = 2 * self._layout.block_size
        self._kernel[self._layout.kv_heads, num_items](
            *(q, self._pools[group], out, log_totals, *plan),
            layer_row=index * rows,
            rows_in_block=self._layout.layers_in[group] * rows,
            q_token=q.stride(0),
            q_head=q.stride(1),
            **self._options,
        )
