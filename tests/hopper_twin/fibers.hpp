// Threads of one processor that go on only when told to: `makecontext` begins them, `_setjmp` and `_longjmp` switch, since
// `swapcontext` asks the system each time.

#pragma once

#include <csetjmp>
#include <functional>

namespace twin {

class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    ~Fiber();

    void begin(std::function<void()> body);
    bool ended() const { return ended_; }
    void resume();        // From outside: until it gives way or ends.
    void give_way();      // From inside.
    [[noreturn]] void leave();  // From inside, for good.

  private:
    static void enter();

    std::function<void()> body_;
    void* stack_ = nullptr;
    bool started_ = false, ended_ = true;
    jmp_buf inside_, outside_;
};

}  // namespace twin
