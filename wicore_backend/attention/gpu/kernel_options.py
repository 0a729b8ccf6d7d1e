"""What the attention kernels are always given: the constants that they are compiled with, and how scores are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import triton

from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import MASS_KEYS
from wicore_backend.hmt.layout import LayerGroup

_LOG2_E = 1.4426950408889634
_MASS_ROWS = 64  # of its queries, at least
_COMBINED_AT_ONCE = 4096  # values of partial results that a program holds while it puts them together

Options = Mapping[str, Any]
"""Arguments of a launch, by their names in the kernel or in OpenAI Triton."""


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """Of each kernel: `write_kernel`, `decode_kernel` but for its stages, which depend on the step, `prefill_kernel` by
    group, and `prefill_mass_kernel`."""

    write: Options
    decode: Options
    prefill: Mapping[LayerGroup, Options]
    mass: Options

    @classmethod
    def of(cls, tiling: Tiling, *, scale: float, softcap: float | None, overlapped: bool) -> Self:
        """For a model's heads on a card.

        Parameters
        ----------
        scale, softcap
            As for `TorchPagedAttention`.
        overlapped
            Whether a launch begins while the kernel before it ends (programmatic dependent launch).
        """
        layout, tuning = tiling.layout, tiling.tuning
        dims = max(16, triton.next_power_of_2(layout.head_dim))
        heads: dict[str, Any] = {
            "KV_HEADS": layout.kv_heads,
            "HEAD_DIM": layout.head_dim,
            "DIMS": dims,
            "BLOCK_SIZE": layout.block_size,
        }
        scoring = heads | {
            "GROUP": tiling.group,
            "GROUP_ROWS": tiling.group_rows,
            # Scores are powers of two; see `capped` in the kernels.
            "scale": scale * _LOG2_E if softcap is None else scale / softcap,
            "softcap": 0.0 if softcap is None else softcap * _LOG2_E,
            "SOFTCAP": softcap is not None,
            "PRECISION": "ieee",
        }
        launches = {group: tuning.prefill_of(group) for group in layout.groups}
        return cls(
            write=heads
            | {
                "HEADS": triton.next_power_of_2(layout.kv_heads),
                "OVERLAPPED": overlapped,
                "launch_pdl": overlapped,
            },
            decode=scoring
            | {
                "OVERLAPPED": overlapped,
                "ROWS": max(16, tiling.group_rows),
                "KEYS": tuning.decode.keys,
                "CELL": tiling.cell,
                "AT_ONCE": max(1, _COMBINED_AT_ONCE // (tiling.group_rows * dims)),
                "num_warps": tuning.decode.warps,
                "launch_pdl": overlapped,
            },
            prefill={
                group: scoring
                | {
                    "ROWS": tiling.prefill_rows,
                    "KEYS": launch.keys,
                    "num_warps": launch.warps,
                    "num_stages": launch.stages,
                }
                for group, launch in launches.items()
            },
            mass=scoring
            | {
                "TOKENS": max(1, _MASS_ROWS // tiling.group_rows),
                "KEYS": MASS_KEYS,
                "CELL": tiling.cell,
            },
        )
