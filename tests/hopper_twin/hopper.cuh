// The twin of wicore_backend/hopper/hopper.cuh for a CPU: the same functions, and of CUDA's own what kernels
// use. g++ compiles kernels with it; `machine.cpp` runs them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.hpp"

using u32 = unsigned int;
using u64 = std::uint64_t;
using std::max;
using std::min;

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct int2 { int x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { u32 x; };

// Of the thread that runs.
extern "C" Index threadIdx, blockIdx, gridDim;
extern "C" char* shared;

inline u32 __float_as_uint(float v) { u32 bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __uint_as_float(u32 bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline u32 __byte_perm(u32 low, u32 high, u32 order) {  // CUDA's; a byte's sign is never asked for.
    const u64 bytes = (u64)high << 32 | low;
    u32 v = 0;
    for (u32 i = 0; i < 4; ++i) v |= (u32)(bytes >> (order >> i * 4 & 7) * 8 & 255) << i * 8;
    return v;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

// ---- Warps and blocks

inline void __nanosleep(u32) { twin::nap(); }
inline void __syncwarp() { twin::warp_meets(); }
inline void __syncthreads() { twin::all_meet(); }

template <class T>
T __shfl_xor_sync(u32, T value, int distance) {
    T all[32];
    twin::exchange(&value, all, sizeof(T));
    return all[threadIdx.x % 32 ^ distance];
}

template <class T>
T __shfl_sync(u32, T value, int from) {
    T all[32];
    twin::exchange(&value, all, sizeof(T));
    return all[from % 32];
}

template <class T>
T __shfl_down_sync(u32, T value, int distance) {
    T all[32];
    twin::exchange(&value, all, sizeof(T));
    const int lane = threadIdx.x % 32;
    return all[lane + distance < 32 ? lane + distance : lane];
}

// ---- Shared memory

inline u32 address(const void* in_shared) { return (u32)((const char*)in_shared - shared); }

template <class T>
T load(const char* in_shared) { return twin::loaded<T>(in_shared); }

inline uint4 load_if(bool asks, const char* in_shared) {
    return asks ? load<uint4>(in_shared) : uint4{~0u, ~0u, ~0u, ~0u};  // NaN, whatever its kind
}

// Lane l names a row of 16 bytes, of four matrices of 8 rows.
inline uint4 matrices(const char* in_shared, bool turn) {
    const uint4 mine = load<uint4>(in_shared);
    uint4 rows[32];
    twin::exchange(&mine, rows, sizeof(uint4));
    const u32 lane = threadIdx.x % 32;
    u32 found[4];
    for (u32 matrix = 0; matrix < 4; ++matrix) {
        const auto number = [&](u32 row, u32 column) {
            std::uint16_t v;
            std::memcpy(&v, (const char*)(rows + matrix * 8 + row) + column * 2, 2);
            return (u32)v;
        };
        const u32 one = lane / 4, two = lane % 4 * 2;
        const u32 first = turn ? number(two, one) : number(one, two);
        found[matrix] = first | (turn ? number(two + 1, one) : number(one, two + 1)) << 16;
    }
    return {found[0], found[1], found[2], found[3]};
}

inline uint4 load_matrices(const char* in_shared) { return matrices(in_shared, false); }
inline uint4 load_matrices_turned(const char* in_shared) { return matrices(in_shared, true); }

// ---- Barriers

template <int NUMBER, int THREADS>
void meet() { twin::meet(NUMBER, THREADS); }

inline void barrier_init(u32 barrier, u32 arrivals) { twin::barrier_init(barrier, arrivals); }
inline void barriers_ready() {}
inline void arrive(u32 barrier) { twin::arrive(barrier, 0); }
inline void arrive_expecting(u32 barrier, u32 bytes) { twin::arrive(barrier, bytes); }
inline void wait(u32 barrier, u32 parity) { twin::wait(barrier, parity); }

// ---- Bulk copies

using Policy = u64;

inline Policy evict_first() { return 0; }
inline void copy(const char* to, const char* from, u32 bytes, u32 barrier, Policy) {
    twin::copy(to, from, bytes, barrier);
}
inline void copy_16(const char* to, const char* from, bool there) { twin::copy_16(to, from, there); }
inline void arrive_when_copied(u32 barrier) { twin::arrive_when_copied(barrier); }
inline void line_to_l2(const void* global) { twin::inside(global, 128, 4); }

// ---- Global memory

inline float constant(const float* at) { return twin::loaded_constant<float>(at); }
inline float4 constants(const float* at) { return twin::loaded_constant<float4>(at); }
template <class T>
T loaded_global(const void* from) {
    twin::inside(from, sizeof(T), sizeof(T));
    return twin::loaded<T>(from);
}

inline u32 load_pair(const char* at) { return loaded_global<u32>(at); }
inline uint2 load_pairs(const char* at) { return loaded_global<uint2>(at); }
inline uint4 load_words(const void* at) { return loaded_global<uint4>(at); }

inline void tell(u32* to, u32 word) { twin::tell(to, word); }
inline u32 told(const u32* from) { return twin::told(from, twin::Order::relaxed); }

inline uint4 told_four(const u32* from) {
    twin::inside(from, 16, 16);
    const u32 w = told(from + 3), z = told(from + 2);
    const u32 x = told(from);
    return {x, told(from + 1), z, w};
}

inline void add_released(u32* to, u32 by) { twin::add(to, by, twin::Order::acquire_or_release); }
inline u32 added(u32* to, u32 by) { return twin::added(to, by); }
inline u32 told_acquired(const u32* from) { return twin::told(from, twin::Order::acquire_or_release); }

// ---- Kernels over each other

inline void wait_for_kernel_before() { twin::wait_for_kernel_before(); }
inline void let_next_begin() { twin::let_next_begin(); }

// ---- Numbers of 16 bits, of 8 and of 4

template <bool HALF>
u32 pack(float low, float high) {
    return HALF ? twin::to_half(low) | twin::to_half(high) << 16
                : twin::to_bfloat16(low) | twin::to_bfloat16(high) << 16;
}

template <bool HALF>
float2 unpack(u32 pair) {
    if (HALF) return {twin::from_half(pair), twin::from_half(pair >> 16)};
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
}

inline u32 raise_fp8(u32 pair) { return twin::half_of_e4m3(pair & 255) | twin::half_of_e4m3(pair >> 8 & 255) << 16; }

inline uint2 raise_fp8_four(u32 codes) { return {raise_fp8(codes), raise_fp8(codes >> 16)}; }
inline u32 lower_fp8(float low, float high) { return twin::to_e4m3(low) | twin::to_e4m3(high) << 8; }

template <u32 MASK, u32 WITH>
u32 masked_with(u32 word) { return (word & MASK) | WITH; }

inline u32 minus(u32 a, u32 b) {
    const float2 v = unpack<false>(a), w = unpack<false>(b);
    return pack<false>(v.x - w.x, v.y - w.y);
}

inline float exp2_quickly(float v) { return std::exp2(v); }

inline u32 turned(u32 pair) {
    u32 all[32];
    twin::exchange(&pair, all, sizeof(u32));
    const u32 lane = threadIdx.x % 32, first = all[lane % 4 * 8 + lane / 8], second = all[lane % 4 * 8 + 4 + lane / 8];
    const u32 by = lane / 4 % 2 * 16;
    return (first >> by & 0xffff) | (second >> by & 0xffff) << 16;
}

// Of A, lane l has rows l / 4 and that plus 8 in columns l % 4 * 2, the next one, and those plus 8; of B those columns as
// rows, in column l / 4; of the sums the rows of A in columns l % 4 * 2 and the next one (PTX ISA, mma.m16n8k16).
template <bool HALF>
void mma(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    twin::mma(sum, a, b, HALF);
}

#include "warpgroups.hpp"
