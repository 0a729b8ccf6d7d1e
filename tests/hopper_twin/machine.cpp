// See `machine.hpp`. Here: who goes on, what kernels call, and what g++ reports of their accesses.

#include "machine.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "running.hpp"

Index threadIdx, blockIdx, gridDim;
char* shared;

namespace twin {

Machine* machine;

// ---- Who goes on

void Machine::begin_block(u32 place) {
    auto& block = running_[place] = std::make_unique<Block>();
    block->launch = begun_launch_, block->index = begun_, block->place = place, block->threads_left = threads_;
    std::memset(memory_at() + place * shared_bytes_, 0xff, shared_bytes_);
    std::fill_n(shared_words_.begin() + place * (shared_bytes_ / 4), shared_bytes_ / 4, Word());
    for (u32 index = 0; index < threads_; ++index) {
        Thread& thread = threads_of_[place * threads_ + index];
        thread.block = running_[place].get();
        thread.index = index;
        thread.id = (begun_launch_ % 2 * blocks_ + place) * threads_ + index;
        thread.past = Past(size_);
        thread.past.add(thread.id, ~0u);
        thread.ready = nullptr;
        thread.fiber.begin([this] { kernel(parameters_[self().block->launch]); });
    }
    for (u32 i = 0; i < threads_ / LANES; ++i) {
        Warp& warp = warps_[place * threads_ / LANES + i];
        warp.first = place * threads_ + i * LANES;
        warp.there = 0;
    }
    if (++begun_ == blocks_) begun_ = 0, ++begun_launch_;
    happened();
}

void Machine::begin_blocks() {
    if (begun_launch_ == launches_ || (begun_launch_ && let_[begun_launch_ - 1] < blocks_)) return;
    const u32 place = random_() % blocks_;
    if (!running_[place] || running_[place]->threads_left == 0) begin_block(place);
}

void Machine::go_on(Thread& thread) {
    if (thread.fiber.ended()) return;
    if (thread.ready) {
        if (!thread.ready()) return;
        if (*thread.waits.what) happened();
        thread.ready = nullptr;
    }
    thread_ = &thread;
    threadIdx.x = thread.index, blockIdx.x = thread.block->index, gridDim.x = blocks_;
    shared = memory_at() + thread.block->place * shared_bytes_;
    thread.fiber.resume();
    if (thread.fiber.ended() && fault.empty()) ended(thread);
    thread_ = nullptr;
}

void Machine::ended(Thread& thread) {
    Block& block = *thread.block;
    release(ended_[block.launch]);
    happened();
    if (--block.threads_left) return;
    if (block.copies) fault = "block " + number(block.index) + " ended while copies were on their way to it";
    if (!block.let_next) ++let_[block.launch];
    if (left_[block.launch] == 1) {
        land_all([&](const OnItsWay& other) { return other.launch == block.launch; });
        over_[block.launch] = ended_[block.launch].clock();
    }
    --left_[block.launch];
}

std::string Machine::who_waits() const {
    std::map<std::string, u32> waiting;
    for (const Thread& thread : threads_of_)
        if (thread.block && !thread.fiber.ended())
            ++waiting[thread.ready && *thread.waits.what ? thread.waits.what + (" " + number(thread.waits.of))
                                                         : "others' numbers"];
    std::string all = "nobody can go on:";
    for (const auto& [what, count] : waiting) all += " " + number(count) + " threads wait for " + what + ";";
    return all;
}

void Machine::run() {
    const u32 patience = std::max<u32>(400 * warps_.size(), 16 * 1024);  // A few warps may all be slow for a while.
    while (!all_ended() && fault.empty()) {
        ++now_;
        begin_blocks();
        land_something(++idle_ > 8 * warps_.size());
        if (idle_ > patience) fault = who_waits();
        if (now_ % 1024 == 1)
            for (Warp& warp : warps_) warp.weight = 1u << random_() % 7;
        const u32 chosen = random_() % warps_.size();
        if (random_() % 64 >= warps_[chosen].weight) continue;
        const Warp& warp = warps_[chosen];
        const u32 place = warp.first / threads_;
        if (!running_[place]) continue;
        const u32 first = random_() % LANES;
        for (u32 i = 0; i < LANES && fault.empty(); ++i)
            if (!lone_lanes_ || random_() % 2) go_on(threads_of_[warp.first + (first + i) % LANES]);
    }
}

// ---- What kernels call

void nap() { machine->nap(); }
void meet(int number, u32 threads) { machine->meet(number, threads); }
void all_meet() { machine->all_meet(); }
void warp_meets() { machine->warp_meets(nullptr, nullptr, 0, true); }
void exchange(const void* mine, void* all, u32 bytes) { machine->warp_meets(mine, all, bytes, false); }
void barrier_init(u32 barrier, u32 arrivals) { machine->barrier_init(barrier, arrivals); }
void arrive(u32 barrier, u32 announced_bytes) { machine->arrive(barrier, announced_bytes); }
void wait(u32 barrier, u32 parity) { machine->wait(barrier, parity); }
void copy(const void* to, const void* from, u32 bytes, u32 barrier) { machine->copy(to, from, bytes, barrier); }
void copy_pieces(const Piece* pieces, u32 count, u32 barrier) { machine->copy_pieces(pieces, count, barrier); }
void copy_16(const void* to, const void* from, bool there) { machine->copy_16(to, from, there); }
void arrive_when_copied(u32 barrier) { machine->arrive_when_copied(barrier); }
void tell(u32* to, u32 word) { machine->tell(to, word); }
void add(u32* to, u32 by, Order order) { machine->add(to, by, order); }
u32 added(u32* to, u32 by) { return machine->added(to, by); }
u32 told(const u32* from, Order order) { return machine->told(from, order); }

void load(void* to, const void* from, u32 bytes) {
    machine->aligned(from, bytes);
    machine->access(from, bytes, false, false);
    std::memcpy(to, from, bytes);
}

void load_constant(void* to, const void* from, u32 bytes) {
    machine->aligned(from, bytes);
    machine->constant(from, bytes);
    std::memcpy(to, from, bytes);
}

void wait_for_kernel_before() { machine->wait_for_kernel_before(); }
void let_next_begin() { machine->let_next_begin(); }

void inside(const void* global, u64 bytes, u32 aligned) {
    machine->region_of(global, bytes);
    machine->aligned(global, aligned);
}

void mma(float* sum, const u32* a, const u32* b, bool half) {
    struct Part {
        u32 a[4], b[2];
    } part{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[LANES];
    exchange(&part, all, sizeof(Part));
    const u32 lane = threadIdx.x % LANES;
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float total = 0.0f;
        for (u32 k = 0; k < 16; ++k) {
            const u32 of_a = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2] >> k % 2 * 16;
            const u32 of_b = all[column * 4 + k % 8 / 2].b[k / 8] >> k % 2 * 16;
            total += half ? from_half(of_a) * from_half(of_b) : from_bfloat16(of_a) * from_bfloat16(of_b);
        }
        sum[i] += total;
    }
}

}  // namespace twin

// Runs `launches` of the kernel, one after the other in a stream; what was wrong, or an empty text.
extern "C" const char* run(const void* const* parameters, unsigned launches, unsigned blocks, unsigned threads,
                           unsigned shared_bytes, const twin::Region* regions, unsigned count, unsigned long long seed) {
    static std::string fault;
    twin::Machine one(parameters, launches, blocks, threads, shared_bytes, regions, count, seed);
    twin::machine = &one;
    one.run();
    twin::machine = nullptr;
    fault = one.fault;
    return fault.c_str();
}

// ---- What g++ reports of the kernel's plain accesses

#define REPORTED(BYTES)                                                                                    \
    extern "C" void __tsan_read##BYTES(void* at) { twin::machine->access(at, BYTES, false, false); }            \
    extern "C" void __tsan_write##BYTES(void* at) { twin::machine->access(at, BYTES, true, false); }            \
    extern "C" void __tsan_unaligned_read##BYTES(void* at) { twin::machine->access(at, BYTES, false, false); }  \
    extern "C" void __tsan_unaligned_write##BYTES(void* at) { twin::machine->access(at, BYTES, true, false); }

REPORTED(1)
REPORTED(2)
REPORTED(4)
REPORTED(8)
REPORTED(16)

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_read_range(void* at, unsigned long bytes) { twin::machine->access(at, bytes, false, false); }
extern "C" void __tsan_write_range(void* at, unsigned long bytes) { twin::machine->access(at, bytes, true, false); }
