"""Copies of many rows at once, between device memory and page-locked memory or within one, in OpenAI Triton.

One launch copies any number of rows, whatever lies between them. A kernel reads and writes page-locked memory over
PCIe nearly as fast as the copy engines do: 51 GB/s up and 53 down, where cudaMemcpyAsync gets 55 of one long copy, 37
of rows of 256 KiB and 12 of rows of 64 KiB, at 6 us of the host's time for each from Python. (H200, PCIe 5;
docs/benchmarks/tiers-on-gpu.md.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_WARPS = 8
_PROGRAMS_ON_DEVICE = 1024
_PROGRAMS_OVER_PCIE = 32
"""8 are enough on an idle GPU; beside a step's matrix products they get half to three quarters of PCIe's rate, 16 get
nine tenths, 32 all of it."""


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _copy_rows(
    source: tl.tensor,
    target: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    from_listed: tl.constexpr,
    to_listed: tl.constexpr,
    tile_words: tl.constexpr,
) -> None:
    tiles = tl.cdiv(width, tile_words)
    for tile in range(tl.program_id(0), count * tiles, tl.num_programs(0)):
        row = (tile // tiles).to(tl.int64)
        at = (tile % tiles) * tile_words + tl.arange(0, tile_words)
        within = at < width
        source_row = tl.load(sources + row) if from_listed else row
        target_row = tl.load(targets + row) if to_listed else row
        values = tl.load(source + source_row * source_stride + at, mask=within)
        tl.store(target + target_row * target_stride + at, values, mask=within)


def copy_rows(
    source: Tensor, target: Tensor, count: int, *, sources: Tensor | None = None, targets: Tensor | None = None
) -> None:
    """Copy `count` rows: row `sources[i]` of `source` [n, width] to row `targets[i]` of `target` [m, width].

    On the current stream. Each tensor is on the device or in page-locked memory; rows are contiguous. The lists, int64
    on the device, may be longer, and stand for 0, 1, 2, ... where they are left out; no target occurs twice.
    """
    anything = source if sources is None else sources  # For a pointer that is not followed.
    over_pcie = source.device.type == "cpu" or target.device.type == "cpu"
    most = _PROGRAMS_OVER_PCIE if over_pcie else _PROGRAMS_ON_DEVICE
    programs = max(1, min(most, count * triton.cdiv(source.shape[1], _TILE)))
    _copy_rows[(programs,)](
        source,
        target,
        anything if sources is None else sources,
        anything if targets is None else targets,
        count,
        source.shape[1],
        source.stride(0),
        target.stride(0),
        from_listed=sources is not None,
        to_listed=targets is not None,
        tile_words=_TILE,
        num_warps=_WARPS,
    )


def copy_rows_plainly(
    source: Tensor, target: Tensor, count: int, *, sources: Tensor | None = None, targets: Tensor | None = None
) -> None:
    """The plain twin of `copy_rows`, for memory that PyTorch reaches on one device."""
    rows = torch.arange(count, device=source.device)
    target[rows if targets is None else targets[:count]] = source[rows if sources is None else sources[:count]]
