"""Steps of several kernels that give the same bits compiled and interpreted, with or without fused multiply-add."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_UNIT_FIRST = tl.constexpr(float.fromhex("0x1.2492p-9") * 2.0**120)
_UNIT_REST = tl.constexpr(float.fromhex("0x1.24924ap-27") * 2.0**120)
"""2**120 / 448: 16 bits, and those that follow."""


@triton.jit
def load_numbers(pointer, offsets):
    """float32 of numbers of any dtype, denormals included."""
    if pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion gets denormals wrong.
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16)) + offsets).to(tl.uint32)
        numbers = (bits << 16).to(tl.float32, bitcast=True)
    else:
        numbers = tl.load(pointer + offsets).to(tl.float32)
    return numbers


@triton.jit
def store_numbers(pointer, offsets, numbers):
    """Write float32 as the pointer's dtype, rounded to nearest, half to even."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = numbers.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(numbers == numbers, bits, 0x7FC0)
        tl.store(pointer.to(tl.pointer_type(tl.uint16)) + offsets, bits.to(tl.uint16))
    else:
        tl.store(pointer + offsets, numbers.to(pointer.dtype.element_ty))


@triton.jit
def finite(numbers, LARGEST: tl.constexpr):
    """NaN as 0, what is larger than LARGEST as LARGEST."""
    numbers = tl.where(numbers == numbers, numbers, 0.0)
    return tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)


@triton.jit
def in_units_of(numbers, largest, SHORT: tl.constexpr):
    """numbers / largest, correctly rounded where that is over 2**-20; below, about as small. 0 / 0 is 0.

    `largest` is at least the numbers' magnitudes. SHORT says that all have 11 significant bits or fewer. Then no
    quotient is nearer than 2**-36 of itself to the middle between two float32, and it is enough to multiply by an
    inverse of 37 bits: by its first 13, which is exact, and by the rest.
    """
    largest = tl.where(largest == 0, 1.0, largest)
    if SHORT:
        factor = tl.where(largest < 2.0**-64, 2.0**64, tl.where(largest > 2.0**64, 2.0**-64, 1.0))
        largest *= factor
        numbers *= factor
        first = (tl.div_rn(1.0, largest).to(tl.uint32, bitcast=True) & 0xFFFFF800).to(tl.float32, bitcast=True)
        rest = tl.div_rn(tl.fma(-largest, first, 1.0), largest)  # Not negative, so that -0 stays -0.
        units = tl.fma(numbers, first, numbers * rest)
    else:
        units = tl.div_rn(numbers, largest)
    return units


@triton.jit
def nearest_integer(numbers):
    """int32, half to even, of float32 from -2**21 to 2**21."""
    magic: tl.constexpr = 12582912.0  # 3 * 2**22: so large a float32 has no room for a fraction.
    return (numbers + magic).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def e4m3_of(numbers):
    """uint8 codes of float32 from -448 to 448, half to even."""
    if cuda_capability_geq(8, 9):
        codes = numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = e4m3_by_adding(numbers)
    return codes


@triton.jit
def e4m3_by_adding(numbers):
    """`e4m3_of`, on any device."""
    bits = numbers.to(tl.int32, bitcast=True)
    # 2**20 times the number's power of two, or that of the smallest normal e4m3, 2**-6: adding it leaves 3 bits.
    power = tl.maximum(bits & 0x7F800000, 121 << 23) + (20 << 23)
    rounded = (tl.abs(numbers) + power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    code = rounded + (power >> 20) - (141 << 3)  # In its lowest byte: there `power` has no bits.
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_units(codes):
    """float32 of e4m3 codes, divided by 448."""
    bits = codes.to(tl.uint32)
    small = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True)  # The number times 2**-120.
    magnitudes = tl.fma(small, _UNIT_FIRST, small * _UNIT_REST)
    signed = (magnitudes.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), signed)
