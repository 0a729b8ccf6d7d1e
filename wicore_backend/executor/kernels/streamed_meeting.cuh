// What `streamed_layer.cu` is made of, third: how all blocks hear what each has computed. MEETING says which way.
//
// BY_WORDS: results are words with a bit that turns with each launch.
//   1. A thread tells its result with the launch's bit.
//   2. Whoever needs a row asks for its words until all have that bit: with the news comes the number.
//   3. A word is told again in the next launch, which waits for this one's end: nobody can find it two turns late.
//
// BY_HINTS: the same, but most ask only when it is worth it.
//   4. Lanes of one warp ask for the last word that each block tells, then meet the block; then 2.
//
// BY_COUNTER: results are plain numbers.
//   1. A block's threads write their results and meet.
//   2. One of them adds 1 to the meeting's counter (release), and asks until all blocks have (acquire).
//   3. It meets the others of its block, who read the row then.
//   4. The counter goes on from launch to launch: of the launch with number n, n times the blocks is all.
//   5. The MLP's row is in bfloat16, with the sum and the largest number of each tile of it: so nobody needs all
//      numbers before he can convert one.

#pragma once

#include "streamed_products.cuh"

// A row of COUNT pieces among the threads: each takes one in each round. Blocks begin at different places, since all
// read the same memory at the same time; so their sums over a row may differ in the last bit. Where a result must not
// depend on whose it is, as with tiles that are claimed, they begin at the same.
template <int COUNT>
struct Row {
    static constexpr int rounds = (COUNT + CONSUMERS - 1) / CONSUMERS;
    int start;

    __device__ Row() : start(CLAIMED ? 0 : blockIdx.x * COUNT / gridDim.x / WIDTH * WIDTH) {}
    __device__ bool has(int round) const { return round * CONSUMERS + threadIdx.x < COUNT; }
    __device__ int place(int round) const {
        const int place = start + round * CONSUMERS + threadIdx.x;
        return place < COUNT ? place : place - COUNT;
    }
};

// ---- Words that turn: in float32 it is the lowest bit

__device__ __forceinline__ float4 floats(uint4 v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ __forceinline__ bool ask(float4& v, const u32* from, u32 turn) {
    const auto [a, b, c, d] = told_four(from);
    v = floats({a & ~1u, b & ~1u, c & ~1u, d & ~1u});
    return (((a ^ turn) | (b ^ turn) | (c ^ turn) | (d ^ turn)) & 1) == 0;
}

// Two numbers in bfloat16, divided by 2^64: what is under 2^65 leaves the upper bit of the exponent free.
constexpr float FAR = 18446744073709551616.0f;  // 2^64
constexpr u32 FREE_BIT = 14;

__device__ __forceinline__ u32 far_pair(float first, float second) {
    const float most = 1.984375f;
    first = fminf(fmaxf(first * (1.0f / FAR), -most), most), second = fminf(fmaxf(second * (1.0f / FAR), -most), most);
    return pack<false>(first, second);
}

__device__ __forceinline__ bool ask_pairs(float4& v, const u32* from, u32 turn) {
    const uint2 pairs = told_two(from);
    const u32 bit = 1u << FREE_BIT, expected = turn << FREE_BIT;
    const float4 divided = unpack(uint2{pairs.x & ~bit, pairs.y & ~bit});
    v = {divided.x * FAR, divided.y * FAR, divided.z * FAR, divided.w * FAR};
    return (((pairs.x ^ expected) | (pairs.y ^ expected)) & bit) == 0;
}

// A row that all blocks tell, by `ask(v, place)`; its first four tell a thread when to ask for the others.
template <int COUNT, int ROUNDS, class Ask>
__device__ __forceinline__ void hear(const Row<COUNT>& row, float4 (&v)[ROUNDS], Ask ask) {
    bool there[ROUNDS];
    if (row.has(0))
        while (!ask(v[0], row.place(0))) __nanosleep(64);
#pragma unroll
    for (int i = 1; i < ROUNDS; ++i)
        if (row.has(i)) there[i] = ask(v[i], row.place(i));
#pragma unroll
    for (int i = 1; i < ROUNDS; ++i)
        if (row.has(i))
            while (!there[i]) there[i] = ask(v[i], row.place(i));
}

// ---- Meetings: after out, after gate and up, after down

struct Meetings {
    const Layer& layer;
    u32 launch;  // its number

    __device__ u32 turn() const { return launch & 1; }

    // A block's results of out or down; of gate and up, each second output's and the next one's.
    __device__ void tell_result(u32* row, int output, float value) const {
        if constexpr (MEETING == BY_COUNTER) row[output] = __float_as_uint(value);
        else tell(row + output, __float_as_uint(value) & ~1u | turn());
    }
    __device__ void tell_fed(int output, float value, float next) const {
        if constexpr (MEETING == BY_COUNTER) layer.told_fed[output / 2] = pack<false>(value, next);
        else tell(layer.told_fed + output / 2, far_pair(value, next) | turn() << FREE_BIT);
    }

    // After a matrix: until others' results may be asked for. They are in `row`, of which a tile takes so many words,
    // whose `bit` turns.
    __device__ void hold(int matrix, const u32* row, int words_of_tile, u32 bit) const {
        if constexpr (MEETING == BY_COUNTER) {
            consumers_meet();
            if (threadIdx.x == 0) {
                add_released(layer.counters + matrix, 1);
                while ((int)(told_acquired(layer.counters + matrix) - launch * gridDim.x) < 0) __nanosleep(20);
            }
            consumers_meet();
        } else if constexpr (MEETING == BY_HINTS) {
            if (threadIdx.x < WIDTH) {
                for (int block = threadIdx.x; block < gridDim.x; block += WIDTH) {
                    const int end = layer.shares[matrix][block + 1];
                    if (end == layer.shares[matrix][block]) continue;  // It has nothing to tell.
                    const u32* last = row + end * words_of_tile - 1;
                    while ((told(last) >> bit & 1) != turn()) __nanosleep(32);
                }
            }
            consumers_meet();
        }
    }

    // A row in float32 at `words`, four numbers a piece.
    template <int COUNT, int ROUNDS>
    __device__ void hear_row(const Row<COUNT>& row, float4 (&v)[ROUNDS], const u32* words) const {
        if constexpr (MEETING == BY_COUNTER) {
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i)
                if (row.has(i)) v[i] = floats(load_words(words + row.place(i) * 4));
        } else {
            hear(row, v, [&](float4& four, int place) { return ask(four, words + place * 4, turn()); });
        }
    }
};
