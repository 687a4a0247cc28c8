#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define LOCALATTN_ASM_SWITCH 1  // 15 times as fast as swapcontext, which enters the system to save the signal mask
#else
#define LOCALATTN_ASM_SWITCH 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if LOCALATTN_ASM_SWITCH
extern "C" void localattn_switch_fiber(void **save, void *to);
// Saves the registers that a call must preserve on the old stack and takes up those of the new one.
asm(R"(
.text
.globl localattn_switch_fiber
.hidden localattn_switch_fiber
.type localattn_switch_fiber,@function
localattn_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size localattn_switch_fiber,.-localattn_switch_fiber
)");
#endif

namespace localattn::gpu::emulation {

Launch last_launch;
int32_t current_device = 0;

namespace {

KernelRecord *all_kernels = nullptr;

struct KernelReport {
    ~KernelReport() {
        const char *path = std::getenv("LOCALATTN_EMULATED_KERNELS");
        FILE *file = path && *path ? std::fopen(path, "a") : nullptr;
        if (!file) return;
        for (const KernelRecord *kernel = all_kernels; kernel; kernel = kernel->next) {
            std::string name = kernel->name;  // "... [with auto kernel = NAME]", in places with other parameters
            name = name.substr(name.find("kernel = ") + std::strlen("kernel = "));
            name.erase(name.rfind(']'));
            std::replace(name.begin(), name.end(), ';', ',');
            std::fprintf(file, "%s %s\n", kernel->launches ? "launched" : "unused", name.c_str());
        }
        std::fclose(file);
    }
} report_at_the_end;

}  // namespace

KernelRecord::KernelRecord(const char *name) : name(name), next(all_kernels) { all_kernels = this; }

struct FiberContext {
#if LOCALATTN_ASM_SWITCH
    void *stack_pointer = nullptr;
#else
    ucontext_t state;
#endif
};

namespace {

constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;
thread_local Machine *running = nullptr;

// Stacks are kept for the thread's next machine: mapping them costs more than running a small block.
struct StackPool {
    std::vector<char *> stacks;
    char *take() {
        if (!stacks.empty()) {
            char *stack = stacks.back();
            stacks.pop_back();
            return stack;
        }
        void *memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, guard_bytes, PROT_NONE);
        return static_cast<char *>(memory) + guard_bytes;
    }
    void give(char *stack) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack, stack_bytes);  // frames of fibers that never returned
#endif
        stacks.push_back(stack);
    }
    ~StackPool() {
        for (char *stack : stacks) munmap(stack - guard_bytes, stack_bytes + guard_bytes);
    }
};
thread_local StackPool stack_pool;

}  // namespace

Machine &Machine::current() { return *running; }

Machine::Machine(int threads, size_t shared_bytes)
    : fibers_(size_t(threads)),
      warps_(size_t(threads / warp_size)),
      shadow_((shared_bytes + 3) / 4),
      bytes_(new char[shared_bytes + 4]),
      size_(shared_bytes) {
    if (threads < 1 || threads > 1024 || threads % warp_size)
        throw Misuse("a block needs 32 to 1024 threads, in whole warps; got " + std::to_string(threads));
    main_.context = new FiberContext;
    for (size_t i = 0; i < fibers_.size(); i++) {
        Fiber &fiber = fibers_[i];
        fiber.id = int(i);
        fiber.stack = stack_pool.take();
        fiber.stack_size = stack_bytes;
        fiber.context = new FiberContext;
#if LOCALATTN_ASM_SWITCH
        void **top = reinterpret_cast<void **>(fiber.stack + stack_bytes) - 2;  // entered with rsp % 16 == 8
        *top = reinterpret_cast<void *>(&fiber_entry);
        fiber.context->stack_pointer = top - 6;
#else
        getcontext(&fiber.context->state);
        fiber.context->state.uc_stack.ss_sp = fiber.stack;
        fiber.context->state.uc_stack.ss_size = stack_bytes;
        makecontext(&fiber.context->state, &fiber_entry, 0);
#endif
    }
}

Machine::~Machine() {
    for (Fiber &fiber : fibers_) {
        stack_pool.give(fiber.stack);
        delete fiber.context;
    }
    delete main_.context;
    if (running == this) running = nullptr;
}

void Machine::switch_to(Fiber &to) {
    Fiber &from = *self_;
    self_ = &to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
#if LOCALATTN_ASM_SWITCH
    localattn_switch_fiber(&from.context->stack_pointer, to.context->stack_pointer);
#else
    swapcontext(&from.context->state, &to.context->state);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void Machine::fiber_entry() {
    Machine &machine = *running;
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!machine.main_.stack) {  // the first fiber comes straight from the main stack, which nobody else describes
        machine.main_.stack = static_cast<char *>(const_cast<void *>(bottom));
        machine.main_.stack_size = size;
    }
#endif
    for (;;) {  // a fiber serves one block after another
        (*machine.body_)();
        if (--machine.live_ == 0) {
            machine.self_->waits_for = nullptr;
            machine.switch_to(machine.main_);
        } else {
            machine.park(&machine.never_, 0);
        }
    }
}

void Machine::park(const uint32_t *word, int line) {
    self_->waits_for = word;
    self_->seen = *word;
    self_->line = line;
    const size_t count = fibers_.size();
    for (size_t i = 1; i < count; i++) {
        const size_t next = size_t(self_->id) + i;
        Fiber &fiber = fibers_[next < count ? next : next - count];
        if (!fiber.waits_for || *fiber.waits_for != fiber.seen) {
            fiber.waits_for = nullptr;
            switch_to(fiber);
            return;
        }
    }
    int length = std::snprintf(error_, sizeof error_, "deadlock:");
    for (const Fiber &fiber : fibers_) {
        if (length > int(sizeof error_) - 100) break;
        const char *where = fiber.waits_for == &never_ ? "ended" : fiber.waits_for == &epoch_ ? "barrier" : "warp";
        length +=
            std::snprintf(error_ + length, sizeof error_ - size_t(length), " %d:%s@%d", fiber.id, where, fiber.line);
    }
    fail(nullptr, line);
}

void Machine::fail(const char *what, int line) {
    if (what) std::snprintf(error_, sizeof error_, "%s, line %d", what, line);
    const size_t length = std::strlen(error_);
    std::snprintf(error_ + length, sizeof error_ - length, " [block %d,%d,%d thread %d]", block_.x, block_.y, block_.z,
                  self_->id);
    switch_to(main_);
    __builtin_unreachable();
}

void Machine::barrier(int line) {
    if (++arrived_ == int(fibers_.size())) {
        arrived_ = 0;
        epoch_++;
        return;
    }
    park(&epoch_, line);
}

// True for the last lane, which does the work.
bool Machine::arrive(void *argument, int line) {
    Warp &warp = warps_[size_t(self_->id / warp_size)];
    const int lane = self_->id % warp_size;
    warp.argument[lane] = argument;
    warp.line[lane] = line;
    if (++warp.arrived < warp_size) {
        park(&warp.epoch, line);
        return false;
    }
    for (int other : warp.line)
        if (other != line) {
            std::snprintf(error_, sizeof error_, "warp diverged: lines %d and %d", other, line);
            fail(nullptr, line);
        }
    return true;
}

void Machine::release() {
    Warp &warp = warps_[size_t(self_->id / warp_size)];
    warp.arrived = 0;
    warp.epoch++;
}

char *Machine::access(SharedAddress address, size_t size, int thread, bool write, int line) {
    const char *wrong = nullptr;
    const int64_t offset = int64_t(address) - shared_base;
    if (offset < 0 || size_t(offset) + size > size_)
        wrong = "out of bounds";
    else if (address % size)
        wrong = "misaligned access";
    if (!wrong) {
        for (size_t i = size_t(offset) / 4; i < (size_t(offset) + size) / 4; i++) {
            Shadow &word = shadow_[i];
            if (word.written == Shadow::in_flight)
                wrong = "access to a copy in flight";
            else if (!write && !word.written)
                wrong = "uninitialised read";
            else if (word.written == epoch_ && word.writer != thread)
                wrong = "race with an earlier write";
            else if (write && word.read == epoch_ && word.reader != thread)
                wrong = "race with an earlier read";
            if (wrong) break;
            if (write) {
                word.written = epoch_;
                word.writer = thread;
            } else if (word.read != epoch_) {
                word.read = epoch_;
                word.reader = thread;
            } else if (word.reader != thread) {
                word.reader = Shadow::several;
            }
        }
    }
    if (wrong) {
        std::snprintf(error_, sizeof error_, "%s at shared byte %lld of %zu, line %d", wrong,
                      static_cast<long long>(offset), size_, line);
        fail(nullptr, line);
    }
    return bytes_.get() + offset;
}

void Machine::start_copy(Copy copy, int line) {
    if (reinterpret_cast<uintptr_t>(copy.from) % 16) fail("misaligned source of an asynchronous copy", line);
    access(copy.to, 16, self_->id, true, line);
    for (size_t i = 0; i < 4; i++) shadow_[(copy.to - shared_base) / 4 + i].written = Shadow::in_flight;
    self_->copy_groups.back().push_back(copy);
}

void Machine::finish_copies(size_t pending) {
    auto &groups = self_->copy_groups;
    while (groups.size() > pending + 1) {
        for (const Copy &copy : groups.front()) {
            const size_t offset = copy.to - shared_base;
            if (copy.inside)
                std::memcpy(bytes_.get() + offset, copy.from, 16);
            else
                std::memset(bytes_.get() + offset, 0, 16);
            for (size_t i = 0; i < 4; i++) shadow_[offset / 4 + i].written = epoch_;
        }
        groups.erase(groups.begin());
    }
}

void Machine::run(Extent3 grid, Extent3 block, const std::function<void()> &body) {
    grid_ = grid;
    block_ = block;
    body_ = &body;
    epoch_ = 1;
    arrived_ = 0;
    live_ = int(fibers_.size());
    error_[0] = 0;
    std::memset(bytes_.get(), 0xff, size_);
    std::fill(shadow_.begin(), shadow_.end(), Shadow());
    for (Warp &warp : warps_) warp.arrived = 0;
    for (Fiber &fiber : fibers_) {
        fiber.waits_for = nullptr;
        fiber.copy_groups.assign(1, {});
    }
    running = this;
    self_ = &main_;
    switch_to(fibers_[0]);
    if (!error_[0])
        for (const Fiber &fiber : fibers_)
            for (const auto &group : fiber.copy_groups)
                if (!group.empty())
                    throw Misuse("copies still in flight at the end of thread " + std::to_string(fiber.id));
    if (error_[0]) throw Misuse(error_);
}

}  // namespace localattn::gpu::emulation
