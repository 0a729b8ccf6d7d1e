"""Small arrays on their way to the device and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """`array` on `device`; nobody waits for the copy, nor for what the device was given before it.

    On the CPU it is `array` itself.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows of `tensor`; nobody waits for the device, as who indexes by a list does."""
    return tensor.index_select(0, to_device(np.array(rows, np.int64), tensor.device))


def to_host(*tensors: Tensor) -> Callable[[], list[NDArray[Any]]]:
    """A call that gives the values of `tensors`, which are all on one device, once they are there.

    On CUDA they are copied at once: a copy that is asked for later waits for all that the device was given meanwhile.
    """
    if not tensors[0].is_cuda:
        return lambda: [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def read() -> list[NDArray[Any]]:
        there.synchronize()
        return [copy.numpy() for copy in copies]

    return read
