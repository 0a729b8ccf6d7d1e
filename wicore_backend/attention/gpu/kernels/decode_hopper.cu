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
// Products are those of tensor cores (mma.m16n8k16) with the keys as the left operand, 16 rows of it, and the query
// heads of a KV head as the columns of the right one, 8 at most; the weights of keys, turned, are the right operand of
// the values' product. Scores are powers of two. Everything is in bfloat16 but sums.
//
// Keys and values in E4M3 are widened to float16, which holds them, on their way from shared memory to the tensor
// cores, and so are queries. A piece of 16 bytes of keys is 16 channels; those of a product may be in any order that
// the queries have, too, so that each lane takes the 4 that it is given. Values are turned in pairs of channels, of
// which each lane then takes the even and the odd one apart: they are its two rows.
//
// Given when it is compiled: HEAD_DIM, KV_HEADS, GROUP (query heads of a KV head), BLOCK_SIZE (tokens of a
// block), MOST_SEQUENCES (of a step), WARPS (that attend), STAGES (tiles of the ring), LEAST (tiles of a block),
// POOL_BITS (of a number there: 16 for bfloat16, 8 for E4M3).

#include "ring.cuh"

struct Sequence {
    int before;    // tiles of all sequences before it; of the one after the last: of all
    int lowest;    // The first key that is visible. Positions count from where its block table begins.
    int fresh;     // That of its own token, whose key and value are new.
    int table_at;  // Where its block table begins.
};

struct Decode {
    const char *q, *k, *v;  // bfloat16 [sequences, heads, HEAD_DIM]
    char* pool;             // A layer's keys begin at `layer_at` of a block: [2, BLOCK_SIZE, KV_HEADS, HEAD_DIM].
    char* out;              // bfloat16 [sequences, KV_HEADS * GROUP, HEAD_DIM]
    const Sequence* work;   // [sequences + 1]
    const int* tables;
    float* parts;   // [blocks, 2, GROUP, HEAD_DIM], and
    float2* stats;  // [blocks, 2, GROUP]: what runs leave, their greatest scores and sums of weights
    u32* arrived;   // [sequences, KV_HEADS], zero before and after
    const int* mass_at;  // [sequences]: where in `mass` each one's measurement begins, or -1; null if none is asked.
    float* mass;         // [rows, KV_HEADS * GROUP]: see `Measurement`
    long long layer_at, block_stride;                   // bytes
    int q_token, q_head, k_token, k_head, v_token, v_head;  // bytes from one to the next
    int sequences;
    float scale;
};

constexpr int WIDTH = 32, KEYS = 32, COLUMNS = 8, CONSUMERS = WARPS * WIDTH;
constexpr bool NARROW = POOL_BITS == 8;  // Numbers are multiplied in float16 then, else in bfloat16.
constexpr int HEAD_BYTES = HEAD_DIM * POOL_BITS / 8, ROW_BYTES = KV_HEADS * HEAD_BYTES;  // in the pool
constexpr int PANEL_BYTES = KEYS * HEAD_BYTES, STAGE_BYTES = 2 * PANEL_BYTES;  // keys or values of a tile; both
constexpr int DEPTH = HEAD_DIM / 16, PIECES = HEAD_BYTES / 16;
constexpr int VECTORS = HEAD_DIM / 128;  // of a head: 4 numbers for each lane

static_assert(HEAD_DIM % 128 == 0 && BLOCK_SIZE % KEYS == 0 && GROUP <= COLUMNS, "other shapes have another kernel");
static_assert(POOL_BITS == 16 || POOL_BITS == 8, "other numbers have another kernel");

// ---- Shared memory: ring, barriers, the sequences, what warps put together (of one run and of the next)

using Ring = RingOf<STAGES, STAGE_BYTES>;

constexpr int PARTS_BYTES = WARPS * GROUP * HEAD_DIM * 4, STATS_BYTES = WARPS * GROUP * 8;
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
                               position % BLOCK_SIZE * ROW_BYTES + run.head * HEAD_BYTES;
            wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
            for (int i = 0; i < KEYS * PIECES / WIDTH; ++i) {
                const int token = (i * WIDTH + lane) / PIECES, piece = (i * WIDTH + lane) % PIECES;
                const bool visible = position + token >= run.sequence.lowest && position + token < run.sequence.fresh;
                char* to = ring.memory() + token * HEAD_BYTES + (piece ^ token % 8) * 16;
                copy_16(to, from + token * ROW_BYTES + piece * 16, visible);
                copy_16(to + PANEL_BYTES, from + (BLOCK_SIZE + token) * ROW_BYTES + piece * 16, visible);
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
        if (begin >= 0) at = decode.mass + ((long long)begin * KV_HEADS + run.head) * GROUP;
    }
    __device__ void put(int row, int member, float weight) const {
        at[(long long)row * (KV_HEADS * GROUP) + member] = weight;
    }
};

// ---- The attending warps

constexpr float FLOOR = -1e30f;  // Below any score; finite, so that what has seen no key yet is no NaN.

// A warp's softmax over its tiles of a run. A lane has two columns, `lane % 4 * 2` and the next one, which are query
// heads; of values' sums two channels of each 16, `channel_of` the first row and that of the second.
struct State {
    float top[2] = {FLOOR, FLOOR};
    float total[2] = {};  // of this lane's keys
    float sum[DEPTH][4] = {};
};

__device__ __forceinline__ int channel_of(int second) {
    const int row = threadIdx.x % WIDTH / 4;
    return NARROW ? row * 2 + second : row + second * 8;
}

__device__ __forceinline__ float2 floats(uint2 v) { return {__uint_as_float(v.x), __uint_as_float(v.y)}; }

__device__ __forceinline__ u32 as_half(u32 pair) {  // of bfloat16
    const float2 v = unpack<false>(pair);
    return pack<true>(v.x, v.y);
}

__device__ __forceinline__ u32 lowered(u32 pair) {  // E4M3 of bfloat16, as `hmt/fp8.py` has it: NaN is 0.
    const float2 v = unpack<false>(pair);
    return lower_fp8(v.x == v.x ? v.x : 0.0f, v.y == v.y ? v.y : 0.0f);
}

// Of the head's numbers at `at`, those of this lane: 4 of each 128.
__device__ __forceinline__ void load_head(uint2 (&v)[VECTORS], const char* at) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) v[i] = load_pairs(at + i * 256 + threadIdx.x % WIDTH * 8);
}

__device__ __forceinline__ const char* query_head(const Decode& decode, const Run& run, int member) {
    return decode.q + (long long)run.number * decode.q_token + (run.head * GROUP + member) * decode.q_head;
}

// The queries as the right operand: column `lane / 4`, zero beyond the group.
__device__ __forceinline__ void load_queries(u32 (&queries)[DEPTH][2], const Decode& decode, const Run& run) {
    const int lane = threadIdx.x % WIDTH, member = lane / 4;
    const char* at = query_head(decode, run, member);
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        if constexpr (NARROW) {
            const uint2 four = member < GROUP ? load_pairs(at + i * 32 + lane % 4 * 8) : uint2{};
            queries[i][0] = as_half(four.x);
            queries[i][1] = as_half(four.y);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                queries[i][half] = member < GROUP ? load_pair(at + i * 32 + half * 16 + lane % 4 * 4) : 0;
        }
    }
}

// Four numbers go to the pool as they are kept there, and stay as what they are read as again.
__device__ __forceinline__ void keep(uint2& four, char* place, int index) {
    if constexpr (NARROW) {
        const u32 codes = lowered(four.x) | lowered(four.y) << 16;
        *(u32*)(place + index * 4) = codes;
        four = raise_fp8_four(codes);
    } else {
        *(uint2*)(place + index * 8) = four;
    }
}

// What a softmax begins with: the token's own key and value, which go to the pool.
__device__ __forceinline__ void begin_with_own(State& state, const Decode& decode, const Run& run,
                                               const Measurement& measurement) {
    const int lane = threadIdx.x % WIDTH, fresh = run.sequence.fresh;
    uint2 key[VECTORS], value[VECTORS], query[VECTORS];
    load_head(key, decode.k + (long long)run.number * decode.k_token + run.head * decode.k_head);
    load_head(value, decode.v + (long long)run.number * decode.v_token + run.head * decode.v_head);
    const long long block = decode.tables[run.sequence.table_at + fresh / BLOCK_SIZE];
    char* place = decode.pool + block * decode.block_stride + decode.layer_at + fresh % BLOCK_SIZE * ROW_BYTES +
                  run.head * HEAD_BYTES;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        keep(key[i], place, i * WIDTH + lane);
        keep(value[i], place + BLOCK_SIZE * ROW_BYTES, i * WIDTH + lane);
    }
#pragma unroll
    for (int member = 0; member < GROUP; ++member) {
        load_head(query, query_head(decode, run, member));
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float2 a = unpack<false>(query[i].x), b = unpack<false>(query[i].y);
            const float2 c = unpack<NARROW>(key[i].x), d = unpack<NARROW>(key[i].y);
            product += (a.x * c.x + a.y * c.y) + (b.x * d.x + b.y * d.y);
        }
#pragma unroll
        for (int distance = WIDTH / 2; distance; distance /= 2) product += __shfl_xor_sync(~0u, product, distance);
        if (lane % 4 == member / 2) {
            state.top[member % 2] = product * decode.scale;
            state.total[member % 2] = lane / 4 == 0 ? 1.0f : 0.0f;  // One lane's of the column.
            if (measurement.at && lane / 4 == 0) measurement.put(measurement.tiles, member, product * decode.scale);
        }
    }
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // The lane that has channel i * 16 + channel_of(half), in which word, and there in which half.
            const int holder = i * 4 % WIDTH + (NARROW ? lane / 8 : half * 2 + lane / 16);
            const u32 x = __shfl_sync(~0u, value[i / 8].x, holder), y = __shfl_sync(~0u, value[i / 8].y, holder);
            const float2 pair = unpack<NARROW>(lane / (NARROW ? 4 : 8) % 2 ? y : x);
            const bool upper = NARROW ? half : lane / 4 % 2;
            state.sum[i][half * 2] = state.sum[i][half * 2 + 1] = upper ? pair.y : pair.x;
        }
}

__device__ __forceinline__ float most_of_column(float most) {
#pragma unroll
    for (int distance = 4; distance < WIDTH; distance *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    return most;
}

__device__ __forceinline__ float sum_of_column(float sum) {
#pragma unroll
    for (int distance = 4; distance < WIDTH; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
}

// Of 16 channels of a key and of the one 8 below, this lane's 4 of each.
__device__ __forceinline__ void add_keys(float (&scores)[4], u32 upper, u32 lower, const u32 (&queries)[2]) {
    const uint2 a = raise_fp8_four(upper), b = raise_fp8_four(lower);
    mma<true>(scores, a.x, b.x, a.y, b.y, queries[0], queries[1]);
}

// Two channels of two values, and of the two 8 below.
__device__ __forceinline__ void add_values(float (&sum)[4], u32 upper, u32 lower, u32 first, u32 second) {
    constexpr u32 BY_CHANNELS = 0x3120;  // The bytes' order: a channel of both values, then the other one.
    const uint2 a = raise_fp8_four(__byte_perm(upper, 0, BY_CHANNELS));
    const uint2 b = raise_fp8_four(__byte_perm(lower, 0, BY_CHANNELS));
    mma<true>(sum, a.x, a.y, b.x, b.y, first, second);
}

// One more tile, whose tokens begin at `position`, with its keys and values at `panel`.
__device__ __forceinline__ void add_tile(State& state, const u32 (&queries)[DEPTH][2], const char* panel, int position,
                                         const Sequence& sequence, const Measurement& measurement, float scale) {
    const int lane = threadIdx.x % WIDTH;
    float scores[2][4] = {};
    {
        const int row = lane % 16;
#pragma unroll
        for (int i = 0; i < PIECES / 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int piece = (i * 2 + lane / 16) ^ row % 8;
                const uint4 keys = load_matrices(panel + (half * 16 + row) * HEAD_BYTES + piece * 16);
                if constexpr (NARROW) {
                    add_keys(scores[half], keys.x, keys.y, queries[i * 2]);
                    add_keys(scores[half], keys.z, keys.w, queries[i * 2 + 1]);
                } else {
                    mma<false>(scores[half], keys.x, keys.y, keys.z, keys.w, queries[i][0], queries[i][1]);
                }
            }
    }
    if (position < sequence.lowest || position + KEYS > sequence.fresh) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int key = position + i / 4 * 16 + i % 4 / 2 * 8 + lane / 4;
            if (key < sequence.lowest || key >= sequence.fresh) scores[i / 4][i % 4] = __uint_as_float(0xff800000);
        }
    }
    float shrink[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        const float most = most_of_column(fmaxf(fmaxf(scores[0][column], scores[0][column + 2]),
                                                fmaxf(scores[1][column], scores[1][column + 2])));
        const float higher = fmaxf(state.top[column], most * scale);
        shrink[column] = exp2_quickly(state.top[column] - higher);
        state.top[column] = higher;
        float sum = 0.0f;
#pragma unroll
        for (int i = column; i < 8; i += 2) {
            float& score = scores[i / 4][i % 4];
            score = exp2_quickly(score * scale - higher);
            sum += score;
        }
        state.total[column] = state.total[column] * shrink[column] + sum;
        if (measurement.at) {
            sum = sum_of_column(sum);
            const int member = lane % 4 * 2 + column;
            if (lane / 4 == 0 && member < GROUP) measurement.put(position / KEYS, member, higher + __log2f(sum));
        }
    }
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) state.sum[i][j] *= shrink[j % 2];
    const int token = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 first = turned(pack<NARROW>(scores[half][0], scores[half][1]));
        const u32 second = turned(pack<NARROW>(scores[half][2], scores[half][3]));
#pragma unroll
        for (int i = 0; i < PIECES / 2; ++i) {
            const int piece = (i * 2 + lane / 8 % 2) ^ token % 8;
            const uint4 values =
                load_matrices_turned(panel + PANEL_BYTES + (half * 16 + token) * HEAD_BYTES + piece * 16);
            if constexpr (NARROW) {
                add_values(state.sum[i * 2], values.x, values.z, first, second);
                add_values(state.sum[i * 2 + 1], values.y, values.w, first, second);
            } else {
                mma<false>(state.sum[i], values.x, values.y, values.z, values.w, first, second);
            }
        }
    }
}

// Two channels of a query head, of results that are put together one by one.
struct Merged {
    float top = FLOOR, whole = 0.0f;
    float2 sum = {};

    __device__ void add(float2 stat, float2 part) {
        const float higher = fmaxf(top, stat.x);
        const float shrink = exp2_quickly(top - higher), share = exp2_quickly(stat.x - higher);
        whole = whole * shrink + stat.y * share;
        sum = {sum.x * shrink + part.x * share, sum.y * shrink + part.y * share};
        top = higher;
    }
};

// What the warps have of a run goes to the result, or to where the last block of its sequence and head finds it, which
// then gives the result. `turn` alternates from run to run.
__device__ __forceinline__ void give(const State& state, const Decode& decode, const Shares& shares, const Run& run,
                                     const Measurement& measurement, int turn) {
    constexpr int OF_MEMBER = HEAD_DIM / 2, PAIRS = GROUP * OF_MEMBER;
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    float* parts = (float*)(shared + PARTS_AT + turn * PARTS_BYTES);
    float2* stats = (float2*)(shared + STATS_AT + turn * STATS_BYTES);
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        const float total = sum_of_column(state.total[column]);
        const int member = lane % 4 * 2 + column;
        if (member >= GROUP) continue;
        if (lane / 4 == 0) stats[warp * GROUP + member] = {state.top[column], total};
        float* mine = parts + (warp * GROUP + member) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            if constexpr (NARROW) {  // They lie beside each other.
                *(float2*)(mine + i * 16 + channel_of(0)) = {state.sum[i][column], state.sum[i][column + 2]};
            } else {
                mine[i * 16 + channel_of(0)] = state.sum[i][column];
                mine[i * 16 + channel_of(1)] = state.sum[i][column + 2];
            }
        }
    }
    consumers_meet();
    const auto put = [&](int pair, const Merged& merged) {
        const long long row = ((long long)run.number * KV_HEADS + run.head) * (GROUP * HEAD_DIM);
        const float share = 1.0f / merged.whole;
        *(u32*)(decode.out + (row + pair * 2) * 2) = pack<false>(merged.sum.x * share, merged.sum.y * share);
        if (measurement.at && pair % OF_MEMBER == 0)
            measurement.put(measurement.tiles + 1, pair / OF_MEMBER, merged.top + __log2f(merged.whole));
    };
    const bool whole = run.whole();
    const int slot = (blockIdx.x * 2 + (run.first == 0)) * GROUP;
    for (int pair = threadIdx.x; pair < PAIRS; pair += CONSUMERS) {
        const int member = pair / OF_MEMBER;
        Merged merged;
#pragma unroll
        for (int of = 0; of < WARPS; ++of)
            merged.add(stats[of * GROUP + member], *(const float2*)(parts + of * GROUP * HEAD_DIM + pair * 2));
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
            const int theirs = ((block * KV_HEADS + run.head) * 2 + (block == first)) * GROUP;
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
        load_queries(queries, decode, run);
        const Measurement measurement(decode, run);
        State state;
        if (run.ends() && warp == 0) begin_with_own(state, decode, run, measurement);
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
