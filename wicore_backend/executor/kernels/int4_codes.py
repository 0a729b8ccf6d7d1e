"""Taking INT4 codes out of their words, two at once, and widening whole matrices, in OpenAI Triton.

A shift and a mask take two codes out of two half-words that share a register: as the fractions of two numbers that are
128 and the code (in float16, 1024 and the code). `quantization/int4.py` says how codes lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix


def takes(weight: Int4Matrix) -> bool:
    """Whether the kernels here read `weight`: so if it is tiled in both ways and its groups are of 32, 64 or 128."""
    tiled = weight.codes.shape[2] == TILE_ROWS and weight.scales.shape[3] == 2
    return tiled and weight.group in (32, 64, 128) and weight.dtype.itemsize == weight.scales.dtype.itemsize == 2


def scale_type(weight: Int4Matrix) -> tl.dtype:
    """Of the scales and zeros, two of which an int32 holds."""
    return tl.bfloat16 if weight.scales.dtype == torch.bfloat16 else tl.float16


@triton.jit
def low(pair, TYPE: tl.constexpr):
    """The lower of two 16-bit floats in an int32, in float32."""
    if tl.bfloat16 == TYPE:
        result = (pair << 16).to(tl.float32, bitcast=True)
    else:
        result = pair.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    return result


@triton.jit
def high(pair, TYPE: tl.constexpr):
    """The upper of two 16-bit floats in an int32, in float32."""
    if tl.bfloat16 == TYPE:
        result = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        result = (pair >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    return result


@triton.constexpr_function
def _raising(at, half):
    """PTX that takes two codes at bit `at` out of two half-words, as fractions of 128 or, in float16, of 1024."""
    return f"""{{
        .reg .b32 pair;
        shr.b32 pair, $1, {at};
        lop3.b32 $0, pair, 0x000f000f, {"0x64006400" if half else "0x43004300"}, 0xea;
    }}"""


@triton.constexpr_function
def _lowering(half, scaled):
    """PTX that takes `$2` from two raised codes and, if `scaled`, multiplies them by `$3`."""
    number = "f16x2" if half else "bf16x2"
    lowered = f"sub.{number} pair, $1, $2; mul.{number} $0, pair, $3;" if scaled else f"sub.{number} $0, $1, $2;"
    return f"{{ .reg .b32 pair; {lowered} }}"


@triton.jit
def raised(codes, AT: tl.constexpr, like, PACKED: tl.constexpr):
    """The codes of four bits at bit `AT` of half-words in the type of `like`, and 128 or, in float16, 1024 more."""
    HALF: tl.constexpr = like.dtype == tl.float16
    if PACKED:
        asm: tl.constexpr = _raising(AT, HALF)
        result = tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=like.dtype, is_pure=True, pack=2)
    else:
        result = (((codes >> AT) & 15) + (1024 if HALF else 128)).to(like.dtype)
    return result


@triton.jit
def lowered(codes, zero, scale, AT: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr):
    """Those codes less `zero`, which is raised likewise, and times `scale` if `SCALED`."""
    HALF: tl.constexpr = zero.dtype == tl.float16
    result = raised(codes, AT, zero, PACKED)
    if PACKED:
        asm: tl.constexpr = _lowering(HALF, SCALED)
        if SCALED:
            result = tl.inline_asm_elementwise(
                asm, "=r,r,r,r", [result, zero, scale], dtype=zero.dtype, is_pure=True, pack=2
            )
        else:
            result = tl.inline_asm_elementwise(asm, "=r,r,r", [result, zero], dtype=zero.dtype, is_pure=True, pack=2)
    else:
        result -= zero
        if SCALED:
            result *= scale
    return result


@triton.jit
def _dequantize(
    codes,
    scales,
    zeros,
    out,
    spans,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    narrow_scales=None,
):
    QUARTER: tl.constexpr = GROUP // 2
    span = tl.program_id(0)
    row = tl.arange(0, TILE_ROWS)[:, None]
    inner = tl.arange(0, QUARTER)[None, :]
    place = (tl.program_id(1) * spans + span) * TILE_ROWS + row
    code = tl.load(codes + place.to(tl.int64) * QUARTER + inner).to(tl.int32)
    scale = tl.load(scales + place)
    if HAS_ZEROS:
        zero = tl.load(zeros + place)
        zero_0, zero_1 = low(zero, SCALE), high(zero, SCALE)
    else:
        zero_0, zero_1 = 8.0, 8.0
    at = out + ((tl.program_id(1) * TILE_ROWS + row).to(tl.int64) * spans + span) * (4 * QUARTER) + inner
    if narrow_scales is not None:
        inverse = tl.div_rn(1.0, tl.load(narrow_scales + tl.program_id(1) * TILE_ROWS + row))
    for quarter in tl.static_range(4):
        value = ((code >> 4 * quarter) & 15).to(tl.float32)
        value = (value - (zero_0 if quarter < 2 else zero_1)) * (
            low(scale, SCALE) if quarter < 2 else high(scale, SCALE)
        )
        if narrow_scales is None:
            tl.store(at + quarter * QUARTER, value.to(out.dtype.element_ty))
        else:
            tl.store(at + quarter * QUARTER, e4m3_of(value * inverse))


def dequantize(weight: Int4Matrix, out: Tensor, *, scale: Tensor | None = None) -> None:
    """Write the matrix into `out` [N, K], contiguous.

    With a `scale`, `fp8_scale`'s, the numbers are in FP8, as `in_fp8` rounds them, and `out` is of bytes.
    """
    tiles, spans = weight.codes.shape[:2]
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _dequantize[(spans, tiles)](
        *(weight.codes.view(torch.int16), weight.scales.view(torch.int32), zeros.view(torch.int32), out, spans),
        GROUP=weight.group,
        TILE_ROWS=TILE_ROWS,
        SCALE=scale_type(weight),
        HAS_ZEROS=weight.zeros is not None,
        narrow_scales=scale,
        num_warps=4,
    )
