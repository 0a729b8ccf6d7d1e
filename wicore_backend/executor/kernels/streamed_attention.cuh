// What `streamed_layer.cu` is made of, fourth, where a layer attends itself: its attention, of one token in a window.
//
//   1. The tiles of each KV head's keys and values are shared out among some blocks, a *part* each. The copying warp
//      brings a block's into the ring before any weights, which then come while attention is computed.
//   2. All warps visit all stages of tiles, and each tile is one warp's, with a softmax of its own. Another one, if
//      there is any, has the token's own key and value, which are in no tile, and writes them to the pool.
//   3. A block puts its warps' softmaxes together, and leaves the part in bfloat16 with its greatest score and sum of
//      weights. All blocks meet, also those that have no tile.
//   4. Each block puts all parts of all heads together, in their order, as x of `out`. One block a head could do that
//      for the others, but they would wait for it as long again as for the parts, and the parts are 64 KB.
//
// Given when it is compiled, too: KV_HEADS, MEMBERS, BLOCK_SIZE, POOL_BITS (see `attention.cuh`), LEAST (tiles of a
// part, where there are as many).

#pragma once

#include "attention.cuh"
#include "streamed_meeting.cuh"

constexpr int OF_STAGE = STAGE_BYTES / attention::TILE_BYTES;  // tiles
constexpr int QUERY_HEADS = KV_HEADS * MEMBERS;

static_assert(QUERY_HEADS * HEAD_DIM == ATTENDED, "all heads are attended to");
static_assert(1 <= OF_STAGE && OF_STAGE <= WARPS, "a stage has whole tiles, and none has two of a warp's");

// A stage's barrier of its own: all lanes of the copying warp arrive there when their pieces of its tiles have come.
__device__ __forceinline__ u32 tiles_barrier(const Ring& ring) { return address(shared + TILES_AT) + ring.stage * 8; }

__device__ __forceinline__ void prepare_tiles() {  // before `Ring::prepare`
    for (Ring ring; ring.parity == 0; ring.next()) barrier_init(tiles_barrier(ring), WIDTH);
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

// ---- The copying warp

__device__ __forceinline__ void copy_tiles(Ring& ring, const Keys& keys) {
    using attention::HEAD_BYTES, attention::KEYS, attention::PANEL_BYTES, attention::PIECES, attention::TOKEN_BYTES;
    const Part part(keys);
    const int lane = threadIdx.x % WIDTH;
    const int* table = keys.tables + part.sequence.table_at;
    int mine = 0;
#pragma unroll 1
    for (int tile = 0; tile < part.count; ++tile) {
        if (tile % WIDTH == 0) mine = tile + lane < part.count ? table[part.position(tile + lane) / BLOCK_SIZE] : 0;
        const long long block = __shfl_sync(~0u, mine, tile % WIDTH);
        const int position = part.position(tile), slot = tile % OF_STAGE;
        const char* from = keys.pool + block * keys.block_stride + keys.layer_at + position % BLOCK_SIZE * TOKEN_BYTES +
                           part.head * HEAD_BYTES;
        if (slot == 0) wait(ring.empty(), ring.parity ^ 1);
        char* panel = ring.memory() + slot * attention::TILE_BYTES;
#pragma unroll
        for (int i = 0; i < KEYS * PIECES / WIDTH; ++i) {
            const int token = (i * WIDTH + lane) / PIECES, piece = (i * WIDTH + lane) % PIECES;
            const int at = position + token;
            const bool visible = at >= part.sequence.lowest && at < part.sequence.fresh;
            char* to = panel + token * HEAD_BYTES + (piece ^ token % 8) * 16;
            copy_16(to, from + token * TOKEN_BYTES + piece * 16, visible);
            copy_16(to + PANEL_BYTES, from + (BLOCK_SIZE + token) * TOKEN_BYTES + piece * 16, visible);
        }
        if (slot < OF_STAGE - 1 && tile < part.count - 1) continue;
        // Whoever has no tile of the stage is to know all the same which phase of its barriers this is.
        if (lane == 0) arrive(ring.full());
        arrive_when_copied(tiles_barrier(ring));
        ring.next();
    }
}

// ---- The attending warps

// A block's part goes to where all blocks find it, when they have met.
__device__ __forceinline__ Ring attend(Ring ring, const Keys& keys, const Part& part) {
    constexpr int OF_MEMBER = HEAD_DIM / 2, PAIRS = MEMBERS * OF_MEMBER;
    const int warp = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    float* parts = (float*)(shared + X_AT);
    float2* stats = (float2*)(shared + X_AT + WARPS * MEMBERS * HEAD_DIM * 4);
    const int softmaxes = min(part.count + part.has_own(), WARPS);
    if (part.count == 0) return ring;
    u32 queries[attention::DEPTH][2];
    attention::State state;
    if (warp < softmaxes) {
        const Token token{keys, part};
        attention::load_queries(queries, token);
        if (part.has_own() && warp == part.count % WARPS) attention::begin_with_own(state, token, Unmeasured{});
    }
#pragma unroll 1
    for (int first = 0; first < part.count; first += OF_STAGE, ring.next()) {
        const int turn = warp - first % WARPS, slot = turn < 0 ? turn + WARPS : turn;
        wait(ring.full(), ring.parity);
        if (slot < OF_STAGE && first + slot < part.count) {
            wait(tiles_barrier(ring), ring.parity);
            attention::add_tile(state, queries, ring.memory() + slot * attention::TILE_BYTES,
                                part.position(first + slot), part.sequence, Unmeasured{}, keys.scale);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.empty());
    }
    if (warp < softmaxes) attention::leave(state, warp, stats, parts);
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
    return ring;
}

// Attention, of which each thread takes numbers, from all heads' parts; zero where there is no token.
template <int COUNT, int ROUNDS>
__device__ __forceinline__ void put_together(const Keys& keys, int parts, const Row<COUNT>& row, float4 (&v)[ROUNDS]) {
    constexpr int AT_ONCE = 4;
    float top[ROUNDS], whole[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) top[i] = attention::FLOOR, whole[i] = 0.0f, v[i] = {};
#pragma unroll 1
    for (int first = 0; first < parts; first += AT_ONCE) {
        uint2 stats[AT_ONCE][ROUNDS], numbers[AT_ONCE][ROUNDS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i)
                if (first + j < parts && row.has(i)) {
                    const int head = row.place(i) * 4 / HEAD_DIM;
                    stats[j][i] = load_pairs((const char*)(keys.stats + (first + j) * QUERY_HEADS + head));
                    numbers[j][i] = load_pairs(keys.parts + (first + j) * (ATTENDED * 2) + row.place(i) * 8);
                }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i)
                if (first + j < parts && row.has(i)) {
                    const float2 stat = attention::floats(stats[j][i]);
                    const float higher = fmaxf(top[i], stat.x);
                    const float shrink = exp2_quickly(top[i] - higher);
                    const float share = stat.y * exp2_quickly(stat.x - higher);
                    const float4 part = unpack(numbers[j][i]);
                    top[i] = higher;
                    whole[i] = whole[i] * shrink + share;
                    v[i] = {v[i].x * shrink + part.x * share, v[i].y * shrink + part.y * share,
                            v[i].z * shrink + part.z * share, v[i].w * shrink + part.w * share};
                }
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const float share = whole[i] > 0.0f ? 1.0f / whole[i] : 0.0f;
        v[i] = {v[i].x * share, v[i].y * share, v[i].z * share, v[i].w * share};
    }
}
