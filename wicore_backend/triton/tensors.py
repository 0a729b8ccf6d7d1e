"""Tensors of Triton requests as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def tensors_of(request: Any) -> dict[str, NDArray[Any]]:
    """A request's input tensors by name; STRING tensors hold bytes."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def strings(*values: str) -> NDArray[np.object_]:
    """A STRING tensor [N]."""
    return np.array([value.encode() for value in values], dtype=np.object_)
