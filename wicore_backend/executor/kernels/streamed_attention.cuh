// What `streamed_layer.cu` is made of, fourth, where a layer attends itself: its attention, of one token in a window.
//
//   1. The tiles of each KV head's keys and values are shared out among some blocks, a *part* each. The ring's first
//      stages, when it is filled for the first time, are slots for tiles: SLOTS warps have one each, into which they
//      copy a tile before the kernel before this one has ended. Weights come behind the slots from the beginning.
//   2. Each of these warps attends to tiles in its slot, with a softmax of its own. Another one, if there is any, has
//      the token's own key and value, which are in no tile, and writes them to the pool. Slots are weights' then.
//   3. A block puts its warps' softmaxes together, and leaves the part in bfloat16 with its greatest score and sum of
//      weights. All blocks meet, also those that have no tile.
//   4. Each block puts all parts of all heads together, in their order, as x of `out`. One block a head could do that
//      for the others, but they would wait for it as long again as for the parts, and the parts are 64 KB.
//
// Given when it is compiled, too: KV_HEADS, MEMBERS, BLOCK_SIZE, POOL_BITS (see `attention.cuh`), LEAST (tiles of a
// part, where there are as many), SLOTS (enough for a part's tiles in a full window, if there is room).

#pragma once

#include "attention.cuh"
#include "streamed_meeting.cuh"

constexpr int OF_STAGE = STAGE_BYTES / attention::TILE_BYTES;  // tiles
constexpr int TILE_STAGES = (SLOTS + OF_STAGE - 1) / OF_STAGE;
constexpr int QUERY_HEADS = KV_HEADS * MEMBERS;

static_assert(QUERY_HEADS * HEAD_DIM == ATTENDED, "all heads are attended to");
static_assert(OF_STAGE >= 1 && SLOTS <= WARPS && TILE_STAGES < STAGES, "slots have room, and so have weights");

__device__ __forceinline__ char* slot_memory(int slot) {
    return shared + slot / OF_STAGE * STAGE_BYTES + slot % OF_STAGE * attention::TILE_BYTES;
}

// A slot's barrier: all lanes of its warp arrive there when their pieces of a tile have come.
__device__ __forceinline__ u32 slot_barrier(int slot) { return address(shared + TILES_AT) + slot * 8; }

__device__ __forceinline__ void prepare_slots() {  // by one thread, before `Ring::prepare`
    for (int slot = 0; slot < SLOTS; ++slot) barrier_init(slot_barrier(slot), WIDTH);
}

// By the same one, after it: the stages of slots count as filled for the first time.
__device__ __forceinline__ void skip_slots() {
    Ring ring;
    for (int stage = 0; stage < TILE_STAGES; ++stage, ring.next()) arrive(ring.full());
}

// What a block has of one KV head's tiles.
struct Part {
    int head;     // the KV head
    int number;   // of the head's parts
    int parts;    // that each head has; none if there is no token yet
    int first;    // of the head's tiles
    int count;    // of its own
    attention::Sequence sequence;

    __device__ explicit Part(const Keys& keys)
        : head(blockIdx.x % KV_HEADS), number(blockIdx.x / KV_HEADS), first(0), count(0) {
        const uint4 words = load_words(keys.work);
        const int tiles = load_words(keys.work + 16).x;
        sequence = {(int)words.x, (int)words.y, (int)words.z, (int)words.w};
        parts = min((int)(gridDim.x / KV_HEADS), (tiles + LEAST - 1) / LEAST);
        if (number >= parts) return;
        first = tiles * number / parts;
        count = tiles * (number + 1) / parts - first;
    }
    __device__ int slots() const { return min(count, SLOTS); }  // that have tiles
    __device__ bool has_own() const { return number == parts - 1; }
    __device__ int position(int tile) const {
        return (sequence.lowest / attention::KEYS + first + tile) * attention::KEYS;
    }
};

// The token, as one KV head has it.
struct Token {
    const Keys& keys;
    const Part& part;

    __device__ const char* query(int member) const {
        return keys.q + (part.head * MEMBERS + member) * (HEAD_DIM * 2);
    }
    __device__ const char* key() const { return keys.k + part.head * (HEAD_DIM * 2); }
    __device__ const char* value() const { return keys.v + part.head * (HEAD_DIM * 2); }
    __device__ float scale() const { return keys.scale; }
    __device__ char* place() const {
        const int fresh = part.sequence.fresh;
        const long long block = keys.tables[part.sequence.table_at + fresh / BLOCK_SIZE];
        return keys.pool + block * keys.block_stride + keys.layer_at + fresh % BLOCK_SIZE * attention::TOKEN_BYTES +
               part.head * attention::HEAD_BYTES;
    }
};

// Nobody asks for a local layer's attention mass.
struct Unmeasured {
    static constexpr const float* at = nullptr;
    static constexpr int tiles = 0;
    __device__ void put(int, int, float) const {}
};

// ---- A warp's tiles

// The part's `tile`-th, into this warp's slot.
__device__ __forceinline__ void copy_tile(const Keys& keys, const Part& part, int tile) {
    using attention::HEAD_BYTES, attention::KEYS, attention::PANEL_BYTES, attention::PIECES, attention::TOKEN_BYTES;
    const int slot = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    const int position = part.position(tile);
    const long long block = keys.tables[part.sequence.table_at + position / BLOCK_SIZE];
    const char* from = keys.pool + block * keys.block_stride + keys.layer_at + position % BLOCK_SIZE * TOKEN_BYTES +
                       part.head * HEAD_BYTES;
    char* panel = slot_memory(slot);
#pragma unroll
    for (int i = 0; i < KEYS * PIECES / WIDTH; ++i) {
        const int token = (i * WIDTH + lane) / PIECES, piece = (i * WIDTH + lane) % PIECES;
        const bool visible = position + token >= part.sequence.lowest && position + token < part.sequence.fresh;
        char* to = panel + token * HEAD_BYTES + (piece ^ token % 8) * 16;
        copy_16(to, from + token * TOKEN_BYTES + piece * 16, visible);
        copy_16(to + PANEL_BYTES, from + (BLOCK_SIZE + token) * TOKEN_BYTES + piece * 16, visible);
    }
    arrive_when_copied(slot_barrier(slot));
}

// What earlier steps wrote waits for nobody; and stages in which a warp has no tile wait for it no longer.
__device__ __forceinline__ void begin_tiles(const Keys& keys, const Part& part) {
    const int warp = threadIdx.x / WIDTH;
    const bool has_tile = warp < part.slots();
    if (has_tile) copy_tile(keys, part, warp);
    if (threadIdx.x % WIDTH > 0) return;
    Ring ring;
    for (int stage = 0; stage < TILE_STAGES; ++stage, ring.next())
        if (!has_tile || stage != warp / OF_STAGE) arrive(ring.empty());
}

// A block's part goes to where all blocks find it, when they have met.
__device__ __forceinline__ void attend(const Keys& keys, const Part& part) {
    constexpr int OF_MEMBER = HEAD_DIM / 2, PAIRS = MEMBERS * OF_MEMBER;
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    float* parts = (float*)(shared + X_AT);
    float2* stats = (float2*)(shared + X_AT + WARPS * MEMBERS * HEAD_DIM * 4);
    const int slots = part.slots(), softmaxes = min(slots + part.has_own(), WARPS);
    if (part.count == 0) return;
    if (warp < softmaxes) {
        u32 queries[attention::DEPTH][2];
        attention::State state;
        const Token token{keys, part};
        attention::load_queries(queries, token);
        if (part.has_own() && warp == slots % WARPS) attention::begin_with_own(state, token, Unmeasured{});
        u32 parity = 0;
#pragma unroll 1
        for (int tile = warp; warp < slots && tile < part.count; tile += SLOTS, parity ^= 1) {
            if (tile >= SLOTS) copy_tile(keys, part, tile);  // Seldom: it is waited for at once.
            wait(slot_barrier(warp), parity);
            attention::add_tile(state, queries, slot_memory(warp), part.position(tile), part.sequence, Unmeasured{},
                                keys.scale);
            before_bulk_copies();
            __syncwarp();
        }
        if (warp < slots && lane == 0) {
            Ring ring;
            ring.skip(warp / OF_STAGE);
            arrive(ring.empty());
        }
        attention::leave(state, warp, stats, parts);
    }
    consumers_meet();
    for (int pair = threadIdx.x; pair < PAIRS; pair += CONSUMERS) {
        const int member = pair / OF_MEMBER;
        attention::Merged merged;
        for (int of = 0; of < softmaxes; ++of)
            merged.add(stats[of * MEMBERS + member], *(const float2*)(parts + of * MEMBERS * HEAD_DIM + pair * 2));
        const float share = 1.0f / merged.whole;
        const int at = part.number * ATTENDED + part.head * MEMBERS * HEAD_DIM + pair * 2;
        *(u32*)(keys.parts + at * 2) = pack<false>(merged.sum.x * share, merged.sum.y * share);
        if (pair % OF_MEMBER == 0)
            keys.stats[part.number * QUERY_HEADS + part.head * MEMBERS + member] = {merged.top, merged.whole};
    }
}

// What each part of a head counts for in the head's attention, into `weights` [parts, QUERY_HEADS], of which a thread
// needs the first number.
__device__ __forceinline__ void weigh(const Keys& keys, int parts, float2* weights) {
    constexpr int AT_ONCE = 8;
    for (int head = threadIdx.x; head < QUERY_HEADS; head += CONSUMERS) {
        float top = attention::FLOOR, whole = 0.0f;
#pragma unroll 1
        for (int first = 0; first < parts; first += AT_ONCE) {
            uint2 stats[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (first + j < parts)
                    stats[j] = load_pairs((const char*)(keys.stats + (first + j) * QUERY_HEADS + head));
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (first + j < parts) {
                    const float2 stat = attention::floats(stats[j]);
                    top = fmaxf(top, stat.x);
                    weights[(first + j) * QUERY_HEADS + head] = stat;
                }
        }
        for (int part = 0; part < parts; ++part) {
            float2& weight = weights[part * QUERY_HEADS + head];
            weight.x = weight.y * exp2_quickly(weight.x - top);
            whole += weight.x;
        }
        const float share = 1.0f / whole;
        for (int part = 0; part < parts; ++part) weights[part * QUERY_HEADS + head].x *= share;
    }
}

// Attention, of which each thread takes numbers, from all heads' parts; zero where there is no token.
template <int COUNT, int ROUNDS>
__device__ __forceinline__ void put_together(const Keys& keys, int parts, const Row<COUNT>& row, float4 (&v)[ROUNDS]) {
    constexpr int AT_ONCE = 8;
    float2* weights = (float2*)(shared + X_AT);
    uint2 numbers[AT_ONCE][ROUNDS];
    const auto fetch = [&](int first) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i)
                if (first + j < parts && row.has(i))
                    numbers[j][i] = load_pairs(keys.parts + (first + j) * (ATTENDED * 2) + row.place(i) * 8);
    };
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) v[i] = {};
    fetch(0);
    weigh(keys, parts, weights);
    consumers_meet();
#pragma unroll 1
    for (int first = 0; first < parts; first += AT_ONCE) {
        if (first > 0) fetch(first);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i)
                if (first + j < parts && row.has(i)) {
                    const float weight = weights[(first + j) * QUERY_HEADS + row.place(i) * 4 / HEAD_DIM].x;
                    const float4 part = unpack(numbers[j][i]);
                    v[i] = {v[i].x + part.x * weight, v[i].y + part.y * weight, v[i].z + part.z * weight,
                            v[i].w + part.w * weight};
                }
    }
}
