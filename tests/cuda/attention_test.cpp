// Every CUDA variant, run on the host by emulation or on a GPU, against brute force in float64 over random problems.
//
//     attention_test [problems] [seed] [only this variant]
//
// Results are poisoned with NaN first, padding between the elements of a result must keep its poison. A failing problem
// is printed with the seed that makes it again (problems 1, that seed).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "brute_force.h"
#include "cuda/dtype.h"
#include "cuda/variant.h"
#include "device_memory.h"
#include "scalar.h"
#include "window.h"

using namespace localattn;

namespace {

using Random = std::mt19937;

int pick(Random &random, int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); }
bool chance(Random &random, double probability) { return std::bernoulli_distribution(probability)(random); }

double half_step(Dtype dtype) {  // of rounding, relative
    switch (dtype) {
        case Dtype::float64:
            return 1.1e-16;
        case Dtype::float32:
            return 6e-8;
        case Dtype::float16:
            return 4.9e-4;
        case Dtype::bfloat16:
            return 3.9e-3;
    }
    return 0;
}

const char *name_of(Dtype dtype) {
    constexpr const char *names[] = {"float32", "float64", "float16", "bfloat16"};
    return names[int(dtype)];
}

// A tensor of six axes (batch, three spatial, head, channel) in memory: any order of axes, gaps between them, starting
// at any element; broadcast axes have stride 0.
class Stored {
public:
    Dtype dtype = Dtype::float32;
    int extent[6] = {1, 1, 1, 1, 1, 1};
    int64_t stride[6] = {};
    bool present = false;
    cuda::DeviceVector<unsigned char> memory;
    int64_t start = 0;

    int size_of_element() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

    // `aligned`: channels last and contiguous, and every stride and the start a multiple of 16 bytes.
    void lay_out(Random &random, Dtype type, std::vector<int> extents, const std::vector<bool> &broadcast,
                 bool aligned) {
        dtype = type;
        present = true;
        std::copy(extents.begin(), extents.end(), extent);
        int order[6] = {0, 1, 2, 3, 4, 5};  // from the outermost
        if (chance(random, 0.5)) std::shuffle(order, order + (aligned ? 5 : 6), random);
        const int unit = aligned ? 16 / size_of_element() : 1;
        int64_t step = 1;
        for (int i = 5; i >= 0; i--) {
            const int axis = order[i];
            if (broadcast[size_t(axis)]) continue;
            stride[axis] = step;
            step *= extent[axis];
            if (chance(random, 0.3)) step += pick(random, 1, 3);
            step = (step + unit - 1) / unit * unit;
        }
        start = int64_t(pick(random, 0, 2)) * unit;
        for (int axis = 0; axis < 6; axis++)
            if (!aligned && extent[axis] > 1 && chance(random, 0.1)) {  // backwards
                start += (extent[axis] - 1) * stride[axis];
                stride[axis] = -stride[axis];
            }
        memory.assign(size_t(start + step + 8) * size_t(size_of_element()) + 16, 0xff);  // NaN in every type
        while (reinterpret_cast<uintptr_t>(memory.data()) % 16) std::abort();
    }
    int64_t offset(const int (&at)[6]) const {
        int64_t sum = start;
        for (int axis = 0; axis < 6; axis++) sum += at[axis] * stride[axis];
        return sum;
    }
    template <class Visit>
    void each(Visit visit) const {
        int at[6];
        int64_t index = 0;
        for (at[0] = 0; at[0] < extent[0]; at[0]++)
            for (at[1] = 0; at[1] < extent[1]; at[1]++)
                for (at[2] = 0; at[2] < extent[2]; at[2]++)
                    for (at[3] = 0; at[3] < extent[3]; at[3]++)
                        for (at[4] = 0; at[4] < extent[4]; at[4]++)
                            for (at[5] = 0; at[5] < extent[5]; at[5]++) visit(offset(at), index++);
    }
    double get(int64_t at) const {
        double value = 0;
        cuda::with_type(dtype, [&](auto element) {
            std::memcpy(&element, memory.data() + size_t(at) * sizeof element, sizeof element);
            value = double(widen(element));
        });
        return value;
    }
    void set(int64_t at, double value) {
        cuda::with_type(dtype, [&](auto element) {
            if constexpr (std::is_same_v<decltype(element), double>)
                element = value;
            else
                narrow(float(value), element);
            std::memcpy(memory.data() + size_t(at) * sizeof element, &element, sizeof element);
        });
    }
    // Dense copy, broadcast axes repeated.
    std::vector<double> values() const {
        std::vector<double> all;
        if (present) each([&](int64_t at, int64_t) { all.push_back(get(at)); });
        return all;
    }
    void fill(Random &random, double spread) {
        std::normal_distribution<double> normal(0, spread);
        each([&](int64_t at, int64_t) { set(at, normal(random)); });
    }
    Tensor tensor() {
        Tensor t;
        if (!present) return t;
        t.data = memory.data() + size_t(start) * size_t(size_of_element());
        t.batch = stride[0];
        for (int a = 0; a < 3; a++) t.axis[a] = stride[1 + a];
        t.head = stride[4];
        t.channel = stride[5];
        return t;
    }
};

struct Trial {
    brute_force::Shape shape;
    Problem problem;
    Stored query, key, value, bias, table, axis_bias[3], mask, output, lse, grad_output, grad_lse;
    Stored grad_query, grad_key, grad_value, grad_bias, grad_table, grad_axis_bias[3];
    cuda::DeviceVector<unsigned char> mask_bytes;
    brute_force::Results expected;
};

// What tells the instantiations of the tiled kernels apart.
struct Tile {
    Dtype dtype;
    int width;  // a multiple of 8 channels up to this, and more than the tile below takes
};
constexpr Tile tiles[] = {{Dtype::float32, 32},  {Dtype::float32, 64},  {Dtype::float32, 128},  {Dtype::float32, 256},
                          {Dtype::float16, 32},  {Dtype::float16, 64},  {Dtype::float16, 128},  {Dtype::float16, 256},
                          {Dtype::bfloat16, 32}, {Dtype::bfloat16, 64}, {Dtype::bfloat16, 128}, {Dtype::bfloat16, 256}};
constexpr size_t tile_count = sizeof tiles / sizeof *tiles;

// Half of the problems have the layout, widths and types that tiled variants take: every tile in turn, with windows
// that take its smaller and its larger block, without and with biases. Half of those have the plain window.
void draw(Random &random, Trial &t, unsigned seed) {
    const bool tiled = seed % 2, plain = tiled && chance(random, 0.5);
    brute_force::Shape &s = t.shape;
    const int rank = tiled ? 2 - chance(random, 0.1) : pick(random, 1, 3);
    const unsigned turn = seed / 2;
    const Tile &tile = tiles[turn % tile_count];
    const bool large_window = turn / tile_count % 2, has_bias = tiled ? turn / tile_count / 2 % 2 : chance(random, 0.6);
    const Dtype dtype = tiled ? tile.dtype : Dtype(pick(random, 0, 3));
    const char border = plain ? 'm' : "mzs"[pick(random, 0, 2)];
    s.raster = !tiled && border != 's' && chance(random, 0.15);
    s.batch = pick(random, 1, 2);
    s.kv_heads = pick(random, 1, 2);
    s.heads = s.kv_heads * (chance(random, 0.3) ? 2 : 1);
    const int least = tile.width > 32 ? tile.width / 2 + 8 : 8;
    const auto some_width = [&] { return pick(random, least / 8, tile.width / 8) * 8; };
    s.channels = tiled ? some_width() : pick(random, 1, chance(random, 0.05) ? 300 : 40);
    s.value_channels = chance(random, 0.7) ? s.channels
                       : tiled             ? some_width()
                                           : pick(random, 1, chance(random, 0.05) ? 300 : 40);
    const int longest = tiled ? (rank == 1 ? 60 : 14) : rank == 1 ? 30 : rank == 2 ? 8 : 5;
    const int widest = tiled ? (chance(random, 0.2) ? 21 : 9) : rank == 1 ? 9 : rank == 2 ? 5 : 3;
    const int plain_kernel = pick(random, 0, widest / 2) * 2 + 1;
    for (int a = 0; a < 3; a++) {
        brute_force::Axis &x = s.axis[a];
        x = {1, 1, 1, 1, 1, false, border};
        if (a < 3 - rank) continue;
        x.queries = x.keys = pick(random, 1, longest);
        if (!plain && chance(random, 0.3)) x.keys = pick(random, 1, longest);
        x.kernel = plain ? plain_kernel : s.raster ? pick(random, 0, 2) * 2 + 1 : pick(random, 1, widest);
        if (plain) continue;
        if (!s.raster && chance(random, 0.4)) x.stride = pick(random, 1, x.kernel);
        if (chance(random, 0.4)) x.dilation = pick(random, 1, 4);
        if (!s.raster && chance(random, 0.3)) x.causal = true;
    }
    if (tiled) {
        brute_force::Axis &x = s.axis[2];
        const bool is_float = dtype == Dtype::float32;
        const int most = is_float ? 13 * 64 / tile.width : 8;  // that the smaller block takes
        if (large_window && x.kernel <= most) x.kernel = most + pick(random, 1, 3);
        for (int a = 1; a < 3 && !large_window; a++) {
            brute_force::Axis &y = s.axis[a];
            y.kernel = std::min(y.kernel, most);
            y.stride = std::min(y.stride, is_float ? y.kernel : std::min(y.kernel, 9 - y.kernel));
            if (!is_float) y.keys = y.queries;
        }
    }
    if (!tiled && chance(random, 0.03)) s.axis[2].queries = 0;
    if (!tiled && chance(random, 0.03)) s.axis[2].keys = 0;
    constexpr double scales[] = {0.3, 0, -0.5};
    s.scale = chance(random, 0.2) ? scales[pick(random, 0, 2)] : 1 / std::sqrt(double(s.channels));

    const int b = s.batch, q0 = s.axis[0].queries, q1 = s.axis[1].queries, q2 = s.axis[2].queries, h = s.heads;
    const int k0 = s.axis[0].keys, k1 = s.axis[1].keys, k2 = s.axis[2].keys;
    const std::vector<bool> whole(6, false);
    const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    const auto input = [&](Stored &stored, Dtype type, std::vector<int> extents, std::vector<bool> broadcast,
                           bool aligned) {
        stored.lay_out(random, type, extents, broadcast, aligned);
        stored.fill(random, 1);
    };
    const auto result = [&](Stored &stored, Dtype type, std::vector<int> extents, const std::vector<bool> &broadcast) {
        stored.lay_out(random, type, extents, broadcast, tiled);
    };
    const auto some = [&] {  // axes that a bias leaves out
        std::vector<bool> broadcast(6);
        if (chance(random, 0.7))
            for (int axis = 0; axis < 6; axis++) broadcast[size_t(axis)] = chance(random, 0.4);
        return broadcast;
    };
    std::vector<bool> repeated_batch = whole;
    repeated_batch[0] = !tiled && chance(random, 0.1);
    input(t.query, dtype, {b, q0, q1, q2, h, s.channels}, whole, tiled);
    input(t.key, dtype, {b, k0, k1, k2, s.kv_heads, s.channels}, repeated_batch, tiled);
    input(t.value, dtype, {b, k0, k1, k2, s.kv_heads, s.value_channels}, whole, tiled);
    input(t.grad_output, dtype, {b, q0, q1, q2, h, s.value_channels}, whole, tiled);
    if (chance(random, 0.5)) input(t.grad_lse, wide, {b, q0, q1, q2, h, 1}, whole, false);
    result(t.output, dtype, {b, q0, q1, q2, h, s.value_channels}, whole);
    result(t.lse, wide, {b, q0, q1, q2, h, 1}, whole);
    result(t.grad_query, dtype, std::vector<int>(t.query.extent, t.query.extent + 6), whole);
    result(t.grad_key, dtype, std::vector<int>(t.key.extent, t.key.extent + 6), whole);
    result(t.grad_value, dtype, std::vector<int>(t.value.extent, t.value.extent + 6), whole);
    // The tiled kernels apply the key mask as they do biases; some problems have it alone.
    const bool masked = chance(random, tiled ? (has_bias ? 0.4 : 0) : 0.3);
    const bool needs_bias = tiled && has_bias && !(masked && chance(random, 0.4));
    const double bias_chance = has_bias && (needs_bias || !tiled) ? 0.5 : 0;
    const auto biased = [&](Stored &stored, Stored &gradient, std::vector<int> extents,
                            const std::vector<bool> &broadcast) {
        input(stored, dtype, extents, broadcast, false);
        result(gradient, wide, extents, broadcast);
    };
    if (chance(random, bias_chance)) biased(t.bias, t.grad_bias, {b, q0, q1, q2, h, s.entries()}, some());
    if (chance(random, bias_chance) || (needs_bias && !t.bias.present))
        biased(t.table, t.grad_table,
               {1, 2 * s.axis[0].kernel - 1, 2 * s.axis[1].kernel - 1, 2 * s.axis[2].kernel - 1, h, 1}, whole);
    for (int a = 3 - rank; a < 3; a++)
        if (chance(random, bias_chance / 2))
            biased(t.axis_bias[a], t.grad_axis_bias[a], {b, q0, q1, q2, h, s.axis[a].kernel}, some());
    // A bias of -infinity leaves an entry out; a query may lose all of its entries so.
    if (t.bias.present && chance(random, 0.3)) {
        const double density = chance(random, 0.3) ? 0.95 : 0.2;
        t.bias.each([&](int64_t at, int64_t) {
            if (chance(random, density)) t.bias.set(at, -INFINITY);
        });
    }

    brute_force::Inputs in;
    in.query = t.query.values(), in.key = t.key.values(), in.value = t.value.values(), in.bias = t.bias.values();
    in.grad_output = t.grad_output.values(), in.grad_lse = t.grad_lse.values();
    for (int a = 0; a < 3; a++) in.axis_bias[a] = t.axis_bias[a].values();
    if (t.table.present) {  // (head, cells) there, (cells, head) here
        in.table.resize(size_t(h) * s.cells());
        t.table.each([&](int64_t at, int64_t i) { in.table[size_t(i % h * s.cells() + i / h)] = t.table.get(at); });
    }
    if (masked) {
        t.mask_bytes.assign(size_t(b * s.keys()) + 1, 0);
        const double density = chance(random, 0.3) ? 0.1 : 0.7;
        for (int i = 0; i < b * s.keys(); i++) in.key_mask.push_back(t.mask_bytes[size_t(i)] = chance(random, density));
        if (in.key_mask.empty()) in.key_mask.push_back(0);
        // What a masked key holds reaches no one.
        if (!repeated_batch[0] && chance(random, 0.5))
            for (Stored *stored : {&t.key, &t.value})
                stored->each([&](int64_t at, int64_t i) {
                    const int64_t place = i / (stored->extent[4] * stored->extent[5]);
                    if (!in.key_mask[size_t(place)]) stored->set(at, i % 2 ? NAN : INFINITY);
                });
    }
    t.expected = brute_force::attention(s, in);

    Problem &p = t.problem;
    p.dtype = dtype;
    p.rank = rank;
    p.batch = b, p.heads = h, p.kv_heads = s.kv_heads, p.channels = s.channels, p.value_channels = s.value_channels;
    for (int a = 0; a < 3; a++) {
        const brute_force::Axis &x = s.axis[a];
        p.axis[a].queries = x.queries, p.axis[a].keys = x.keys, p.axis[a].kernel = x.kernel,
        p.axis[a].stride = x.stride;
        p.axis[a].dilation = x.dilation, p.axis[a].causal = x.causal;
        p.axis[a].border = x.border == 'm' ? Border::mask : x.border == 'z' ? Border::zero : Border::shift;
    }
    p.raster = s.raster;
    p.scale = s.scale;
    p.query = t.query.tensor(), p.key = t.key.tensor(), p.value = t.value.tensor(), p.bias = t.bias.tensor();
    p.rel_pos_bias = t.table.tensor();
    p.output = t.output.tensor(), p.lse = t.lse.tensor();
    if (masked) {
        p.key_mask.data = t.mask_bytes.data();
        p.key_mask.batch = s.keys(), p.key_mask.axis[0] = k1 * k2, p.key_mask.axis[1] = k2, p.key_mask.axis[2] = 1;
    }
    p.grad_output = t.grad_output.tensor(), p.grad_lse = t.grad_lse.tensor(), p.grad_query = t.grad_query.tensor();
    p.grad_key = t.grad_key.tensor(), p.grad_value = t.grad_value.tensor(), p.grad_bias = t.grad_bias.tensor();
    p.grad_rel_pos_bias = t.grad_table.tensor();
    for (int a = 0; a < 3; a++)
        p.axis_bias[a] = t.axis_bias[a].tensor(), p.grad_axis_bias[a] = t.grad_axis_bias[a].tensor();
}

std::string describe(const Trial &t) {
    const brute_force::Shape &s = t.shape;
    char text[512];
    int n = std::snprintf(text, sizeof text, "%s batch %d heads %d/%d channels %d/%d", name_of(t.problem.dtype),
                          s.batch, s.heads, s.kv_heads, s.channels, s.value_channels);
    for (int a = 3 - t.problem.rank; a < 3; a++) {
        const brute_force::Axis &x = s.axis[a];
        n += std::snprintf(text + n, sizeof text - size_t(n), " [%d queries %d keys k%d s%d d%d%s %c]", x.queries,
                           x.keys, x.kernel, x.stride, x.dilation, x.causal ? " causal" : "", x.border);
    }
    std::snprintf(text + n, sizeof text - size_t(n), "%s%s%s%s%s", s.raster ? " raster" : "",
                  t.bias.present ? " bias" : "", t.table.present ? " table" : "", t.mask_bytes.empty() ? "" : " mask",
                  t.grad_lse.present ? " grad_lse" : "");
    return text;
}

// Worst difference, relative to the largest value (or `magnitude`) and to what is allowed; infinite for NaN or for a
// touched gap.
double judge(const Stored &stored, const std::vector<double> &expected, double relative, double magnitude = 0.1) {
    if (!stored.present) return 0;
    std::vector<char> used(stored.memory.size(), 0);
    std::map<int64_t, double> sums;  // what a broadcast gradient sums over
    Stored owned = stored;
    for (int axis = 0; axis < 6; axis++)
        if (!owned.stride[axis])
            owned.extent[axis] = 1;  // an axis that the tensor does not have, even if its extent is 0
    owned.each([&](int64_t at, int64_t) { sums[at] = 0; });
    stored.each([&](int64_t at, int64_t i) { sums[at] += expected[size_t(i)]; });
    double largest = magnitude, worst = 0;
    for (const auto &[at, sum] : sums)
        if (std::isfinite(sum)) largest = std::max(largest, std::abs(sum));
    for (const auto &[at, sum] : sums) {
        const double got = stored.get(at);
        if (got != sum) {
            const double error = std::abs(got - sum) / (relative * largest);
            worst = error <= worst ? worst : error;  // keeps NaN
        }
        const size_t bytes = size_t(stored.size_of_element());
        std::fill_n(used.begin() + int64_t(size_t(at) * bytes), bytes, 1);
    }
    for (size_t i = 0; i < used.size(); i++)
        if (!used[i] && stored.memory[i] != 0xff) return INFINITY;
    return worst <= 1e30 ? worst : INFINITY;
}

std::map<std::string, double> worst_seen;
int failures = 0;

void expect(const Trial &t, const char *variant, unsigned seed, const char *what, double error) {
    const std::string key = std::string(variant) + " " + name_of(t.problem.dtype) + " " + what;
    worst_seen[key] = std::max(worst_seen[key], error);
    if (error <= 1) return;
    failures++;
    std::printf("FAIL %s, %s off by %.3g of what is allowed, seed %u: %s\n", variant, what, error, seed,
                describe(t).c_str());
}

void run_pass(const cuda::Variant &variant, Trial &t, Pass pass, unsigned seed) {
    cuda::DeviceVector<double> workspace(variant.workspace(t.problem, pass) / 8 + 1, NAN);
    try {
        const char *error = variant.run(t.problem, pass, nullptr, workspace.data());
        if (!error) error = cuda::finish();
        if (!error) return;
        std::printf("FAIL %s: %s, seed %u: %s\n", variant.name, error, seed, describe(t).c_str());
    } catch (const std::runtime_error &misuse) {  // the emulation saw it
        std::printf("FAIL %s: %s, seed %u: %s\n", variant.name, misuse.what(), seed, describe(t).c_str());
    }
    failures++;
}

void check(const cuda::Variant &variant, Trial t, unsigned seed, bool forward, bool backward) {
    const auto bind = [&] {  // the copy's own memory
        Problem &p = t.problem;
        p.query = t.query.tensor(), p.key = t.key.tensor(), p.value = t.value.tensor(), p.bias = t.bias.tensor();
        p.rel_pos_bias = t.table.tensor(), p.output = t.output.tensor(), p.lse = t.lse.tensor();
        if (p.key_mask.data) p.key_mask.data = t.mask_bytes.data();
        p.grad_output = t.grad_output.tensor(), p.grad_lse = t.grad_lse.tensor(), p.grad_query = t.grad_query.tensor();
        p.grad_key = t.grad_key.tensor(), p.grad_value = t.grad_value.tensor(), p.grad_bias = t.grad_bias.tensor();
        p.grad_rel_pos_bias = t.grad_table.tensor();
        for (int a = 0; a < 3; a++)
            p.axis_bias[a] = t.axis_bias[a].tensor(), p.grad_axis_bias[a] = t.grad_axis_bias[a].tensor();
    };
    bind();
    // On a GPU, where threads race for real, everything once more: the bits must be the same.
    const auto repeat = [&](Pass pass, std::vector<Stored *> results) {
        if (!cuda::on_gpu) return;
        std::vector<Stored> before;
        for (const Stored *result : results) before.push_back(*result);
        run_pass(variant, t, pass, seed);
        for (size_t i = 0; i < results.size(); i++)
            expect(t, variant.name, seed, "repeatability", before[i].memory == results[i]->memory ? 0 : INFINITY);
    };
    const double step = half_step(t.problem.dtype), wide = half_step(Dtype::float32);
    const bool is_double = t.problem.dtype == Dtype::float64;
    const double outputs = is_double ? 1e-13 : 4 * step + 60 * wide;
    // Through delta, gradients inherit the rounding of the stored output.
    const double gradients = is_double ? 1e-12 : 12 * step + 200 * wide;
    if (forward) {
        run_pass(variant, t, Pass::forward, seed);
        repeat(Pass::forward, {&t.output, &t.lse});
        expect(t, variant.name, seed, "output", judge(t.output, t.expected.output, outputs));
        // Tensor cores round the weights, not the scores.
        expect(t, variant.name, seed, "lse", judge(t.lse, t.expected.lse, is_double ? 1e-13 : 100 * wide));
    }
    if (backward) {
        if (!forward) {
            t.output.each([&](int64_t at, int64_t i) { t.output.set(at, t.expected.output[size_t(i)]); });
            t.lse.each([&](int64_t at, int64_t i) { t.lse.set(at, t.expected.lse[size_t(i)]); });
        }
        run_pass(variant, t, Pass::backward, seed);
        repeat(Pass::backward, {&t.grad_query, &t.grad_key, &t.grad_value, &t.grad_bias, &t.grad_table,
                                &t.grad_axis_bias[0], &t.grad_axis_bias[1], &t.grad_axis_bias[2]});
        expect(t, variant.name, seed, "grad_query", judge(t.grad_query, t.expected.grad_query, gradients));
        // A key read for every batch has one gradient for each: nothing is summed.
        expect(t, variant.name, seed, "grad_key", judge(t.grad_key, t.expected.grad_key, gradients));
        expect(t, variant.name, seed, "grad_value", judge(t.grad_value, t.expected.grad_value, gradients));
        // Where the sum cancels (over a whole window it is 0), its terms tell what error is to be expected.
        double largest_term = 0.1;
        for (double term : t.expected.grad_bias) largest_term = std::max(largest_term, std::abs(term));
        const double sum = largest_term * std::sqrt(double(t.expected.grad_bias.size()));
        expect(t, variant.name, seed, "grad_bias", judge(t.grad_bias, t.expected.grad_bias, gradients, sum));
        for (int a = 0; a < 3; a++)
            expect(t, variant.name, seed, "grad_axis_bias",
                   judge(t.grad_axis_bias[a], t.expected.grad_axis_bias[a], gradients, sum));
        std::vector<double> table(t.expected.grad_table.size());
        const int cells = t.shape.cells(), heads = t.shape.heads;
        for (int i = 0; i < cells * heads; i++)
            table[size_t(i)] = t.expected.grad_table[size_t(i % heads * cells + i / heads)];
        expect(t, variant.name, seed, "grad_rel_pos_bias", judge(t.grad_table, table, gradients, sum));
    }
}

// A NaN in one value and an infinite score reach the queries whose windows hold them and what those touch in the
// backward: such a score makes the log-sum-exp infinite and the rest NaN. Nothing else is reached. What the tiled
// variants compute once more for that may be rounded otherwise.
void check_containment(const cuda::Variant &variant, Dtype dtype, const cuda::Device &device) {
    constexpr int side = 28, channels = 8, nan_at = 3, infinity_at = 24;
    const bool tiled = variant.declines(Problem(), Pass::forward, device);  // the generic one declines nothing
    const auto run = [&](bool spoilt) {
        Random random(1);
        std::vector<Stored> all(9);
        for (size_t i = 0; i < all.size(); i++) {
            const bool is_lse = i == 4;
            all[i].lay_out(random, is_lse && dtype != Dtype::float64 ? Dtype::float32 : dtype,
                           {1, 1, side, side, 1, is_lse ? 1 : channels}, std::vector<bool>(6, false), true);
            if (i < 3 || i == 5) all[i].each([&](int64_t at, int64_t n) { all[i].set(at, double(n % 11 + 1) / 16); });
        }
        Stored &key = all[1], &value = all[2];
        if (spoilt) value.set(value.offset({0, 0, nan_at, nan_at, 0, 0}), NAN);
        if (spoilt) key.set(key.offset({0, 0, infinity_at, infinity_at, 0, 1}), INFINITY);
        Problem p;
        p.dtype = dtype;
        p.batch = p.heads = p.kv_heads = 1;
        p.channels = p.value_channels = channels;
        for (int a = 1; a < 3; a++) p.axis[a].queries = p.axis[a].keys = side, p.axis[a].kernel = 3;
        Tensor *const tensors[] = {&p.query,       &p.key,        &p.value,    &p.output,    &p.lse,
                                   &p.grad_output, &p.grad_query, &p.grad_key, &p.grad_value};
        for (size_t i = 0; i < all.size(); i++) *tensors[i] = all[i].tensor();
        for (const Pass pass : {Pass::forward, Pass::backward}) {
            if (variant.declines(p, pass, device)) return std::vector<Stored>();
            cuda::DeviceVector<double> workspace(variant.workspace(p, pass) / 8 + 1, NAN);
            const char *error = variant.run(p, pass, nullptr, workspace.data());
            if (!error) error = cuda::finish();
            if (error) std::printf("FAIL containment: %s\n", error), failures++;
        }
        return all;
    };
    const std::vector<Stored> clean = run(false), spoilt = run(true);
    if (clean.empty()) return;
    int wrong = 0;
    const auto within = [](int y, int x, int centre, int distance) {
        return std::max(std::abs(y - centre), std::abs(x - centre)) <= distance;
    };
    constexpr size_t lse = 4;
    for (const size_t i : {size_t(3), lse, size_t(6), size_t(7), size_t(8)}) {
        const Stored &result = spoilt[i];
        const int reach = i < 7 ? 1 : 2;  // of the queries around a fault; of the keys that these see
        for (int y = 0; y < side; y++)
            for (int x = 0; x < side; x++)
                for (int c = 0; c < result.extent[5]; c++) {
                    const int64_t at = result.offset({0, 0, y, x, 0, c});
                    const double got = result.get(at);
                    if (within(y, x, infinity_at, reach))
                        wrong += i == lse ? got != INFINITY : !std::isnan(got);
                    else if (within(y, x, nan_at, reach) && (i == 6 || i == 7 || (i == 3 && c == 0)))
                        wrong += !std::isnan(got);
                    else
                        wrong += !(std::abs(got - clean[i].get(at)) <= (tiled ? 4 * half_step(dtype) : 0));
                }
    }
    failures += wrong != 0;
    std::printf("%s %s %s: where NaN and infinity go (%d wrong)\n", wrong ? "FAIL" : "ok  ", variant.name,
                name_of(dtype), wrong);
}

}  // namespace

int main(int argc, char **argv) {
    const int problems = argc > 1 ? std::atoi(argv[1]) : 200;
    const unsigned first_seed = argc > 2 ? unsigned(std::strtoul(argv[2], nullptr, 10)) : 1;
    const char *only = argc > 3 ? argv[3] : nullptr;
    const cuda::Device device = cuda::test_device();
    std::map<std::string, int> taken;
    std::printf("%d problems from seed %u\n", problems, first_seed);
    for (int i = 0; i < problems; i++) {
        const unsigned seed = first_seed + unsigned(i);
        Random random(seed);
        Trial trial;
        draw(random, trial, seed);
        // Biases' gradients in one go, or by some heads or batches at a time.
        const auto entries = int64_t(trial.expected.grad_bias.size());
        cuda::cached_score_gradients = chance(random, 0.5) ? int64_t(8) << 20 : pick(random, 1, int(entries) + 1);
        for (int32_t v = 0; v < cuda::variant_count; v++) {
            const cuda::Variant &variant = *cuda::variants[v];
            if (only && std::strcmp(only, variant.name) != 0) continue;
            if (device.capability < variant.capability) continue;
            const bool forward = !variant.declines(trial.problem, Pass::forward, device);
            const bool backward = !variant.declines(trial.problem, Pass::backward, device);
            const int widest = std::max(trial.shape.channels, trial.shape.value_channels);
            for (const Tile &tile : tiles) {
                if (v == cuda::variant_count - 1 || tile.dtype != trial.problem.dtype) continue;
                if (widest > tile.width || (tile.width > 32 && widest <= tile.width / 2)) continue;
                const std::string name = std::string(name_of(tile.dtype)) + " up to " + std::to_string(tile.width);
                taken[name + " forward"] += forward;
                if (tile.dtype == Dtype::float32 || tile.width <= 128) taken[name + " backward"] += backward;
            }
            check(variant, trial, seed, forward, backward);
        }
    }
    for (int32_t v = 0; v < cuda::variant_count; v++)
        for (int dtype = 0; dtype < 4; dtype++)
            if (device.capability >= cuda::variants[v]->capability)
                check_containment(*cuda::variants[v], Dtype(dtype), device);
    for (const auto &[name, error] : worst_seen)
        std::printf("  worst %-50s %.3f of what is allowed\n", name.c_str(), error);
    for (const auto &[name, count] : taken) {
        std::printf("  tiled kernels computed %d of %s\n", count, name.c_str());
        if (count || problems < 100 || only) continue;
        std::printf("FAIL no problem of this kind\n");
        failures++;
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
