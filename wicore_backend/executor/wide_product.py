"""Products of many rows on Hopper, which two multiprocessors share out between them: how the kernel is cut and called.

`kernels/wide_product.cu` says what it does and why, `kernels/shared_tiles.py` who multiplies what. It is compiled when
a model's matrices are made, once for each type and form, and kept on disk. It takes bfloat16 and float16.
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
from wicore_backend.executor.kernels.shared_tiles import (
    DEPTH,
    ROW_TILES,
    ROWS,
    WEIGHT_ROWS,
    Shares,
    programs,
    sum_parts,
    tile_columns,
)
from wicore_backend.quantization.int4 import Int4Matrix

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

_KERNELS = Path(__file__).parent / "kernels"
SOURCE = _KERNELS / "wide_product.cu"
HEADERS = (*hopper.HEADERS, _KERNELS / "gelu.cuh")
_STAGES = 4
"""Of the ring, as many as fit."""
_CLUSTER = 2
_THREADS = 3 * 128
"""Of a block: two warpgroups multiply, and of a third one thread copies."""
_X_BOX_ROWS, _BOX_ROWS = 64, 128
"""Of x and of the weight, that are copied at once."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    gated
        Whether the weight is of gate and up, and what is given GELU of one times the other.
    half
        Whether numbers are float16, not bfloat16.
    """

    gated: bool
    half: bool = False

    @property
    def shared_bytes(self) -> int:
        """Of a block: the ring, of its rows and the weight's, and two barriers a stage."""
        return _STAGES * ((ROWS // _CLUSTER + WEIGHT_ROWS) * DEPTH * 2 + 2 * 8)

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {"STAGES": _STAGES, "GROUP": ROW_TILES, "GATED": int(self.gated), "FLOAT16": int(self.half)}


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product of so many rows is shared out.

    Attributes
    ----------
    row_tiles, column_tiles
        Of the result.
    pairs
        Of tiles of half as many rows, those that are left: two beside each other are a cluster's.
    steps
        Of the inner dimension, of 64.
    """

    row_tiles: int
    column_tiles: int
    pairs: int
    steps: int
    shares: Shares

    @classmethod
    def of(cls, rows: int, columns: int, depth: int, *, gated: bool, programs: int) -> Cut:
        """Of `rows` times `depth` to `columns` of the result, among so many clusters."""
        row_tiles, column_tiles = -(-rows // ROWS), columns // tile_columns(gated=gated)
        steps, pairs = depth // DEPTH, 0
        # Pairs come last, and tiles that are shared out first, fewer than there are programs.
        if 0 < rows % ROWS <= ROWS // 2 and (row_tiles - 1) * column_tiles >= programs:
            row_tiles, pairs = row_tiles - 1, -(-column_tiles // 2)
        shares = Shares.of(row_tiles * column_tiles + pairs, steps=steps, programs=programs)
        return cls(row_tiles, column_tiles, pairs, steps, shares)

    def blocks(self, programs: int) -> int:
        """Of a launch."""
        return _CLUSTER * min(programs, self.shares.units)


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64 * 16) for name in ("x", "weight")),
        *((name, ctypes.c_void_p) for name in ("out", "parts")),
        *(
            (name, ctypes.c_int)
            for name in ["rows", "row_tiles", "column_tiles", "columns", "steps", "shared", "splits", "units", "stride"]
        ),
        ("_to_multiple_of_64", ctypes.c_int * 3),
    ]


def given(
    x_map: ctypes.Array[ctypes.c_uint64],
    weight_map: ctypes.Array[ctypes.c_uint64],
    out: Tensor,
    parts: Tensor,
    cut: Cut,
) -> ctypes.Structure:
    """The kernel's parameters, for `out` [T, N] and `parts`, float32 [shared, splits, 256, 256]."""
    rows, columns = out.shape
    shares = cut.shares
    return _Product(
        *(x_map, weight_map, out.data_ptr(), parts.data_ptr()),
        *(rows, cut.row_tiles, cut.column_tiles, columns, cut.steps),
        *(shares.shared, shares.splits, shares.units, out.stride(0)),
    )


class WideProduct:
    """x W^T, [T, N], of `x` [T, K] and a `weight` [N, K] in 16 bits; `gated` GELU of x by its first half times x by its
    second, [T, N / 2].

    Parameters
    ----------
    weight
        Which `fits`, on a Hopper card, and stays where it is.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled.
    """

    def __init__(self, weight: Tensor, *, gated: bool) -> None:
        # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
        from wicore_backend.hopper.nvrtc import tensor_map

        self._weight = weight
        self._gated = gated
        self._kernel = _kernel(Form(gated, weight.dtype is torch.float16), weight.device)
        self._map = tensor_map(weight, box_rows=_BOX_ROWS)
        self._x_map = functools.partial(tensor_map, box_rows=_X_BOX_ROWS)
        self._programs = programs(weight.device)

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`x` is `copyable`. `out` may be some columns of a longer row, from a multiple of 8 on."""
        columns = len(self._weight) // (1 + self._gated)
        if out is None:
            out = x.new_empty(len(x), columns)
        cut = Cut.of(len(x), columns, x.shape[1], gated=self._gated, programs=self._programs)
        shares = cut.shares
        parts = x.new_empty(shares.shared, shares.splits, ROWS, WEIGHT_ROWS, dtype=torch.float32)
        self._kernel.launch(cut.blocks(self._programs), given(self._x_map(x), self._map, out, parts, cut))
        if shares.shared:
            sum_parts(parts, out, shares, row_tiles=cut.row_tiles, gated=self._gated)
        return out


def fits(weight: Tensor | Int4Matrix) -> bool:
    """Whether `weight` [N, K], as it is or widened, has a whole number of tiles: N of 256, K of 64; in 16 bits."""
    rows, depth = weight.shape
    return weight.dtype.itemsize == 2 and rows % WEIGHT_ROWS == 0 and depth % DEPTH == 0


def copyable(x: Tensor) -> bool:
    """Whether boxes of `x` [T, K] can be copied: its rows begin at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (len(x) == 1 or x.stride(0) * x.itemsize % 16 == 0)


def compiles(weight: Tensor | Int4Matrix, *, gated: bool) -> bool:
    """Compile the kernel for what is in the type of `weight`, on a Hopper card; whether there is what that takes."""
    try:
        _kernel(Form(gated, weight.dtype is torch.float16), weight.device)
    except (ImportError, OSError, RuntimeError):
        _log.warning("products of many rows are by cuBLAS, which is slower", exc_info=True)
        return False
    return True


@functools.cache
def _kernel(form: Form, device: torch.device) -> Kernel:
    from wicore_backend.hopper.nvrtc import Kernel

    with torch.cuda.device(device):
        return Kernel.of(
            *(SOURCE, HEADERS, form.defines()),
            threads=_THREADS,
            shared_bytes=form.shared_bytes,
            cooperative=False,
            cluster=_CLUSTER,
        )
