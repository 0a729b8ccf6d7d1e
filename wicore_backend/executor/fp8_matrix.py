"""An FP8 matrix on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.kernels.small import gated
from wicore_backend.executor.roles import Role
from wicore_backend.quantization.fp8 import Fp8Matrix


class Fp8GpuMatrix:
    """`Matrix` of an `Fp8Matrix`."""

    def __init__(self, role: Role, weight: Fp8Matrix, bias: Tensor | None = None) -> None:
        self._role = role
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        whole = F.linear(x, self._weight.dequantized(), self._bias)
        if self._role == "gate_up":
            return gated(whole)
        return whole.float() if self._role == "head" else whole
