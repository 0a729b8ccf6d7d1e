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

#include "streamed_products.cuh"

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
