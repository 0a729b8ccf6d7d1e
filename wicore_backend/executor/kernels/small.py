"""The small kernels of the dense segments, in OpenAI Triton. Their plain twin is `TorchExecutor`.

Each reads every value once, computes in float32 and rounds at its end. On Hopper they lie over their neighbours: the
next kernel may start as soon as they have, and they have read what does not change when their input is there.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_WARPS = 4
_MANY_ROWS, _VERY_MANY_ROWS = 256, 2048
_GATED_BLOCK = 1024
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlaps(x: Tensor) -> bool:
    """Whether kernels on the device of `x` start before the one that they follow has ended: so on Hopper."""
    return x.is_cuda and _is_hopper(x.device)


@triton.jit
def follow(OVERLAPPED: tl.constexpr):
    """Let the next kernel start, and wait for what the last one wrote (programmatic dependent launch)."""
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _embed(ids, table, out, size, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < size
    source = tl.load(ids + row).to(tl.int64)
    value = tl.load(table + source * size + column, mask=within).to(tl.float32)
    tl.store(out + row * size + column, (value * scale).to(out.dtype.element_ty), mask=within)


def embed(ids: Tensor, table: Tensor, scale: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `ids` int [T] of `table` [V, D], times `scale`: [T, D] beside `ids`, in `dtype` or that of the table.

    The table may lie in page-locked memory of the host.
    """
    size = table.shape[1]
    out = ids.new_empty(len(ids), size, dtype=dtype or table.dtype)
    _embed[(len(ids), triton.cdiv(size, 2048))](ids, table, out, size, scale, BLOCK=2048, num_warps=_WARPS)
    return out


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    residual,
    weight,
    next_weight,
    summed,
    out,
    rows,
    size,
    eps,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    within = column < size
    factor = tl.load(weight + column, mask=within, other=0.0)
    if ADDS:
        next_factor = tl.load(next_weight + column, mask=within, other=0.0)
    follow(OVERLAPPED)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        at = row * size + column
        value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
        if ADDS:
            carried = tl.load(residual + at, mask=within, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            value += tl.load(x + part * rows * size + at, mask=within, other=0.0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value) / size + eps) * factor
        if ADDS:
            value += carried
            tl.store(summed + at, value.to(summed.dtype.element_ty), mask=within)
            value *= tl.rsqrt(tl.sum(value * value) / size + eps) * next_factor
        tl.store(out + at, value.to(out.dtype.element_ty), mask=within)


class _NormLaunch(NamedTuple):
    """Warps of a program; how many programs a multiprocessor has, if rows are that many; rows that are loaded ahead."""

    warps: int
    programs: int
    stages: int


def _norm_launch(rows: int, size: int) -> _NormLaunch:
    """The fastest of those measured in docs/benchmarks/hopper.md: many rows share the reading of the weights."""
    if rows < _MANY_ROWS:
        return _NormLaunch(max(1, min(16, int(triton.next_power_of_2(size)) // 512)), rows, 1)
    return _NormLaunch(4, 4, 1) if rows < _VERY_MANY_ROWS else _NormLaunch(8, 2, 3)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of `x` [T, D] times `weight` float32 [D]."""
    out = torch.empty_like(x)
    rows, size = x.shape
    launch = _norm_launch(rows, size)
    _norm[(min(rows, launch.programs * processors(x.device)),)](
        *(x, x, weight, weight, out, out, rows, size, eps),
        ADDS=False,
        PARTS=1,
        STAGES=launch.stages,
        BLOCK=triton.next_power_of_2(size),
        OVERLAPPED=False,
        num_warps=launch.warps,
    )
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a part of a layer, and what the next part reads.

    Parameters
    ----------
    x
        [T, D] that the part gave, or float32 [S, T, D] whose sum over S it is.
    residual
        [T, D], the stream so far.
    weight
        float32 [D] of the norm on `x`.
    next_weight
        float32 [D] of the norm on the sum, which gives the second result.
    """
    summed, out = torch.empty_like(residual), torch.empty_like(residual)
    rows, size = residual.shape
    launch = _norm_launch(rows, size)
    overlapped = overlaps(x)
    _norm[(min(rows, launch.programs * processors(x.device)),)](
        *(x, residual, weight, next_weight, summed, out, rows, size, eps),
        ADDS=True,
        PARTS=1 if x.dim() == 2 else len(x),
        STAGES=launch.stages,
        BLOCK=triton.next_power_of_2(size),
        OVERLAPPED=overlapped,
        num_warps=launch.warps,
        launch_pdl=overlapped,
    )
    return summed, out


@triton.jit
def _qk_norm_rope(
    product,
    weight,
    cos,
    sin,
    row_size,
    table_stride,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    program = tl.program_id(0)
    of_row: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    row = (program // of_row).to(tl.int64)
    head = program % of_row * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    within = (head < HEADS) & (column < HALF)
    weights = weight + head * (2 * HALF) + column
    factor_a = tl.load(weights, mask=within, other=0.0)
    factor_b = tl.load(weights + HALF, mask=within, other=0.0)
    follow(OVERLAPPED)
    first = product + row * row_size + head * (2 * HALF) + column
    a = tl.load(first, mask=within, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=within, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    a *= scale * factor_a
    b *= scale * factor_b
    at = row * table_stride + column  # Both halves of a head turn by the same angles.
    c = tl.load(cos + at, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=column < HALF, other=0.0).to(tl.float32)
    tl.store(first, (a * c - b * s).to(product.dtype.element_ty), mask=within)
    tl.store(first + HALF, (b * c + a * s).to(product.dtype.element_ty), mask=within)


def qk_norm_rope(product: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """Normalise and rotate the query and key heads of `product` [T, (Hq + 2 Hkv) d], the QKV product, in place.

    `weight` is float32 [Hq + Hkv, d]; `cos` and `sin` are [T, d], with one row stride.
    """
    heads, head_dim = weight.shape
    block = min(8, triton.next_power_of_2(heads))
    programs = len(product) * triton.cdiv(heads, block)
    overlapped = overlaps(product)
    _qk_norm_rope[(programs,)](
        *(product, weight, cos, sin, product.shape[1], cos.stride(0), eps),
        HEADS=heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        HEADS_BLOCK=block,
        OVERLAPPED=overlapped,
        num_warps=_WARPS,
        launch_pdl=overlapped,
    )


@triton.jit
def gelu(x):
    """GELU in its tanh form: x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    # Written as exp and a quotient it takes twice the instructions, to keep subnormals, which are nothing beside 1.
    return x * _one_over_1_plus_exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x))


@triton.jit
def _one_over_1_plus_exp2(x):
    if _INTERPRETED:
        result = 1.0 / (1.0 + tl.exp2(x))
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _gated(gate_up, out, size, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr):
    follow(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=within, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=within, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gelu(gate) * up).to(out.dtype.element_ty), mask=within)


def gated(gate_up: Tensor) -> Tensor:
    """GELU of the first half of each row of `gate_up` [T, 2 F], times the second: [T, F]."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    overlapped = overlaps(gate_up)
    _gated[(rows, triton.cdiv(size, _GATED_BLOCK))](
        gate_up, out, size, BLOCK=_GATED_BLOCK, OVERLAPPED=overlapped, num_warps=_WARPS, launch_pdl=overlapped
    )
    return out
