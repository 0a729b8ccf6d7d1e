// What `streamed_layer.cu` is made of, second: products of weights in the ring with x in shared memory.

#pragma once

#include "gelu.cuh"
#include "streamed_ring.cuh"

// Two codes in float16 as fractions of 1024: of bits 0 to 3 of a word's half-words (MASK 0x000f000f) as 1024 + code, of
// bits 4 to 7 (0x00f000f0) as 1024 + 16 code, so that x is a sixteenth there.
template <u32 MASK>
__device__ __forceinline__ void add_int4(float (&sum)[4], uint4 low, uint4 high, uint4 x) {
    const auto raise = masked_with<MASK, 0x64006400>;
    mma<true>(sum, raise(low.x), raise(high.x), raise(low.y), raise(high.y), x.x, x.y);
    mma<true>(sum, raise(low.z), raise(high.z), raise(low.w), raise(high.w), x.z, x.w);
}

__device__ __forceinline__ uint4 second_byte(uint4 v) { return {v.x >> 8, v.y >> 8, v.z >> 8, v.w >> 8}; }

__device__ __forceinline__ void add_fp8(float (&sum)[4], u32 low, u32 high, u32 x_first, u32 x_second) {
    mma<true>(sum, raise_fp8(low), raise_fp8(high), raise_fp8(low >> 16), raise_fp8(high >> 16), x_first, x_second);
}

// Eight adjacent numbers of each of two outputs, as they are.
__device__ __forceinline__ void add_bf16(float (&sum)[4], uint4 low, uint4 high, uint4 x) {
    mma<false>(sum, low.x, high.x, low.y, high.y, x.x, x.y);
    mma<false>(sum, low.z, high.z, low.w, high.w, x.z, x.w);
}

// A lane's place in a span: what it reads of the tile's outputs `lane / 4` and that plus 8, and of x.
struct Place {
    int odd;         // of the output, and of the column of x
    u32 of_weights;  // bytes in a span, but for the half
    __device__ Place() {
        const int lane = threadIdx.x % WIDTH;
        odd = lane / 4 & 1;
        of_weights = lane % 4 * 16;
    }
    __device__ u32 half(int i) const { return (i ^ odd) * 64; }
    __device__ float2 pick(const float (&sum)[2][4]) const {
        return odd ? float2{sum[0][1] + sum[1][1], sum[0][3] + sum[1][3]}
                   : float2{sum[0][0] + sum[1][0], sum[0][2] + sum[1][2]};
    }
};

// x is asked for by the lanes of two columns only: what others multiply by lands in columns that nobody reads.
__device__ __forceinline__ uint4 load_x(const char* at) { return load_if(threadIdx.x % WIDTH < 8, at); }

// Adds the products of outputs `lane / 4` and that plus 8 of the tile with one of the `spans` in `stage`, which has
// room for `each`; `x` and its groups' `sums` are that span's. In INT4 to `total`, else to `sum`.
__device__ __forceinline__ void add_span(float2& total, float (&sum)[2][4], const Place& place, const char* stage,
                                         int span, int spans, int each, const char* x, const char* sums) {
    const int row = threadIdx.x % WIDTH / 4;
    const int row_at = BITS == 4 ? span * SPAN_BYTES + row * ROW_BYTES : (row * spans + span) * ROW_BYTES;
    const char* weights = stage + place.of_weights + row_at;
    const int to_high = 8 * ROW_BYTES * (BITS == 4 ? 1 : spans);
    constexpr int LOADS = SPAN_INPUTS / 64;  // of x, in each half
    uint4 low[2], high[2], v[2][LOADS];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        low[i] = load<uint4>(weights + place.half(i));
        high[i] = load<uint4>(weights + place.half(i) + to_high);
#pragma unroll
        for (int j = 0; j < LOADS; ++j) {
            const u32 at = place.half(i) + place.of_weights;
            v[i][j] = load_x(x + (BITS == 4 ? at + j * 128 : LOADS * at + j * 16));
        }
    }
    if constexpr (BITS == 4) {
        const char* scales = stage + each * SPAN_BYTES + span * SCALE_BYTES + row * 4;
        const float2 low_scale = unpack<SCALE_HALF>(load<u32>(scales));
        const float2 high_scale = unpack<SCALE_HALF>(load<u32>(scales + 8 * 4));
        float2 low_zero = {8.0f, 8.0f}, high_zero = low_zero;
        if constexpr (ZEROS) {
            const char* zeros = scales + each * SCALE_BYTES;
            low_zero = unpack<SCALE_HALF>(load<u32>(zeros));
            high_zero = unpack<SCALE_HALF>(load<u32>(zeros + 8 * 4));
        }
        const float4 of_x = load<float4>(sums);
        float first[2][4] = {}, second[2][4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add_int4<0x000f000f>(first[i], low[i], high[i], v[i][0]);
            add_int4<0x00f000f0>(first[i], low[i], high[i], v[i][1]);
            add_int4<0x000f000f>(second[i], second_byte(low[i]), second_byte(high[i]), v[i][2]);
            add_int4<0x00f000f0>(second[i], second_byte(low[i]), second_byte(high[i]), v[i][3]);
        }
        const float2 a = place.pick(first), b = place.pick(second);
        total.x += low_scale.x * (a.x - of_x.x - low_zero.x * of_x.y) +
                   low_scale.y * (b.x - of_x.z - low_zero.y * of_x.w);
        total.y += high_scale.x * (a.y - of_x.x - high_zero.x * of_x.y) +
                   high_scale.y * (b.y - of_x.z - high_zero.y * of_x.w);
    } else if constexpr (BITS == 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) add_bf16(sum[i], low[i], high[i], v[i][0]);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add_fp8(sum[i], low[i].x, high[i].x, v[i][0].x, v[i][0].y);
            add_fp8(sum[i], low[i].y, high[i].y, v[i][0].z, v[i][0].w);
            add_fp8(sum[i], low[i].z, high[i].z, v[i][1].x, v[i][1].y);
            add_fp8(sum[i], low[i].w, high[i].w, v[i][1].z, v[i][1].w);
        }
    }
}

// Stages `begin` up to `end` of a matrix, the next ones of the ring, times x: each warp's part of each output of the
// tiles they are of into `parts` [tiles, WARPS, 16].
template <int DEPTH>
__device__ __forceinline__ Ring multiply(Ring ring, int begin, int end, float* parts) {
    using C = Cut<DEPTH>;
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    const Place place;
    float2 total = {};
    float sum[2][4] = {};
    int stage = begin % C::stages;
#pragma unroll 1
    for (int left = end - begin; left > 0; --left, ring.next()) {
        const int first = stage * C::each, spans = min(C::each, C::spans - first), span = first + warp;
        wait(ring.full(), ring.parity);
        if (warp < spans)
            add_span(total, sum, place, ring.memory(), warp, spans, C::each, shared + X_AT + span * SPAN_INPUTS * 2,
                     shared + SUMS_AT + span * 16);
        __syncwarp();
        if (lane == 0) arrive(ring.empty());
        if (++stage < C::stages && left > 1) continue;
        if (BITS != 4) total = place.pick(sum);
        if (lane % 4 == 0) {
            float* part = parts + warp * TILE + lane / 4;
            part[0] = total.x;
            part[8] = total.y;
        }
        parts += WARPS * TILE;
        stage = 0, total = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = 0.0f;
    }
    return ring;
}

__device__ __forceinline__ float whole(const float* parts, int tile, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[(tile * WARPS + warp) * TILE + row];
    return sum;
}

__device__ __forceinline__ float4 unpack(uint2 pairs) {  // of bfloat16
    const float2 a = unpack<false>(pairs.x), b = unpack<false>(pairs.y);
    return {a.x, a.y, b.x, b.y};
}

// What a row of a matrix is scaled by, loaded early; 1 if it has no such scale.
__device__ __forceinline__ float scale_of(const Matrix& matrix, int output, bool there) {
    return BITS == 8 && there ? constant((const float*)matrix.scales + output) : 1.0f;
}

// What a block tells the one before it: its part of a tile that the other began, as words whose lowest bit turns with
// each launch. It is the first that it computes of a matrix, and the last that the other does, who so rarely waits.
struct Parts {
    u32* words;
    u32 turn;
    __device__ Parts(const Layer& layer, int matrix, u32 turn)
        : words(layer.told_parts + (matrix * gridDim.x + blockIdx.x) * 2 * TILE), turn(turn) {}
    __device__ void tell_part(int place, float value) const {
        tell(words + place, __float_as_uint(value) & ~1u | turn);
    }
    __device__ float of_next_block(int place) const {
        u32 word;
        while (((word = told(words + 2 * TILE + place)) ^ turn) & 1) __nanosleep(20);
        return __uint_as_float(word & ~1u);
    }
};

// This block's outputs of a matrix whose DEPTH inputs are in shared memory: `give(output, value)` for each. A tile whose
// stages are two blocks' is given by the one that has the first.
template <int DEPTH, class Give>
__device__ __forceinline__ void product(Ring& ring, const Matrix& matrix, const int2& share, float x_scale,
                                        const Parts& others, Give give) {
    constexpr int STEPS = Cut<DEPTH>::stages;
    const int row = threadIdx.x % TILE;
    float* parts = (float*)(shared + X_AT + DEPTH * 2);
    int begin = share.x;
    if (begin % STEPS) {
        const int tile = begin / STEPS;
        const bool tells = threadIdx.x < TILE;
        const float scale = x_scale * scale_of(matrix, tile * TILE + row, tells);
        ring = multiply<DEPTH>(ring, begin, (tile + 1) * STEPS, parts);
        consumers_meet();
        if (tells) others.tell_part(row, whole(parts, 0, row) * scale);
        begin = (tile + 1) * STEPS;
        parts += WARPS * TILE;
    }
    const int first = begin / STEPS, tiles = (share.y + STEPS - 1) / STEPS - first, mine = threadIdx.x / TILE;
    const int output = (first + mine) * TILE + row;
    const bool there = mine < tiles;
    const float scale = x_scale * scale_of(matrix, output, there);
    ring = multiply<DEPTH>(ring, begin, share.y, parts);
    consumers_meet();
    if (there) {
        float value = whole(parts, mine, row) * scale;
        if (share.y % STEPS && mine == tiles - 1) value += others.of_next_block(row);
        give(output, value);
    }
}

// Sum and largest magnitude of a tile's 16 numbers, as bfloat16 has them, by half a warp.
__device__ __forceinline__ float2 of_tile(float value) {
    value = unpack<false>(pack<false>(value, 0.0f)).x;
    float2 v = {value, fabsf(value)};
#pragma unroll
    for (int distance = TILE / 2; distance; distance /= 2) {
        v.x += __shfl_xor_sync(~0u, v.x, distance);
        v.y = fmaxf(v.y, __shfl_xor_sync(~0u, v.y, distance));
    }
    return v;
}

// As `product` of gate and up, GELU of one times the other: `give(output, value, next)` for each second output, and to
// `of_tiles` what `of_tile` is of each.
template <class Give>
__device__ __forceinline__ void gated_product(Ring& ring, const Matrix& matrix, const int2& share, float x_scale,
                                              const Parts& others, float2* of_tiles, Give give) {
    constexpr int STEPS = Cut<HIDDEN>::stages, OF_PAIR = 2 * STEPS;
    const int row = threadIdx.x % TILE, mine = threadIdx.x / TILE;
    float* parts = (float*)(shared + X_AT + HIDDEN * 2);
    int begin = share.x;
    if (begin % OF_PAIR) {
        const int pair = begin / OF_PAIR, missing = begin / STEPS % 2;  // of the pair's tiles
        const bool tells = threadIdx.x < 2 * TILE;
        const float scale = x_scale * scale_of(matrix, pair * TILE + row + mine * FED, tells);
        ring = multiply<HIDDEN>(ring, begin, (pair + 1) * OF_PAIR, parts);
        consumers_meet();
        if (tells) others.tell_part(threadIdx.x, mine < missing ? 0.0f : whole(parts, mine - missing, row) * scale);
        begin = (pair + 1) * OF_PAIR;
        parts += 2 * WARPS * TILE;
    }
    const int first = begin / OF_PAIR, tiles = (share.y + STEPS - 1) / STEPS - 2 * first;
    const int output = (first + mine) * TILE + row;
    const bool there = 2 * mine < tiles;
    const float scale = x_scale * scale_of(matrix, output, there);
    const float up_scale = x_scale * scale_of(matrix, output + FED, there);
    ring = multiply<HIDDEN>(ring, begin, share.y, parts);
    consumers_meet();
    float value = 0.0f;
    if (there) {
        float gate = whole(parts, 2 * mine, row) * scale;
        float up = 2 * mine + 1 < tiles ? whole(parts, 2 * mine + 1, row) * up_scale : 0.0f;
        if (share.y % OF_PAIR && 2 * mine + 2 >= tiles) {
            gate += others.of_next_block(row);
            up += others.of_next_block(TILE + row);
        }
        value = gelu_times(gate, up);
    }
    const float next = __shfl_down_sync(~0u, value, 1);
    if (there && threadIdx.x % 2 == 0) give(output, value, next);
    const float2 of_this = of_tile(value);
    if (there && row == 0) of_tiles[output / TILE] = of_this;
}
