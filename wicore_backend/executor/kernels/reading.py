"""Reading memory and nothing else: the rate at which no kernel can be beaten, to compare others with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _TIMES = 2048, 8


@triton.jit
def _read(memory, sums, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for time in tl.static_range(TIMES):
        total += tl.load(memory + (program * TIMES + time) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total))


def read_all(memory: Tensor) -> Tensor:
    """Sums, modulo 2**32, of the 16,384 values that each program read of `memory` int32 [a multiple of that]."""
    programs = memory.numel() // (_BLOCK * _TIMES)
    sums = torch.empty(programs, dtype=torch.int32, device=memory.device)
    _read[(programs,)](memory, sums, BLOCK=_BLOCK, TIMES=_TIMES, num_warps=4)
    return sums
