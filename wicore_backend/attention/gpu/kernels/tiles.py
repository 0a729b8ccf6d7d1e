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
def as_numbers(stored, dtype: tl.constexpr):
    """Elements of a pool as numbers of `dtype`."""
    if stored.dtype == tl.uint8:
        if cuda_capability_geq(8, 9):
            # Said to be impure, so that the compiler widens a tile where it was loaded. Else it lays bytes out for the
            # tensor cores first, and values, which these want by columns, come from shared memory byte by byte.
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
                is_pure=False,
                pack=4,
            )
        else:  # Their exponents count from 7, those of float16 from 15.
            bits = ((stored.to(tl.uint16) & 0x7F) << 7) | ((stored.to(tl.uint16) & 0x80) << 8)
            numbers = bits.to(tl.float16, bitcast=True) * 256.0
    else:
        numbers = stored
    return numbers.to(dtype)


@triton.constexpr_function
def operand_type(queries, element):
    """The type in which queries of one type are multiplied with elements of a pool of another."""
    return tl.float16 if element == tl.uint8 and queries == tl.bfloat16 else queries


@triton.jit
def load_tile(rows, there, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [keys, DIMS] as `dtype`, whatever the pool holds; 0 where a key is not `there` and past HEAD_DIM.

    Memory that is masked may hold anything, NaN included, so it is not loaded.
    """
    dims = tl.arange(0, DIMS)
    pointers = rows[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0)
    elif HEAD_DIM < DIMS:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    return as_numbers(tile, dtype)


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
def merge(
    top, total, attended, products, visible, values, scale, softcap,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax over what it was over before and one more tile of keys.

    `top` [rows] is the greatest score so far, `total` [rows] the sum of all weights and `attended` [rows, DIMS] that of
    the weighted values, both relative to 2^top. `products` [rows, keys] are of queries and keys, `visible` says which
    count if MASKED. Returns the new three and the tile's weights [rows, keys].
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
    total = total * shrink + tl.sum(weights, 1)
    attended = attended * shrink[:, None]
    attended = tl.dot(weights.to(values.dtype), values, attended, input_precision=PRECISION)
    return higher, total, attended, weights
