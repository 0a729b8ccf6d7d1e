// Decode attention on Hopper: one query token a sequence, all keys of a step shared out evenly among blocks.
//
// Attention of a decode is the reading of keys and values. Those of each KV head are cut into tiles of 32 tokens of one
// sequence, and each block gets as many tiles of a head as any other, whosever they are. One of its warps does nothing
// but copy them into a ring in shared memory, as far ahead as there is room, and begins before the kernel
// before this one has ended: what earlier steps wrote waits for nobody. The other warps take tiles in turns, each with
// a softmax of its own, so that none waits for another's.
//
//   1. A *run* is a block's tiles of one sequence and head. At its end the warps put their results together.
//   2. A run that is all of a sequence and head is the result. Others are left in global memory, and whichever block
//      ends last puts them together.
//   3. The token's own key and value are in no tile: the block that has the last one takes them as they come, as what
//      one warp's softmax begins with, and writes them to the pool.
//
// How a warp attends to a tile is in `attention.cuh`.
//
// Given when it is compiled: HEAD_DIM, KV_HEADS, MEMBERS (query heads of a KV head), BLOCK_SIZE (tokens of a
// block), MOST_SEQUENCES (of a step), WARPS (that attend), STAGES (tiles of the ring), LEAST (tiles of a block),
// POOL_BITS (of a number there: 16 for bfloat16, 8 for E4M3).

#include "attention.cuh"
#include "ring.cuh"

using namespace attention;

struct Decode {
    const char *q, *k, *v;  // bfloat16 [sequences, heads, HEAD_DIM]
    char* pool;             // A layer's keys begin at `layer_at` of a block: [2, BLOCK_SIZE, KV_HEADS, HEAD_DIM].
    char* out;              // bfloat16 [sequences, KV_HEADS * MEMBERS, HEAD_DIM]
    const Sequence* work;   // [sequences + 1]
    const int* tables;
    float* parts;   // [blocks, 2, MEMBERS, HEAD_DIM], and
    float2* stats;  // [blocks, 2, MEMBERS]: what runs leave, their greatest scores and sums of weights
    u32* arrived;   // [sequences, KV_HEADS], zero before and after
    const int* mass_at;  // [sequences]: where in `mass` each one's measurement begins, or -1; null if none is asked.
    float* mass;         // [rows, KV_HEADS * MEMBERS]: see `Measurement`
    long long layer_at, block_stride;                   // bytes
    int q_token, q_head, k_token, k_head, v_token, v_head;  // bytes from one to the next
    int sequences;
    float scale;
};

constexpr int CONSUMERS = WARPS * WIDTH;

// ---- Shared memory: ring, barriers, the sequences, what warps put together (of one run and of the next)

using Ring = RingOf<STAGES, TILE_BYTES>;

constexpr int PARTS_BYTES = WARPS * MEMBERS * HEAD_DIM * 4, STATS_BYTES = WARPS * MEMBERS * 8;
constexpr int SEQUENCES_AT = Ring::end;
constexpr int PARTS_AT = SEQUENCES_AT + (MOST_SEQUENCES + 1) * 16;
constexpr int STATS_AT = PARTS_AT + 2 * PARTS_BYTES;
constexpr int LAST_AT = STATS_AT + 2 * STATS_BYTES;

__device__ __forceinline__ void consumers_meet() { meet<1, CONSUMERS>(); }

__device__ __forceinline__ Sequence sequence_of(int number) {
    return load<Sequence>(shared + SEQUENCES_AT + number * sizeof(Sequence));
}

// ---- Who has which tiles

// Of a head's tiles, all sequences' one after the other. Neighbouring blocks have neighbouring heads of the same tiles,
// which lie beside each other in memory: with all heads' tiles one after the other 64 sequences took 5% more.
struct Shares {
    u32 tiles, blocks;

    __device__ explicit Shares(const Decode& decode)
        : tiles(sequence_of(decode.sequences).before),
          blocks(min(gridDim.x / KV_HEADS, (tiles + LEAST - 1) / LEAST)) {}
    __device__ u32 begin(u32 block) const { return (u64)tiles * block / blocks; }
    __device__ u32 owner(u32 tile) const { return (((u64)tile + 1) * blocks - 1) / tiles; }
};

// A block's runs, one after the other.
struct Run {
    int left;            // tiles of the block, this run's included
    int head;            // the KV head
    int number;          // the sequence's
    int first;           // of the sequence's tiles
    int tiles;           // that the sequence has
    Sequence sequence;

    __device__ Run(const Decode& decode, const Shares& shares) : left(0), head(blockIdx.x % KV_HEADS) {
        const u32 block = blockIdx.x / KV_HEADS;
        if (block >= shares.blocks) return;
        const int begin = shares.begin(block);
        left = shares.begin(block + 1) - begin;
        int beyond = decode.sequences;
        number = 0;
        while (number + 1 < beyond) {  // The last one that begins there or before.
            const int middle = (number + beyond) / 2;
            if (sequence_of(middle).before <= begin) number = middle;
            else beyond = middle;
        }
        enter();
        first = begin - sequence.before;
    }
    __device__ int count() const { return min(left, tiles - first); }
    __device__ bool whole() const { return first == 0 && left >= tiles; }
    __device__ bool ends() const { return left >= tiles - first; }
    __device__ int position(int tile) const { return (sequence.lowest / KEYS + first + tile) * KEYS; }
    __device__ void next() {
        left -= count();
        first = tiles = 0;
        while (left > 0 && tiles == 0) ++number, enter();
    }

  private:
    __device__ void enter() {
        sequence = sequence_of(number);
        tiles = sequence_of(number + 1).before - sequence.before;
    }
};

// ---- The copying warp

__device__ __forceinline__ void copy_tiles(const Decode& decode, Run run) {
    const int lane = threadIdx.x % WIDTH;
    Ring ring;
    for (; run.left > 0; run.next()) {
        const int count = run.count();
        const int* table = decode.tables + run.sequence.table_at;
        int mine = 0;
        for (int tile = 0; tile < count; ++tile, ring.skip(1)) {
            if (tile % WIDTH == 0) mine = tile + lane < count ? table[run.position(tile + lane) / BLOCK_SIZE] : 0;
            const long long block = __shfl_sync(~0u, mine, tile % WIDTH);
            const int position = run.position(tile);
            const char* from = decode.pool + block * decode.block_stride + decode.layer_at +
                               position % BLOCK_SIZE * TOKEN_BYTES + run.head * HEAD_BYTES;
            wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
            for (int i = 0; i < KEYS * PIECES / WIDTH; ++i) {
                const int token = (i * WIDTH + lane) / PIECES, piece = (i * WIDTH + lane) % PIECES;
                const bool visible = position + token >= run.sequence.lowest && position + token < run.sequence.fresh;
                char* to = ring.memory() + token * HEAD_BYTES + (piece ^ token % 8) * 16;
                copy_16(to, from + token * TOKEN_BYTES + piece * 16, visible);
                copy_16(to + PANEL_BYTES, from + (BLOCK_SIZE + token) * TOKEN_BYTES + piece * 16, visible);
            }
            arrive_when_copied(ring.full());
        }
    }
}

// ---- What is measured

// Attention mass of a sequence, as powers of two: the weight of each tile's keys from where its block table begins, then
// that of its own key, then the sum of all. Each is a row with a number for each query head.
struct Measurement {
    float* at = nullptr;  // The first row, of this KV head; null if nobody asks.
    int tiles;

    __device__ Measurement(const Decode& decode, const Run& run) : tiles(run.sequence.fresh / KEYS + 1) {
        const int begin = decode.mass_at ? decode.mass_at[run.number] : -1;
        if (begin >= 0) at = decode.mass + ((long long)begin * KV_HEADS + run.head) * MEMBERS;
    }
    __device__ void put(int row, int member, float weight) const {
        at[(long long)row * (KV_HEADS * MEMBERS) + member] = weight;
    }
};

// ---- The attending warps

// A run's token.
struct Token {
    const Decode& decode;
    const Run& run;

    __device__ const char* query(int member) const {
        return decode.q + (long long)run.number * decode.q_token + (run.head * MEMBERS + member) * decode.q_head;
    }
    __device__ const char* key() const {
        return decode.k + (long long)run.number * decode.k_token + run.head * decode.k_head;
    }
    __device__ const char* value() const {
        return decode.v + (long long)run.number * decode.v_token + run.head * decode.v_head;
    }
    __device__ float scale() const { return decode.scale; }
    __device__ char* place() const {
        const int fresh = run.sequence.fresh;
        const long long block = decode.tables[run.sequence.table_at + fresh / BLOCK_SIZE];
        return decode.pool + block * decode.block_stride + decode.layer_at + fresh % BLOCK_SIZE * TOKEN_BYTES +
               run.head * HEAD_BYTES;
    }
};

// What the warps have of a run goes to the result, or to where the last block of its sequence and head finds it, which
// then gives the result. `turn` alternates from run to run.
__device__ __forceinline__ void give(const State& state, const Decode& decode, const Shares& shares, const Run& run,
                                     const Measurement& measurement, int turn) {
    constexpr int OF_MEMBER = HEAD_DIM / 2, PAIRS = MEMBERS * OF_MEMBER;
    const int warp = threadIdx.x / WIDTH;
    float* parts = (float*)(shared + PARTS_AT + turn * PARTS_BYTES);
    float2* stats = (float2*)(shared + STATS_AT + turn * STATS_BYTES);
    leave(state, warp, stats, parts);
    consumers_meet();
    const auto put = [&](int pair, const Merged& merged) {
        const long long row = ((long long)run.number * KV_HEADS + run.head) * (MEMBERS * HEAD_DIM);
        const float share = 1.0f / merged.whole;
        *(u32*)(decode.out + (row + pair * 2) * 2) = pack<false>(merged.sum.x * share, merged.sum.y * share);
        if (measurement.at && pair % OF_MEMBER == 0)
            measurement.put(measurement.tiles + 1, pair / OF_MEMBER, merged.top + __log2f(merged.whole));
    };
    const bool whole = run.whole();
    const int slot = (blockIdx.x * 2 + (run.first == 0)) * MEMBERS;
    for (int pair = threadIdx.x; pair < PAIRS; pair += CONSUMERS) {
        const int member = pair / OF_MEMBER;
        Merged merged;
#pragma unroll
        for (int of = 0; of < WARPS; ++of)
            merged.add(stats[of * MEMBERS + member], *(const float2*)(parts + of * MEMBERS * HEAD_DIM + pair * 2));
        if (whole) {
            put(pair, merged);
        } else {
            *(float2*)(decode.parts + (long long)slot * HEAD_DIM + pair * 2) = merged.sum;
            if (pair % OF_MEMBER == 0) decode.stats[slot + member] = {merged.top, merged.whole};
        }
    }
    if (whole) return;
    consumers_meet();
    const u32 first = shares.owner(run.sequence.before), last = shares.owner(run.sequence.before + run.tiles - 1);
    if (threadIdx.x == 0) {
        u32* counter = decode.arrived + run.number * KV_HEADS + run.head;
        const bool all = added(counter, 1) == last - first;
        if (all) *counter = 0;
        *(u32*)(shared + LAST_AT) = all;
    }
    consumers_meet();
    if (!load<u32>(shared + LAST_AT)) return;
    for (int pair = threadIdx.x; pair < PAIRS; pair += CONSUMERS) {
        Merged merged;
#pragma unroll 4
        for (u32 block = first; block <= last; ++block) {
            const int theirs = ((block * KV_HEADS + run.head) * 2 + (block == first)) * MEMBERS;
            merged.add(floats(load_pairs((const char*)(decode.stats + theirs + pair / OF_MEMBER))),
                       floats(load_pairs((const char*)(decode.parts + (long long)theirs * HEAD_DIM + pair * 2))));
        }
        put(pair, merged);
    }
}

__device__ __forceinline__ void attend(const Decode& decode, const Shares& shares, Run run) {
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    Ring ring;
    ring.skip(warp);
    int ahead = warp;  // tiles from the run's first to this warp's next
    wait_for_kernel_before();
    for (int turn = 0; run.left > 0; run.next(), turn ^= 1) {
        const int count = run.count();
        u32 queries[DEPTH][2];
        load_queries(queries, Token{decode, run});
        const Measurement measurement(decode, run);
        State state;
        if (run.ends() && warp == 0) begin_with_own(state, Token{decode, run}, measurement);
        for (; ahead < count; ahead += WARPS, ring.skip(WARPS)) {
            wait(ring.full(), ring.parity);
            add_tile(state, queries, ring.memory(), run.position(ahead), run.sequence, measurement, decode.scale);
            __syncwarp();
            if (lane == 0) arrive(ring.empty());
        }
        ahead -= count;
        give(state, decode, shares, run, measurement, turn);
    }
}

// The least blocks of a multiprocessor, which 0 leaves to the compiler: for E4M3 and eight warps it spills else.
extern "C" __global__ void __launch_bounds__(CONSUMERS + WIDTH, NARROW ? 1 : 0)
    decode_hopper(const __grid_constant__ Decode decode) {
    // Who waits for a stage's phase must know that the one before it is over, or takes that for it.
    static_assert(STAGES % WARPS == 0, "a stage is always the same warp's");
    let_next_begin();
    for (int i = threadIdx.x; i <= decode.sequences; i += CONSUMERS + WIDTH)
        *(uint4*)(shared + SEQUENCES_AT + i * 16) = load_words(decode.work + i);
    if (threadIdx.x == 0) Ring::prepare(WIDTH, 1);
    __syncthreads();
    const Shares shares(decode);
    const Run run(decode, shares);
    if (threadIdx.x < CONSUMERS) {
        attend(decode, shares, run);
    } else {
        copy_tiles(decode, run);
    }
}
