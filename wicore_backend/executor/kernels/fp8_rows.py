"""Rows in FP8, each by its own largest value, where something else writes them anyway: norms and GELU.

The plain twin is `quantized_rows` of what `small` gives. Each row is one program's, since its scale is known when all
of it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps
from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of
from wicore_backend.quantization.fp8 import FP8, FP8_MAX, Fp8Rows


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


@triton.jit(do_not_specialize=["rows"])
def _add_norm_quantized(
    x,
    residual,
    weight,
    next_weight,
    summed,
    out,
    scales,
    rows,
    size,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    within = column < size
    factor = tl.load(weight + column, mask=within, other=0.0)
    next_factor = tl.load(next_weight + column, mask=within, other=0.0)
    follow(OVERLAPPED)
    at = row.to(tl.int64) * size + column
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    carried = tl.load(residual + at, mask=within, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * rows * size + at, mask=within, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / size + eps) * factor
    value += carried
    tl.store(summed + at, value.to(summed.dtype.element_ty), mask=within)
    value *= tl.rsqrt(tl.sum(value * value) / size + eps) * next_factor
    _store_quantized(value, within, out, scales, row, size, column, LARGEST)


def add_norm_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Fp8Rows]:
    """`small.add_norm`, whose second result is in FP8 and was not rounded in between."""
    rows, size = residual.shape
    summed, out = torch.empty_like(residual), _empty(rows, size, residual)
    overlapped = overlaps(x)
    _add_norm_quantized[(rows,)](
        *(x, residual, weight, next_weight, summed, out.values.view(torch.uint8), out.scale, rows, size, eps),
        PARTS=1 if x.dim() == 2 else len(x),
        BLOCK=triton.next_power_of_2(size),
        LARGEST=FP8_MAX,
        OVERLAPPED=overlapped,
        num_warps=_warps(size),
        launch_pdl=overlapped,
    )
    return summed, out


@triton.jit
def _gated_quantized(gate_up, out, scales, size, BLOCK: tl.constexpr, LARGEST: tl.constexpr, OVERLAPPED: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    within = column < size
    follow(OVERLAPPED)
    at = gate_up + row.to(tl.int64) * 2 * size + column
    gate = tl.load(at, mask=within, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=within, other=0.0).to(tl.float32)
    _store_quantized(gelu(gate) * up, within, out, scales, row, size, column, LARGEST)


def gated_quantized(gate_up: Tensor) -> Fp8Rows:
    """`small.gated` of `gate_up` [T, 2 F], in FP8 and not rounded in between: [T, F]."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = _empty(rows, size, gate_up)
    overlapped = overlaps(gate_up)
    _gated_quantized[(rows,)](
        *(gate_up, out.values.view(torch.uint8), out.scale, size),
        BLOCK=triton.next_power_of_2(size),
        LARGEST=FP8_MAX,
        OVERLAPPED=overlapped,
        num_warps=_warps(size),
        launch_pdl=overlapped,
    )
    return out


def _empty(rows: int, size: int, like: Tensor) -> Fp8Rows:
    values = torch.empty(rows, size, dtype=FP8, device=like.device)
    return Fp8Rows(values, torch.empty(rows, dtype=torch.float32, device=like.device))


def _warps(size: int) -> int:
    return max(1, min(32, int(triton.next_power_of_2(size)) // 512))
