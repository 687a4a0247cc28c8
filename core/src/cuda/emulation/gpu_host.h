// gpu.h for the host: each call goes to the emulated block that the calling fiber belongs to. `line` is the caller's,
// for messages and to tell one collective from another.
#pragma once
#include <cmath>
#include <cstring>

#define GPU_KERNEL [[maybe_unused]] static
#define GPU_FUNCTION static inline
#define GPU_METHOD inline
#define GPU_ARGUMENT const
#define GPU_BOUNDS(threads, blocks)
#define GPU_UNROLL_FOR for
#define GPU_TABLE const

#include "machine.h"

namespace localattn::gpu {

GPU_FUNCTION int thread_index() { return emulation::Machine::current().thread(); }
GPU_FUNCTION Extent3 block_index() { return emulation::Machine::current().block(); }
GPU_FUNCTION Extent3 grid_extent() { return emulation::Machine::current().grid(); }
GPU_FUNCTION int block_threads() { return emulation::Machine::current().threads(); }
GPU_FUNCTION void synchronize(int line = __builtin_LINE()) { emulation::Machine::current().barrier(line); }

namespace emulation {

struct Vote {
    bool condition, any;
};
struct Ballot {
    bool condition;
    uint32_t bits;
};
struct Uniform {
    int value, line;
};
struct Shuffle {
    float value;
    int lanes;
    float received;
};
template <class Real>
struct Sum {
    Real value;
};
struct MatrixLoad {
    uint32_t *registers;
    SharedAddress row;
    int line;
    bool transposed;
};
struct MultiplyAdd {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

template <class Element>
float half_of_pair(uint32_t pair, int half) {
    return widen(Element{uint16_t(pair >> 16 * half)});
}

// Fragments of m16n8k16: lane l holds rows l/4 and l/4+8 of A and C, column l/4 of B, and pairs of neighbours along k.
template <class Element>
void multiply_add_all(MultiplyAdd *const *lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < warp_size; lane++)
        for (int half = 0; half < 2; half++) {
            for (int r = 0; r < 4; r++)
                a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + half] =
                    half_of_pair<Element>(lanes[lane]->a[r], half);
            for (int r = 0; r < 2; r++)
                b[lane % 4 * 2 + r * 8 + half][lane / 4] = half_of_pair<Element>(lanes[lane]->b[r], half);
        }
    for (int row = 0; row < 16; row++) {
        float sum[8] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
        for (int n = 0; n < 8; n++) lanes[row % 8 * 4 + n / 2]->c[row / 8 * 2 + n % 2] += sum[n];
    }
}

// Lanes 8m .. 8m+7 give the addresses of the eight rows of matrix m, which lands in register m of every lane.
inline void load_matrix_all(MatrixLoad *const *lanes) {
    Machine &machine = Machine::current();
    const int first = machine.thread() / warp_size * warp_size;
    for (int matrix = 0; matrix < 4; matrix++)
        for (int row = 0; row < 8; row++) {
            const int source = matrix * 8 + row;
            const MatrixLoad &from = *lanes[source];
            uint16_t values[8];
            std::memcpy(values, machine.access(from.row, 16, first + source, false, from.line), 16);
            for (int column = 0; column < 8; column++) {
                const int lane = from.transposed ? column * 4 + row / 2 : row * 4 + column / 2;
                const int half = from.transposed ? row % 2 : column % 2;
                uint32_t &to = lanes[lane]->registers[matrix];
                to = half ? (to & 0xffffu) | uint32_t(values[column]) << 16 : (to & 0xffff0000u) | values[column];
            }
        }
}

}  // namespace emulation

GPU_FUNCTION bool any_in_warp(bool condition, int line = __builtin_LINE()) {
    emulation::Vote vote{condition, false};
    emulation::Machine::current().collective<emulation::Vote>(
        vote,
        [](emulation::Vote *const *lanes) {
            bool any = false;
            for (int i = 0; i < warp_size; i++) any |= lanes[i]->condition;
            for (int i = 0; i < warp_size; i++) lanes[i]->any = any;
        },
        line);
    return vote.any;
}
GPU_FUNCTION uint32_t ballot(bool condition, int line = __builtin_LINE()) {
    emulation::Ballot ballot{condition, 0};
    emulation::Machine::current().collective<emulation::Ballot>(
        ballot,
        [](emulation::Ballot *const *lanes) {
            uint32_t bits = 0;
            for (int i = 0; i < warp_size; i++) bits |= uint32_t(lanes[i]->condition) << i;
            for (int i = 0; i < warp_size; i++) lanes[i]->bits = bits;
        },
        line);
    return ballot.bits;
}
GPU_FUNCTION int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
// A value that must be the same in all lanes.
GPU_FUNCTION int uniform(int value, int line = __builtin_LINE()) {
    emulation::Uniform uniform{value, line};
    emulation::Machine::current().collective<emulation::Uniform>(
        uniform,
        [](emulation::Uniform *const *lanes) {
            for (int i = 1; i < warp_size; i++)
                if (lanes[i]->value != lanes[0]->value)
                    emulation::Machine::current().fail("a uniform value differs between lanes", lanes[i]->line);
        },
        line);
    return value;
}
GPU_FUNCTION int64_t opaque(int64_t value) { return value; }
GPU_FUNCTION int opaque(int value) { return value; }
GPU_FUNCTION float shuffle_xor(float value, int lanes, int line = __builtin_LINE()) {
    emulation::Shuffle shuffle{value, lanes, 0};
    emulation::Machine::current().collective<emulation::Shuffle>(
        shuffle,
        [](emulation::Shuffle *const *all) {
            for (int i = 0; i < warp_size; i++) all[i]->received = all[i ^ all[i]->lanes]->value;
        },
        line);
    return shuffle.received;
}
// A butterfly, in the device's order of addition: the same bits in every lane of a group.
template <int group = warp_size, class Real>
GPU_FUNCTION Real warp_sum(Real value, int line = __builtin_LINE()) {
    emulation::Sum<Real> sum{value};
    emulation::Machine::current().collective<emulation::Sum<Real>>(
        sum,
        [](emulation::Sum<Real> *const *lanes) {
            for (int distance = group / 2; distance > 0; distance /= 2) {
                Real next[warp_size];
                for (int i = 0; i < warp_size; i++) next[i] = lanes[i]->value + lanes[i ^ distance]->value;
                for (int i = 0; i < warp_size; i++) lanes[i]->value = next[i];
            }
        },
        line);
    return sum.value;
}
template <class Real>
GPU_FUNCTION Real warp_max(Real value, int line = __builtin_LINE()) {
    emulation::Sum<Real> largest{value};
    emulation::Machine::current().collective<emulation::Sum<Real>>(
        largest,
        [](emulation::Sum<Real> *const *lanes) {
            Real all = lanes[0]->value;
            for (int i = 1; i < warp_size; i++) all = lanes[i]->value > all ? lanes[i]->value : all;
            for (int i = 0; i < warp_size; i++) lanes[i]->value = all;
        },
        line);
    return largest.value;
}

GPU_FUNCTION SharedAddress shared_memory() { return emulation::Machine::shared_base; }
GPU_FUNCTION uint32_t load_shared(SharedAddress from, int line = __builtin_LINE()) {
    emulation::Machine &machine = emulation::Machine::current();
    uint32_t value;
    std::memcpy(&value, machine.access(from, 4, machine.thread(), false, line), 4);
    return value;
}
GPU_FUNCTION void load_shared(float (&values)[4], SharedAddress from, int line = __builtin_LINE()) {
    emulation::Machine &machine = emulation::Machine::current();
    std::memcpy(values, machine.access(from, 16, machine.thread(), false, line), 16);
}
GPU_FUNCTION void store_shared(SharedAddress to, const float (&values)[4], int line = __builtin_LINE()) {
    emulation::Machine &machine = emulation::Machine::current();
    std::memcpy(machine.access(to, 16, machine.thread(), true, line), values, 16);
}
GPU_FUNCTION void store_shared(SharedAddress to, uint32_t value, int line = __builtin_LINE()) {
    emulation::Machine &machine = emulation::Machine::current();
    std::memcpy(machine.access(to, 4, machine.thread(), true, line), &value, 4);
}
GPU_FUNCTION void load_matrix(uint32_t (&registers)[4], SharedAddress row, int line = __builtin_LINE()) {
    emulation::MatrixLoad load{registers, row, line, false};
    emulation::Machine::current().collective(load, emulation::load_matrix_all, line);
}
GPU_FUNCTION void load_matrix_transposed(uint32_t (&registers)[4], SharedAddress row, int line = __builtin_LINE()) {
    emulation::MatrixLoad load{registers, row, line, true};
    emulation::Machine::current().collective(load, emulation::load_matrix_all, line);
}
template <class Element>
GPU_FUNCTION void multiply_add(Element, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               int line = __builtin_LINE()) {
    emulation::MultiplyAdd product{c, a, {b0, b1}};
    emulation::Machine::current().collective(product, emulation::multiply_add_all<Element>, line);
}

GPU_FUNCTION void copy_async(SharedAddress to, const void *from, bool inside, int line = __builtin_LINE()) {
    emulation::Machine::current().start_copy({to, from, inside}, line);
}
GPU_FUNCTION void copy_commit() { emulation::Machine::current().commit_copies(); }
template <int pending>
GPU_FUNCTION void copy_wait() {
    emulation::Machine::current().finish_copies(pending);
}

GPU_FUNCTION uint32_t load_pair(const void *from, int line = __builtin_LINE()) {
    if (reinterpret_cast<uintptr_t>(from) % 4) emulation::Machine::current().fail("misaligned global read", line);
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}
GPU_FUNCTION void store_pair(void *to, uint32_t pair, int line = __builtin_LINE()) {
    if (reinterpret_cast<uintptr_t>(to) % 4) emulation::Machine::current().fail("misaligned global write", line);
    std::memcpy(to, &pair, sizeof pair);
}

// The first in the lower half.
template <class Element>
GPU_FUNCTION uint32_t pack(Element, float low, float high) {
    Element pair[2];
    narrow(low, pair[0]);
    narrow(high, pair[1]);
    return pair[0].bits | uint32_t(pair[1].bits) << 16;
}

GPU_FUNCTION void require(bool condition, const char *text, int line = __builtin_LINE()) {
    if (!condition) emulation::Machine::current().fail(text, line);
}

GPU_FUNCTION float exponential(float x) { return std::exp(x); }
GPU_FUNCTION double exponential(double x) { return std::exp(x); }
GPU_FUNCTION float logarithm(float x) { return std::log(x); }
GPU_FUNCTION double logarithm(double x) { return std::log(x); }
GPU_FUNCTION float fast_exp2(float x) { return std::exp2(x); }
GPU_FUNCTION float fast_log2(float x) { return std::log2(x); }
GPU_FUNCTION float fast_reciprocal(float x) { return 1 / x; }

namespace emulation {

template <auto kernel>
const char *describe_kernel() {
    return __PRETTY_FUNCTION__;
}
// Made before main() for every kernel that the program launches somewhere.
template <auto kernel>
KernelRecord record_of(describe_kernel<kernel>());

}  // namespace emulation

// Runs every block of the grid, one after another. Returns NULL; misuse of the machine is thrown (emulation::Misuse).
template <auto kernel, class Argument>
const char *launch(Extent3 grid, int threads, size_t shared_bytes, void *stream, const Argument &argument) {
    emulation::last_launch = {stream, emulation::current_device};
    ++emulation::record_of<kernel>.launches;
    emulation::Machine machine(threads, shared_bytes);
    const std::function<void()> body = [&] { kernel(argument); };
    for (int32_t z = 0; z < grid.z; z++)
        for (int32_t y = 0; y < grid.y; y++)
            for (int32_t x = 0; x < grid.x; x++) machine.run(grid, {x, y, z}, body);
    return nullptr;
}

}  // namespace localattn::gpu
