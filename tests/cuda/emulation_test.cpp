// The emulation of a GPU must catch what a GPU would get wrong in silence. Each kernel here is broken on purpose in one
// way; the unbroken twin of each must pass.
#include <cstdio>
#include <string>

#include "cuda/gpu.h"

using namespace localattn;
using namespace localattn::gpu;

namespace {

struct Buffers {
    const void *source;  // 16-byte aligned
    uint32_t *results;   // one per thread
    bool broken;
};

constexpr int threads = 64;

// Every thread reads what its neighbour wrote.
void exchange(Buffers b) {
    store_shared(shared_memory() + 4 * SharedAddress(thread_index()), uint32_t(thread_index()));
    if (!b.broken) synchronize();
    b.results[thread_index()] = load_shared(shared_memory() + 4 * SharedAddress((thread_index() + 1) % threads));
}

// The buffer is used twice; the readers of the first use must be done before the second.
void reuse(Buffers b) {
    const SharedAddress mine = shared_memory() + 4 * SharedAddress(thread_index());
    const SharedAddress other = shared_memory() + 4 * SharedAddress((thread_index() + 1) % threads);
    store_shared(mine, 1);
    synchronize();
    const uint32_t first = load_shared(other);
    if (!b.broken) synchronize();
    store_shared(mine, 2);
    synchronize();
    b.results[thread_index()] = first + load_shared(other);
}

void unwritten(Buffers b) {
    if (!b.broken || thread_index() != 17) store_shared(shared_memory() + 4 * SharedAddress(thread_index()), 7);
    b.results[thread_index()] = load_shared(shared_memory() + 4 * SharedAddress(thread_index()));
}

void past_the_end(Buffers b) {
    store_shared(shared_memory() + 4 * SharedAddress(thread_index() + (b.broken ? 193 : 192)), 1);
}

void below_the_start(Buffers b) {
    store_shared(shared_memory() + 4 * SharedAddress(thread_index()) - (b.broken ? 4u : 0u), 1);
}

void misaligned(Buffers b) {
    const SharedAddress at = shared_memory() + 4 * SharedAddress(thread_index());
    store_shared(at + (b.broken ? 2u : 0u), 1);
}

// Two groups of copies; the first is read while the second may still be in flight.
void pipeline(Buffers b) {
    const SharedAddress first = shared_memory(), second = shared_memory() + 256;
    if (thread_index() < 16) copy_async(first + 16 * SharedAddress(thread_index()), b.source, true);
    copy_commit();
    if (thread_index() < 16) copy_async(second + 16 * SharedAddress(thread_index()), b.source, false);
    copy_commit();
    if (b.broken)
        copy_wait<2>();
    else
        copy_wait<1>();
    synchronize();
    const uint32_t one = load_shared(first + 4 * SharedAddress(thread_index()));
    copy_wait<0>();
    synchronize();
    b.results[thread_index()] = one + load_shared(second + 4 * SharedAddress(thread_index()));
}

// Landed for the thread that waited, but nobody else knows without a barrier.
void copied_without_barrier(Buffers b) {
    if (thread_index() < 16) copy_async(shared_memory() + 16 * SharedAddress(thread_index()), b.source, true);
    copy_commit();
    copy_wait<0>();
    if (!b.broken) synchronize();
    b.results[thread_index()] = load_shared(shared_memory() + 4 * SharedAddress(thread_index()));
}

void never_waited(Buffers b) {
    if (thread_index() < 16) copy_async(shared_memory() + 16 * SharedAddress(thread_index()), b.source, true);
    copy_commit();
    if (!b.broken) copy_wait<0>();
}

void misaligned_source(Buffers b) {
    const SharedAddress to = shared_memory() + 16 * SharedAddress(thread_index());
    copy_async(to, static_cast<const char *>(b.source) + (b.broken ? 4 : 0), true);
    copy_commit();
    copy_wait<0>();
}

void half_a_barrier(Buffers b) {
    if (!b.broken || thread_index() < 32) synchronize();
}

void divergent(Buffers b) {
    bool any = false;
    if (b.broken && thread_index() % 2)
        any = any_in_warp(true);
    else
        any = any_in_warp(true);
    b.results[thread_index()] = any;
}

void lane_missing(Buffers b) {
    if (!b.broken || thread_index() % 32 != 5) b.results[thread_index()] = uint32_t(shuffle_xor(1.f, 1));
}

void not_uniform(Buffers b) { b.results[thread_index()] = uint32_t(uniform(b.broken ? thread_index() / 16 : 3)); }

void matrix_row_outside(Buffers b) {
    for (int i = 0; i < 4; i++)
        store_shared(shared_memory() + 4 * SharedAddress(4 * thread_index() + i), uint32_t(thread_index()));
    synchronize();
    uint32_t registers[4];
    const int row = b.broken && thread_index() == 9 ? 64 : thread_index() % 32;
    load_matrix(registers, shared_memory() + 16 * SharedAddress(row));
    b.results[thread_index()] = registers[3];
}

int failures = 0;

template <auto kernel>
void check(const char *name, const char *expected) {
    alignas(16) const uint32_t source[8] = {3, 3, 3, 3, 3, 3, 3, 3};
    uint32_t results[threads] = {};
    for (const bool broken : {false, true}) {
        std::string caught = "nothing";
        try {
            launch<kernel>({1, 1, 1}, threads, 1024, nullptr, Buffers{source, results, broken});
        } catch (const emulation::Misuse &misuse) {
            caught = misuse.what();
        }
        const bool good = broken ? caught.find(expected) != std::string::npos : caught == "nothing";
        failures += !good;
        std::printf("%s %s, %s: %.100s\n", good ? "ok  " : "FAIL", name, broken ? "broken" : "sound", caught.c_str());
    }
}

// A sound kernel's results, so that the emulation does not merely refuse: sums and products of small integers, exact.
void arithmetic(Buffers b) {
    const int lane = thread_index() % warp_size;
    for (int i = 0; i < 4; i++)  // row r of matrix m holds (8m + r) in all eight columns
        store_shared(shared_memory() + 16 * SharedAddress(thread_index()) + 4 * SharedAddress(i),
                     pack(bfloat16(), float(lane), float(lane)));
    synchronize();
    uint32_t a[4];
    load_matrix(a, shared_memory() + 16 * SharedAddress(thread_index()));
    float c[4] = {1, 1, 1, 1};
    const uint32_t ones = pack(bfloat16(), 1, 1);
    multiply_add(bfloat16(), c, a, ones, ones);
    // Matrices 0 and 2 are rows 0-7 of A, 1 and 3 rows 8-15: row r sums 8r + 8(r+16), row r+8 sums 8(r+8) + 8(r+24).
    const int row = lane / 4;
    const bool right = c[0] == 1 + 8 * row + 8 * (row + 16) && c[3] == 1 + 8 * (row + 8) + 8 * (row + 24) &&
                       warp_sum(float(lane)) == 496 && shuffle_xor(float(lane), 5) == float(lane ^ 5) &&
                       any_in_warp(lane == 7) && !any_in_warp(false);
    b.results[thread_index()] = right;
}

}  // namespace

int main() {
    check<exchange>("barrier between write and read", "uninitialised");
    check<reuse>("barrier between read and next write", "race with an earlier read");
    check<unwritten>("read of unwritten memory", "uninitialised");
    check<past_the_end>("index past the end", "out of bounds");
    check<below_the_start>("index below the start", "out of bounds");
    check<misaligned>("misaligned address", "misaligned");
    check<pipeline>("wait count", "in flight");
    check<copied_without_barrier>("barrier after a copy", "race");
    check<never_waited>("copy never waited for", "still in flight");
    check<misaligned_source>("misaligned copy source", "misaligned source");
    check<half_a_barrier>("barrier in a branch", "deadlock");
    check<divergent>("divergent collective", "diverged");
    check<lane_missing>("lane missing from a shuffle", "deadlock");
    check<not_uniform>("uniform value that is none", "uniform value differs");
    check<matrix_row_outside>("matrix row outside", "out of bounds");

    uint32_t results[threads] = {};
    launch<arithmetic>({1, 1, 1}, threads, 1024, nullptr, Buffers{nullptr, results, false});
    bool right = true;
    for (uint32_t result : results) right = right && result;
    failures += !right;
    std::printf("%s collectives compute\n", right ? "ok  " : "FAIL");
    return failures != 0;
}
