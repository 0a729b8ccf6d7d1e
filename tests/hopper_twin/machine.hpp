// A card for kernels that g++ has compiled: what their instructions ask of it, for `hopper.cuh` beside this.
//
// 1. Every thread of the kernel is a fiber. At each instruction of `hopper.cuh` that others could notice it gives way,
//    and a random choice says who goes on, by weights of the warps that change now and then: warps and blocks are fast
//    and slow in turns.
// 2. A multiprocessor has one block. As soon as one is free a block of the next launch starts there, if all blocks of
//    the launch before have let it.
// 3. Copies and what blocks tell each other arrive later, in random order, but a thread's copies of 16 bytes in theirs;
//    in some runs only when nobody else can go on. What a copy writes holds NaN until then.
// 4. Each thread has a vector clock: which of the other threads' doings come before its own. Barriers, releases and
//    acquires hand clocks on, nothing else does. g++ reports every plain access (-fsanitize=thread, without its
//    library). Two accesses to a word, one of them writing, of which none comes before the other, are a fault, however
//    the run went. A bulk copy counts as a thread of its own, from when it is issued; who waited for its barrier's phase
//    comes after it.
// 5. Faults too: an access that is misaligned or outside of what the launch has; reading shared memory that nobody
//    wrote; writing what is constant; an arrival too many; lanes of a warp at different instructions that all take part
//    in; a block that ends with copies on their way; a run in which nobody can go on.

#pragma once

#include <cstdint>

namespace twin {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

// ---- Warps and blocks

void nap();                          // Others go on for a while.
void meet(int number, u32 threads);  // When so many of the block are there, all go on.
void all_meet();
void warp_meets();
void exchange(const void* mine, void* all, u32 bytes);  // Lanes of a warp: `all` [32] is in the order of lanes.
void mma(float* sum, const u32* a, const u32* b, bool half);  // [4], [4], [2]: see the twin's `hopper.cuh`.

// ---- Barriers in shared memory, and bulk copies

void barrier_init(u32 barrier, u32 arrivals);
void arrive(u32 barrier, u32 announced_bytes);
void wait(u32 barrier, u32 parity);
void copy(const void* to, const void* from, u32 bytes, u32 barrier);
void copy_16(const void* to, const void* from, bool there);

struct Piece {  // 16 bytes of a bulk copy, zeros from nowhere
    const char* to;
    const char* from;
};

void copy_pieces(const Piece* pieces, u32 count, u32 barrier);
void arrive_when_copied(u32 barrier);

// ---- Memory

enum class Order { relaxed, acquire_or_release };

void tell(u32* to, u32 word);
void add(u32* to, u32 by, Order order);
u32 told(const u32* from, Order order);
u32 added(u32* to, u32 by);  // At once, both acquiring and releasing; what it was.
void load(void* to, const void* from, u32 bytes);  // Plainly, from wherever.
void load_constant(void* to, const void* from, u32 bytes);

template <class T>
T loaded(const void* from) {
    T v;
    load(&v, from, sizeof(T));
    return v;
}

template <class T>
T loaded_constant(const void* from) {
    T v;
    load_constant(&v, from, sizeof(T));
    return v;
}

void inside(const void* global, u64 bytes, u32 aligned);

// ---- Kernels over each other

void wait_for_kernel_before();
void let_next_begin();

// ---- Numbers of 16 and 8 bits

float from_half(u32 bits);
u32 to_half(float v);
u32 to_bfloat16(float v);
float from_bfloat16(u32 bits);  // the lower 16
u32 half_of_e4m3(u32 bits);
u32 to_e4m3(float v);

}  // namespace twin
