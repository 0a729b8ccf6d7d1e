"""Products of 2 to 8 rows with INT4 matrices on Hopper: how the kernel is cut, compiled and called.

`kernels/int4_rows.cu` says what it does and why. It is compiled for each way to cut a matrix when a model's matrices
are made, and kept on disk. It takes bfloat16 and groups of 128.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from wicore_backend.executor.int4_products import (
    KERNELS,
    POINTERS,
    SPAN_BYTES,
    SUM_PADDING,
    HopperProduct,
    compiled,
    in_parts,
    made,
    pointers,
    processors,
)
from wicore_backend.executor.roles import Role
from wicore_backend.hopper import SHARED_BYTES
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

SOURCE = KERNELS / "int4_rows.cu"
MOST_ROWS = 8
"""Of 16 a layer of 27B takes 103 us by this kernel, where `kernels/int4.py` takes 86 (docs/benchmarks/int4.md)."""
_WIDTH, _SPAN = 32, 256
_MOST_WARPS = 11
"""That multiply: with the one that copies three on each of a multiprocessor's four schedulers."""
_MOST_STAGES = 12
_LEAST_SPANS = 4
"""Of a block that gives a part of the sum: parts are written and read again."""


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
        sums = self.parts * MOST_ROWS * (self.tiles * TILE_ROWS + SUM_PADDING) * torch.float32.itemsize
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
        return self.tiles * SPAN_BYTES + MOST_ROWS * _SPAN * torch.bfloat16.itemsize + 2 * 8

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
        *((name, ctypes.c_void_p) for name in ("x", "codes")),
        *POINTERS,
        ("x_row", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "tiles", "spans", "splits", "gated", "wide")),
    ]


def given(x: Tensor, weight: Int4Matrix, cut: Cut, out: Tensor, *, gated: bool) -> ctypes.Structure:
    """The kernel's parameters for `x` [T, K], `weight` [N, K] and `out` [T, N], or [splits, T, N], or [T, N / 2]."""
    assert x.dtype is torch.bfloat16, "rows in bfloat16"
    tiles, spans = weight.codes.shape[:2]
    return _Product(
        *(x.data_ptr(), weight.codes.data_ptr(), *pointers(weight, out)),
        *(x.stride(0) * x.itemsize, len(x), tiles, spans, cut.splits, gated, out.dtype is torch.float32),
    )


class RowsProduct(HopperProduct):
    """Of 2 to 8 rows.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled.
    """

    def __init__(self, role: Role, weight: Int4Matrix) -> None:
        tiles, spans = weight.codes.shape[:2]
        self._cut = Cut.of(tiles, spans, processors=processors(weight.device), splits=in_parts(role))
        super().__init__(role, weight, rows=range(2, MOST_ROWS + 1), splits=self._cut.splits)
        self._blocks = self._cut.blocks(tiles)
        form = Form(self._cut.tiles, weight.scales.dtype is torch.float16, weight.zeros is not None)
        self._kernel = compiled(SOURCE, form, weight.device)

    def _launch(self, x: Tensor, out: Tensor) -> None:
        self._kernel.launch(self._blocks, given(x, self._weight, self._cut, out, gated=self._gated))


def rows_product(role: Role, weight: Int4Matrix) -> RowsProduct | None:
    """As `int4_products.made`."""
    return made(RowsProduct, role, weight)
