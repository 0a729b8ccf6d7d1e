#include "fibers.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <new>
#include <utility>
#include <vector>

namespace twin {

namespace {

constexpr std::size_t STACK_BYTES = 128 * 1024;
Fiber* entering;
std::vector<void*> free_stacks;  // Of machines that were: to make one takes long.

}  // namespace

Fiber::~Fiber() {
    if (stack_) free_stacks.push_back(stack_);
}

void Fiber::begin(std::function<void()> body) {
    if (!stack_ && !free_stacks.empty()) {
        stack_ = free_stacks.back();
        free_stacks.pop_back();
    } else if (!stack_) {
        stack_ = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
        if (stack_ == MAP_FAILED) {
            stack_ = nullptr;
            throw std::bad_alloc();
        }
    }
    body_ = std::move(body);
    started_ = ended_ = false;
}

void Fiber::enter() {
    Fiber* self = entering;
    self->body_();
    self->leave();
}

void Fiber::resume() {
    if (_setjmp(outside_)) return;
    if (started_) _longjmp(inside_, 1);
    started_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_;
    start.uc_stack.ss_size = STACK_BYTES;
    start.uc_link = nullptr;
    makecontext(&start, &Fiber::enter, 0);
    entering = this;
    setcontext(&start);
}

void Fiber::give_way() {
    if (!_setjmp(inside_)) _longjmp(outside_, 1);
}

void Fiber::leave() {
    ended_ = true;
    _longjmp(outside_, 1);
}

}  // namespace twin
