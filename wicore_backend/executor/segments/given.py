"""What a segment is given, before a library is: addresses are all that those see, and read whatever is there."""

from __future__ import annotations

import torch
from torch import Tensor

from wicore_backend.errors import EngineError
from wicore_backend.executor.segments.contract import Segment, TensorSpec


def check_given(segment: Segment, spec: TensorSpec, tensor: Tensor, device: torch.device) -> None:
    """Prove that `tensor` is what the contract says of one of a segment's tensors, in order, and on `device`.

    Raises
    ------
    EngineError
        If not: names the segment and the tensor, what it is and what it is to be.
    """
    fits = tensor.dtype is spec.dtype and tensor.shape[1:] == spec.shape[1:] and tensor.is_contiguous()
    there = tensor.device
    if fits and there.type == device.type and (there.index or 0) == (device.index or 0):
        return
    order = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    raise EngineError(
        f"{segment.name}: {spec.name} is {tensor.dtype} {tuple(tensor.shape)}{order} on {there} in place of "
        f"{spec.dtype} {spec.shape} in order on {device}"
    )
