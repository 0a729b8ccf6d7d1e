// The dense part of a decoder layer, from its attention to the next layer's, for one token, as one kernel.
//
// A layer of one token is the reading of its weights. As four products and the kernels between them it pauses at the
// end of each: the last programs run alone, the next product waits for them, and memory idles. Here one block a
// multiprocessor stays for the whole layer. One of its threads does nothing but copy: this block's share of all four
// matrices, in the order of their use, into a ring in shared memory, as far ahead as there is room, since weights wait
// for nobody. The warps multiply what has come; between two matrices they wait for all blocks' results, and meanwhile
// the ring fills.
//
//   out      attention [ATTENDED] -> attended [HIDDEN]
//   gate_up  norm of (residual + norm of attended) -> GELU(gate) * up, fed [FED]
//   down     fed -> given [HIDDEN]
//   qkv      norm of (residual + norm of given) -> heads [QKV], normed and rotated
//
// Each block takes the norms of the whole row itself, which costs less than telling the others. Sums have one order.
//
// A matrix is cut into tiles of 16 outputs, a tile into spans of 128 bytes of each output. A stage of the ring is some
// spans of a tile, and each warp multiplies one of them by tensor cores (mma.m16n8k16): weights are the left operand,
// raised to float16, x is in columns of the right one. A span's halves lie in the same banks of shared memory for all
// outputs, so that odd outputs take them the other way round: for those x is in a second column, likewise turned.
//
// Given when it is compiled: HIDDEN, ATTENDED, FED, QKV, HEAD_DIM, QK_HEADS (sizes); BITS (of a weight: 4 or 8);
// SCALE_HALF (INT4's scales are float16, not bfloat16); ZEROS (INT4 has zero points); WARPS (that multiply); STAGES (of
// the ring); FLIGHT (of those, at most on their way).

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

// ---- The multiplying warps

__device__ __forceinline__ void mma(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two E4M3 numbers in float16.
__device__ __forceinline__ u32 raise_fp8(u32 pair) {
    u32 raised;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(raised) : "r"(pair));
    return raised;
}

// Two codes in float16 as fractions of 1024: of bits 0 to 3 of a word's half-words (MASK 0x000f000f) as 1024 + code, of
// bits 4 to 7 (0x00f000f0) as 1024 + 16 code, so that x is a sixteenth there.
template <u32 MASK>
__device__ __forceinline__ u32 raise_int4(u32 word) {
    u32 raised;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(raised) : "r"(word), "n"(MASK), "n"(0x64006400));
    return raised;
}

template <u32 MASK>
__device__ __forceinline__ void add_int4(float (&sum)[4], uint4 low, uint4 high, uint4 x) {
    const auto raise = raise_int4<MASK>;
    mma(sum, raise(low.x), raise(high.x), raise(low.y), raise(high.y), x.x, x.y);
    mma(sum, raise(low.z), raise(high.z), raise(low.w), raise(high.w), x.z, x.w);
}

__device__ __forceinline__ uint4 second_byte(uint4 v) { return {v.x >> 8, v.y >> 8, v.z >> 8, v.w >> 8}; }

__device__ __forceinline__ void add_fp8(float (&sum)[4], u32 low, u32 high, u32 x_first, u32 x_second) {
    mma(sum, raise_fp8(low), raise_fp8(high), raise_fp8(low >> 16), raise_fp8(high >> 16), x_first, x_second);
}

// A lane's place in a span: what it reads of the tile's outputs `lane / 4` and that plus 8, and of x.
struct Place {
    int odd;         // of the output, and of the column of x
    u32 of_weights;  // bytes in a span, but for the half
    __device__ Place() {
        const int lane = threadIdx.x % WIDTH;
        odd = lane / 4 & 1;
        of_weights = lane % 4 * 16;
    }
    __device__ u32 half(int i) const { return (i ^ odd) * 64; }
    __device__ float2 pick(const float (&sum)[2][4]) const {
        return odd ? float2{sum[0][1] + sum[1][1], sum[0][3] + sum[1][3]}
                   : float2{sum[0][0] + sum[1][0], sum[0][2] + sum[1][2]};
    }
};

// x is asked for by the lanes of two columns only: what others multiply by lands in columns that nobody reads.
__device__ __forceinline__ uint4 load_x(const char* at) {
    uint4 v;
    asm volatile(
        "{ .reg .pred asks; setp.lt.u32 asks, %5, 8;\n"
        "@asks ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address(at)), "r"(threadIdx.x % WIDTH));
    return v;
}

// Adds the products of outputs `lane / 4` and that plus 8 of the tile with one of the `spans` in `stage`, which has
// room for `each`; `x` and its groups' `sums` are that span's. In INT4 to `total`, else to `sum`.
__device__ __forceinline__ void add_span(float2& total, float (&sum)[2][4], const Place& place, const char* stage,
                                         int span, int spans, int each, const char* x, const char* sums) {
    const int row = threadIdx.x % WIDTH / 4;
    const int row_at = BITS == 4 ? span * SPAN_BYTES + row * ROW_BYTES : (row * spans + span) * ROW_BYTES;
    const char* weights = stage + place.of_weights + row_at;
    const int to_high = 8 * ROW_BYTES * (BITS == 4 ? 1 : spans);
    constexpr int LOADS = SPAN_INPUTS / 64;  // of x, in each half
    uint4 low[2], high[2], v[2][LOADS];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        low[i] = load<uint4>(weights + place.half(i));
        high[i] = load<uint4>(weights + place.half(i) + to_high);
#pragma unroll
        for (int j = 0; j < LOADS; ++j) {
            const u32 at = place.half(i) + place.of_weights;
            v[i][j] = load_x(x + (BITS == 4 ? at + j * 128 : LOADS * at + j * 16));
        }
    }
    if constexpr (BITS == 4) {
        const char* scales = stage + each * SPAN_BYTES + span * SCALE_BYTES + row * 4;
        const float2 low_scale = unpack<SCALE_HALF>(load<u32>(scales));
        const float2 high_scale = unpack<SCALE_HALF>(load<u32>(scales + 8 * 4));
        float2 low_zero = {8.0f, 8.0f}, high_zero = low_zero;
        if constexpr (ZEROS) {
            const char* zeros = scales + each * SCALE_BYTES;
            low_zero = unpack<SCALE_HALF>(load<u32>(zeros));
            high_zero = unpack<SCALE_HALF>(load<u32>(zeros + 8 * 4));
        }
        const float4 of_x = load<float4>(sums);
        float first[2][4] = {}, second[2][4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add_int4<0x000f000f>(first[i], low[i], high[i], v[i][0]);
            add_int4<0x00f000f0>(first[i], low[i], high[i], v[i][1]);
            add_int4<0x000f000f>(second[i], second_byte(low[i]), second_byte(high[i]), v[i][2]);
            add_int4<0x00f000f0>(second[i], second_byte(low[i]), second_byte(high[i]), v[i][3]);
        }
        const float2 a = place.pick(first), b = place.pick(second);
        total.x += low_scale.x * (a.x - of_x.x - low_zero.x * of_x.y) +
                   low_scale.y * (b.x - of_x.z - low_zero.y * of_x.w);
        total.y += high_scale.x * (a.y - of_x.x - high_zero.x * of_x.y) +
                   high_scale.y * (b.y - of_x.z - high_zero.y * of_x.w);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add_fp8(sum[i], low[i].x, high[i].x, v[i][0].x, v[i][0].y);
            add_fp8(sum[i], low[i].y, high[i].y, v[i][0].z, v[i][0].w);
            add_fp8(sum[i], low[i].z, high[i].z, v[i][1].x, v[i][1].y);
            add_fp8(sum[i], low[i].w, high[i].w, v[i][1].z, v[i][1].w);
        }
    }
}

// The next `tiles` tiles of the ring times x: each warp's part of each output into `parts` [tiles, WARPS, 16]. A tile
// has `of_tile` spans, `each` in a stage. Gives the ring after them.
__device__ __forceinline__ Ring multiply(Ring ring, int tiles, int of_tile, int each, float* parts) {
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    const Place place;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        float2 total = {};
        float sum[2][4] = {};
#pragma unroll 1
        for (int first = 0; first < of_tile; first += each, ring.next()) {
            const int spans = min(each, of_tile - first), span = first + warp;
            wait(ring.full(), ring.parity);
            if (warp < spans)
                add_span(total, sum, place, ring.memory(), warp, spans, each, shared + X_AT + span * SPAN_INPUTS * 2,
                         shared + SUMS_AT + span * 16);
            __syncwarp();
            if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty()) : "memory");
        }
        if (BITS != 4) total = place.pick(sum);
        if (lane % 4 == 0) {
            float* part = parts + (tile * WARPS + warp) * TILE + lane / 4;
            part[0] = total.x;
            part[8] = total.y;
        }
    }
    return ring;
}

__device__ __forceinline__ float whole(const float* parts, int tile, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[(tile * WARPS + warp) * TILE + row];
    return sum;
}

__device__ __forceinline__ float constant(const float* at) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}

__device__ __forceinline__ float4 constants(const float* at) {
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at));
    return v;
}

// What a row of a matrix is scaled by, loaded early; 1 if it has no such scale.
__device__ __forceinline__ float scale_of(const Matrix& matrix, int output, bool there) {
    return BITS == 8 && there ? constant((const float*)matrix.scales + output) : 1.0f;
}

// This block's outputs of a matrix whose DEPTH inputs are in shared memory: `give(output, value)` for each.
template <int DEPTH, class Give>
__device__ __forceinline__ void product(Ring& ring, const Matrix& matrix, const int2& share, float x_scale, Give give) {
    float* parts = (float*)(shared + X_AT + DEPTH * 2);
    const int tiles = share.y - share.x, output = share.x * TILE + threadIdx.x;
    const bool there = threadIdx.x < tiles * TILE;
    const float scale = x_scale * scale_of(matrix, output, there);
    ring = multiply(ring, tiles, Cut<DEPTH>::spans, Cut<DEPTH>::each, parts);
    consumers_meet();
    if (there) give(output, whole(parts, threadIdx.x / TILE, threadIdx.x % TILE) * scale);
}

// As `product` of gate and up, GELU of one times the other: `give(output, value, next)` for each second output.
template <class Give>
__device__ __forceinline__ void gated_product(Ring& ring, const Matrix& matrix, const int2& share, float x_scale,
                                              Give give) {
    float* parts = (float*)(shared + X_AT + HIDDEN * 2);
    const int pairs = share.y - share.x, output = share.x * TILE + threadIdx.x;
    const bool there = threadIdx.x < pairs * TILE;
    const float scale = x_scale * scale_of(matrix, output, there);
    const float up_scale = x_scale * scale_of(matrix, output + FED, there);
    ring = multiply(ring, 2 * pairs, Cut<HIDDEN>::spans, Cut<HIDDEN>::each, parts);
    consumers_meet();
    float value = 0.0f;
    if (there) {
        const int pair = threadIdx.x / TILE, row = threadIdx.x % TILE;
        const float gate = whole(parts, 2 * pair, row) * scale, up = whole(parts, 2 * pair + 1, row) * up_scale;
        value = __fdividef(gate, 1.0f + __expf(-1.5957691216057308f * (gate + 0.044715f * gate * gate * gate))) * up;
    }
    const float next = __shfl_down_sync(~0u, value, 1);
    if (there && threadIdx.x % 2 == 0) give(output, value, next);
}

// ---- Between products

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = WIDTH / 2; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// Sum and largest value over the multiplying warps; `scratch` [2 WARPS] is in use until they meet again.
__device__ __forceinline__ float2 block_sum_and_max(float sum, float most, float* scratch) {
    sum = warp_sum(sum);
#pragma unroll
    for (int distance = WIDTH / 2; distance; distance /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    if (threadIdx.x % WIDTH == 0) scratch[threadIdx.x / WIDTH] = sum, scratch[WARPS + threadIdx.x / WIDTH] = most;
    consumers_meet();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        sum += scratch[warp];
        most = fmaxf(most, scratch[WARPS + warp]);
    }
    return {sum, most};
}

// The power of two that brings `most` between 2^13 and 2^14, so that x uses the range of float16, and its inverse.
__device__ __forceinline__ float2 fitting(float most) {
    const int exponent = max((int)(__float_as_uint(most) >> 23), 32);
    return {__uint_as_float(267 - exponent << 23), __uint_as_float(exponent - 13 << 23)};
}

__device__ __forceinline__ float most_of(const float4& v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

// Four adjacent numbers of x, the `place`-th, for the tensor cores; a warp's are the inputs of a group. For INT4, what
// raising the codes adds to a group's product, and the sum of its x.
__device__ __forceinline__ void put(int place, float4 v) {
    const bool sixteenth = BITS == 4 && place / 16 % 2;
    if (sixteenth) v.x *= 0.0625f, v.y *= 0.0625f, v.z *= 0.0625f, v.w *= 0.0625f;
    const u32 first = pack<true>(v.x, v.y), second = pack<true>(v.z, v.w);
    *(uint2*)(shared + X_AT + place * 8) = {first, second};
    if (BITS == 4) {
        const float2 a = unpack<true>(first), b = unpack<true>(second);
        float sum = (a.x + a.y) + (b.x + b.y);
#pragma unroll
        for (int distance = WIDTH / 4; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        const float other = __shfl_xor_sync(~0u, sum, WIDTH / 2);
        if (threadIdx.x % WIDTH == 0)
            *(float2*)(shared + SUMS_AT + place / WIDTH * 8) = {1024.0f * (sum + other), sum + 16.0f * other};
    }
}

// A row of COUNT fours of numbers among the threads: each takes one in each round. Blocks begin at different places,
// since all read the same memory at the same time.
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

// x, of which each thread has numbers, into shared memory; what its products are to be multiplied by.
template <int COUNT, int ROUNDS>
__device__ __forceinline__ float put_all(const Row<COUNT>& row, const float4 (&v)[ROUNDS]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        if (row.has(i)) most = fmaxf(most, most_of(v[i]));
    const float2 scale = fitting(block_sum_and_max(0.0f, most, (float*)(shared + SCRATCH_AT)).y);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        if (row.has(i)) put(row.place(i), {v[i].x * scale.x, v[i].y * scale.x, v[i].z * scale.x, v[i].w * scale.x});
    consumers_meet();
    return scale.y;
}

__device__ __forceinline__ uint2 load_four(const char* at) {  // Of 16 bits, past the first-level cache.
    uint2 v;
    asm volatile("ld.global.cg.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

// Results go to all blocks in words with a bit that turns with each launch: whoever finds it turned has the number,
// too. So news and number take one way through memory, where a barrier takes four. In float32 it is the lowest bit.
__device__ __forceinline__ void tell(u32* to, float value, u32 turn) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(__float_as_uint(value) & ~1u | turn) : "memory");
}

__device__ __forceinline__ bool ask(float4& v, const u32* from, u32 turn) {
    u32 a, b, c, d;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(from) : "memory");
    v = {__uint_as_float(a & ~1u), __uint_as_float(b & ~1u), __uint_as_float(c & ~1u), __uint_as_float(d & ~1u)};
    return (((a ^ turn) | (b ^ turn) | (c ^ turn) | (d ^ turn)) & 1) == 0;
}

// Two numbers in bfloat16, divided by 2^64: what is under 2^65 leaves the upper bit of the exponent free.
constexpr float FAR = 18446744073709551616.0f;  // 2^64
constexpr u32 FREE_BIT = 14;

__device__ __forceinline__ void tell(u32* to, float first, float second, u32 turn) {
    const float most = 1.984375f;
    first = fminf(fmaxf(first * (1.0f / FAR), -most), most), second = fminf(fmaxf(second * (1.0f / FAR), -most), most);
    const u32 pair = pack<false>(first, second) | turn << FREE_BIT;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(pair) : "memory");
}

__device__ __forceinline__ bool ask_pairs(float4& v, const u32* from, u32 turn) {
    uint2 pairs;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(pairs.x), "=r"(pairs.y) : "l"(from) : "memory");
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

using Hidden = Row<HIDDEN / 4>;
constexpr int VECTORS = Hidden::rounds;

__device__ __forceinline__ float squares(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// The residual stream after a part of the layer, whose result the blocks tell each other in `told`, and its norm in
// shared memory; what its products are to be multiplied by.
__device__ __forceinline__ float add_norm(const Layer& layer, const Hidden& row, const u32* told, u32 turn,
                                          const float* weight, const float* next, uint2 (&stream)[VECTORS]) {
    float* scratch = (float*)(shared + SCRATCH_AT);
    float4 factor[VECTORS], next_factor[VECTORS], value[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) {
            factor[i] = constants(weight + row.place(i) * 4);
            next_factor[i] = constants(next + row.place(i) * 4);
        }
    hear(row, value, [&](float4& v, int place) { return ask(v, told + place * 4, turn); });
    float sum = 0.0f, most = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) sum += squares(value[i]);
    const float scale = rsqrtf(block_sum_and_max(sum, 0.0f, scratch).x * (1.0f / HIDDEN) + layer.eps);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) {
            float4 v = unpack(stream[i]);
            v.x += value[i].x * scale * factor[i].x;
            v.y += value[i].y * scale * factor[i].y;
            v.z += value[i].z * scale * factor[i].z;
            v.w += value[i].w * scale * factor[i].w;
            stream[i] = {pack<false>(v.x, v.y), pack<false>(v.z, v.w)};
            sum += squares(v);
            const float4 f = next_factor[i];
            value[i] = {v.x * f.x, v.y * f.y, v.z * f.z, v.w * f.w};
            most = fmaxf(most, most_of(value[i]));
        }
    const float2 both = block_sum_and_max(sum, most, scratch + 2 * WARPS);
    const float next_scale = rsqrtf(both.x * (1.0f / HIDDEN) + layer.eps);
    const float2 fit = fitting(both.y * next_scale);
    const float whole_scale = next_scale * fit.x;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) {
            const float4 v = value[i];
            put(row.place(i), {v.x * whole_scale, v.y * whole_scale, v.z * whole_scale, v.w * whole_scale});
        }
    consumers_meet();
    return fit.y;
}

// Query and key heads, normed and rotated, and value heads as they are: a warp takes a head that all blocks have told.
__device__ __forceinline__ void rotate_heads(const Layer& layer, u32 turn) {
    constexpr int ROUNDS = HEAD_DIM / (4 * WIDTH), HALF_DIM = HEAD_DIM / 2;
    const int head = blockIdx.x + threadIdx.x / WIDTH * gridDim.x, first = threadIdx.x % WIDTH * 4;
    if (head >= QKV / HEAD_DIM) return;
    const bool rotated = head < QK_HEADS;
    float4 v[ROUNDS], factor[ROUNDS], cosine[ROUNDS], sine[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int at = first + i * 4 * WIDTH;  // Both halves of a head turn by the same angles.
        factor[i] = rotated ? constants(layer.qk_norm + head * HEAD_DIM + at) : float4{};
        cosine[i] = unpack(load_four(layer.cos + at % HALF_DIM * 2));
        sine[i] = unpack(load_four(layer.sin + at % HALF_DIM * 2));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        while (!ask(v[i], layer.told_heads + head * HEAD_DIM + first + i * 4 * WIDTH, turn)) __nanosleep(32);
        sum += squares(v[i]);
    }
    if (rotated) {
        const float scale = rsqrtf(warp_sum(sum) * (1.0f / HEAD_DIM) + layer.eps);
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i)
            v[i] = {v[i].x * scale * factor[i].x, v[i].y * scale * factor[i].y, v[i].z * scale * factor[i].z,
                    v[i].w * scale * factor[i].w};
        float4 other[ROUNDS];
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            if constexpr (ROUNDS == 1) {
                other[i] = {__shfl_xor_sync(~0u, v[i].x, WIDTH / 2), __shfl_xor_sync(~0u, v[i].y, WIDTH / 2),
                            __shfl_xor_sync(~0u, v[i].z, WIDTH / 2), __shfl_xor_sync(~0u, v[i].w, WIDTH / 2)};
            } else {
                other[i] = v[(i + ROUNDS / 2) % ROUNDS];
            }
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            const float sign = first + i * 4 * WIDTH < HALF_DIM ? -1.0f : 1.0f;
            const float4 c = cosine[i], s = sine[i], o = other[i];
            v[i] = {v[i].x * c.x + sign * o.x * s.x, v[i].y * c.y + sign * o.y * s.y,
                    v[i].z * c.z + sign * o.z * s.z, v[i].w * c.w + sign * o.w * s.w};
        }
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        *(uint2*)(layer.heads + (head * HEAD_DIM + first + i * 4 * WIDTH) * 2) = {pack<false>(v[i].x, v[i].y),
                                                                                 pack<false>(v[i].z, v[i].w)};
}

__device__ void compute(Ring ring, const Layer& layer) {
    const Shares shares(layer);
    const Hidden row;
    uint2 stream[VECTORS];
    // The norms' weights are fetched by all blocks together, long before they are needed.
    if (const int line = blockIdx.x + threadIdx.x * gridDim.x; line < HIDDEN / 32) {
        for (const float* norm : {layer.post_attention_norm, layer.pre_feedforward_norm, layer.post_feedforward_norm,
                                  layer.next_norm})
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + line * 32));
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 launches;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(launches) : "l"(layer.launches) : "memory");
    const u32 turn = launches & 1;
    float scale;
    {
        const Row<ATTENDED / 4> attended;
        float4 attention[attended.rounds];
#pragma unroll
        for (int i = 0; i < attended.rounds; ++i)
            if (attended.has(i)) attention[i] = unpack(load_four(layer.attention + attended.place(i) * 8));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (row.has(i)) stream[i] = load_four(layer.hidden + row.place(i) * 8);
        scale = put_all(attended, attention);
    }
    product<ATTENDED>(ring, layer.out, shares.out, scale,
                      [&](int output, float value) { tell(layer.told_attended + output, value, turn); });
    scale = add_norm(layer, row, layer.told_attended, turn, layer.post_attention_norm, layer.pre_feedforward_norm,
                     stream);
    gated_product(ring, layer.gate_up, shares.gate_up, scale, [&](int output, float value, float next) {
        tell(layer.told_fed + output / 2, value, next, turn);
    });
    {
        const Row<FED / 4> fed;
        float4 v[fed.rounds];
        hear(fed, v, [&](float4& four, int place) { return ask_pairs(four, layer.told_fed + place * 2, turn); });
            scale = put_all(fed, v);
    }
    product<FED>(ring, layer.down, shares.down, scale,
                 [&](int output, float value) { tell(layer.told_given + output, value, turn); });
    scale = add_norm(layer, row, layer.told_given, turn, layer.post_feedforward_norm, layer.next_norm, stream);
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) *layer.launches = launches + 1;  // All have read it who told what has been heard.
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (row.has(i)) *(uint2*)(layer.next_hidden + row.place(i) * 8) = stream[i];
    }
    product<HIDDEN>(ring, layer.qkv, shares.qkv, scale,
                    [&](int output, float value) { tell(layer.told_heads + output, value, turn); });
    rotate_heads(layer, turn);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + WIDTH, 1) streamed_layer(const __grid_constant__ Layer layer) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            const u32 barrier = address(shared + BARRIERS_AT) + stage * 8;
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier + STAGES * 8), "n"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x < CONSUMERS) {
        compute({}, layer);
    } else if (threadIdx.x == CONSUMERS) {
        copy_all({}, layer);
    }
}
