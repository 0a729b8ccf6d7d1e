// What `streamed_layer.cu` is made of, first: sizes, the layout of shared memory, the thread that copies weights there.

#pragma once

#include "hopper.cuh"

struct Matrix {
    const char* values;
    const char* scales;  // FP8: float32 [outputs]. INT4: 16 bits [tiles, spans, 16, 2], as in quantization/int4.py.
    const char* zeros;   // INT4: likewise.
};

constexpr int BY_WORDS = 0, BY_COUNTER = 1, BY_HINTS = 2;        // MEETING, see `streamed_meeting.cuh`
constexpr int MOST_BLOCKS = 159;
constexpr int MOST_CLAIMED = CLAIMED ? CLAIMED + 2 : 0;           // of a block, see `copy_claimed`
constexpr int OUT = 0, GATE_UP = 1, DOWN = 2, NEXT_QKV = 3;  // the layer's matrices, in the order of their use

struct Layer {
    TensorMap maps[4];  // TENSOR_MAPS: boxes of a stage's spans of a tile
    Matrix out, gate_up, down, qkv;
    const float *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm, *next_norm;  // [HIDDEN]
    const float* qk_norm;                        // [QK_HEADS, HEAD_DIM]
    const char *attention, *hidden, *cos, *sin;  // bfloat16 [ATTENDED], [HIDDEN], [HEAD_DIM] twice
    char *next_hidden, *heads;                   // bfloat16 [HIDDEN], [QKV]
    u32* launches;      // How many there have been, from 1.
    u32 *told_attended, *told_fed, *told_given, *told_heads;  // [HIDDEN], [FED / 2], [HIDDEN], [QKV]: see `tell`
    u32* claims;        // CLAIMED: how many pairs of gate and up's tiles.
    u32* counters;      // Of each meeting, BY_COUNTER.
    float2* fed_tiles;  // [FED / 16]: see `of_tile`
    const char *next_out, *next_gate_up;  // AHEAD: the next layer's values; or null
    float eps;
    unsigned short shares[4][MOST_BLOCKS + 1];  // Where each block's tiles begin; of gate_up, pairs of tiles.
};

constexpr int WIDTH = 32, TILE = 16, ROW_BYTES = 128, GROUP = 128;
constexpr int BOX_NUMBER_BYTES = 8;  // of what boxes are counted in: a box has 256 in a row at most
constexpr int CONSUMERS = WARPS * WIDTH;
constexpr int SPAN_INPUTS = ROW_BYTES * 8 / BITS;
constexpr int SPAN_BYTES = TILE * ROW_BYTES;
constexpr int SCALE_BYTES = BITS == 4 ? TILE * 2 * 2 : 0;  // of a span
constexpr int STAGE_BYTES = WARPS * (SPAN_BYTES + SCALE_BYTES * (1 + ZEROS));
constexpr int DEEPEST = FED > HIDDEN ? (FED > ATTENDED ? FED : ATTENDED) : (HIDDEN > ATTENDED ? HIDDEN : ATTENDED);
constexpr int SUMS_BYTES = BITS == 4 ? DEEPEST / GROUP * 8 : 0;

static_assert(HIDDEN % GROUP == 0 && ATTENDED % GROUP == 0 && FED % GROUP == 0 && QKV % TILE == 0, "whole tiles");
static_assert(HIDDEN % SPAN_INPUTS == 0 && ATTENDED % SPAN_INPUTS == 0 && FED % SPAN_INPUTS == 0, "whole spans");

template <int DEPTH>
struct Cut {  // of a tile of a matrix of DEPTH inputs
    static constexpr int spans = DEPTH / SPAN_INPUTS;
    static constexpr int stages = (spans + WARPS - 1) / WARPS;
    static constexpr int each = (spans + stages - 1) / stages;  // spans of a stage, but for the last
};

// ---- Shared memory: ring, barriers, scratch for sums over the block, sums of x, x and the warps' parts of results.

constexpr int BARRIERS_AT = STAGES * STAGE_BYTES;
constexpr int SCRATCH_AT = BARRIERS_AT + 2 * STAGES * 8;
constexpr int CLAIMS_AT = SCRATCH_AT + 4 * WARPS * 4;
constexpr int SUMS_AT = (CLAIMS_AT + (CLAIMED ? MOST_CLAIMED * 4 : 0) + 15) / 16 * 16;
constexpr int X_AT = (SUMS_AT + SUMS_BYTES + 127) / 128 * 128;

__device__ __forceinline__ void consumers_meet() { meet<1, CONSUMERS>(); }

struct Ring {
    int stage = 0;
    u32 parity = 0;

    __device__ char* memory() const { return shared + stage * STAGE_BYTES; }
    __device__ u32 full() const { return address(shared + BARRIERS_AT) + stage * 8; }
    __device__ u32 empty() const { return full() + STAGES * 8; }
    __device__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// ---- The copying thread

// Stages on their way are FLIGHT at most: what the blocks tell each other would queue behind more.
struct Flight {
    Ring last;
    int stages = 0;
    __device__ void take_off() {
        if (stages < FLIGHT) {
            ++stages;
        } else {
            wait(last.full(), last.parity);
            last.next();
        }
    }
};

template <int DEPTH>
__device__ __forceinline__ void copy_tile(Ring& ring, Flight& flight, const Matrix& matrix, const TensorMap& map,
                                          int tile, Policy policy) {
    using C = Cut<DEPTH>;
#pragma unroll 1
    for (int span = 0; span < C::spans; span += C::each, ring.next()) {
        const int spans = min(C::each, C::spans - span);
        wait(ring.empty(), ring.parity ^ 1);
        flight.take_off();
        const int bytes = (TENSOR_MAPS ? C::each : spans) * (SPAN_BYTES + SCALE_BYTES * (1 + ZEROS));
        arrive_expecting(ring.full(), bytes);
        char* to = ring.memory();
        if constexpr (BITS == 4) {
            const long place = (long)tile * C::spans + span;
            copy(to, matrix.values + place * SPAN_BYTES, spans * SPAN_BYTES, ring.full(), policy);
            to += C::each * SPAN_BYTES;
            copy(to, matrix.scales + place * SCALE_BYTES, spans * SCALE_BYTES, ring.full(), policy);
            to += C::each * SCALE_BYTES;
            if (ZEROS) copy(to, matrix.zeros + place * SCALE_BYTES, spans * SCALE_BYTES, ring.full(), policy);
        } else if constexpr (TENSOR_MAPS) {
            copy_box(to, map, span * (ROW_BYTES / BOX_NUMBER_BYTES), tile * TILE, ring.full(), policy);
        } else {
            const char* from = matrix.values + ((long)tile * TILE * C::spans + span) * ROW_BYTES;
#pragma unroll
            for (int row = 0; row < TILE; ++row, to += spans * ROW_BYTES, from += C::spans * ROW_BYTES)
                copy(to, from, spans * ROW_BYTES, ring.full(), policy);
        }
    }
}

// This block's tiles of each matrix, from `x` up to `y`.
struct Shares {
    int2 out, gate_up, down, qkv;
    __device__ explicit Shares(const Layer& layer) {
        out = of(layer.shares[OUT]);
        gate_up = of(layer.shares[GATE_UP]);
        down = of(layer.shares[DOWN]);
        qkv = of(layer.shares[NEXT_QKV]);
    }

  private:
    __device__ static int2 of(const unsigned short* begins) { return {begins[blockIdx.x], begins[blockIdx.x + 1]}; }
};

// CLAIMED: the last pairs of gate and up's tiles go to whoever is there first, since some blocks' memory is faster.
//   1. Shares leave out CLAIMED pairs a block, the last ones. A copying thread takes the next of them by a counter, while
//      it copies the one before.
//   2. It puts the pair's number into shared memory before it announces the pair's first stage: whoever has waited for
//      that may read it.
//   3. If there is none left it puts NO_PAIR, and announces a stage of no bytes.
//   4. A block takes MOST_CLAIMED at most. Nobody asks for a pair after that.
//   5. Block 0 sets the counter back after all have told what they made of gate and up: they had taken their last by
//      then. The next launch begins to take when this one has ended.
constexpr int NO_PAIR = -1;

__device__ __forceinline__ int* claimed_pairs() { return (int*)(shared + CLAIMS_AT); }

__device__ __forceinline__ int next_pair(const Layer& layer) {
    const int pair = layer.shares[GATE_UP][gridDim.x] + take_next(layer.claims);
    return pair < FED / TILE ? pair : NO_PAIR;
}

__device__ __forceinline__ void copy_pair(Ring& ring, Flight& flight, const Layer& layer, int pair, Policy policy) {
    copy_tile<HIDDEN>(ring, flight, layer.gate_up, layer.maps[GATE_UP], pair, policy);
    copy_tile<HIDDEN>(ring, flight, layer.gate_up, layer.maps[GATE_UP], pair + FED / TILE, policy);
}

__device__ __forceinline__ void copy_claimed(Ring& ring, Flight& flight, const Layer& layer, Policy policy) {
    wait_for_kernel_before();
    int pair = next_pair(layer);
    for (int i = 0; i < MOST_CLAIMED; ++i) {
        claimed_pairs()[i] = pair;
        if (pair == NO_PAIR) {
            wait(ring.empty(), ring.parity ^ 1);
            flight.take_off();
            arrive(ring.full());
            return ring.next();
        }
        const int next = i + 1 < MOST_CLAIMED ? next_pair(layer) : NO_PAIR;
        copy_pair(ring, flight, layer, pair, policy);
        pair = next;
    }
}

// The bytes of a matrix that this block's tiles of it take, `most` at most, into L2, not faster than they are read.
template <int DEPTH>
__device__ __forceinline__ int share_to_l2(const char* values, int first, int last, int most) {
    constexpr int TILE_BYTES = DEPTH / 8 * BITS * TILE, PIECE = 8192;
    const int bytes = min((last - first) * TILE_BYTES, most);
    const char* from = values + (long)first * TILE_BYTES;
    for (int at = 0; at < bytes; at += PIECE) {
        bytes_to_l2(from + at, min(PIECE, bytes - at));
        __nanosleep(200);
    }
    return bytes;
}

__device__ void copy_all(Ring ring, const Layer& layer) {
    const Policy policy = evict_first();
    const Shares shares(layer);
    Flight flight;
    for (int tile = shares.out.x; tile < shares.out.y; ++tile)
        copy_tile<ATTENDED>(ring, flight, layer.out, layer.maps[OUT], tile, policy);
    for (int pair = shares.gate_up.x; pair < shares.gate_up.y; ++pair) copy_pair(ring, flight, layer, pair, policy);
    if constexpr (CLAIMED > 0) copy_claimed(ring, flight, layer, policy);
    for (int tile = shares.down.x; tile < shares.down.y; ++tile)
        copy_tile<FED>(ring, flight, layer.down, layer.maps[DOWN], tile, policy);
    for (int tile = shares.qkv.x; tile < shares.qkv.y; ++tile)
        copy_tile<HIDDEN>(ring, flight, layer.qkv, layer.maps[NEXT_QKV], tile, policy);
    if (AHEAD > 0 && layer.next_out) {
        const int left = AHEAD - share_to_l2<ATTENDED>(layer.next_out, shares.out.x, shares.out.y, AHEAD);
        const int2 pairs = shares.gate_up;
        share_to_l2<HIDDEN>(layer.next_gate_up, pairs.x, pairs.y, left / 2);
        share_to_l2<HIDDEN>(layer.next_gate_up, pairs.x + FED / TILE, pairs.y + FED / TILE, left / 2);
    }
}
