// The twin of what warpgroups do in hopper.cuh: boxes of tensors, and products whose left operand is in registers.
//
// A product is made when it is waited for: what a thread has made of its registers by then, of the sums or of shared memory
// is what it reads or writes. It counts as reading shared memory then, too: who lets that go before has a race.

#pragma once

#include <vector>

// ---- Boxes

// As tests' `tensor_map` makes it.
struct alignas(64) TensorMap {
    const char* at;
    u64 sizes[3], apart[3], box[3];  // numbers of 16 bits, bytes, numbers; from the innermost on
    u64 to_multiple_of_64[6];
};

inline void copy_box(const char* to, const TensorMap& map, int column, int row, int matrix, u32 barrier) {
    std::vector<twin::Piece> pieces;
    const u32 begin = address(to);
    for (u64 m = 0; m < map.box[2]; ++m)
        for (u64 r = 0; r < map.box[1]; ++r)
            for (u32 c = 0; c < 8; ++c) {
                const u32 place = begin + ((m * map.box[1] + r) * 8 + c) * 16;
                const u64 at[3] = {column + c * 8, row + r, matrix + m};
                const bool there = at[0] < map.sizes[0] && at[1] < map.sizes[1] && at[2] < map.sizes[2];
                pieces.push_back({shared + (place ^ place / 128 % 8 * 16),
                                  there ? map.at + at[0] * 2 + at[1] * map.apart[1] + at[2] * map.apart[2] : nullptr});
            }
    twin::copy_pieces(pieces.data(), pieces.size(), barrier);
}

inline void copy_box(const char* to, const TensorMap& map, int column, int row, u32 barrier) {
    copy_box(to, map, column, row, 0, barrier);
}

// ---- Registers

template <int COUNT>
void give_registers() { twin::warp_meets(); }

template <int COUNT>
void take_registers() { twin::warp_meets(); }

// ---- Products

namespace twin {

void product_given(float* sum, const u32* a, u32 b);  // [32], [4], and where b is in shared memory
void products_end();                                  // Those since the last end are a group.
void products_wait(u32 groups);                       // Until at most the last so many go on.

}  // namespace twin

inline u64 wgmma_operand(const char* in_shared) { return address(in_shared) >> 4; }

inline void wgmma_64(float (&sum)[32], const u32* a, u64 b) {
    twin::product_given(sum, a, (u32)b << 4);
}

inline void wgmma_begin() {}

inline void wgmma_end() { twin::products_end(); }

template <int GROUPS>
void wgmma_wait() {
    twin::products_wait(GROUPS);
    twin::warp_meets();
}

template <int COUNT>
void wgmma_has_read(const u32 (&)[COUNT]) {}

template <int COUNT>
void wgmma_wait_for(float (&)[COUNT]) { wgmma_wait<0>(); }

inline u32 times(u32 a, u32 b) {
    const float2 v = unpack<false>(a), w = unpack<false>(b);
    return pack<false>(v.x * w.x, v.y * w.y);
}
