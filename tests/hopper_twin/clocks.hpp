// Who has done what before whom: vector clocks, and for each word of memory its last accesses.

#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "machine.hpp"

namespace twin {

struct Access {
    u32 who, when;
    bool atomic;  // Two such are in some order, whichever; they are no fault.
};

// Of each thread, how much of what it did comes before. Shared, since after each barrier many threads know the same.
using Clock = std::shared_ptr<const std::vector<u32>>;

// What comes before a point: a clock, and of a few threads more than it says.
class Past {
  public:
    explicit Past(u32 threads = 0) : threads_(threads) {}

    bool has(const Access& access) const {
        if (clock_ && access.when <= (*clock_)[access.who]) return true;
        return std::any_of(more_.begin(), more_.end(),
                           [&](const Access& more) { return more.who == access.who && access.when <= more.when; });
    }

    void add(u32 who, u32 when) { more_.push_back({who, when, false}); }

    void add(const Past& other) {
        clock_ = joined(clock_, other.clock_);
        more_.insert(more_.end(), other.more_.begin(), other.more_.end());
    }

    void add(const Clock& clock) { clock_ = joined(clock_, clock); }

    const Clock& base() const { return clock_; }

    Clock clock() const {
        auto all = clock_ ? std::make_shared<std::vector<u32>>(*clock_) : std::make_shared<std::vector<u32>>(threads_);
        for (const Access& more : more_) (*all)[more.who] = std::max((*all)[more.who], more.when);
        return all;
    }

  private:
    // Lanes of a warp ask for the same two, those of some warps in turns.
    static Clock joined(const Clock& a, const Clock& b) {
        struct Answer {
            Clock a, b, both;
        };
        static std::array<Answer, 64> answers;
        static u32 oldest = 0;
        if (!a || a == b) return b;
        if (!b) return a;
        for (const Answer& answer : answers)
            if (a == answer.a && b == answer.b) return answer.both;
        bool more = false, less = false;
        for (u32 i = 0; i < a->size(); ++i) more |= (*a)[i] < (*b)[i], less |= (*b)[i] < (*a)[i];
        Clock both = more ? b : a;
        if (more && less) {
            auto all = std::make_shared<std::vector<u32>>(*a);
            for (u32 i = 0; i < all->size(); ++i) (*all)[i] = std::max((*all)[i], (*b)[i]);
            both = std::move(all);
        }
        answers[oldest++ % answers.size()] = {a, b, both};
        return both;
    }

    u32 threads_;
    Clock clock_;  // or none, which is nothing
    std::vector<Access> more_;
};

enum class Conflict { none, after_write, after_read, never_written };

class Word {
  public:
    // `access` after `past`; what it conflicts with goes to `other`. What `starts_empty` is written before it is read.
    Conflict read(const Access& access, const Past& past, bool starts_empty, Access& other) {
        if (!written_ && starts_empty) return Conflict::never_written;
        if (conflicts(access, past, other)) return Conflict::after_write;
        for (Access& earlier : reads_)
            if (earlier.who == access.who && earlier.atomic == access.atomic) return earlier = access, Conflict::none;
        reads_.push_back(access);
        return Conflict::none;
    }

    Conflict write(const Access& access, const Past& past, Access& other) {
        if (conflicts(access, past, other)) return Conflict::after_write;
        for (const Access& earlier : reads_)
            if (!(earlier.atomic && access.atomic) && !past.has(earlier)) return other = earlier, Conflict::after_read;
        reads_.clear();
        written_ = true;
        write_ = access;
        return Conflict::none;
    }

  private:
    bool conflicts(const Access& access, const Past& past, Access& other) const {
        other = write_;
        return written_ && !(write_.atomic && access.atomic) && !past.has(write_);
    }

    bool written_ = false;
    Access write_{};
    std::vector<Access> reads_;
};

}  // namespace twin
