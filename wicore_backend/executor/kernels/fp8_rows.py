"""Rows in FP8, each by its own largest value, where something else writes them anyway: norms and GELU.

The plain twin is `quantized_rows` of what `small` gives. Each row is one program's, since its scale is known when all
of it is. What these read may be a product that still lacks its scales, which it is quicker without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps
from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of
from wicore_backend.quantization.fp8 import FP8, FP8_MAX, Fp8Rows, Rows


@triton.jit
def _store_quantized(value, within, out, scales, row, size, column, LARGEST: tl.constexpr):
    """`value` [BLOCK] of a row, in FP8, and its scale; a row of zeros has the scale 1."""
    largest = tl.max(tl.abs(tl.where(within, value, 0.0)))
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    tl.store(scales + row, scale)
    # Rounding may bring the largest a hair over what the type holds.
    value = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
    tl.store(out + row.to(tl.int64) * size + column, e4m3_of(value), mask=within)


@triton.jit
def _quantize_rows(
    x, out, scales, size, x_stride, BLOCK: tl.constexpr, LARGEST: tl.constexpr, OVERLAPPED: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    within = column < size
    follow(OVERLAPPED)
    value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=within, other=0.0).to(tl.float32)
    _store_quantized(value, within, out, scales, row, size, column, LARGEST)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """`x` [T, K], whose rows may lie apart, in FP8."""
    rows, size = x.shape
    out = _empty(rows, size, x)
    overlapped = overlaps(x)
    _quantize_rows[(rows,)](
        *(x, out.values.view(torch.uint8), out.scale, size, x.stride(0)),
        BLOCK=triton.next_power_of_2(size),
        LARGEST=FP8_MAX,
        OVERLAPPED=overlapped,
        num_warps=_warps(size),
        launch_pdl=overlapped,
    )
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Unscaled:
    """A product whose values are still to be multiplied by a scale of their row and one of their column."""

    values: Tensor
    """[T, N]"""
    row_scale: Tensor
    """float32 [T]"""
    column_scale: Tensor
    """float32 [N]"""

    def scaled(self) -> Tensor:
        """The plain twin of what reads it: float32 [T, N]."""
        return self.values.float() * self.row_scale[:, None] * self.column_scale


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x,
    row_scale,
    column_scale,
    residual,
    weight,
    next_weight,
    summed,
    out,
    scales,
    rows,
    size,
    eps,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    within = column < size
    factor = tl.load(weight + column, mask=within, other=0.0)
    next_factor = tl.load(next_weight + column, mask=within, other=0.0)
    if SCALES:
        scale = tl.load(column_scale + column, mask=within, other=0.0)
    follow(OVERLAPPED)
    at = row.to(tl.int64) * size + column
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    carried = tl.load(residual + at, mask=within, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * rows * size + at, mask=within, other=0.0).to(tl.float32)
    if SCALES:
        value *= scale * tl.load(row_scale + row)
    value *= tl.rsqrt(tl.sum(value * value) / size + eps) * factor
    value += carried
    tl.store(summed + at, value.to(summed.dtype.element_ty), mask=within)
    value *= tl.rsqrt(tl.sum(value * value) / size + eps) * next_factor
    if QUANTIZES:
        _store_quantized(value, within, out, scales, row, size, column, LARGEST)
    else:
        tl.store(out + at, value.to(out.dtype.element_ty), mask=within)


def add_norm(
    x: Tensor | Unscaled, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float, *, quantizes: bool
) -> tuple[Tensor, Rows]:
    """`small.add_norm` of a product that may be unscaled; if it `quantizes`, its second result is in FP8."""
    rows, size = residual.shape
    summed = torch.empty_like(residual)
    normed = _empty(rows, size, residual) if quantizes else torch.empty_like(residual)
    values, row_scale, column_scale = _parts(x)
    out, scales = _written(normed)
    overlapped = overlaps(residual)
    _add_norm[(rows,)](
        *(values, row_scale, column_scale, residual, weight, next_weight, summed, out, scales, rows, size, eps),
        SCALES=isinstance(x, Unscaled),
        PARTS=1 if values.dim() == 2 else len(values),
        QUANTIZES=quantizes,
        BLOCK=triton.next_power_of_2(size),
        LARGEST=FP8_MAX,
        OVERLAPPED=overlapped,
        num_warps=_warps(size),
        launch_pdl=overlapped,
    )
    return summed, normed


@triton.jit
def _gated(
    gate_up,
    row_scale,
    column_scale,
    out,
    scales,
    size,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    within = column < size
    if SCALES:
        gate_scale = tl.load(column_scale + column, mask=within, other=0.0)
        up_scale = tl.load(column_scale + size + column, mask=within, other=0.0)
    follow(OVERLAPPED)
    at = gate_up + row.to(tl.int64) * 2 * size + column
    gate = tl.load(at, mask=within, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=within, other=0.0).to(tl.float32)
    if SCALES:
        scale = tl.load(row_scale + row)
        gate *= gate_scale * scale
        up *= up_scale * scale
    _store_quantized(gelu(gate) * up, within, out, scales, row, size, column, LARGEST)


def gated(gate_up: Tensor | Unscaled) -> Fp8Rows:
    """`small.gated` of a product [T, 2 F] that may be unscaled, in FP8 and not rounded in between: [T, F]."""
    values, row_scale, column_scale = _parts(gate_up)
    rows, size = len(values), values.shape[1] // 2
    fed = _empty(rows, size, values)
    out, scales = _written(fed)
    overlapped = overlaps(values)
    _gated[(rows,)](
        *(values, row_scale, column_scale, out, scales, size),
        SCALES=isinstance(gate_up, Unscaled),
        BLOCK=triton.next_power_of_2(size),
        LARGEST=FP8_MAX,
        OVERLAPPED=overlapped,
        num_warps=_warps(size),
        launch_pdl=overlapped,
    )
    return fed


def _parts(x: Tensor | Unscaled) -> tuple[Tensor, Tensor, Tensor]:
    """Values and scales; a product that has none stands for them, and is not read."""
    return (x, x, x) if isinstance(x, Tensor) else (x.values, x.row_scale, x.column_scale)


def _written(rows: Rows) -> tuple[Tensor, Tensor]:
    return (rows, rows) if isinstance(rows, Tensor) else (rows.values.view(torch.uint8), rows.scale)


def _empty(rows: int, size: int, like: Tensor) -> Fp8Rows:
    values = torch.empty(rows, size, dtype=FP8, device=like.device)
    return Fp8Rows(values, torch.empty(rows, dtype=torch.float32, device=like.device))


def _warps(size: int) -> int:
    return max(1, min(32, int(triton.next_power_of_2(size)) // 512))
