"""What the attention kernels share: keys and values out of blocks, and the running softmax over tiles of them.

A pool of bytes holds e4m3 numbers (`hmt/fp8.py`). They are multiplied as float16, which holds them exactly.

Scores are kept in powers of two, since that is the exponential that the hardware has: 2^(s log2 e) = e^s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_of, finite
from wicore_backend.hmt.fp8 import LARGEST

_LARGEST = tl.constexpr(LARGEST)
LOG2_E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)
"""Below any score. Finite, so that a row that has seen no key yet is no NaN."""


@triton.jit
def token_rows(
    pool, table, at, there, block_stride,
    ROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Pointers [KEYS] to where the tokens from position `at`, a multiple of KEYS, on lie in one layer of the pool."""
    if BLOCK_SIZE % KEYS == 0:  # One look at the table, and offsets that are the same for every tile.
        block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        rows = pool + block * block_stride + (at % BLOCK_SIZE) * ROW + tl.arange(0, KEYS) * ROW
    else:
        positions = at + tl.arange(0, KEYS)
        if MASKED:
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=there, other=0)
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE)
        rows = pool + blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * ROW
    return rows


@triton.jit
def as_stored(numbers, element: tl.constexpr):
    """Keys or values as elements of a pool."""
    return e4m3_of(finite(numbers.to(tl.float32), _LARGEST)) if element == tl.uint8 else numbers.to(element)


@triton.jit
def as_numbers(stored, dtype: tl.constexpr, IN_PLACE: tl.constexpr = False):
    """Elements of a pool as numbers of `dtype`; see `load_tile` for IN_PLACE."""
    if stored.dtype == tl.uint8:
        if not cuda_capability_geq(8, 9):
            # Their exponents count from 7, those of float16 from 15.
            bits = ((stored.to(tl.uint16) & 0x7F) << 7) | ((stored.to(tl.uint16) & 0x80) << 8)
            numbers = bits.to(tl.float16, bitcast=True) * 256.0
        elif IN_PLACE:
            numbers = tl.inline_asm_elementwise(
                """{
                .reg .b16 low, high;
                mov.b32 {low, high}, $2;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
                }""",
                constraints="=r,=r,r",
                args=[stored],
                dtype=tl.float16,
                is_pure=False,  # So it is done where it stands.
                pack=4,
            )
        else:
            numbers = stored.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        numbers = stored
    return numbers.to(dtype)


@triton.jit
def halves_of(pairs, dtype: tl.constexpr):
    """The lower and the higher of pairs of e4m3 bytes, int16, as numbers of `dtype`."""
    if cuda_capability_geq(8, 9):
        lower = tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b16 picked, rest;
            prmt.b32 both, $1, 0, 0x4420;
            mov.b32 {picked, rest}, both;
            cvt.rn.f16x2.e4m3x2 $0, picked;
            }""",
            constraints="=r,r",
            args=[pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        higher = tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b16 picked, rest;
            prmt.b32 both, $1, 0, 0x4431;
            mov.b32 {picked, rest}, both;
            cvt.rn.f16x2.e4m3x2 $0, picked;
            }""",
            constraints="=r,r",
            args=[pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        lower = as_numbers((pairs & 0xFF).to(tl.uint8), tl.float16)
        higher = as_numbers(((pairs >> 8) & 0xFF).to(tl.uint8), tl.float16)
    return lower.to(dtype), higher.to(dtype)


@triton.constexpr_function
def operand_type(queries, element):
    """The type in which queries of one type are multiplied with elements of a pool of another."""
    return tl.float16 if element == tl.uint8 and queries == tl.bfloat16 else queries


@triton.jit
def load_tile(
    rows, there, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr,
    IN_PLACE: tl.constexpr = False,
):  # fmt: skip
    """Keys or values [keys, DIMS] as `dtype`, whatever the pool holds; 0 where a key is not `there` and past HEAD_DIM.

    Memory that is masked may hold anything, NaN included, so it is not loaded. IN_PLACE has bytes widened before they
    are laid out for the tensor cores; values, which these want by columns, come out of shared memory one by one else.
    """
    return as_numbers(_load(rows, there, HEAD_DIM, DIMS, MASKED), dtype, IN_PLACE)


@triton.jit
def load_pairs(
    rows, there, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Values in e4m3 as two tiles [keys, DIMS // 2]: those of even channels, and those of odd ones.

    The tensor cores want them by columns, and shared memory gives columns of 16 bits.
    """
    pairs = _load(rows.to(tl.pointer_type(tl.int16)), there, HEAD_DIM // 2, DIMS // 2, MASKED)
    return halves_of(pairs, dtype)


@triton.jit
def _load(rows, there, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr):
    dims = tl.arange(0, DIMS)
    pointers = rows[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0)
    elif HEAD_DIM < DIMS:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def capped(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores, as powers of two, from products of queries and keys.

    They are `products * scale`, or if SOFTCAP `softcap * tanh(products * scale)`.
    """
    scores = products * scale
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E)) + 1.0))
    return scores


@triton.jit
def weigh(
    top, total, products, visible, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The softmax over what it was over before and one more tile of keys.

    `top` [rows] is the greatest score so far, and `total` [rows] the sum of all weights relative to 2^top. `products`
    [rows, keys] are of queries and keys, `visible` says which count if MASKED. Returns the new two, the tile's weights
    [rows, keys], and what all before it shrinks by.
    """
    if SOFTCAP:
        products = capped(products, scale, softcap, True)
    if MASKED:
        products = tl.where(visible, products, float("-inf"))
    if SOFTCAP:
        higher = tl.maximum(top, tl.max(products, 1))
        weights = tl.exp2(products - higher[:, None])
    else:  # Scaled after the maximum is taken, scores cost one instruction with the difference to it.
        higher = tl.maximum(top, tl.max(products, 1) * scale)
        weights = tl.exp2(products * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    return higher, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def add_weighted(attended, shrink, weights, values, PRECISION: tl.constexpr):
    """The sum [rows, DIMS] of the weighted values, with a tile's."""
    return tl.dot(weights.to(values.dtype), values, attended * shrink[:, None], input_precision=PRECISION)
