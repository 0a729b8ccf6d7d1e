// Attention of one token to tiles of keys and values in shared memory: what a warp makes of a tile, what it begins
// with, and how several warps' results become one. For `decode_hopper.cu` and `streamed_layer.cu`.
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
// Given when it is compiled: HEAD_DIM, KV_HEADS, MEMBERS (query heads of a KV head), BLOCK_SIZE (tokens of a block),
// POOL_BITS (of a number there: 16 for bfloat16, 8 for E4M3).

#pragma once

#include "hopper.cuh"

namespace attention {

// One of a step; positions count from where its block table begins.
struct Sequence {
    int before;    // tiles of all sequences before it; of the one after the last: of all
    int lowest;    // The first key that is visible.
    int fresh;     // That of its own token, whose key and value are new.
    int table_at;  // Where its block table begins.
};

constexpr int WIDTH = 32, KEYS = 32, COLUMNS = 8;
constexpr bool NARROW = POOL_BITS == 8;  // Numbers are multiplied in float16 then, else in bfloat16.
constexpr int HEAD_BYTES = HEAD_DIM * POOL_BITS / 8, TOKEN_BYTES = KV_HEADS * HEAD_BYTES;  // in the pool
constexpr int PANEL_BYTES = KEYS * HEAD_BYTES, TILE_BYTES = 2 * PANEL_BYTES;  // keys or values of a tile; both
constexpr int DEPTH = HEAD_DIM / 16, PIECES = HEAD_BYTES / 16;
constexpr int VECTORS = HEAD_DIM / 128;  // of a head: 4 numbers for each lane

static_assert(HEAD_DIM % 128 == 0 && BLOCK_SIZE % KEYS == 0 && MEMBERS <= COLUMNS, "other shapes have another kernel");
static_assert(POOL_BITS == 16 || POOL_BITS == 8, "other numbers have another kernel");

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

// A `Token` says where its heads are, `query(member)`, `key()` and `value()`; `place()`, where its key goes in the pool,
// its value BLOCK_SIZE tokens later; and `scale()`, of its scores. A `Measurement` says whether anybody asks, `at`, and
// takes the weight of a tile and of the own key, `put(row, member, weight)`. A token is given by value: by reference the
// compiler finds another order of instructions.

// The queries as the right operand: column `lane / 4`, zero beyond the group.
template <class Token>
__device__ __forceinline__ void load_queries(u32 (&queries)[DEPTH][2], Token token) {
    const int lane = threadIdx.x % WIDTH, member = lane / 4;
    const char* at = token.query(member);
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        if constexpr (NARROW) {
            const uint2 four = member < MEMBERS ? load_pairs(at + i * 32 + lane % 4 * 8) : uint2{};
            queries[i][0] = as_half(four.x);
            queries[i][1] = as_half(four.y);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                queries[i][half] = member < MEMBERS ? load_pair(at + i * 32 + half * 16 + lane % 4 * 4) : 0;
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
template <class Token, class Measurement>
__device__ __forceinline__ void begin_with_own(State& state, Token token, const Measurement& measurement) {
    const int lane = threadIdx.x % WIDTH;
    uint2 key[VECTORS], value[VECTORS], query[VECTORS];
    load_head(key, token.key());
    load_head(value, token.value());
    char* place = token.place();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        keep(key[i], place, i * WIDTH + lane);
        keep(value[i], place + BLOCK_SIZE * TOKEN_BYTES, i * WIDTH + lane);
    }
#pragma unroll
    for (int member = 0; member < MEMBERS; ++member) {
        load_head(query, token.query(member));
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
            state.top[member % 2] = product * token.scale();
            state.total[member % 2] = lane / 4 == 0 ? 1.0f : 0.0f;  // One lane's of the column.
            if (measurement.at && lane / 4 == 0) measurement.put(measurement.tiles, member, product * token.scale());
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
template <class Measurement>
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
            if (lane / 4 == 0 && member < MEMBERS) measurement.put(position / KEYS, member, higher + __log2f(sum));
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

// The `warp`-th softmax, for others: of each query head its greatest score and sum of weights, into `stats` [warps,
// MEMBERS], and the values' sums, into `parts` [warps, MEMBERS, HEAD_DIM].
__device__ __forceinline__ void leave(const State& state, int warp, float2* stats, float* parts) {
    const int lane = threadIdx.x % WIDTH;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        const float total = sum_of_column(state.total[column]);
        const int member = lane % 4 * 2 + column;
        if (member >= MEMBERS) continue;
        if (lane / 4 == 0) stats[warp * MEMBERS + member] = {state.top[column], total};
        float* mine = parts + (warp * MEMBERS + member) * HEAD_DIM;
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
}

}  // namespace attention
