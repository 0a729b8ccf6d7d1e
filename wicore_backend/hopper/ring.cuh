// A ring of stages, with which shared memory begins unless it is AT a later place: who copies fills them one after the
// other, who computes empties them. Behind them are two barriers a stage, which say that it is full, and that it is empty.

#pragma once

#include "hopper.cuh"

template <int COUNT, int BYTES, int AT = 0>
struct RingOf {
    static constexpr int end = AT + COUNT * (BYTES + 2 * 8);  // of its memory

    int stage = 0;
    u32 parity = 0;

    // By one thread, before the block meets: how many arrive when a stage has been filled, and when it has been emptied.
    __device__ static void prepare(u32 filling, u32 emptying) {
        for (RingOf ring; ring.parity == 0; ring.next()) {
            barrier_init(ring.full(), filling);
            barrier_init(ring.empty(), emptying);
        }
        barriers_ready();
    }
    __device__ char* memory() const { return shared + AT + stage * BYTES; }
    __device__ u32 full() const { return address(shared + AT + COUNT * BYTES) + stage * 8; }
    __device__ u32 empty() const { return full() + COUNT * 8; }
    __device__ void next() {
        if (++stage == COUNT) stage = 0, parity ^= 1;
    }
    __device__ void skip(int stages) {  // at most as many as there are
        if ((stage += stages) >= COUNT) stage -= COUNT, parity ^= 1;
    }
};
