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
// those of 4 and 8 bits raised to float16, x is in columns of the right one. A span's halves lie in the same banks of
// shared memory for all outputs, so that odd outputs take them the other way round: for those x is in a second column,
// likewise turned.
//
// Given when it is compiled: HIDDEN, ATTENDED, FED, QKV, HEAD_DIM, QK_HEADS (sizes); BITS (of a weight: 4, 8 or 16);
// SCALE_HALF (INT4's scales are float16, not bfloat16); ZEROS (INT4 has zero points); WARPS (that multiply); STAGES (of
// the ring); FLIGHT (of those, at most on their way).

#include "streamed_meeting.cuh"

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

// The power of two that brings `most` between 2^13 and 2^14, so that x uses the range of float16, and its inverse; for
// bfloat16, which has the range of float32, 1.
__device__ __forceinline__ float2 fitting(float most) {
    if (BITS == 16) return {1.0f, 1.0f};
    const int exponent = max((int)(__float_as_uint(most) >> 23), 32);
    return {__uint_as_float(267 - exponent << 23), __uint_as_float(exponent - 13 << 23)};
}

__device__ __forceinline__ float most_of(const float4& v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

// For INT4: whether four adjacent numbers of x, the `place`-th, are multiplied by codes that are 16 times too large.
__device__ __forceinline__ bool is_sixteenth(int place) { return BITS == 4 && place / 16 % 2; }

// For INT4, of a group's x, which has such sums in both halves: what raising the codes adds to its product, and the sum
// before some were made sixteenths.
__device__ __forceinline__ void put_sums(int group, float first, float second) {
    *(float2*)(shared + SUMS_AT + group * 8) = {1024.0f * (first + second), first + 16.0f * second};
}

// Four adjacent numbers of x, the `place`-th, for the tensor cores; a warp's are the inputs of a group.
__device__ __forceinline__ void put(int place, float4 v) {
    if (is_sixteenth(place)) v.x *= 0.0625f, v.y *= 0.0625f, v.z *= 0.0625f, v.w *= 0.0625f;
    const u32 first = pack<RAISED>(v.x, v.y), second = pack<RAISED>(v.z, v.w);
    *(uint2*)(shared + X_AT + place * 8) = {first, second};
    if (BITS == 4) {
        const float2 a = unpack<true>(first), b = unpack<true>(second);
        float sum = (a.x + a.y) + (b.x + b.y);
#pragma unroll
        for (int distance = WIDTH / 4; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        const float other = __shfl_xor_sync(~0u, sum, WIDTH / 2);
        if (threadIdx.x % WIDTH == 0) put_sums(place / WIDTH, sum, other);
    }
}

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

using Hidden = Row<HIDDEN / 4>;
constexpr int VECTORS = Hidden::rounds;

__device__ __forceinline__ float squares(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// The residual stream after a part of the layer, whose last matrix's result is in `words` when the blocks have met, and
// its norm in shared memory; what its products are to be multiplied by.
__device__ __forceinline__ float add_norm(const Meetings& meetings, int matrix, const Hidden& row, const u32* words,
                                          const float* weight, const float* next, uint2 (&stream)[VECTORS]) {
    float* scratch = (float*)(shared + SCRATCH_AT);
    float4 factor[VECTORS], next_factor[VECTORS], value[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) {
            factor[i] = constants(weight + row.place(i) * 4);
            next_factor[i] = constants(next + row.place(i) * 4);
        }
    meetings.hold(matrix);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) value[i] = floats(load_words(words + row.place(i) * 4));
    float sum = 0.0f, most = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (row.has(i)) sum += squares(value[i]);
    const float scale = rsqrtf(block_sum_and_max(sum, 0.0f, scratch).x * (1.0f / HIDDEN) + meetings.layer.eps);
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
    const float next_scale = rsqrtf(both.x * (1.0f / HIDDEN) + meetings.layer.eps);
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
        cosine[i] = unpack(load_pairs(layer.cos + at % HALF_DIM * 2));
        sine[i] = unpack(load_pairs(layer.sin + at % HALF_DIM * 2));
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

// The MLP's row in shared memory, when the blocks have met; what its products are to be multiplied by.
__device__ __forceinline__ float put_fed(const Layer& layer) {
    constexpr int OF_GROUP = GROUP / TILE, GROUPS = (FED / GROUP + CONSUMERS - 1) / CONSUMERS;
    const Row<FED / 8> row;
    uint4 eights[row.rounds];
    float2 tiles[GROUPS][OF_GROUP];
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < row.rounds; ++i)
        if (row.has(i)) eights[i] = load_words(layer.told_fed + row.place(i) * 4);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        if (const int group = i * CONSUMERS + threadIdx.x; group < FED / GROUP)
#pragma unroll
            for (int j = 0; j < OF_GROUP; j += 2) {
                const float4 two = floats(load_words(layer.fed_tiles + group * OF_GROUP + j));
                tiles[i][j] = {two.x, two.y}, tiles[i][j + 1] = {two.z, two.w};
                most = fmaxf(most, fmaxf(two.y, two.w));
            }
    const float2 scale = fitting(block_sum_and_max(0.0f, most, (float*)(shared + SCRATCH_AT)).y);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        if (const int group = i * CONSUMERS + threadIdx.x; BITS == 4 && group < FED / GROUP) {
            float halves[2] = {};
#pragma unroll
            for (int j = 0; j < OF_GROUP; ++j) halves[j / (OF_GROUP / 2)] += tiles[i][j].x;
            put_sums(group, halves[0] * scale.x, halves[1] * scale.x * 0.0625f);
        }
#pragma unroll
    for (int i = 0; i < row.rounds; ++i)
        if (row.has(i)) {
            const int place = row.place(i);
            const float by = is_sixteenth(place * 2) ? scale.x * 0.0625f : scale.x;
            const float4 a = unpack(uint2{eights[i].x, eights[i].y}), b = unpack(uint2{eights[i].z, eights[i].w});
            *(uint4*)(shared + X_AT + place * 16) = {
                pack<RAISED>(a.x * by, a.y * by), pack<RAISED>(a.z * by, a.w * by), pack<RAISED>(b.x * by, b.y * by),
                pack<RAISED>(b.z * by, b.w * by)};
        }
    consumers_meet();
    return scale.y;
}

__device__ void compute(Ring ring, const Layer& layer) {
    const Hidden row;
    uint2 stream[VECTORS];
    // The norms' weights are fetched by all blocks together, long before they are needed.
    if (const int line = blockIdx.x + threadIdx.x * gridDim.x; line < HIDDEN / 32) {
        for (const float* norm : {layer.post_attention_norm, layer.pre_feedforward_norm, layer.post_feedforward_norm,
                                  layer.next_norm})
            line_to_l2(norm + line * 32);
    }
    wait_for_kernel_before();
    const Meetings meetings{layer, told(layer.launches)};
    float scale;
    {
        const Row<ATTENDED / 4> attended;
        float4 attention[attended.rounds];
#pragma unroll
        for (int i = 0; i < attended.rounds; ++i)
            if (attended.has(i)) attention[i] = unpack(load_pairs(layer.attention + attended.place(i) * 8));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (row.has(i)) stream[i] = load_pairs(layer.hidden + row.place(i) * 8);
        scale = put_all(attended, attention);
    }
    const auto parts = [&](int matrix) { return Parts(layer, matrix, meetings.turn()); };
    product<ATTENDED>(ring, layer.out, share_of(layer, OUT), scale, parts(OUT),
                      [&](int output, float value) { layer.told_attended[output] = __float_as_uint(value); });
    scale = add_norm(meetings, OUT, row, layer.told_attended, layer.post_attention_norm, layer.pre_feedforward_norm,
                     stream);
    gated_product(ring, layer.gate_up, share_of(layer, GATE_UP), scale, parts(GATE_UP), layer.fed_tiles,
                  [&](int output, float value, float next) {
                      layer.told_fed[output / 2] = pack<false>(value, next);
                  });
    meetings.hold(GATE_UP);
    scale = put_fed(layer);
    product<FED>(ring, layer.down, share_of(layer, DOWN), scale, parts(DOWN),
                 [&](int output, float value) { layer.told_given[output] = __float_as_uint(value); });
    scale = add_norm(meetings, DOWN, row, layer.told_given, layer.post_feedforward_norm, layer.next_norm, stream);
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) tell(layer.launches, meetings.launch + 1);  // All have read it who told what has been heard.
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            if (row.has(i)) *(uint2*)(layer.next_hidden + row.place(i) * 8) = stream[i];
    }
    product<HIDDEN>(ring, layer.qkv, share_of(layer, NEXT_QKV), scale, parts(NEXT_QKV),
                    [&](int output, float value) {
                        tell(layer.told_heads + output, __float_as_uint(value) & ~1u | meetings.turn());
                    });
    rotate_heads(layer, meetings.turn());
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + WIDTH, 1) streamed_layer(const __grid_constant__ Layer layer) {
    if (threadIdx.x == 0) Ring::prepare(1, WARPS);
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < CONSUMERS) {
        compute({}, layer);
    } else if (threadIdx.x == CONSUMERS) {
        copy_all({}, layer);
    }
}
