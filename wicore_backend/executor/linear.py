"""Linear maps with their weights laid out as the device reads them fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """x W^T + b for x [..., in], `weight` [out, in] and `bias` [out] or None.

    On a CPU in float32 the weight is packed by oneDNN, in the same memory: against torch's own product, one token
    through the demo model's matrices takes 1.0 in place of 2.5 ms on 2 threads, and 16 take 1.7 in place of 3.5.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C._has_mkldnn
        # No batch size is given, so the layout is good for any.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return F.linear(x, self._weight, self._bias)
