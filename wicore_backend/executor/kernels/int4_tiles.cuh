// What kernels have in common that multiply by an INT4 matrix (quantization/int4.py) on tensor cores: its tiles, the scales
// and zero points of a warp's two, codes in bfloat16, and how a block gives the sums that it has in shared memory.
//
// Given when it is compiled: SCALE_HALF (scales are float16, not bfloat16), ZEROS (there are zero points).

#pragma once

#include "gelu.cuh"

constexpr int WIDTH = 32, TILE = 16, SPAN_INPUTS = 256;
constexpr int CODE_ROW = 128, CODE_BYTES = TILE * CODE_ROW, SCALE_ROW = 4, SCALE_BYTES = TILE * SCALE_ROW;  // of a span

// Of a span of a warp's two tiles, for each of a lane's outputs, `lane / 4` and that plus 8: numbers of both groups.
struct Factors {
    u32 low[2], high[2];

    __device__ void load(const char* of_matrix, const int (&tiles)[2], int spans, int span) {
        const int row = threadIdx.x % WIDTH / 4;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const char* at = of_matrix + ((long long)tiles[tile] * spans + span) * SCALE_BYTES + row * SCALE_ROW;
            low[tile] = load_pair(at);
            high[tile] = load_pair(at + 8 * SCALE_ROW);
        }
    }
};

__device__ __forceinline__ float number_of(u32 of_groups, int group) {
    const float2 both = unpack<SCALE_HALF>(of_groups);
    return group ? both.y : both.x;
}

constexpr float RAISED_BY = 128.0f;  // What a code is with the bits of bfloat16's 128 before it.

// The codes of a quarter of the span less their zero point.
__device__ __forceinline__ u32 lowered(u32 codes, int quarter, u32 zero) {
    return minus(masked_with<0x000f000f, 0x43004300>(codes >> 4 * quarter), zero);
}

__device__ __forceinline__ u32 zero_of(u32 of_groups, int group) {
    const float zero = RAISED_BY + (ZEROS ? number_of(of_groups, group) : 8.0f);
    return pack<false>(zero, zero);
}

// What a block has summed, in SUMMANDS parts. Of gate and up each tile of gate is before the same one of up.
template <int SUMMANDS, int ROWS, int OUTPUTS>
struct Sums {
    static constexpr int ROW = OUTPUTS + 4;  // What a warp writes at once lies in all banks.

    float* numbers;

    __device__ __forceinline__ float& at(int part, int row, int output) const {
        return numbers[(part * ROWS + row) * ROW + output];
    }
    __device__ __forceinline__ float whole(int row, int output) const {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < SUMMANDS; ++part) sum += at(part, row, output);
        return sum;
    }
    // The block's result by so many of its threads, two adjacent numbers of a row by each. `share` says which tile is the
    // first, and which split it is.
    template <class Product, class Share>
    __device__ __forceinline__ void give(const Product& product, const Share& share, int threads) const {
        const int features = (product.gated ? OUTPUTS / TILE / 2 : OUTPUTS / TILE) * TILE;  // of the block
        const int first = share.first * TILE, outputs = product.tiles / (1 + product.gated) * TILE;
        for (int i = threadIdx.x; i < product.rows * features / 2; i += threads) {
            const int row = i / (features / 2), feature = i % (features / 2) * 2;
            if (first + feature >= outputs) continue;
            float2 v;
            if (product.gated) {
                const int gate = feature / TILE * 2 * TILE + feature % TILE;
                v.x = gelu_times(whole(row, gate), whole(row, gate + TILE));
                v.y = gelu_times(whole(row, gate + 1), whole(row, gate + 1 + TILE));
            } else {
                v = {whole(row, feature), whole(row, feature + 1)};
            }
            const long long at = ((long long)share.split * product.rows + row) * outputs + first + feature;
            if (product.wide) {
                *(float2*)(product.out + at * 4) = v;
            } else {
                *(u32*)(product.out + at * 2) = pack<false>(v.x, v.y);
            }
        }
    }
};
