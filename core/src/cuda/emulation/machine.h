// A block of GPU threads on the host. One OS thread runs one block; each GPU thread is a fiber.
//
// A fiber runs until a collective (block barrier or warp operation), parks on that collective's epoch and hands over to
// the next runnable fiber; the last to arrive does the work for all. When no fiber can run, that is a deadlock,
// reported with every thread's line.
//
// Shared memory is poisoned with NaN and shadowed word by word. Errors are: access out of bounds or misaligned, reading
// what nobody wrote, touching the target of an asynchronous copy before it has landed, two threads touching a word (one
// of them writing) with no barrier in between, lanes of a warp at different collectives, copies in flight at the end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gpu_types.h"

namespace localattn::gpu::emulation {

// What a kernel did wrong, where, and in which block and thread.
struct Misuse : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Where kernels run, for tests of what calls them: devices and streams make no difference here.
struct Launch {
    void *stream = nullptr;
    int32_t device = 0;
};
extern Launch last_launch;
extern int32_t current_device;

// One instantiation of a kernel, and how often it was launched. At its end the program appends all of them to the file
// that the environment names by LOCALATTN_EMULATED_KERNELS: "launched NAME" or "unused NAME".
struct KernelRecord {
    const char *name;  // as the compiler puts it
    int64_t launches = 0;
    KernelRecord *next;

    explicit KernelRecord(const char *name);
};

struct Copy {
    SharedAddress to;
    const void *from;
    bool inside;
};

// What is known of one 32-bit word of shared memory. Times are barrier epochs of the block; 0 is never.
struct Shadow {
    static constexpr uint32_t in_flight = ~0u;
    static constexpr int nobody = -1, several = -2;
    uint32_t written = 0, read = 0;
    int writer = nobody, reader = nobody;
};

struct FiberContext;

struct Fiber {
    int id = 0;
    int line = 0;
    const uint32_t *waits_for = nullptr;  // parked while *waits_for == seen
    uint32_t seen = 0;
    char *stack = nullptr;
    size_t stack_size = 0;
    void *fake_stack = nullptr;
    FiberContext *context = nullptr;
    std::vector<std::vector<Copy>> copy_groups;  // the last is the one still open
};

struct Warp {
    uint32_t epoch = 0;
    int arrived = 0;
    void *argument[warp_size];
    int line[warp_size];
};

class Machine {
public:
    Machine(int threads, size_t shared_bytes);
    ~Machine();
    Machine(const Machine &) = delete;
    Machine &operator=(const Machine &) = delete;

    // Runs `body` once in every thread of one block. Throws Misuse.
    void run(Extent3 grid, Extent3 block, const std::function<void()> &body);

    // The machine that the calling fiber belongs to.
    static Machine &current();

    int thread() const { return self_->id; }
    int threads() const { return int(fibers_.size()); }
    Extent3 block() const { return block_; }
    Extent3 grid() const { return grid_; }

    void barrier(int line);
    // Waits for the whole warp; then `all` runs once, with every lane's argument.
    template <class Argument>
    void collective(Argument &argument, void (*all)(Argument *const *), int line) {
        if (arrive(&argument, line)) {
            all(reinterpret_cast<Argument *const *>(warps_[size_t(self_->id / warp_size)].argument));
            release();
        }
    }
    // Checked host address of `size` bytes of shared memory, touched by `thread`.
    char *access(SharedAddress address, size_t size, int thread, bool write, int line);
    void start_copy(Copy copy, int line);
    void commit_copies() { self_->copy_groups.emplace_back(); }
    void finish_copies(size_t pending);

    // Ends the block. The calling fiber is abandoned as it is, so it may own nothing by now.
    [[noreturn]] void fail(const char *what, int line);

    static constexpr SharedAddress shared_base = 1024;  // not zero, as on sm_90

private:
    void switch_to(Fiber &to);
    void park(const uint32_t *word, int line);
    bool arrive(void *argument, int line);
    void release();
    static void fiber_entry();

    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<Shadow> shadow_;
    std::unique_ptr<char[]> bytes_;
    size_t size_;
    Fiber main_;
    Fiber *self_ = nullptr;
    uint32_t epoch_ = 1, never_ = 0;
    int arrived_ = 0, live_ = 0;
    Extent3 grid_, block_;
    const std::function<void()> *body_ = nullptr;
    char error_[512] = {};
};

}  // namespace localattn::gpu::emulation
