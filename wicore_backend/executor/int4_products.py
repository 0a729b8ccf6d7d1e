"""What products with INT4 matrices by kernels in CUDA C++ for Hopper have in common, whichever rows they are for."""

from __future__ import annotations

import ctypes
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from wicore_backend import hopper
from wicore_backend.executor.kernels.small import overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

KERNELS = Path(__file__).parent / "kernels"
HEADERS = (*hopper.HEADERS, KERNELS / "gelu.cuh", KERNELS / "int4_tiles.cuh")
SPAN_BYTES = 2048
"""Of a tile's codes."""
SUM_PADDING = 4
"""Numbers behind each row of a block's sums."""
_GROUP = 128


class Form(Protocol):
    """What a kernel is compiled for; hashable."""

    @property
    def threads(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    def defines(self) -> dict[str, int]: ...


class HopperProduct(ABC):
    """x W^T of `x` [T, K] in bfloat16 and an INT4 matrix [N, K].

    Gives [T, N]; of out and down its parts, float32 [splits, T, N]; of gate and up GELU of one times the other,
    [T, N / 2].

    Parameters
    ----------
    role
        Of the matrix, whose form is `fits`.
    rows
        That it is for.
    splits
        Parts of a sum, of out and down.
    """

    def __init__(self, role: Role, weight: Int4Matrix, *, rows: range, splits: int) -> None:
        self._weight = weight
        self._gated = role == "gate_up"
        self._rows = rows
        self._splits = splits if in_parts(role) else None

    def takes(self, x: Tensor) -> bool:
        """Whether it is for so many rows, and they can be copied by 16 bytes."""
        apart = x.stride(0) * x.itemsize
        return len(x) in self._rows and x.stride(1) == 1 and x.data_ptr() % 16 == apart % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        shape = (len(x), self._weight.shape[0] // (1 + self._gated))
        out = x.new_empty(shape) if self._splits is None else x.new_empty(self._splits, *shape, dtype=torch.float32)
        self._launch(x, out)
        return out

    @abstractmethod
    def _launch(self, x: Tensor, out: Tensor) -> None: ...


_Product = TypeVar("_Product", bound=HopperProduct)


def in_parts(role: Role) -> bool:
    """Whether a role's result may be parts of sums, which the norm after it adds."""
    return role in ("out", "down")


def fits(weight: Int4Matrix) -> bool:
    """Whether the kernels multiply by such a matrix."""
    tensors = [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]
    return (
        weight.dtype is torch.bfloat16
        and weight.codes.shape[2] == TILE_ROWS
        and weight.codes.shape[0] % 2 == 0
        and weight.scales.shape[3] == 2
        and weight.group == _GROUP
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def made(product: Callable[[Role, Int4Matrix], _Product], role: Role, weight: Int4Matrix) -> _Product | None:
    """The product with a layer's matrix on this device; None if that is of another kind or has not what compiles it, or
    the matrix does not fit."""
    if role == "head" or not overlaps(weight.codes) or not fits(weight):
        return None
    try:
        return product(role, weight)
    except (ImportError, OSError, RuntimeError):
        _log.warning("products of few rows with INT4 are by another kernel, which is slower", exc_info=True)
        return None


def processors(device: torch.device) -> int:
    """Multiprocessors, each of which has one block."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def compiled(source: Path, form: Form, device: torch.device) -> Kernel:
    """The kernel of a source that includes `HEADERS`, as often as it is asked for the same one.

    Raises
    ------
    RuntimeError
        If it cannot be compiled.
    """
    # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
    from wicore_backend.hopper.nvrtc import Kernel

    with torch.cuda.device(device):
        return Kernel.of(
            source, HEADERS, form.defines(), threads=form.threads, shared_bytes=form.shared_bytes, cooperative=False
        )


def pointers(weight: Int4Matrix, out: Tensor) -> tuple[int, int | None, int]:
    """Where scales, zero points and the result are, as kernels' parameters have them."""
    zeros = None if weight.zeros is None else weight.zeros.data_ptr()
    return weight.scales.data_ptr(), zeros, out.data_ptr()


POINTERS = [(name, ctypes.c_void_p) for name in ("scales", "zeros", "out")]
