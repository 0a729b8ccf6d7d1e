"""Small arrays on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence
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
