"""Numbers and norms at the precision at which transformers computes them."""

from __future__ import annotations

import torch
from torch import Tensor


class RMSNorm:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis, in float32, rounded to x's type at the end.

    `weight` is float32 [D] or [heads, D], Gemma's 1 already added. The root is taken as the hypotenuse of |x| and
    sqrt(D eps), the factor sqrt(D) kept in the weight: four kernels in place of the seven of torch's own on a CPU,
    where a decode step is made of little else than launching kernels (4.5 against 9.5 microseconds for D = 256).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self._weight = weight * size**0.5
        self._floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        normed: Tensor = (wide * self._weight).div_(length.hypot_(self._floor))
        return normed if x.dtype == torch.float32 else normed.to(x.dtype)


def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by: sqrt(hidden_size), rounded to the model's type as transformers does.

    sqrt(3072) = 55.4256 becomes 55.5 in bfloat16.
    """
    return torch.tensor(hidden_size**0.5, dtype=dtype).item()
