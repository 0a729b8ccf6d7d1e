"""Keys and values in a byte each: e4m3 numbers without a scale.

A scale would move the range in which e4m3 has 4 bits, from 2^-6 to 448, to where the numbers are. They are there:
Gemma-3's keys leave a norm, and values were found far below the end (docs/benchmarks/kv-fp8.md has what scales for
layers, heads and tokens would change: nothing much, for a float's precision is relative to itself). And what is written
of a token must not depend on those after it, or a block's bytes would not follow from its name.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


def to_fp8(numbers: Tensor) -> Tensor:
    """The nearest e4m3 numbers, half to even; what is beyond `LARGEST` becomes that, and NaN 0.

    A number x is off by at most |x| / 16, or by 2^-10 below 2^-6.
    """
    return numbers.float().nan_to_num(0.0).clamp_(-LARGEST, LARGEST).to(FP8)
