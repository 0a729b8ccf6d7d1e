// What `streamed_layer.cu` is made of, third: how all blocks hear what each has computed.
//
//   1. A block's threads write their results and meet.
//   2. One of them adds 1 to the meeting's counter (release), and asks until all blocks have (acquire).
//   3. It meets the others of its block, who read the row then.
//   4. The counter goes on from launch to launch: of the launch with number n, n times the blocks is all.
//   5. The MLP's row is in bfloat16, with the sum and the largest number of each tile of it: so nobody needs all
//      numbers before he can convert one.
//
// The heads, which few need, are words with a bit that turns with each launch, as are parts of tiles: whoever needs them
// asks until they have it. A word is told again in the next launch, which waits for this one's end: nobody can find it
// two turns late.

#pragma once

#include "streamed_products.cuh"

// A row of COUNT pieces among the threads: each takes one in each round. Blocks begin at different places, since all
// read the same memory at the same time; so their sums over a row may differ in the last bit.
template <int COUNT>
struct Row {
    static constexpr int rounds = (COUNT + CONSUMERS - 1) / CONSUMERS;
    int start;

    __device__ Row() : start(blockIdx.x * COUNT / gridDim.x / WIDTH * WIDTH) {}
    __device__ bool has(int round) const { return round * CONSUMERS + threadIdx.x < COUNT; }
    __device__ int place(int round) const {
        const int place = start + round * CONSUMERS + threadIdx.x;
        return place < COUNT ? place : place - COUNT;
    }
};

__device__ __forceinline__ float4 floats(uint4 v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Words in float32, whose lowest bit turns.
__device__ __forceinline__ bool ask(float4& v, const u32* from, u32 turn) {
    const auto [a, b, c, d] = told_four(from);
    v = floats({a & ~1u, b & ~1u, c & ~1u, d & ~1u});
    return (((a ^ turn) | (b ^ turn) | (c ^ turn) | (d ^ turn)) & 1) == 0;
}

// After out, after gate and up, after down.
struct Meetings {
    const Layer& layer;
    u32 launch;  // its number

    __device__ u32 turn() const { return launch & 1; }

    // After a matrix: until all blocks have written their results.
    __device__ void hold(int matrix) const {
        consumers_meet();
        if (threadIdx.x == 0) {
            add_released(layer.counters + matrix, 1);
            while ((int)(told_acquired(layer.counters + matrix) - launch * gridDim.x) < 0) __nanosleep(20);
        }
        consumers_meet();
    }
};
