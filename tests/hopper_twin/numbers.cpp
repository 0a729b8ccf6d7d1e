// Numbers of 16 and 8 bits, as the card has them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "machine.hpp"

namespace twin {

namespace {

float half_to_float(u32 bits) {
    const std::uint16_t low = bits;
    _Float16 v;
    std::memcpy(&v, &low, 2);
    return v;
}

}  // namespace

float from_half(u32 bits) {
    static const std::vector<float> all = [] {
        std::vector<float> table(1 << 16);
        for (u32 i = 0; i < table.size(); ++i) table[i] = half_to_float(i);
        return table;
    }();
    return all[bits & 0xffff];
}

u32 to_half(float v) {
    const _Float16 half = v;
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

float from_bfloat16(u32 bits) {
    const u32 raised = bits << 16;
    float v;
    std::memcpy(&v, &raised, 4);
    return v;
}

u32 to_bfloat16(float v) {  // to the nearest, of two as near to the even one
    u32 bits;
    std::memcpy(&bits, &v, 4);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

u32 half_of_e4m3(u32 bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return 0x7fff;
    const float v = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    return to_half(bits & 128 ? -v : v);
}

u32 to_e4m3(float v) {  // to the nearest, of two as near to the even one; what is beyond the greatest to that
    if (v != v) return 0x7f;
    const u32 sign = std::signbit(v) ? 128 : 0;
    v = std::min(std::fabs(v), 448.0f);
    const int exponent = v < 0x1p-6f ? -6 : std::ilogb(v);
    const float units = std::nearbyint(std::ldexp(v, 3 - exponent));  // 8 to 16 of them, fewer below 2^-6
    return sign | ((exponent + 6) * 8 + (u32)units);
}

}  // namespace twin
