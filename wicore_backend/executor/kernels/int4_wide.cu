// Products of up to 64 rows with an INT4 matrix on Hopper, for steps of 33 to 64 tokens.
//
// So many rows are for a warpgroup's products (wgmma), in which the matrix is the left operand, in registers, and the rows
// are the right one, in shared memory: what a warp raises of codes to bfloat16 it multiplies by all rows at once, and the
// rows are read once for all outputs of a block. One warp does nothing but bring spans of 256 inputs of the weights into a
// ring, another the rows into a second one, by boxes of tensors; weights wait for nobody, and so begin before the kernel
// before this one has ended. Where all blocks together have few outputs, several share an output's inputs: they give parts
// of the result.
//
//   1. A warp has two tiles of 16 outputs, one of each half of the block's: of gate and up, one of gate and the same one of
//      up, and what it gives is GELU of one times the other. A warpgroup's product is of its four warps' tiles of a half.
//   2. A quarter of a span of a tile is 16 registers: codes less their zero point, times their scale. While the tensor cores
//      multiply one tile's, the warp makes the other's.
//   3. At the end of a span all products have ended. If some went on while the next span's registers are made, the compiler
//      would let each product end before the next begins.
//
// Boxes lie in shared memory as products read them: among the 16-byte pieces of a row of 128, piece c of row r is where
// c ^ r % 8 is. Rows of x that are not there, and tiles, come as zeros.
//
// Given when it is compiled: WARPGROUPS (warpgroups that multiply), CODE_STAGES and X_STAGES (of the rings), GATED (it is gate
// and up), SCALE_HALF (scales are float16, not bfloat16), ZEROS (there are zero points).

#define SHARED_ALIGNMENT 1024

#include "int4_tiles.cuh"
#include "ring.cuh"

struct Product {
    TensorMap x;         // bfloat16 [rows, inputs], in boxes of 64 rows and 64 inputs
    TensorMap codes;     // 16 bits [tiles, spans x 16, 64], as in quantization/int4.py, in boxes of a half's tiles and a span
    const char* scales;  // 16 bits [tiles, spans, 16, 2]
    const char* zeros;   // likewise
    char* out;           // [rows, outputs] in bfloat16; in float32, if it is wide; of each split, if there are several
    int rows, tiles, spans, splits, wide;
    static constexpr int gated = GATED;
};

constexpr int ROWS = 64, WARPS = 4, CONSUMERS = WARPGROUPS * WARPS * WIDTH, THREADS = CONSUMERS + WARPS * WIDTH;
constexpr int HALF_TILES = WARPGROUPS * WARPS, TILES = 2 * HALF_TILES, HALF_BYTES = HALF_TILES * CODE_BYTES;
constexpr int QUARTER = 64, X_BYTES = ROWS * QUARTER * 2;  // inputs, and what they take of all rows

using Codes = RingOf<CODE_STAGES, 2 * HALF_BYTES>;
using Rows = RingOf<X_STAGES, 4 * X_BYTES, (Codes::end + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT>;

// What a block has: each half's first tile, and spans from `begin` up to `end`.
struct Share {
    int first, split, begin, end;

    __device__ explicit Share(const Product& product)
        : first(blockIdx.x / product.splits * (GATED ? HALF_TILES : TILES)), split(blockIdx.x % product.splits),
          begin(product.spans * split / product.splits), end(product.spans * (split + 1) / product.splits) {}
    __device__ int tile(const Product& product, int half) const {
        return first + half * (GATED ? product.tiles / 2 : HALF_TILES);
    }
};

// ---- The copying warps, of each of which a lane copies

__device__ __forceinline__ void copy_weights(const Product& product, const Share& share) {
    Codes ring;
    for (int span = share.begin; span < share.end; ++span, ring.next()) {
        wait(ring.empty(), ring.parity ^ 1);
        arrive_expecting(ring.full(), 2 * HALF_BYTES);
        for (int half = 0; half < 2; ++half)
            copy_box(ring.memory() + half * HALF_BYTES, product.codes, 0, span * TILE, share.tile(product, half), ring.full());
    }
}

__device__ __forceinline__ void copy_rows(const Product& product, const Share& share) {
    wait_for_kernel_before();
    Rows ring;
    for (int span = share.begin; span < share.end; ++span, ring.next()) {
        wait(ring.empty(), ring.parity ^ 1);
        arrive_expecting(ring.full(), 4 * X_BYTES);
        for (int quarter = 0; quarter < 4; ++quarter)
            copy_box(ring.memory() + quarter * X_BYTES, product.x, span * SPAN_INPUTS + quarter * QUARTER, 0, ring.full());
    }
}

// ---- The multiplying warps

// Of a span of a warp's two tiles, the codes that its lane has of the left operand of the quarters' products: of each 16
// inputs four words, of outputs `lane / 4` and that plus 8, and again 8 inputs further on.
struct Words {
    u32 of[2][16];

    __device__ __forceinline__ void load(const char* stage, int in_half) {
        const int lane = threadIdx.x % WIDTH, row = lane / 4;
        const char* codes = stage + in_half * CODE_BYTES + row * CODE_ROW + lane % 4 * 4;
#pragma unroll
        for (int piece = 0; piece < 8; ++piece) {
            const char* at = codes + (piece ^ row) * 16;
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int eight = 0; eight < 2; ++eight)
                    of[half][piece * 2 + eight] = ::load<u32>(at + half * HALF_BYTES + eight * 8 * CODE_ROW);
        }
    }
};

// What scales its outputs in the next span, on its way while one is multiplied: four lanes have the same two outputs of two
// tiles, and each loads one's.
struct NextFactors {
    const Product& product;
    int tile;
    u32 scale, zero = 0;

    __device__ NextFactors(const Product& product, const Share& share, int in_half) : product(product) {
        tile = min(share.tile(product, threadIdx.x % 4 / 2) + in_half, product.tiles - 1);  // The last, if it is not there.
    }
    __device__ __forceinline__ void load(int span) {
        const int row = threadIdx.x % WIDTH / 4 + threadIdx.x % 2 * 8;
        const long long at = ((long long)tile * product.spans + min(span, product.spans - 1)) * SCALE_BYTES + row * SCALE_ROW;
        scale = load_pair(product.scales + at);
        if (ZEROS) zero = load_pair(product.zeros + at);
    }
    __device__ __forceinline__ static Factors of_all(u32 own) {
        const int first = threadIdx.x % WIDTH / 4 * 4;
        Factors all;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            all.low[half] = __shfl_sync(~0u, own, first + half * 2);
            all.high[half] = __shfl_sync(~0u, own, first + half * 2 + 1);
        }
        return all;
    }
};

// The left operand of a quarter's products of a tile.
__device__ __forceinline__ void raise(u32 (&weights)[16], const u32 (&words)[16], int quarter, u32 low_scale, u32 high_scale,
                                      u32 low_zero, u32 high_zero) {
    const int group = quarter / 2;
    const float low = number_of(low_scale, group), high = number_of(high_scale, group);
    const u32 scales[2] = {pack<false>(low, low), pack<false>(high, high)};
    constexpr u32 MIDDLE = 0x43084308;  // 128 + 8: what `zero_of` has to compute.
    const u32 zeros[2] = {ZEROS ? zero_of(low_zero, group) : MIDDLE, ZEROS ? zero_of(high_zero, group) : MIDDLE};
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i] = times(lowered(words[i], quarter, zeros[i % 2]), scales[i % 2]);
}

__device__ __forceinline__ void multiply(const Product& product, const Share& share, int group) {
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH, in_half = group * WARPS + warp % WARPS;
    float sum[2][ROWS / 2] = {};
    NextFactors next(product, share, in_half);
    next.load(share.begin);
    Words words;
    u32 weights[2][16];
    Codes codes;
    Rows rows;
    for (int span = share.begin; span < share.end; ++span, codes.next(), rows.next()) {
        const Factors scales = NextFactors::of_all(next.scale), zeros = ZEROS ? NextFactors::of_all(next.zero) : Factors{};
        next.load(span + 1);
        wait(codes.full(), codes.parity);
        words.load(codes.memory(), in_half);
        __syncwarp();
        if (lane == 0) arrive(codes.empty());
        wait(rows.full(), rows.parity);
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                wgmma_wait<1>();  // Those of this half before, whose registers are made anew.
                wgmma_has_read(weights[half]);
                raise(weights[half], words.of[half], quarter, scales.low[half], scales.high[half], zeros.low[half],
                      zeros.high[half]);
                const u64 x = wgmma_operand(rows.memory() + quarter * X_BYTES);
                wgmma_begin();
#pragma unroll
                for (int sixteen = 0; sixteen < 4; ++sixteen)
                    wgmma_64(sum[half], weights[half] + sixteen * 4, x + sixteen * 2);
                wgmma_end();
            }
        wgmma_wait<0>();
        if (lane == 0) arrive(rows.empty());
    }
    meet<1, CONSUMERS>();  // Nobody reads the rings any more.
    const Sums<1, ROWS, TILES * TILE> sums{(float*)shared};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        wgmma_wait_for(sum[half]);
        const int tile = GATED ? in_half * 2 + half : half * HALF_TILES + in_half;
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i)
            sums.at(0, i / 4 * 8 + lane % 4 * 2 + i % 2, tile * TILE + lane / 4 + i % 4 / 2 * 8) = sum[half][i];
    }
    meet<1, CONSUMERS>();
    wait_for_kernel_before();  // Which may still read what was where the result goes.
    sums.give(product, share, CONSUMERS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) int4_wide(const __grid_constant__ Product product) {
    static_assert(Rows::end <= 227 * 1024, "a block's shared memory");
    const int group = __shfl_sync(~0u, threadIdx.x / (WARPS * WIDTH), 0);
    let_next_begin();
    if (threadIdx.x == 0) {
        Codes::prepare(1, WARPGROUPS * WARPS);
        Rows::prepare(1, WARPGROUPS * WARPS);
    }
    __syncthreads();
    const Share share(product);
    if (group < WARPGROUPS) {
        take_registers<WARPGROUPS == 3 ? 160 : 232>();
        multiply(product, share, group);
    } else {
        give_registers<32>();
        if (threadIdx.x == CONSUMERS) copy_weights(product, share);
        if (threadIdx.x == CONSUMERS + WIDTH) copy_rows(product, share);
    }
}
