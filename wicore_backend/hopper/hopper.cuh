// Hopper's instructions that C++ has no words for, a function each. Whatever inline PTX a kernel has is here,
// so that tests/hopper_twin can put a file of the same name in its place, with which g++ compiles the very same
// kernels for a CPU and watches what they do.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

#ifndef SHARED_ALIGNMENT  // A kernel may ask for more.
#define SHARED_ALIGNMENT 128
#endif
extern __shared__ __align__(SHARED_ALIGNMENT) char shared[];

// ---- Shared memory

__device__ __forceinline__ u32 address(const void* in_shared) { return (u32)__cvta_generic_to_shared(in_shared); }

template <class T>
__device__ __forceinline__ T load(const char* in_shared) { return *(const T*)in_shared; }

// What is at `in_shared` for lanes that ask; for others anything.
__device__ __forceinline__ uint4 load_if(bool asks, const char* in_shared) {
    uint4 v;
    asm volatile(
        "{ .reg .pred asks; setp.ne.u32 asks, %5, 0;\n"
        "@asks ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address(in_shared)), "r"((u32)asks));
    return v;
}

// Four matrices of 8 rows of 16 bytes, for the tensor cores: lane l names the (l % 8)-th row of matrix l / 8, and gets
// of each matrix the 4 bytes of row l / 4 that are the (l % 4)-th; turned, those of column l / 4, by numbers of 16 bits.
__device__ __forceinline__ uint4 load_matrices(const char* in_shared) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address(in_shared)) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_matrices_turned(const char* in_shared) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address(in_shared)) : "memory");
    return v;
}

// ---- Barriers of a block: some of its warps meet, by number; or in shared memory, of 8 bytes, with phases (mbarrier).
//
// 1. A phase is over when all its arrivals have come, and all bytes that were announced.
// 2. Who waits for parity 0 waits for the first phase's end, for 1 the second's, for 0 the third's. Before the first
//    has ended, what has parity 1 counts as over.
// 3. What a thread wrote or read before it arrived comes before what those do who waited for that phase; other
//    threads', too, if they met it before (`__syncwarp`).

template <int NUMBER, int THREADS>
__device__ __forceinline__ void meet() { asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory"); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all `barrier_init`, before copies use them.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- Bulk copies, of multiples of 16 bytes between multiples of 16; they end in any order, each telling its barrier.

using Policy = u64;

__device__ __forceinline__ Policy evict_first() {  // from L2: what is read once
    Policy policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy(const char* to, const char* from, u32 bytes, u32 barrier, Policy policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(address(to)), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// A matrix in global memory, of which boxes are copied: as cuTensorMapEncodeTiled makes it.
struct __align__(64) TensorMap { u64 words[16]; };

// A box of it, from a column and a row on, zeros where the matrix has ended. As the map has it, 16-byte pieces of its
// rows of 128 bytes are exchanged with each other: within eight rows, which begin at multiples of 1,024.
__device__ __forceinline__ void copy_box(const char* to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(address(to)), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Of several matrices the same box, from one of them on.
__device__ __forceinline__ void copy_box(const char* to, const TensorMap& map, int column, int row, int matrix,
                                         u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(address(to)), "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(barrier) : "memory");
}

// Into L2 only, and nobody is told.
__device__ __forceinline__ void line_to_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ---- Copies of 16 bytes by each thread, between multiples of 16; zeros where nothing is there.

__device__ __forceinline__ void copy_16(const char* to, const char* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// This thread arrives at the barrier when all its copies so far have come.
__device__ __forceinline__ void arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- Global memory

__device__ __forceinline__ float constant(const float* at) {  // Nobody writes it while the kernel runs.
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}

__device__ __forceinline__ float4 constants(const float* at) {
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ u32 load_pair(const char* at) {  // Two numbers of 16 bits, past the first-level cache.
    u32 v;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_pairs(const char* at) {  // Four numbers of 16 bits, past the first-level cache.
    uint2 v;
    asm volatile("ld.global.cg.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_words(const void* at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

// Words that blocks tell each other while they run: each is whole, and in no order with any other.
__device__ __forceinline__ void tell(u32* to, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ u32 told(const u32* from) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

__device__ __forceinline__ uint4 told_four(const u32* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

// What this thread did, and others that it has met, comes before what those do who find the word so. One may add and
// many ask; who has met one that has found it so need not ask.
__device__ __forceinline__ void add_released(u32* to, u32 by) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(by) : "memory");
}

__device__ __forceinline__ u32 told_acquired(const u32* from) {
    u32 word;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

// Adds, and gives what it was: both ways, what came before comes before what others do after.
__device__ __forceinline__ u32 added(u32* to, u32 by) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(by) : "memory");
    return before;
}

// ---- Kernels of a stream that lie over each other (programmatic dependent launch)

// Until the kernel before has ended, and what it wrote is there.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next one may take what multiprocessors this one leaves.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- Registers that one warpgroup leaves for another; all of its warps do so.

template <int COUNT>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// ---- Products by a warpgroup (wgmma), which go on while it does something else

// Rows of 64 numbers of 16 bits, as `copy_box` leaves them; further columns are 16 bytes a unit beyond.
__device__ __forceinline__ u64 wgmma_operand(const char* in_shared) {
    return (u64)((address(in_shared) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Before the first product, and when a thread has touched the sums.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last end are a group.
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most the last so many groups go on.
template <int GROUPS>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory"); }

// Until all have ended, and the sums can be read.
template <int COUNT>
__device__ __forceinline__ void wgmma_wait_for(float (&sum)[COUNT]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// The operands of an instruction that has 32 sums: ten of their numbers in its text, and what 16 of them are.
#define TEN(n) "%" #n "0,%" #n "1,%" #n "2,%" #n "3,%" #n "4,%" #n "5,%" #n "6,%" #n "7,%" #n "8,%" #n "9,"
#define FOUR_OF(v, i) "+f"(v[i]), "+f"(v[i + 1]), "+f"(v[i + 2]), "+f"(v[i + 3])
#define SIXTEEN_OF(v, i) FOUR_OF(v, i), FOUR_OF(v, i + 4), FOUR_OF(v, i + 8), FOUR_OF(v, i + 12)

// sum [64, 64] += a [64, 16] b [64, 16]^T of bfloat16, where a is in registers: of warp w's 16 rows a lane has four columns
// of `lane / 4` and of that plus 8, columns lane % 4 * 2 and the next one of both, and then those 8 further on. Until the
// product has ended nobody may write them.
__device__ __forceinline__ void wgmma_64(float (&sum)[32], const u32* a, u64 b) {
    asm volatile(
        "{ .reg .pred adds; setp.eq.b32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TEN() TEN(1) TEN(2) "%30,%31},"
        "{%32, %33, %34, %35}, %36, adds, 1, 1, 0; }"
        : SIXTEEN_OF(sum, 0), SIXTEEN_OF(sum, 16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Registers that products have read are these products' until here.
template <int COUNT>
__device__ __forceinline__ void wgmma_has_read(const u32 (&a)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" ::"r"(a[i]));
}

#undef SIXTEEN_OF
#undef FOUR_OF
#undef TEN

// ---- Numbers of 16 bits, of 8 and of 4

template <bool HALF>
__device__ __forceinline__ u32 pack(float low, float high) {  // in float16, else bfloat16
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

// The lower two E4M3 numbers in float16.
__device__ __forceinline__ u32 raise_fp8(u32 pair) {
    u32 raised;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(raised) : "r"(pair));
    return raised;
}

// Four E4M3 numbers in float16.
__device__ __forceinline__ uint2 raise_fp8_four(u32 codes) {
    uint2 raised;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(raised.x), "=r"(raised.y) : "r"(codes));
    return raised;
}

// The nearest two E4M3 numbers, half to even, in the lower 16 bits; what is beyond 448 becomes that.
__device__ __forceinline__ u32 lower_fp8(float low, float high) {
    u32 pair;
    asm("{ .reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, %1, %2; cvt.u32.u16 %0, both; }"
        : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// (word & MASK) | WITH, which the compiler would take two instructions for.
template <u32 MASK, u32 WITH>
__device__ __forceinline__ u32 masked_with(u32 word) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word), "n"(MASK), "n"(WITH));
    return v;
}

// Two bfloat16 numbers less two others.
__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 v;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// Times two others.
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 v;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// Of an 8 x 8 matrix of numbers of 16 bits a lane has two of row `lane / 4`; then two of column `lane / 4`.
__device__ __forceinline__ u32 turned(u32 pair) {
    u32 v;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
    return v;
}

__device__ __forceinline__ float exp2_quickly(float v) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}

// sum [16, 8] += a [16, 16] b [16, 8] by the lanes of a warp: mma.m16n8k16 of float16 or bfloat16, with sums in float32.
template <bool HALF>
__device__ __forceinline__ void mma(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (HALF) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}
