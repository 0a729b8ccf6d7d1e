// What runs, as `machine.hpp` tells it: threads, warps, blocks, what is on its way; and what instructions do. Who goes on
// is in `machine.cpp`.

#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>

#include "clocks.hpp"
#include "fibers.hpp"
#include "machine.hpp"

struct Index {
    unsigned x;
};
extern "C" Index threadIdx, blockIdx, gridDim;  // Of the thread that runs.
extern "C" char* shared;
extern "C" void kernel(const void* parameters);  // What was compiled.

namespace twin {

constexpr u32 LANES = 32, MOST_BARRIERS = 64, MOST_MEETINGS = 16;

struct Region {  // of global memory
    const char* at;
    u64 bytes;
    int mutable_;
    const char* name;
};

struct Barrier {  // in shared memory
    u32 arrivals = 0, pending = 0, phase = 0;
    u32 id = 0, copies = 1;  // What copies to it are in clocks: all of a phase as one.
    long long bytes = 0;
    Past coming;
    Clock over;
};

struct Meeting {
    u32 there = 0, held = 0;
    Past coming;
    Clock over;
};

struct Block {
    u32 launch, index, place, threads_left;
    bool let_next = false;
    u32 copies = 0;
    std::map<u32, Barrier> barriers;
    Meeting meetings[MOST_MEETINGS];
};

struct Warp {
    u32 first;  // of its threads
    u32 weight = 1;
    u32 there = 0, held = 0, bytes = 0;
    bool orders = false;
    Past coming;
    Clock over;
    alignas(16) char given[2][LANES][64];
};

struct Reason {  // to wait
    const char* what = "";
    u32 of = 0;
};

struct SmallCopy {  // of 16 bytes
    char* to;
    const char* from;  // Zeros if it is null.
};

struct Thread {
    Fiber fiber;
    Block* block = nullptr;
    u32 index = 0, id = 0;  // in its block; in clocks
    Past past;
    std::function<bool()> ready;
    Reason waits;
    std::vector<SmallCopy> copies;
};

struct OnItsWay {
    std::function<void()> land;
    const void* to;
    u32 launch;
    Access issued;
    bool orderly;  // Those to one place land in their order.
};

inline std::string number(u64 n) { return std::to_string(n); }

class Machine {
  public:
    Machine(const void* const* parameters, u32 launches, u32 blocks, u32 threads, u32 shared_bytes,
            const Region* regions, u32 count, u64 seed)
        : parameters_(parameters), launches_(launches), blocks_(blocks), threads_(threads),
          shared_bytes_((shared_bytes + 127) / 128 * 128), random_(seed), regions_(regions, regions + count),
          memory_(blocks * shared_bytes_ + 128), shared_words_(blocks * shared_bytes_ / 4),
          threads_of_(blocks * threads), warps_(blocks * threads / LANES), running_(blocks),
          size_(2 * blocks * (threads + MOST_BARRIERS)), counts_(size_, 1), ended_(launches, Past(size_)), over_(launches),
          left_(launches, blocks), let_(launches) {
        std::sort(regions_.begin(), regions_.end(), [](auto& a, auto& b) { return a.at < b.at; });
        for (const Region& region : regions_) words_.emplace_back(region.mutable_ ? (region.bytes + 3) / 4 : 0);
        static const u32 late[] = {1, 4, 64, 0};
        lateness_ = late[random_() % 4];
        lone_lanes_ = random_() % 4 == 0;
    }

    void run();
    std::string fault;

    // ---- What instructions do

    void yield() { self().fiber.give_way(); }

    // Until `there` holds, which is asked by whoever chooses who goes on.
    void until(std::function<bool()> there, Reason why) {
        Thread& thread = self();
        thread.ready = std::move(there);
        thread.waits = why;
        thread.fiber.give_way();
    }

    void nap() {
        const u64 awake = now_ + random_() % (16 * warps_.size());
        until([this, awake] { return now_ >= awake; }, {});
    }

    void warp_meets(const void* mine, void* all, u32 bytes, bool orders) {
        Warp& warp = warp_of(self());
        const u32 held = warp.held;
        if (warp.there == 0) warp.bytes = bytes, warp.orders = orders, warp.coming = Past(orders ? size_ : 0);
        if (warp.bytes != bytes || warp.orders != orders)
            stop("lanes of a warp are at different instructions that all take part in");
        if (bytes) std::memcpy(warp.given[held % 2][self().index % LANES], mine, bytes);
        if (orders) release(warp.coming);
        if (++warp.there == LANES) {
            if (orders) warp.over = warp.coming.clock();
            ++warp.held, warp.there = 0;
            happened();
        } else {
            until([&warp, held] { return warp.held != held; }, {"the other lanes of warp", self().index / LANES});
        }
        if (orders) acquire(warp.over);
        for (u32 lane = 0; lane < LANES && bytes; ++lane)
            std::memcpy((char*)all + lane * bytes, warp.given[held % 2][lane], bytes);
    }

    void meet(u32 number, u32 threads) {
        Meeting& meeting = self().block->meetings[number];
        const u32 held = meeting.held;
        if (meeting.there == 0) meeting.coming = Past(size_);
        release(meeting.coming);
        if (++meeting.there == threads) {
            meeting.over = meeting.coming.clock();
            ++meeting.held, meeting.there = 0;
            happened();
        } else {
            until([&meeting, held] { return meeting.held != held; }, {"meeting", number});
        }
        acquire(meeting.over);
        yield();
    }

    void all_meet() { meet(0, threads_); }

    void barrier_init(u32 at, u32 arrivals) {
        auto& barriers = self().block->barriers;
        if (barriers.count(at) || barriers.size() == MOST_BARRIERS || at % 8 || at + 8 > shared_bytes_)
            stop("no barrier can be at " + number(at) + " of shared memory");
        const u32 of_block = self().block->launch % 2 * blocks_ + self().block->place;
        const u32 id = 2 * blocks_ * threads_ + of_block * MOST_BARRIERS + barriers.size();
        barriers[at] = {arrivals, arrivals, 0, id, counts_[id], 0, Past(size_), Past(size_).clock()};
    }

    void arrive(u32 at, u32 announced) {
        yield();
        Barrier& barrier = barrier_at(at);
        if (barrier.pending == 0) stop("an arrival too many at barrier " + number(at));
        barrier.bytes += announced;
        --barrier.pending;
        release(barrier.coming);
        over_if_all_came(barrier);
    }

    void wait(u32 at, u32 parity) {
        yield();
        Barrier& barrier = barrier_at(at);
        if (barrier.phase % 2 == parity)
            until([&barrier, parity] { return barrier.phase % 2 != parity; },
                  {parity ? "parity 1 of the barrier at" : "parity 0 of the barrier at", at});
        acquire(barrier.over);
    }

    void copy(const void* to, const void* from, u32 bytes, u32 at) {
        yield();
        Barrier& barrier = barrier_at(at);
        const u64 place = (const char*)to - shared;
        if (bytes == 0 || bytes % 16 || place % 16 || (u64)from % 16) stop("a bulk copy is not of whole 16 bytes");
        if (place >= shared_bytes_ || place + bytes > shared_bytes_) stop("a bulk copy ends outside of shared memory");
        region_of(from, bytes);
        for (u64 word = place / 4; word < (place + bytes) / 4; ++word)
            check(words_here()[word], {barrier.id, barrier.copies, false}, past(), true, (char*)to + (word * 4 - place));
        Past issued(size_);
        release(issued);
        issued.add(barrier.id, barrier.copies);
        std::memset((void*)to, 0xff, bytes);
        Block* block = self().block;
        ++block->copies;
        const Access access{self().id, counts_[self().id], false};
        auto land = [this, block, &barrier, bytes, to, from, issued = std::move(issued)] {
            std::memcpy((void*)to, from, bytes);
            --block->copies;
            barrier.bytes -= bytes;
            barrier.coming.add(issued);
            over_if_all_came(barrier);
        };
        on_their_way_.push_back({std::move(land), to, block->launch, access, false});
    }

    void copy_pieces(const Piece* pieces, u32 count, u32 at) {
        yield();
        Barrier& barrier = barrier_at(at);
        std::vector<Piece> all(pieces, pieces + count);
        for (const Piece& one : all) {
            const u64 place = one.to - shared;
            if (place >= shared_bytes_ || place + 16 > shared_bytes_) stop("a bulk copy ends outside of shared memory");
            if (one.from) region_of(one.from, 16), access(one.from, 16, false, false);
            for (u64 word = place / 4; word < place / 4 + 4; ++word)
                check(words_here()[word], {barrier.id, barrier.copies, false}, past(), true, shared + word * 4);
            std::memset((void*)one.to, 0xff, 16);
        }
        Past issued(size_);
        release(issued);
        issued.add(barrier.id, barrier.copies);
        Block* block = self().block;
        ++block->copies;
        const Access access{self().id, counts_[self().id], false};
        const char* first = all.front().to;
        auto land = [this, block, &barrier, all = std::move(all), issued = std::move(issued)] {
            for (const Piece& one : all) {
                if (one.from) std::memcpy((void*)one.to, one.from, 16);
                else std::memset((void*)one.to, 0, 16);
            }
            --block->copies;
            barrier.bytes -= all.size() * 16;
            barrier.coming.add(issued);
            over_if_all_came(barrier);
        };
        on_their_way_.push_back({std::move(land), first, block->launch, access, false});
    }

    void copy_16(const void* to, const void* from, bool there) {
        const u64 place = (const char*)to - shared;
        if (place % 16 || (u64)from % 16) stop("a copy of 16 bytes is not aligned");
        if (place + 16 > shared_bytes_) stop("a copy ends outside of shared memory");
        if (there) region_of(from, 16), access(from, 16, false, false);
        self().copies.push_back({(char*)to, there ? (const char*)from : nullptr});
    }

    // All copies of the thread count as issued now, and land together, after those before. Then it arrives, sooner or
    // later, and not always after it has for those before.
    void arrive_when_copied(u32 at) {
        yield();
        Barrier& barrier = barrier_at(at);
        std::vector<SmallCopy> copies = std::move(self().copies);
        self().copies.clear();
        for (const SmallCopy& one : copies) {
            const u64 place = one.to - shared;
            for (u64 word = place / 4; word < place / 4 + 4; ++word)
                check(words_here()[word], {barrier.id, barrier.copies, false}, past(), true, shared + word * 4);
            std::memset(one.to, 0xff, 16);
        }
        Past issued(size_);
        release(issued);
        issued.add(barrier.id, barrier.copies);
        Block* block = self().block;
        ++block->copies;
        const Access access{self().id, counts_[self().id], false};
        auto arrive = [this, block, &barrier, at, issued = std::move(issued)] {
            --block->copies;
            if (barrier.pending == 0) fault = "an arrival too many at barrier " + number(at);
            else --barrier.pending;
            barrier.coming.add(issued);
            over_if_all_came(barrier);
        };
        OnItsWay arrival{std::move(arrive), shared + at, block->launch, access, false};
        auto land = [this, copies = std::move(copies), arrival = std::move(arrival)] {
            for (const SmallCopy& one : copies) {
                if (one.from) std::memcpy(one.to, one.from, 16);
                else std::memset(one.to, 0, 16);
            }
            on_their_way_.push_back(arrival);
        };
        on_their_way_.push_back({std::move(land), &self(), block->launch, access, true});
    }

    u32 added(u32* to, u32 by) {
        yield();
        access(to, 4, true, true);
        const u32 mine = self().id;
        Past before(size_);
        release(before);
        land_all([&](const OnItsWay& other) {
            return (other.to == to && other.issued.who == mine) || before.has(other.issued);
        });
        if (const auto earlier = released_.find(to); earlier != released_.end()) {
            before.add(earlier->second);
            acquire(earlier->second);
        }
        released_[to] = before.clock();
        happened();
        const u32 was = *to;
        *to += by;
        return was;
    }

    void tell(u32* to, u32 word) {
        yield();
        access(to, 4, true, true);
        const Access issued{self().id, counts_[self().id], true};
        on_their_way_.push_back({[to, word] { *to = word; }, to, self().block->launch, issued, true});
        happened();
    }

    void add(u32* to, u32 by, Order order) {
        yield();
        access(to, 4, true, true);
        const Access issued{self().id, counts_[self().id], true};
        Past before(size_);
        release(before);
        auto land = [this, to, by, order, before = std::move(before)] {
            if (order == Order::acquire_or_release) {
                land_all([&](const OnItsWay& other) { return other.to != to && before.has(other.issued); });
                Past released = before;
                if (const auto earlier = released_.find(to); earlier != released_.end()) released.add(earlier->second);
                released_[to] = released.clock();
            }
            *to += by;
        };
        on_their_way_.push_back({std::move(land), to, self().block->launch, issued, true});
        happened();
    }

    u32 told(const u32* from, Order order) {
        if (random_() % 4 == 0) yield();  // Each time would be slow: most of what runs asks.
        access(from, 4, false, true);
        const u32 mine = self().id;
        land_all([&](const OnItsWay& other) { return other.to == from && other.issued.who == mine; });
        if (const auto released = released_.find(from); order != Order::relaxed && released != released_.end())
            acquire(released->second);
        return *from;
    }

    // A plain access, or an atomic one. What lies neither in shared nor in global memory is the thread's own.
    void access(const void* at, u32 bytes, bool writes, bool atomic) {
        const u64 place = (const char*)at - memory_at();
        if (place < blocks_ * (u64)shared_bytes_) {
            if (place / shared_bytes_ != self().block->place) stop("another block's shared memory is accessed");
            for (u64 word = place / 4; word < (place + bytes + 3) / 4; ++word)
                check(shared_words_[word], here(atomic), past(), writes, memory_at() + word * 4);
            return;
        }
        const int index = region_at(at);
        if (index < 0) return;
        const Region& region = regions_[index];
        if ((const char*)at + bytes > region.at + region.bytes) stop("an access goes beyond " + std::string(region.name));
        if (!region.mutable_) {
            if (writes) stop(std::string(region.name) + " is constant and written");
            return;
        }
        const u64 first = (const char*)at - region.at;
        for (u64 word = first / 4; word < (first + bytes + 3) / 4; ++word)
            check(words_[index][word], here(atomic), past(), writes, region.at + word * 4);
    }

    void constant(const void* at, u32 bytes) {
        if (region_of(at, bytes).mutable_) stop("what is not constant is read as if it were: " + name(at));
    }

    const Region& region_of(const void* at, u64 bytes) {
        const int index = region_at(at);
        if (index < 0 || (const char*)at + bytes > regions_[index].at + regions_[index].bytes)
            stop("an access outside of global memory");
        return regions_[index];
    }

    void aligned(const void* at, u32 to) {
        if ((u64)at % to) stop("an access of " + number(to) + " bytes is not aligned: " + name(at));
    }

    void wait_for_kernel_before() {
        const u32 launch = self().block->launch;
        until([this, launch] { return launch == 0 || left_[launch - 1] == 0; }, {"the kernel before, of launch", launch});
        if (launch) acquire(over_[launch - 1]);
    }

    void let_next_begin() {
        Block& block = *self().block;
        if (!block.let_next) block.let_next = true, ++let_[block.launch];
        yield();
    }

    [[noreturn]] void stop(const std::string& what) {
        const Thread& thread = self();
        fault = what + " (launch " + number(thread.block->launch) + ", " + name(thread.id) + ")";
        thread_->fiber.leave();
    }


  private:
    Thread& self() { return *thread_; }
    Past& past() { return thread_->past; }
    Access here(bool atomic) const { return {thread_->id, counts_[thread_->id], atomic}; }
    Warp& warp_of(const Thread& thread) { return warps_[(thread.block->place * threads_ + thread.index) / LANES]; }
    char* memory_at() { return (char*)(((u64)memory_.data() + 127) / 128 * 128); }
    Word* words_here() { return shared_words_.data() + thread_->block->place * (shared_bytes_ / 4); }
    void happened() { idle_ = 0; }

    // What this thread has done so far comes before what those do who take `into`.
    void release(Past& into) {
        Thread& thread = self();
        into.add(thread.past.base());
        into.add(thread.id, counts_[thread.id]++);
    }

    void acquire(const Clock& clock) { past().add(clock); }

    Barrier& barrier_at(u32 at) {
        auto& barriers = self().block->barriers;
        const auto found = barriers.find(at);
        if (found == barriers.end()) stop("there is no barrier at " + number(at) + " of shared memory");
        return found->second;
    }

    void over_if_all_came(Barrier& barrier) {
        if (barrier.pending || barrier.bytes) return;
        barrier.pending = barrier.arrivals;
        ++barrier.phase;
        barrier.copies = ++counts_[barrier.id];
        barrier.over = barrier.coming.clock();
        barrier.coming = Past(size_);
        happened();
    }

    int region_at(const void* at) const {
        const auto after = std::upper_bound(regions_.begin(), regions_.end(), (const char*)at,
                                            [](const char* at, const Region& region) { return at < region.at; });
        if (after == regions_.begin()) return -1;
        const Region& region = after[-1];
        return (const char*)at < region.at + region.bytes ? after - regions_.begin() - 1 : -1;
    }

    std::string name(const void* at) {
        const u64 place = (const char*)at - memory_at();
        if (place < blocks_ * (u64)shared_bytes_) return "shared memory at " + number(place % shared_bytes_);
        const int index = region_at(at);
        if (index < 0) return "somewhere";
        return std::string(regions_[index].name) + " at byte " + number((const char*)at - regions_[index].at);
    }

    std::string name(u32 id) const {
        const u32 barriers = 2 * blocks_ * threads_;
        if (id >= barriers) return "a copy to block " + number((id - barriers) / MOST_BARRIERS % blocks_);
        const u32 index = id % threads_;
        return "block " + number(id / threads_ % blocks_) + " warp " + number(index / LANES) + " lane " +
               number(index % LANES);
    }

    void check(Word& word, const Access& access, const Past& past, bool writes, const void* at) {
        Access other{};
        const bool in_shared = (u64)((const char*)at - memory_at()) < blocks_ * (u64)shared_bytes_;
        const Conflict conflict = writes ? word.write(access, past, other) : word.read(access, past, in_shared, other);
        if (conflict == Conflict::none) return;
        if (conflict == Conflict::never_written) stop(this->name(at) + " is read, and nobody wrote it");
        stop("race: " + name(access.who) + (writes ? " writes " : " reads ") + this->name(at) + ", which " +
             name(other.who) + (conflict == Conflict::after_write ? " wrote" : " read") + " in no order with it");
    }

    template <class Which>
    void land_all(Which which) {
        for (u32 i = 0; i < on_their_way_.size();)
            if (which(on_their_way_[i])) land(i), i = 0;
            else ++i;
    }

    void land(u32 i) {
        for (u32 earlier = 0; on_their_way_[i].orderly && earlier < i; ++earlier)
            if (on_their_way_[earlier].to == on_their_way_[i].to) i = earlier;
        const OnItsWay arriving = std::move(on_their_way_[i]);
        on_their_way_.erase(on_their_way_.begin() + i);
        arriving.land();
        happened();
    }

    void land_something(bool nobody_goes_on) {
        if (on_their_way_.empty() || !(nobody_goes_on || (lateness_ && random_() % lateness_ == 0))) return;
        land(random_() % on_their_way_.size());
    }

    void begin_block(u32 place);
    void begin_blocks();
    void go_on(Thread& thread);
    void ended(Thread& thread);
    bool all_ended() const { return left_.back() == 0; }
    std::string who_waits() const;

    const void* const* parameters_;
    const u32 launches_, blocks_, threads_, shared_bytes_;
    std::mt19937 random_;
    std::vector<Region> regions_;
    std::vector<char> memory_;  // All blocks' shared memory.
    std::vector<Word> shared_words_;
    std::vector<std::vector<Word>> words_;  // of each region
    std::vector<Thread> threads_of_;        // of each multiprocessor
    std::vector<Warp> warps_;
    std::vector<std::unique_ptr<Block>> running_;  // on each multiprocessor
    const u32 size_;                               // of a clock: threads, then barriers, each of two launches
    std::vector<u32> counts_;                      // how much each has done
    std::vector<Past> ended_;                      // of each launch
    std::vector<Clock> over_;
    std::vector<u32> left_, let_;  // of each launch: blocks that have not ended; that let the next one begin
    std::map<const void*, Clock> released_;
    std::deque<OnItsWay> on_their_way_;
    Thread* thread_ = nullptr;
    u64 now_ = 0;
    u32 idle_ = 0, begun_launch_ = 0, begun_ = 0, lateness_, lone_lanes_;
};

}  // namespace twin
