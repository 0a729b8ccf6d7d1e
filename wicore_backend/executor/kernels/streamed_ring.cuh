// What `streamed_layer.cu` is made of, first: sizes, the layout of shared memory, the thread that copies weights there.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

struct Matrix {
    const char* values;
    const char* scales;  // FP8: float32 [outputs]. INT4: 16 bits [tiles, spans, 16, 2], as in quantization/int4.py.
    const char* zeros;   // INT4: likewise.
};

struct Layer {
    Matrix out, gate_up, down, qkv;
    const float *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm, *next_norm;  // [HIDDEN]
    const float* qk_norm;                        // [QK_HEADS, HEAD_DIM]
    const char *attention, *hidden, *cos, *sin;  // bfloat16 [ATTENDED], [HIDDEN], [HEAD_DIM] twice
    char *next_hidden, *heads;                   // bfloat16 [HIDDEN], [QKV]
    const int* shares;  // [4, blocks + 1]: where each block's tiles begin; of gate_up, pairs of tiles
    u32* launches;      // How many there have been, from 1.
    u32 *told_attended, *told_fed, *told_given, *told_heads;  // [HIDDEN], [FED / 2], [HIDDEN], [QKV]: see `tell`
    float eps;
};

constexpr int WIDTH = 32, TILE = 16, ROW_BYTES = 128, GROUP = 128;
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
constexpr int SUMS_AT = (SCRATCH_AT + 4 * WARPS * 4 + 15) / 16 * 16;
constexpr int X_AT = (SUMS_AT + SUMS_BYTES + 127) / 128 * 128;

__device__ __forceinline__ u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

template <class T>
__device__ __forceinline__ T load(const char* at) { return *(const T*)at; }

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

extern __shared__ __align__(128) char shared[];

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

// ---- 16 bits and 32

template <bool HALF>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    if constexpr (HALF) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

template <bool HALF>
__device__ __forceinline__ float2 unpack(u32 pair) {
    float2 v;
    if constexpr (HALF) {
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
            : "=f"(v.x), "=f"(v.y) : "r"(pair));
    } else {
        v = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
    }
    return v;
}

__device__ __forceinline__ float4 unpack(uint2 pairs) {
    const float2 a = unpack<false>(pairs.x), b = unpack<false>(pairs.y);
    return {a.x, a.y, b.x, b.y};
}

// ---- The copying thread

__device__ __forceinline__ void copy(const char* to, const char* from, int bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(address(to)), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

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
__device__ __forceinline__ void copy_tile(Ring& ring, Flight& flight, const Matrix& matrix, int tile, u64 policy) {
    using C = Cut<DEPTH>;
#pragma unroll 1
    for (int span = 0; span < C::spans; span += C::each, ring.next()) {
        const int spans = min(C::each, C::spans - span);
        wait(ring.empty(), ring.parity ^ 1);
        flight.take_off();
        const int bytes = spans * (SPAN_BYTES + SCALE_BYTES * (1 + ZEROS));
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     ::"r"(ring.full()), "r"(bytes) : "memory");
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
}

// This block's tiles of each matrix, from `x` up to `y`.
struct Shares {
    int2 out, gate_up, down, qkv;
    __device__ explicit Shares(const Layer& layer) {
        const int* from = layer.shares + blockIdx.x;
        const int of_next = gridDim.x + 1;
        out = {from[0], from[1]};
        gate_up = {from[of_next], from[of_next + 1]};
        down = {from[2 * of_next], from[2 * of_next + 1]};
        qkv = {from[3 * of_next], from[3 * of_next + 1]};
    }
};

__device__ void copy_all(Ring ring, const Layer& layer) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Shares shares(layer);
    Flight flight;
    for (int tile = shares.out.x; tile < shares.out.y; ++tile)
        copy_tile<ATTENDED>(ring, flight, layer.out, tile, policy);
    for (int tile = shares.gate_up.x; tile < shares.gate_up.y; ++tile) {
        copy_tile<HIDDEN>(ring, flight, layer.gate_up, tile, policy);
        copy_tile<HIDDEN>(ring, flight, layer.gate_up, tile + FED / TILE, policy);
    }
    for (int tile = shares.down.x; tile < shares.down.y; ++tile)
        copy_tile<FED>(ring, flight, layer.down, tile, policy);
    for (int tile = shares.qkv.x; tile < shares.qkv.y; ++tile)
        copy_tile<HIDDEN>(ring, flight, layer.qkv, tile, policy);
}
