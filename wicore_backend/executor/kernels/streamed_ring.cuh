// What `streamed_layer.cu` is made of, first: sizes, the layout of shared memory, the thread that copies weights there.

#pragma once

#include "ring.cuh"

struct Matrix {
    const char* values;
    const char* scales;  // FP8: float32 [outputs]. INT4: 16 bits [tiles, spans, 16, 2], as in quantization/int4.py.
    const char* zeros;   // INT4: likewise.
};

constexpr int MOST_BLOCKS = 159;
constexpr int OUT = 0, GATE_UP = 1, DOWN = 2, NEXT_QKV = 3;  // the layer's matrices, in the order of their use

struct Layer {
    Matrix out, gate_up, down, qkv;
    const float *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm, *next_norm;  // [HIDDEN]
    const float* qk_norm;                        // [QK_HEADS, HEAD_DIM]
    const char *attention, *hidden, *cos, *sin;  // bfloat16 [ATTENDED], [HIDDEN], [HEAD_DIM] twice
    char *next_hidden, *heads;                   // bfloat16 [HIDDEN], [QKV]
    u32* launches;  // How many there have been, from 1.
    u32 *told_attended, *told_fed, *told_given, *told_heads;  // [HIDDEN], [FED / 2], [HIDDEN], [QKV]: results
    u32* told_parts;    // [4, blocks, 2 TILE]: parts of tiles, see `product`
    u32* counters;      // Of each meeting.
    float2* fed_tiles;  // [FED / 16]: see `of_tile`
    float eps;
    unsigned short shares[4][MOST_BLOCKS + 1];  // Where each block's begins, in stages.
};

constexpr int WIDTH = 32, TILE = 16, ROW_BYTES = 128, GROUP = 128;
constexpr int CONSUMERS = WARPS * WIDTH;
constexpr bool RAISED = BITS != 16;  // Products are of float16, else of bfloat16.
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

using Ring = RingOf<STAGES, STAGE_BYTES>;

constexpr int SCRATCH_AT = Ring::end;
constexpr int SUMS_AT = (SCRATCH_AT + 4 * WARPS * 4 + 15) / 16 * 16;
constexpr int X_AT = (SUMS_AT + SUMS_BYTES + 127) / 128 * 128;

__device__ __forceinline__ void consumers_meet() { meet<1, CONSUMERS>(); }

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

// Spans of a tile from the `span`-th on, a stage of them, into the ring.
template <int DEPTH>
__device__ __forceinline__ void copy_stage(const Ring& ring, Flight& flight, const Matrix& matrix, int tile, int span,
                                           Policy policy) {
    using C = Cut<DEPTH>;
    const int spans = min(C::each, C::spans - span);
    wait(ring.empty(), ring.parity ^ 1);
    flight.take_off();
    arrive_expecting(ring.full(), spans * (SPAN_BYTES + SCALE_BYTES * (1 + ZEROS)));
    char* to = ring.memory();
    if constexpr (BITS == 4) {
        const long place = (long)tile * C::spans + span;
        copy(to, matrix.values + place * SPAN_BYTES, spans * SPAN_BYTES, ring.full(), policy);
        to += C::each * SPAN_BYTES;
        copy(to, matrix.scales + place * SCALE_BYTES, spans * SCALE_BYTES, ring.full(), policy);
        to += C::each * SCALE_BYTES;
        if (ZEROS) copy(to, matrix.zeros + place * SCALE_BYTES, spans * SCALE_BYTES, ring.full(), policy);
    } else {
        const char* from = matrix.values + ((long)tile * TILE * C::spans + span) * ROW_BYTES;
#pragma unroll
        for (int row = 0; row < TILE; ++row, to += spans * ROW_BYTES, from += C::spans * ROW_BYTES)
            copy(to, from, spans * ROW_BYTES, ring.full(), policy);
    }
}

// A block's share of a matrix, from stage `x` up to `y`: its tiles lie one after the other, a tile's stages too; of gate
// and up, a tile of gate, the same one of up, the next one of gate. All shares of a matrix are equally long, within a
// stage, since blocks wait for each other after each matrix: so a tile may be two blocks' (see `product`).
__device__ __forceinline__ int2 share_of(const Layer& layer, int matrix) {
    const unsigned short* begins = layer.shares[matrix];
    return {begins[blockIdx.x], begins[blockIdx.x + 1]};
}

template <int DEPTH>
__device__ __forceinline__ void copy_share(Ring& ring, Flight& flight, const Layer& layer, const Matrix& matrix,
                                           int which, Policy policy) {
    const int2 share = share_of(layer, which);
    int tile = share.x / Cut<DEPTH>::stages, stage = share.x % Cut<DEPTH>::stages;
#pragma unroll 1
    for (int left = share.y - share.x; left > 0; --left, ring.next()) {
        const int of_matrix = which == GATE_UP ? tile / 2 + tile % 2 * (FED / TILE) : tile;
        copy_stage<DEPTH>(ring, flight, matrix, of_matrix, stage * Cut<DEPTH>::each, policy);
        if (++stage == Cut<DEPTH>::stages) stage = 0, ++tile;
    }
}

__device__ void copy_all(Ring ring, const Layer& layer) {
    const Policy policy = evict_first();
    Flight flight;
    copy_share<ATTENDED>(ring, flight, layer, layer.out, OUT, policy);
    copy_share<HIDDEN>(ring, flight, layer, layer.gate_up, GATE_UP, policy);
    copy_share<FED>(ring, flight, layer, layer.down, DOWN, policy);
    copy_share<HIDDEN>(ring, flight, layer, layer.qkv, NEXT_QKV, policy);
}
