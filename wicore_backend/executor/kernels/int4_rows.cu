// Products of a few rows with an INT4 matrix on Hopper, for steps of 2 to 8 tokens.
//
// A block has the outputs of some tiles of the matrix, as many as make one wave of blocks, and reads the rows once for
// all of them. One of its warps does nothing but copy spans of 256 inputs into a ring in shared memory, of the weights and
// of the rows; weights wait for nobody, and so begin before the kernel before this one has ended. The other warps multiply
// by tensor cores (mma.m16n8k16), each two tiles of 16 outputs: codes less their zero points are the left operand, in
// bfloat16, the rows' numbers are in columns of the right one, and the sums of each group are scaled.
//
//   1. Where a block has few tiles, its warps are in PARTS, each of which takes other spans: their sums are added at the
//      end, in shared memory.
//   2. Where all blocks together have few, several share an output's inputs: they give parts of the result.
//   3. Of gate and up, a warp's two tiles are one of gate and the same one of up, and what it gives is GELU of one times
//      the other.
//
// A lane takes 16 bytes of an output's codes at once, which are 8 adjacent inputs in each quarter of the span, and the same
// 8 of a row: the order of inputs within a product is another than theirs, the same in both operands. Odd rows lie in
// shared memory with their halves exchanged, so that 8 lanes read from all banks.
//
// Given when it is compiled: TILES (of a block, an even number), PARTS, STAGES (of the ring, a multiple of PARTS), SCALE_HALF
// (scales are float16, not bfloat16), ZEROS (there are zero points).

#include "int4_tiles.cuh"
#include "ring.cuh"

struct Product {
    const char* x;       // bfloat16 [rows, inputs]
    const char* codes;   // [tiles, spans, 16, 128 bytes], as in quantization/int4.py, and
    const char* scales;  // 16 bits [tiles, spans, 16, 2]
    const char* zeros;   // likewise
    char* out;           // [rows, outputs] in bfloat16; in float32, if it is wide; of each split, if there are several
    long long x_row;     // bytes
    int rows, tiles, spans, splits, gated, wide;  // `tiles` is an even number.
};

constexpr int ROWS = 8, X_ROW = SPAN_INPUTS * 2, X_AT = TILES * CODE_BYTES;
constexpr int PAIRS = TILES / 2, CONSUMERS = PAIRS * PARTS * WIDTH;

using Ring = RingOf<STAGES, X_AT + ROWS * X_ROW>;

static_assert(TILES % 2 == 0 && TILES <= WIDTH, "a warp has two tiles, and a lane copies one");

__device__ __forceinline__ void consumers_meet() { meet<1, CONSUMERS>(); }

// Among the 16-byte pieces of a row of x, where one of them lies.
__device__ __forceinline__ int swapped(int piece, int row) { return piece ^ row % 2 * 4; }

// What a block has: `count` tiles, of gate and up pairs of them, and spans from `begin` up to `end`.
struct Share {
    int first, count, split, begin, end;

    __device__ explicit Share(const Product& product)
        : first(blockIdx.x / product.splits * (product.gated ? PAIRS : TILES)),
          count(product.gated ? 2 * min(PAIRS, product.tiles / 2 - first) : min(TILES, product.tiles - first)),
          split(blockIdx.x % product.splits), begin(product.spans * split / product.splits),
          end(product.spans * (split + 1) / product.splits) {}
    // Of the block's tiles, which one of the matrix.
    __device__ int tile(const Product& product, int number) const {
        return product.gated ? first + number / 2 + number % 2 * (product.tiles / 2) : first + number;
    }
};

// ---- The copying warp

// Each lane copies a tile.
__device__ __forceinline__ void copy_weights(const Ring& ring, const Product& product, const Share& share, int span,
                                             Policy policy) {
    const int lane = threadIdx.x % WIDTH;
    const long long place = (long long)share.tile(product, lane) * product.spans + span;
    if (lane == 0) arrive_expecting(ring.full(), share.count * CODE_BYTES);
    __syncwarp();
    if (lane < share.count)
        copy(ring.memory() + lane * CODE_BYTES, product.codes + place * CODE_BYTES, CODE_BYTES, ring.full(), policy);
}

// Each lane copies a piece of each of `count` rows; zeros for those that are not there.
__device__ __forceinline__ void copy_rows(const Ring& ring, const Product& product, int span, int count) {
    const int lane = threadIdx.x % WIDTH;
    const char* from = product.x + (long long)span * X_ROW + lane * 16;
    const char* to = ring.memory() + X_AT;
#pragma unroll 4
    for (int row = 0; row < count; ++row) {
        copy_16(to + row * X_ROW + swapped(lane, row) * 16, from, row < product.rows);
        if (row + 1 < product.rows) from += product.x_row;
    }
    arrive_when_copied(ring.full());
}

__device__ __forceinline__ void copy_all(const Product& product, const Share& share) {
    const int filled = min(share.begin + STAGES, share.end);
    const Policy policy = evict_first();
    Ring ring;
    for (int span = share.begin; span < filled; ++span, ring.next()) copy_weights(ring, product, share, span, policy);
    wait_for_kernel_before();
    ring = {};
    for (int span = share.begin; span < filled; ++span, ring.next()) copy_rows(ring, product, span, ROWS);
    for (int span = filled; span < share.end; ++span, ring.next()) {
        wait(ring.empty(), ring.parity ^ 1);
        copy_weights(ring, product, share, span, policy);
        copy_rows(ring, product, span, product.rows);
    }
}

// ---- The multiplying warps

// sum += the products of the warp's two tiles with the rows, of one span.
__device__ __forceinline__ void add_span(float (&sum)[2][4], const char* stage, int pair, const Factors& scales,
                                         const Factors& zeros) {
    const int lane = threadIdx.x % WIDTH, row = lane / 4, of_row = lane % 4;
    const char* codes = stage + pair * 2 * CODE_BYTES + row * CODE_ROW + of_row * 16;
    const char* x = stage + X_AT + row * X_ROW;
    uint4 low[2][2], high[2][2];  // of each tile and half
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            low[tile][half] = load<uint4>(codes + tile * CODE_BYTES + half * 64);
            high[tile][half] = load<uint4>(codes + tile * CODE_BYTES + half * 64 + 8 * CODE_ROW);
        }
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        float of_group[2][4] = {};
#pragma unroll
        for (int quarter = group * 2; quarter < group * 2 + 2; ++quarter)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 v = load<uint4>(x + swapped(quarter * 8 + half * 4 + of_row, row) * 16);
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const u32 low_zero = zero_of(zeros.low[tile], group), high_zero = zero_of(zeros.high[tile], group);
                    const uint4 l = low[tile][half], h = high[tile][half];
                    mma<false>(of_group[tile], lowered(l.x, quarter, low_zero), lowered(h.x, quarter, high_zero),
                               lowered(l.y, quarter, low_zero), lowered(h.y, quarter, high_zero), v.x, v.y);
                    mma<false>(of_group[tile], lowered(l.z, quarter, low_zero), lowered(h.z, quarter, high_zero),
                               lowered(l.w, quarter, low_zero), lowered(h.w, quarter, high_zero), v.z, v.w);
                }
            }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sum[tile][i] += number_of(i < 2 ? scales.low[tile] : scales.high[tile], group) * of_group[tile][i];
    }
}

__device__ __forceinline__ void multiply(const Product& product, const Share& share) {
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH, part = warp / PAIRS, pair = warp % PAIRS;
    const bool there = pair * 2 < share.count;
    const int tiles[2] = {share.tile(product, there ? pair * 2 : 0), share.tile(product, there ? pair * 2 + 1 : 1)};
    float sum[2][4] = {};
    Factors scales, zeros, next_scales, next_zeros;  // The next span's are on their way while one is multiplied.
    const auto load_next = [&](int span) {
        span = min(span, product.spans - 1);
        next_scales.load(product.scales, tiles, product.spans, span);
        if (ZEROS) next_zeros.load(product.zeros, tiles, product.spans, span);
    };
    load_next(share.begin + part);
    Ring ring;
    ring.skip(part);
    for (int span = share.begin + part; span < share.end; span += PARTS, ring.skip(PARTS)) {
        scales = next_scales, zeros = next_zeros;
        load_next(span + PARTS);
        wait(ring.full(), ring.parity);
        if (there) add_span(sum, ring.memory(), pair, scales, zeros);
        __syncwarp();
        if (lane == 0) arrive(ring.empty());
    }
    consumers_meet();  // Nobody reads the ring any more.
    const Sums<PARTS, ROWS, TILES * TILE> sums{(float*)shared};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = lane % 4 * 2 + i % 2, output = (pair * 2 + tile) * TILE + lane / 4 + i / 2 * 8;
            sums.at(part, row, output) = sum[tile][i];
        }
    consumers_meet();
    wait_for_kernel_before();  // Which may still read what was where the result goes.
    sums.give(product, share, CONSUMERS);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + WIDTH, 1)
int4_rows(const __grid_constant__ Product product) {
    // Who waits for a stage's phase must know that the one before it is over, or takes that for it.
    static_assert(STAGES % PARTS == 0, "a stage is always the same part's");
    let_next_begin();
    if (threadIdx.x == 0) Ring::prepare(WIDTH + 1, PAIRS);
    __syncthreads();
    const Share share(product);
    if (threadIdx.x < CONSUMERS) {
        multiply(product, share);
    } else {
        copy_all(product, share);
    }
}
