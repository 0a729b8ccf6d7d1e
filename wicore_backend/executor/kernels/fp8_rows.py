"""Rows in FP8, each by its own largest value, where something else writes them anyway: norms and GELU.

The plain twin is `quantized_rows` of what `small` gives. Each row is one program's, since its scale is known when all
of it is; a program has row after row where there are many, and the weights once. What these read may be a product that
still lacks its scales, which it is quicker without.

Instructions are what takes the time, so a row is two pieces, a power of two and what is left, not padded to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.executor.kernels.small import follow, gelu, overlaps, processors
from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of
from wicore_backend.quantization.fp8 import FP8, FP8_MAX, LEAST_SCALE, Fp8Rows, Rows

_MANY_ROWS = 256
"""From as many on a program has fewer warps, each with more to do: docs/benchmarks/fp8.md."""


@triton.jit
def _row_scale_of(largest, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """A row's scale, and its inverse."""
    scale = tl.where(largest > 0, tl.maximum(largest * (1.0 / LARGEST), LEAST), 1.0)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _store_row(value, more, out, scales, row, size, column, rest, within, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """The two pieces of a row in FP8, and its scale."""
    scale, inverse = _row_scale_of(tl.maximum(tl.max(tl.abs(value)), tl.max(tl.abs(more))), LARGEST, LEAST)
    tl.store(scales + row, scale)
    tl.store(out + row * size + column, e4m3_of(value * inverse))
    tl.store(out + row * size + rest, e4m3_of(more * inverse), mask=within)


@triton.jit
def _quantize_rows(
    x,
    out,
    scales,
    size,
    x_stride,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, FIRST)
    rest = FIRST + tl.arange(0, REST)
    within = rest < size
    follow(OVERLAPPED)
    at = x + row * x_stride
    value = tl.load(at + column).to(tl.float32)
    more = tl.load(at + rest, mask=within, other=0.0).to(tl.float32)
    _store_row(value, more, out, scales, row, size, column, rest, within, LARGEST, LEAST)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """`x` [T, K], whose rows may lie apart, in FP8."""
    rows, size = x.shape
    out = _empty(rows, size, x)
    overlapped = overlaps(x)
    first, rest = _pieces(size)
    _quantize_rows[(rows,)](
        *(x, out.values.view(torch.uint8), out.scale, size, x.stride(0)),
        FIRST=first,
        REST=rest,
        LARGEST=FP8_MAX,
        LEAST=LEAST_SCALE,
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


@triton.jit
def _added(at, mask, part_size, PARTS: tl.constexpr):
    """Some columns of a row, the sum of its parts."""
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(at + part * part_size, mask=mask, other=0.0).to(tl.float32)
    return value


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
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    column = tl.arange(0, FIRST)
    rest = FIRST + tl.arange(0, REST)
    all_within = column < FIRST
    within = rest < size
    factor = tl.load(weight + column)
    rest_factor = tl.load(weight + rest, mask=within, other=0.0)
    next_factor = tl.load(next_weight + column)
    rest_next_factor = tl.load(next_weight + rest, mask=within, other=0.0)
    if SCALES:
        scale = tl.load(column_scale + column)
        rest_scale = tl.load(column_scale + rest, mask=within, other=0.0)
    follow(OVERLAPPED)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * size
        value = _added(x + start + column, all_within, rows * size, PARTS)
        more = _added(x + start + rest, within, rows * size, PARTS)
        if SCALES:
            of_row = tl.load(row_scale + row)
            value *= scale * of_row
            more *= rest_scale * of_row
        root = tl.rsqrt((tl.sum(value * value) + tl.sum(more * more)) / size + eps)
        value = value * (root * factor) + tl.load(residual + start + column).to(tl.float32)
        more = more * (root * rest_factor) + tl.load(residual + start + rest, mask=within, other=0.0).to(tl.float32)
        tl.store(summed + start + column, value.to(summed.dtype.element_ty))
        tl.store(summed + start + rest, more.to(summed.dtype.element_ty), mask=within)
        root = tl.rsqrt((tl.sum(value * value) + tl.sum(more * more)) / size + eps)
        value *= next_factor
        more *= rest_next_factor
        if QUANTIZES:
            largest = tl.maximum(tl.max(tl.abs(value)), tl.max(tl.abs(more)))
            of_row, inverse = _row_scale_of(largest * root, LARGEST, LEAST)
            tl.store(scales + row, of_row)
            tl.store(out + start + column, e4m3_of(value * (root * inverse)))
            tl.store(out + start + rest, e4m3_of(more * (root * inverse)), mask=within)
        else:
            tl.store(out + start + column, (value * root).to(out.dtype.element_ty))
            tl.store(out + start + rest, (more * root).to(out.dtype.element_ty), mask=within)


def add_norm(
    x: Tensor | Unscaled,
    residual: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    eps: float,
    *,
    quantizes: bool,
) -> tuple[Tensor, Rows]:
    """`small.add_norm` of a product that may be unscaled; if it `quantizes`, its second result is in FP8."""
    rows, size = residual.shape
    summed = torch.empty_like(residual)
    normed = _empty(rows, size, residual) if quantizes else torch.empty_like(residual)
    values, row_scale, column_scale = _parts(x)
    out, scales = _written(normed)
    warps, programs = (_warps(size), rows) if rows < _MANY_ROWS else (4, 2 * processors(residual.device))
    overlapped = overlaps(residual)
    first, rest = _pieces(size)
    _add_norm[(min(rows, programs),)](
        *(values, row_scale, column_scale, residual, weight, next_weight, summed, out, scales, rows, size, eps),
        SCALES=isinstance(x, Unscaled),
        PARTS=1 if values.dim() == 2 else len(values),
        QUANTIZES=quantizes,
        FIRST=first,
        REST=rest,
        LARGEST=FP8_MAX,
        LEAST=LEAST_SCALE,
        OVERLAPPED=overlapped,
        num_warps=warps,
        launch_pdl=overlapped,
    )
    return summed, normed


@triton.jit
def _fed(at, column_scale, of_row, size, column, mask, SCALES: tl.constexpr):
    """GELU of some columns of gate times those of up."""
    gate = tl.load(at + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + size + column, mask=mask, other=0.0).to(tl.float32)
    if SCALES:
        gate *= tl.load(column_scale + column, mask=mask, other=0.0) * of_row
        up *= tl.load(column_scale + size + column, mask=mask, other=0.0) * of_row
    return gelu(gate) * up


@triton.jit
def _gated(
    gate_up,
    row_scale,
    column_scale,
    out,
    scales,
    size,
    SCALES: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, FIRST)
    rest = FIRST + tl.arange(0, REST)
    within = rest < size
    follow(OVERLAPPED)
    of_row = tl.load(row_scale + row) if SCALES else 1.0
    at = gate_up + row * 2 * size
    value = _fed(at, column_scale, of_row, size, column, column < FIRST, SCALES)
    more = _fed(at, column_scale, of_row, size, rest, within, SCALES)
    _store_row(value, more, out, scales, row, size, column, rest, within, LARGEST, LEAST)


def gated(gate_up: Tensor | Unscaled) -> Fp8Rows:
    """`small.gated` of a product [T, 2 F] that may be unscaled, in FP8 and not rounded in between: [T, F]."""
    values, row_scale, column_scale = _parts(gate_up)
    rows, size = len(values), values.shape[1] // 2
    fed = _empty(rows, size, values)
    out, scales = _written(fed)
    overlapped = overlaps(values)
    first, rest = _pieces(size)
    _gated[(rows,)](
        *(values, row_scale, column_scale, out, scales, size),
        SCALES=isinstance(gate_up, Unscaled),
        FIRST=first,
        REST=rest,
        LARGEST=FP8_MAX,
        LEAST=LEAST_SCALE,
        OVERLAPPED=overlapped,
        num_warps=_warps(size) if rows < _MANY_ROWS else 8,
        launch_pdl=overlapped,
    )
    return fed


def _parts(x: Tensor | Unscaled) -> tuple[Tensor, Tensor, Tensor]:
    """Values and scales; a product that has none stands for them, and is not read."""
    return (x, x, x) if isinstance(x, Tensor) else (x.values, x.row_scale, x.column_scale)


def _written(rows: Tensor | Fp8Rows) -> tuple[Tensor, Tensor]:
    return (rows, rows) if isinstance(rows, Tensor) else (rows.values.view(torch.uint8), rows.scale)


def _empty(rows: int, size: int, like: Tensor) -> Fp8Rows:
    values = torch.empty(rows, size, dtype=FP8, device=like.device)
    return Fp8Rows(values, torch.empty(rows, dtype=torch.float32, device=like.device))


def _pieces(size: int) -> tuple[int, int]:
    """Of a row: the largest power of two, and the smallest that holds the rest."""
    first = 1 << (size.bit_length() - 1)
    return first, int(triton.next_power_of_2(max(1, size - first)))


def _warps(size: int) -> int:
    return max(1, min(32, int(triton.next_power_of_2(size)) // 512))
