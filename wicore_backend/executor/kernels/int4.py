"""Products of a few rows with an INT4 matrix, which is read as it is, in OpenAI Triton.

Codes come out of their words raised (`kernels/int4_codes.py`). What was added comes off each code before the product,
and groups' sums are scaled in float32; for many rows the scale is multiplied in there, too, and there are no sums of
groups. `kernels/products.py` says what starts early and why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from wicore_backend.executor.kernels.int4_codes import high, low, lowered, scale_type
from wicore_backend.executor.kernels.small import gelu, overlaps
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

MAX_ROWS = 128
"""More rows do not fit the registers beside their sums."""


@dataclass(frozen=True, slots=True)
class Int4Tile:
    """How a product is cut.

    Attributes
    ----------
    columns
        Of the result that a program computes; gate and up count each.
    stages
        Spans in flight, less one.
    parts
        Of the inner dimension that a program's warps share out among them: 1, or as many as there are warps.
    splits
        Programs that share the inner dimension, each giving a part of the sum.
    early
        Whether the first span is loaded into registers before the kernel's input is there.
    scaled
        Whether codes are scaled before they are multiplied: rounded once more.
    """

    columns: int
    stages: int
    warps: int = 4
    parts: int = 1
    splits: int = 1
    early: bool = False
    scaled: bool = False

    def fits(self, weight: Int4Matrix) -> bool:
        """Whether `weight` has a whole number of tiles."""
        return weight.shape[0] % self.columns == 0


@triton.jit
def load_rows(x, keep, ROWS: tl.constexpr):
    """A quarter of a span of the rows; a single row as often as a tensor core asks for."""
    loaded = tl.load(x, mask=keep, other=0.0)
    if loaded.shape[-1] == 1:
        if len(loaded.shape) == 2:
            loaded = tl.broadcast_to(loaded, loaded.shape[0], ROWS)
        else:
            loaded = tl.broadcast_to(loaded, loaded.shape[0], loaded.shape[1], ROWS)
    return loaded


@triton.jit
def add_span(
    total,
    span,
    x,
    keep,
    QUARTER: tl.constexpr,
    S: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """`total` and the product of one span: of two groups, each of two quarters."""
    codes, scale, zero = span
    X: tl.constexpr = x.dtype.element_ty
    BASE: tl.constexpr = 128.0 if tl.bfloat16 == X else 1024.0
    if HAS_ZEROS:
        zero_0, zero_1 = low(zero, S) + BASE, high(zero, S) + BASE
    else:
        zero_0 = tl.full([1] * len(codes.shape), BASE + 8, tl.float32)
        zero_1 = zero_0
    scale_0, scale_1 = low(scale, S), high(scale, S)
    x_0 = load_rows(x, keep, total.shape[-1])
    x_1 = load_rows(x + QUARTER, keep, total.shape[-1])
    x_2 = load_rows(x + 2 * QUARTER, keep, total.shape[-1])
    x_3 = load_rows(x + 3 * QUARTER, keep, total.shape[-1])
    if SCALED:
        zero_0, zero_1, scale_0, scale_1 = zero_0.to(X), zero_1.to(X), scale_0.to(X), scale_1.to(X)
        total = tl.dot(lowered(codes, zero_0, scale_0, 0, True, PACKED), x_0, total)
        total = tl.dot(lowered(codes, zero_0, scale_0, 4, True, PACKED), x_1, total)
        total = tl.dot(lowered(codes, zero_1, scale_1, 8, True, PACKED), x_2, total)
        total = tl.dot(lowered(codes, zero_1, scale_1, 12, True, PACKED), x_3, total)
    else:
        zero_0, zero_1 = zero_0.to(X), zero_1.to(X)
        group = tl.dot(lowered(codes, zero_0, 0, 0, False, PACKED), x_0)
        total += scale_0 * tl.dot(lowered(codes, zero_0, 0, 4, False, PACKED), x_1, group)
        group = tl.dot(lowered(codes, zero_1, 0, 8, False, PACKED), x_2)
        total += scale_1 * tl.dot(lowered(codes, zero_1, 0, 12, False, PACKED), x_3, group)
    return total


@triton.jit
def load_span(codes, scales, zeros, there, UNEVEN: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """A span's codes, scales and zeros; zeros for all of them where there is none."""
    if UNEVEN:
        loaded = tl.load(codes, mask=there, other=0), tl.load(scales, mask=there, other=0)
        zero = tl.load(zeros, mask=there, other=0) if HAS_ZEROS else 0
    else:
        loaded = tl.load(codes), tl.load(scales)
        zero = tl.load(zeros) if HAS_ZEROS else 0
    return loaded[0], loaded[1], zero


@triton.jit(do_not_specialize=["rows"])
def _product(
    x,
    codes,
    scales,
    zeros,
    out,
    rows,
    columns,
    spans,
    x_stride,
    ROWS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    UNEVEN: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
    PACKED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_launch_dependents()
    QUARTER: tl.constexpr = GROUP // 2
    lane = tl.arange(0, COLUMNS)
    if GATED:
        half: tl.constexpr = COLUMNS // 2
        column = tl.program_id(0) * half + lane % half + lane // half * columns
    else:
        column = tl.program_id(0) * COLUMNS + lane
    row = tl.arange(0, ROWS)
    x_row = tl.arange(0, 1) if ONE_ROW else row
    inner = tl.arange(0, QUARTER)
    split = tl.program_id(1)
    each = (spans + PARTS * SPLITS - 1) // (PARTS * SPLITS)
    if PARTS == 1:
        span = split * each
        of_column, within, under, of_row = column[:, None], inner[None, :], inner[:, None], x_row[None, :]
    else:
        span = (split * PARTS + tl.arange(0, PARTS)[:, None, None]) * each
        of_column, within = column[None, :, None], inner[None, None, :]
        under, of_row = inner[None, :, None], x_row[None, None, :]
    place = (of_column // TILE_ROWS * spans + span) * TILE_ROWS + of_column % TILE_ROWS
    code_at = codes + place.to(tl.int64) * QUARTER + within
    scale_at = scales + place
    zero_at = zeros + place
    x_at = x + of_row * x_stride + span * (4 * QUARTER) + under
    keep = of_row < rows
    if EARLY:
        # The first tile is on its way before what this kernel follows has ended: weights do not change.
        first = load_span(code_at, scale_at, zero_at, span < spans, UNEVEN, HAS_ZEROS)
    if OVERLAPPED:
        gdc_wait()
    total = tl.zeros([COLUMNS, ROWS] if PARTS == 1 else [PARTS, COLUMNS, ROWS], tl.float32)
    for i in tl.range(EARLY, each, num_stages=STAGES):
        tile = i * TILE_ROWS
        there = span + i < spans
        loaded = load_span(code_at + tile * QUARTER, scale_at + tile, zero_at + tile, there, UNEVEN, HAS_ZEROS)
        here = keep & there if UNEVEN else keep
        x_here = x_at + i * (4 * QUARTER)
        total = add_span(total, loaded, x_here, here, QUARTER, SCALE, HAS_ZEROS, SCALED, PACKED)
    if EARLY:
        # Its rows of x are read only now, so as not to keep the loop's first tiles waiting.
        here = keep & (span < spans) if UNEVEN else keep
        total = add_span(total, first, x_at, here, QUARTER, SCALE, HAS_ZEROS, SCALED, PACKED)
    if PARTS > 1:
        total = tl.sum(total, 0)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, COLUMNS // 2, ROWS]), [1, 2, 0]))
        total = gelu(gate) * up
        column = tl.program_id(0) * half + tl.arange(0, half)
    at = out + (split * rows + row[None, :]) * columns + column[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :])


def int4_product(
    x: Tensor, weight: Int4Matrix, tile: Int4Tile, *, gated: bool = False, result_type: torch.dtype | None = None
) -> Tensor:
    """x W^T of `x` [T, K] and `weight` [N, K]: [T, N], or its parts, float32 [tile.splits, T, N].

    T is `MAX_ROWS` at most.

    Parameters
    ----------
    gated
        The weight is [2 N, K], gate and up: the result is GELU of the gate's product times the up's.
    result_type
        Of a result that is not in parts; that of `x` if it is None.
    """
    rows = len(x)
    columns = weight.shape[0] // (1 + gated)
    spans = weight.codes.shape[1]
    split = tile.splits > 1
    assert not (split and gated), "GELU needs whole sums"
    if split:
        out = x.new_empty(tile.splits, rows, columns, dtype=torch.float32)
    else:
        out = x.new_empty(rows, columns, dtype=result_type or x.dtype)
    overlapped = overlaps(x)
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _product[(columns * (1 + gated) // tile.columns, tile.splits)](
        *(x, weight.codes.view(torch.int16), weight.scales.view(torch.int32), zeros.view(torch.int32), out),
        *(rows, columns, spans, x.stride(0)),
        ROWS=max(8, int(triton.next_power_of_2(rows))),
        ONE_ROW=rows == 1,
        COLUMNS=tile.columns,
        GROUP=weight.group,
        TILE_ROWS=TILE_ROWS,
        EARLY=int(tile.early),
        STAGES=tile.stages,
        PARTS=tile.parts,
        SPLITS=tile.splits,
        UNEVEN=spans % (tile.parts * tile.splits) != 0,
        SCALE=scale_type(weight),
        HAS_ZEROS=weight.zeros is not None,
        SCALED=tile.scaled,
        GATED=gated,
        OVERLAPPED=overlapped,
        PACKED=x.is_cuda,
        num_warps=tile.warps,
        launch_pdl=overlapped,
    )
    return out
