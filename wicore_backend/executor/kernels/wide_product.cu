// Products of many rows on Hopper: out [T, N] = x [T, K] W^T, or GELU of x by one half of W times x by the other.
//
// A prompt's products are bound by the card's power, and what is moved from L2 costs some of it. So two blocks of a
// cluster have a tile of 256 rows and 256 weight rows together, each half of the rows: each brings half of the weight's
// part for both (multicast), and the card reads it once for 256 rows.
//
//   1. Of a block, one thread fills a ring in shared memory, and two warpgroups multiply 64 rows each (wgmma), out of step
//      by up to the ring's length: one has the tensor cores while the other gives its results.
//   2. A stage is empty when the warpgroups of both blocks have read it, for either block's copies write to both. Each
//      therefore lets both go on, and no block leaves before the other has done with it.
//   3. GATED: a tile's weight rows are 128 of gate and as many of up, so one lane has both numbers of each result.
//   4. Where the last rows are 128 at most, a cluster has two tiles of them side by side, one for each block: there rows
//      are read once for both, and the weight by each for itself.
//   5. Clusters stay and take tile after tile. Those that would be left over at the end come first, their depth shared
//      out: parts' sums are left in `parts` for another kernel (shared_tiles.py, which also says where tiles lie).
//
// The weight, too, is read after the kernel before has ended: that may have widened it.
//
// Given when it is compiled: STAGES (of the ring), GROUP (row tiles that are taken one after the other), GATED, FLOAT16
// (not bfloat16).

#define SHARED_ALIGNMENT 1024  // as `copy_box` and `wgmma_operand` ask for

#include "gelu.cuh"
#include "ring.cuh"

struct Product {
    TensorMap x;       // [rows, 64 steps] in boxes of [64, 64]
    TensorMap weight;  // [columns, 64 steps] in boxes of [128, 64]; GATED: [2 columns, 64 steps]
    char* out;         // [rows, columns], rows `stride` numbers apart
    float* parts;      // [shared, splits, 256, 256]
    int rows, row_tiles, column_tiles, columns, steps, shared, splits, units, stride;  // `shared` tiles are in parts.
    // Units beyond all tiles have two tiles of the rows that are left.
};

constexpr int BLOCKS = 2, BLOCK_ROWS = 128, WEIGHT_ROWS = 256, DEPTH = 64, WIDTH = 32, WARPGROUP = 128;
constexpr int X_BYTES = BLOCK_ROWS * DEPTH * 2, HALF_BYTES = WEIGHT_ROWS / 2 * DEPTH * 2, STAGE = X_BYTES + 2 * HALF_BYTES;
constexpr int X_BOX_ROWS = 64, X_BOX_BYTES = X_BOX_ROWS * DEPTH * 2;
constexpr int COLUMNS = GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;  // of the result

using Ring = RingOf<STAGES, STAGE>;

// A tile, and from which to which step of the depth it is multiplied; or two tiles `across`, of half as many rows.
struct Unit {
    int row, column, begin, end;
    bool part, across;

    __device__ Unit(const Product& product, int number) : part(number < product.shared * product.splits) {
        int tile = number - product.shared * (product.splits - 1);
        begin = 0, end = product.steps;
        if (part) {
            tile = number / product.splits;
            const int of_tile = number % product.splits;
            begin = product.steps * of_tile / product.splits, end = product.steps * (of_tile + 1) / product.splits;
        }
        const int tiles = product.row_tiles * product.column_tiles;
        across = tile >= tiles;
        if (across) {
            row = product.row_tiles, column = (tile - tiles) * BLOCKS;
        } else {
            const int width = GROUP * product.column_tiles, first = tile / width * GROUP, within = tile % width;
            const int size = min(product.row_tiles - first, GROUP);
            row = first + within % size, column = within / size;
        }
    }
    // Of the result, a block's first.
    __device__ int row_of(int rank) const { return (row * BLOCKS + (across ? 0 : rank)) * BLOCK_ROWS; }
    __device__ int column_of(int rank) const { return (column + (across ? rank : 0)) * COLUMNS; }
};

// ---- The copying thread

__device__ __forceinline__ void copy_all(const Product& product, int rank) {
    Ring ring;
    for (int n = blockIdx.x / BLOCKS; n < product.units; n += gridDim.x / BLOCKS) {
        const Unit unit(product, n);
        const int row = unit.row_of(rank), column = unit.column_of(rank);
        for (int step = unit.begin; step < unit.end; ++step, ring.next()) {
            wait(ring.empty(), ring.parity ^ 1);
            arrive_expecting(ring.full(), STAGE);  // What the other block copies, too.
            const int depth = step * DEPTH;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int x_row = row + half * X_BOX_ROWS, of_weight = GATED ? half * product.columns + column
                                                                            : column + half * (WEIGHT_ROWS / 2);
                const char *x = ring.memory() + half * X_BOX_BYTES, *weight = ring.memory() + X_BYTES + half * HALF_BYTES;
                if (!unit.across) copy_box(x, product.x, depth, x_row, ring.full());
                if (!unit.across && half == rank) copy_box_to_all<BLOCKS>(weight, product.weight, depth, of_weight, ring.full());
                if (unit.across) copy_box(weight, product.weight, depth, of_weight, ring.full());
                if (unit.across && half == rank) copy_box_to_all<BLOCKS>(x, product.x, depth, x_row, ring.full());
            }
        }
    }
}

// ---- The multiplying warpgroups

__device__ __forceinline__ void exchange(u32& low, u32& high, int by) {
    const bool odd = threadIdx.x & by;
    const u32 got = __shfl_xor_sync(~0u, odd ? low : high, by);
    if (odd) {
        low = got;
    } else {
        high = got;
    }
}

// One lane for each block: this warpgroup has read the stage.
__device__ __forceinline__ void let_go(u32 empty) {
    const int warp = threadIdx.x % WARPGROUP / WIDTH;
    if (threadIdx.x % WIDTH == 0 && warp < BLOCKS) arrive_at(empty, warp);
}

__device__ __forceinline__ void leave_part(const Product& product, const float (&sum)[128], int unit, int row) {
    float* to = product.parts + ((long long)unit * BLOCKS * BLOCK_ROWS + row) * WEIGHT_ROWS + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        *(float2*)(to + i * 8) = {sum[i * 4], sum[i * 4 + 1]};
        *(float2*)(to + 8 * WEIGHT_ROWS + i * 8) = {sum[i * 4 + 2], sum[i * 4 + 3]};
    }
}

// Of rows `row` and `row + 8`, if there is such a column. Four lanes have two numbers each of 8 columns, and exchange them: each writes 16 bytes.
__device__ __forceinline__ void give(const Product& product, const float (&sum)[128], int row, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool there = row + half * 8 < product.rows && column < product.columns;
        char* to = product.out + ((long long)(row + half * 8) * product.stride + column + threadIdx.x % 4 * 8) * 2;
#pragma unroll
        for (int group = 0; group < COLUMNS / 32; ++group) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (group * 4 + i) * 4 + half * 2;
#if GATED
                pairs[i] = pack<FLOAT16>(gelu_times(sum[at], sum[at + 64]), gelu_times(sum[at + 1], sum[at + 65]));
#else
                pairs[i] = pack<FLOAT16>(sum[at], sum[at + 1]);
#endif
            }
            exchange(pairs[0], pairs[1], 1), exchange(pairs[2], pairs[3], 1);
            exchange(pairs[0], pairs[2], 2), exchange(pairs[1], pairs[3], 2);
            if (there) *(uint4*)(to + group * 64) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

__device__ __forceinline__ void multiply_all(const Product& product, int rank, int group) {
    const int row = group * 64 + threadIdx.x % WARPGROUP / WIDTH * 16 + threadIdx.x % WIDTH / 4;  // of the block's
    float sum[128];
    Ring ring;
    for (int n = blockIdx.x / BLOCKS; n < product.units; n += gridDim.x / BLOCKS) {
        const Unit unit(product, n);
        u32 before = 0;
        for (int step = unit.begin; step < unit.end; ++step, ring.next()) {
            wait(ring.full(), ring.parity);
            const u64 x = wgmma_operand(ring.memory() + group * (X_BYTES / 2));
            const u64 weight = wgmma_operand(ring.memory() + X_BYTES);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < DEPTH / 16; ++i)  // 32 bytes further each, in units of 16.
                wgmma_256<FLOAT16>(sum, x + i * 2, weight + i * 2, step != unit.begin || i);
            wgmma_end();
            if (step > unit.begin) {
                wgmma_wait<1>();
                let_go(before);
            }
            before = ring.empty();
        }
        wgmma_wait_for(sum);
        let_go(before);
        if (unit.part) {
            leave_part(product, sum, n, rank * BLOCK_ROWS + row);
        } else {
            give(product, sum, unit.row_of(rank) + row, unit.column_of(rank));
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) wide_product(const __grid_constant__ Product product) {
    let_next_begin();
    const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // The compiler sees that it is a warp's.
    const int rank = rank_in_cluster();
    if (threadIdx.x == 0) Ring::prepare(1, 2 * BLOCKS);
    __syncthreads();
    cluster_meets();  // The other's barriers are ready.
    wait_for_kernel_before();
    if (group == 2) {
        give_registers<40>();
        if (threadIdx.x == 2 * WARPGROUP) copy_all(product, rank);
        __syncwarp();
    } else {
        take_registers<232>();
        multiply_all(product, rank, group);
    }
    cluster_meets();  // The other may still write here, and tell these barriers.
}
