"""Products of 33 to 64 rows with INT4 matrices on Hopper: how the kernel is cut, compiled and called.

`kernels/int4_wide.cu` says what it does and why. It is compiled for each way to cut a matrix when a model's matrices
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

SOURCE = KERNELS / "int4_wide.cu"
MOST_ROWS = 64
ROWS = range(33, MOST_ROWS + 1)
"""Of 32 `kernels/int4.py` is as fast, of 16 faster (docs/benchmarks/int4.md)."""
_WARPGROUPS = (2, 3)
"""That multiply: as many as one multiprocessor has registers for."""
_WARPGROUP = 128
_TILES_OF_WARPGROUP = 8
_SPAN = 256
_X_STAGES = 2
"""The rest of shared memory is for weights, which come from further away."""
_BOXES_ALIGNED = 1024
_BARRIERS = 2 * 8
"""Of a stage."""
_LEAST_SPANS = 2
"""Of a block that gives a part of the sum."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    warpgroups
        That multiply.
    gated
        Whether the matrix is of gate and up, and the result GELU of one times the other.
    half_scales, zeros
        Whether scales are float16, not bfloat16, and whether there are zero points.
    """

    warpgroups: int
    gated: bool = False
    half_scales: bool = False
    zeros: bool = False

    @property
    def tiles(self) -> int:
        """Of 16 outputs, of a block."""
        return self.warpgroups * _TILES_OF_WARPGROUP

    @property
    def code_stages(self) -> int:
        """Of the ring of weights: as many as fit beside that of rows."""
        return (SHARED_BYTES - self._of_rows - (_BOXES_ALIGNED - 1)) // self._of_stage

    @property
    def threads(self) -> int:
        """Of a block: two warps of its last warpgroup copy."""
        return (self.warpgroups + 1) * _WARPGROUP

    @property
    def shared_bytes(self) -> int:
        """Of a block: both rings, and in their place, when all has been multiplied, the sums."""
        codes = -(-self.code_stages * self._of_stage // _BOXES_ALIGNED) * _BOXES_ALIGNED
        sums = MOST_ROWS * (self.tiles * TILE_ROWS + SUM_PADDING) * torch.float32.itemsize
        return max(codes + self._of_rows, sums)

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {
            "WARPGROUPS": self.warpgroups,
            "CODE_STAGES": self.code_stages,
            "X_STAGES": _X_STAGES,
            "GATED": int(self.gated),
            "SCALE_HALF": int(self.half_scales),
            "ZEROS": int(self.zeros),
        }

    @property
    def _of_stage(self) -> int:
        return self.tiles * SPAN_BYTES + _BARRIERS

    @property
    def _of_rows(self) -> int:
        return _X_STAGES * (MOST_ROWS * _SPAN * torch.bfloat16.itemsize + _BARRIERS)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a matrix is shared out among blocks.

    Attributes
    ----------
    warpgroups
        Of a block, each of which has 8 tiles of 16 outputs.
    splits
        Blocks that share an output's inputs, each of which gives a part of the sum.
    """

    warpgroups: int
    splits: int

    @classmethod
    def of(cls, tiles: int, spans: int, *, processors: int, splits: bool) -> Cut:
        """For a matrix of so many tiles of outputs, an even number, and spans of inputs.

        Where it may be in parts, as many blocks as there is room for share the inputs. Of both numbers of warpgroups it
        is the one by which a multiprocessor multiplies less in all; if that is the same, the one of fewer parts.
        """
        cuts = []
        for warpgroups in _WARPGROUPS:
            cut = cls(warpgroups, 1)
            if splits:
                cut = cls(warpgroups, max(1, min(spans // _LEAST_SPANS, processors // cut.blocks(tiles))))
            waves = -(-cut.blocks(tiles) // processors)
            cuts.append((waves * warpgroups * -(-spans // cut.splits), cut.splits, cut))
        return min(cuts, key=lambda each: each[:2])[2]

    def blocks(self, tiles: int) -> int:
        """Of a launch, for so many tiles of outputs."""
        return -(-tiles // (self.warpgroups * _TILES_OF_WARPGROUP)) * self.splits


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64 * 16) for name in ("x", "codes")),
        *POINTERS,
        *((name, ctypes.c_int) for name in ("rows", "tiles", "spans", "splits", "wide")),
        ("_to_multiple_of_64", ctypes.c_int * 5),
    ]


TensorMap = ctypes.Array[ctypes.c_uint64]


def given(x_map: TensorMap, codes_map: TensorMap, weight: Int4Matrix, cut: Cut, out: Tensor) -> ctypes.Structure:
    """The kernel's parameters for `weight` [N, K] and `out` [T, N], or [splits, T, N], or [T, N / 2].

    `x_map` is of x [T, K] in boxes of 64 rows, `codes_map` of `boxed(weight)`.
    """
    tiles, spans = weight.codes.shape[:2]
    return _Product(
        *(x_map, codes_map, *pointers(weight, out)),
        *(out.shape[-2], tiles, spans, cut.splits, out.dtype is torch.float32),
    )


def boxed(weight: Int4Matrix) -> Tensor:
    """Its codes as [tiles, spans x 16, 64] of 16 bits, for boxes of [half of a block's tiles, 16, 64]."""
    return weight.codes.view(torch.int16).view(weight.codes.shape[0], -1, 64)


class WideInt4Product(HopperProduct):
    """Of 33 to 64 rows.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled.
    """

    def __init__(self, role: Role, weight: Int4Matrix) -> None:
        # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
        from wicore_backend.hopper.nvrtc import tensor_map

        tiles, spans = weight.codes.shape[:2]
        self._cut = Cut.of(tiles, spans, processors=processors(weight.device), splits=in_parts(role))
        super().__init__(role, weight, rows=ROWS, splits=self._cut.splits)
        self._blocks = self._cut.blocks(tiles)
        half_scales, zeros = weight.scales.dtype is torch.float16, weight.zeros is not None
        form = Form(self._cut.warpgroups, self._gated, half_scales, zeros)
        self._kernel = compiled(SOURCE, form, weight.device)
        self._tensor_map = tensor_map
        self._codes = tensor_map(boxed(weight), box_rows=TILE_ROWS, box_matrices=form.tiles // 2)

    def _launch(self, x: Tensor, out: Tensor) -> None:
        assert x.dtype is torch.bfloat16, "rows in bfloat16"
        x_map = self._tensor_map(x, box_rows=MOST_ROWS)
        self._kernel.launch(self._blocks, given(x_map, self._codes, self._weight, self._cut, out))


def wide_product(role: Role, weight: Int4Matrix) -> WideInt4Product | None:
    """As `int4_products.made`; nor for QKV and out, where `kernels/int4.py` is faster (docs/benchmarks/int4.md)."""
    return None if role in ("qkv", "out") else made(WideInt4Product, role, weight)
