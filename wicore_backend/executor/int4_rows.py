"""Products of 2 to 8 rows with INT4 matrices on Hopper: how the kernel is cut, compiled and called.

`kernels/int4_rows.cu` says what it does and why. It is compiled for each way to cut a matrix when a model's matrices
are made, and kept on disk. It takes bfloat16 and groups of 128.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wicore_backend import hopper
from wicore_backend.executor.kernels.small import overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.hopper import SHARED_BYTES
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

_KERNELS = Path(__file__).parent / "kernels"
SOURCE = _KERNELS / "int4_rows.cu"
HEADERS = (*hopper.HEADERS, _KERNELS / "gelu.cuh")
MOST_ROWS = 8
"""Of 16 a layer of 27B takes 103 us by this kernel, where `kernels/int4.py` takes 86 (docs/benchmarks/int4.md)."""
_WIDTH, _GROUP, _SPAN = 32, 128, 256
_MOST_WARPS = 11
"""That multiply: with the one that copies three on each of a multiprocessor's four schedulers."""
_MOST_STAGES = 12
_LEAST_SPANS = 4
"""Of a block that gives a part of the sum: parts are written and read again."""
_PADDING = 4


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    tiles
        Of 16 outputs that a block computes, an even number.
    half_scales, zeros
        Whether scales are float16, not bfloat16, and whether there are zero points.
    """

    tiles: int
    half_scales: bool = False
    zeros: bool = False

    @property
    def pairs(self) -> int:
        """Of tiles: a warp's."""
        return self.tiles // 2

    @property
    def parts(self) -> int:
        """Of a block's warps, which take other spans of the same tiles."""
        return max(1, min(_MOST_WARPS // self.pairs, self._room))

    @property
    def stages(self) -> int:
        """Of the ring: a multiple of the parts."""
        return min(_MOST_STAGES, self._room) // self.parts * self.parts

    @property
    def threads(self) -> int:
        """Of a block: its last warp copies."""
        return (self.pairs * self.parts + 1) * _WIDTH

    @property
    def shared_bytes(self) -> int:
        """Of a block: the ring, and in its place, when all has been multiplied, the parts' sums."""
        sums = self.parts * MOST_ROWS * (self.tiles * TILE_ROWS + _PADDING) * torch.float32.itemsize
        return max(self.stages * self._of_stage, sums)

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {
            "TILES": self.tiles,
            "PARTS": self.parts,
            "STAGES": self.stages,
            "SCALE_HALF": int(self.half_scales),
            "ZEROS": int(self.zeros),
        }

    @property
    def _of_stage(self) -> int:
        """A span of the tiles and of the rows, and two barriers."""
        return self.tiles * TILE_ROWS * _SPAN // 2 + MOST_ROWS * _SPAN * torch.bfloat16.itemsize + 2 * 8

    @property
    def _room(self) -> int:
        """Stages that fit."""
        return SHARED_BYTES // self._of_stage


@dataclass(frozen=True, slots=True)
class Cut:
    """How a matrix is shared out among blocks, so that all run at once if the card has as many multiprocessors.

    Attributes
    ----------
    tiles
        Of 16 outputs, of a block.
    splits
        Blocks that share an output's inputs, each of which gives a part of the sum.
    """

    tiles: int
    splits: int

    @classmethod
    def of(cls, tiles: int, spans: int, *, processors: int, splits: bool) -> Cut:
        """For a matrix of so many tiles of outputs and spans of inputs.

        Where it may be in parts, as many blocks as there is room for share the inputs of the most outputs that a block
        takes; otherwise a block takes as few outputs as make one wave of blocks.
        """
        pairs = tiles // 2
        if splits:
            of_block = min(_MOST_WARPS, pairs)
            return cls(2 * of_block, max(1, min(spans // _LEAST_SPANS, processors // -(-pairs // of_block))))
        return cls(2 * min(_MOST_WARPS, -(-pairs // processors)), 1)

    def blocks(self, tiles: int) -> int:
        """Of a launch, for so many tiles of outputs."""
        return -(-tiles // self.tiles) * self.splits


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "out")),
        ("x_row", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "tiles", "spans", "splits", "gated", "wide")),
    ]


def given(x: Tensor, weight: Int4Matrix, cut: Cut, out: Tensor, *, gated: bool) -> ctypes.Structure:
    """The kernel's parameters for `x` [T, K], `weight` [N, K] and `out` [T, N], or [splits, T, N], or [T, N / 2]."""
    assert x.dtype is torch.bfloat16, "rows in bfloat16"
    tiles, spans = weight.codes.shape[:2]
    zeros = None if weight.zeros is None else weight.zeros.data_ptr()
    return _Product(
        *(x.data_ptr(), weight.codes.data_ptr(), weight.scales.data_ptr(), zeros, out.data_ptr()),
        *(x.stride(0) * x.itemsize, len(x), tiles, spans, cut.splits, gated, out.dtype is torch.float32),
    )


class RowsProduct:
    """x W^T of `x` [T, K], 2 to 8 rows in bfloat16, and an INT4 matrix [N, K].

    Gives [T, N]; of out and down its parts, float32 [splits, T, N]; of gate and up GELU of one times the other,
    [T, N / 2].

    Parameters
    ----------
    role
        Of the matrix, whose form is `fits`.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled.
    """

    def __init__(self, role: Role, weight: Int4Matrix) -> None:
        tiles, spans = weight.codes.shape[:2]
        self._weight = weight
        self._gated = role == "gate_up"
        self._in_parts = role in ("out", "down")
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        self._cut = Cut.of(tiles, spans, processors=processors, splits=self._in_parts)
        self._blocks = self._cut.blocks(tiles)
        form = Form(self._cut.tiles, weight.scales.dtype is torch.float16, weight.zeros is not None)
        self._kernel = _kernel(form, weight.device)

    def takes(self, x: Tensor) -> bool:
        """Whether it is for so many rows, and they can be copied by 16 bytes."""
        apart = x.stride(0) * x.itemsize
        return 1 < len(x) <= MOST_ROWS and x.stride(1) == 1 and x.data_ptr() % 16 == apart % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        columns = self._weight.shape[0] // (1 + self._gated)
        dtype = torch.float32 if self._in_parts else x.dtype
        out = x.new_empty((self._cut.splits, len(x), columns) if self._in_parts else (len(x), columns), dtype=dtype)
        self._kernel.launch(self._blocks, given(x, self._weight, self._cut, out, gated=self._gated))
        return out


def fits(weight: Int4Matrix) -> bool:
    """Whether the kernel multiplies by such a matrix."""
    tensors = [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]
    return (
        weight.dtype is torch.bfloat16
        and weight.codes.shape[2] == TILE_ROWS
        and weight.codes.shape[0] % 2 == 0
        and weight.scales.shape[3] == 2
        and weight.group == _GROUP
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def rows_product(role: Role, weight: Int4Matrix) -> RowsProduct | None:
    """The product with a layer's matrix on this device; None if that is of another kind or has not what compiles it, or
    the matrix does not fit."""
    if role == "head" or not overlaps(weight.codes) or not fits(weight):
        return None
    try:
        return RowsProduct(role, weight)
    except (ImportError, OSError, RuntimeError):
        _log.warning("products of few rows with INT4 are by another kernel, which is slower", exc_info=True)
        return None


@functools.cache
def _kernel(form: Form, device: torch.device) -> Kernel:
    # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
    from wicore_backend.hopper.nvrtc import Kernel

    with torch.cuda.device(device):
        return Kernel.of(
            SOURCE, HEADERS, form.defines(), threads=form.threads, shared_bytes=form.shared_bytes, cooperative=False
        )
