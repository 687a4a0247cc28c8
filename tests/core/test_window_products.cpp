// similarity and weighting on random configurations over the whole window rule, each variant in turn, against sums over
// lists of keys.
//
//     test_window_products [--case SEED] [--variant NAME]
#include <limits>

#include "operators.h"

namespace {

using namespace test;

const double infinity = std::numeric_limits<double>::infinity();

// Entries of the whole window as positions of keys per axis, or `outside`, or `absent`.
std::vector<Shape> window_of(Config config, const Shape &query) {
    // What border mask leaves out lies outside the map, where border zero would have its zeros.
    if (config.border == LOCALATTN_BORDER_MASK) config.border = LOCALATTN_BORDER_ZERO;
    AxisWindow axis[3];
    for (int a = 0; a < 3; ++a) axis[a] = axis_window(config, a, query[size_t(a) + 1]);
    std::vector<Shape> window;
    for (const int64_t x : axis[0].entries)
        for (const int64_t y : axis[1].entries)
            for (const int64_t z : axis[2].entries) {
                const bool gone = x == absent || y == absent || z == absent;
                const bool beyond = x == outside || y == outside || z == outside;
                window.push_back({query[0], gone ? absent : beyond ? outside : x, y, z, query[4], 0});
            }
    if (config.raster_causal) window.resize(window.size() / 2 + 1);
    return window;
}

template <class Visit>
void each_query(const Config &c, const Visit &visit) {
    Shape q{};
    for (q[0] = 0; q[0] < c.batch; ++q[0])
        for (q[1] = 0; q[1] < c.query_extent[0]; ++q[1])
            for (q[2] = 0; q[2] < c.query_extent[1]; ++q[2])
                for (q[3] = 0; q[3] < c.query_extent[2]; ++q[3])
                    for (q[4] = 0; q[4] < c.heads; ++q[4]) visit(q);
}

template <class Params>
Params params_of(const Config &c) {
    Params p = LOCALATTN_INIT(Params);
    p.dtype = c.dtype;
    p.rank = c.rank;
    p.batch = c.batch;
    p.heads = c.heads;
    p.channels = c.channels;
    for (int a = 0; a < c.rank; ++a) {
        p.query_extent[a] = c.query_extent[a];
        p.key_extent[a] = c.key_extent[a];
        p.kernel_size[a] = c.kernel_size[a];
        p.stride[a] = c.stride[a];
        p.dilation[a] = c.dilation[a];
        p.is_causal[a] = c.is_causal[a];
    }
    p.raster_causal = c.raster_causal;
    p.border = c.border;
    return p;
}

const Operation<localattn_similarity_params> similarity = {localattn_similarity_forward, localattn_similarity_backward,
                                                           localattn_similarity_workspace_size,
                                                           localattn_similarity_variant};
const Operation<localattn_weighting_params> weighting = {localattn_weighting_forward, localattn_weighting_backward,
                                                         localattn_weighting_workspace_size,
                                                         localattn_weighting_variant};

std::string check(uint64_t seed, const std::string &variant, std::vector<std::string> &failures) {
    Config c = random_config(seed, 60e3);
    Random random(c.seed);
    if (tested_device == LOCALATTN_CUDA) {  // every kernel in turn: each dtype, and each width of the tiled ones
        const bool tiled = seed % 2;
        const int64_t widest = int64_t(32) << seed / 2 % 4;
        const localattn_dtype tiled_dtypes[] = {LOCALATTN_FLOAT32, LOCALATTN_FLOAT16, LOCALATTN_BFLOAT16};
        c.dtype = tiled ? tiled_dtypes[seed / 8 % 3] : static_cast<localattn_dtype>(seed / 2 % 4);
        if (tiled) {
            c.plain_layout = true;
            c.raster_causal = false;
            c.channels = 4 * pick(random, widest == 32 ? 1 : widest / 8 + 1, widest / 4);
        }
    }
    const Element element = element_of(c.dtype);
    const int64_t *sq = c.query_extent, *sk = c.key_extent;
    const int64_t window = c.raster_causal ? c.window() / 2 + 1 : c.window();
    bool empty_keys = c.keys() == 0;
    const Shape at_queries = {c.batch, sq[0], sq[1], sq[2], c.heads, c.channels};
    const Shape at_keys = {c.batch, sk[0], sk[1], sk[2], c.heads, c.channels};
    const Shape at_entries = {c.batch, sq[0], sq[1], sq[2], c.heads, window};
    const auto input = [&](const Shape &shape) {
        Memory m(random, element, shape, 0, c.plain_layout, false);
        m.fill_random(random, 1);
        return m;
    };
    const auto result = [&](const Shape &shape) { return Memory(random, element, shape, 0, c.plain_layout, true); };
    Memory query = input(at_queries), key = input(at_keys), entries = result(at_entries);
    entries.fill_random(random, 1);
    Memory to_queries = result(at_queries), to_keys = result(at_keys), to_entries = result(at_entries);
    const bool has_fill = chance(random, 40);
    const double fill = has_fill ? -10000 : c.border == LOCALATTN_BORDER_ZERO ? 0 : -infinity;

    // What entries hold that are no key must reach nothing.
    if (!empty_keys) {
        each_query(c, [&](Shape at) {
            const std::vector<Shape> keys = window_of(c, at);
            for (at[5] = 0; at[5] < window; ++at[5])
                if (keys[size_t(at[5])][1] < 0) entries.set(at, std::nan(""));
        });
    }
    // A NaN reaches those alone whose window holds it.
    for (Memory *map : {&query, &key}) {
        const Shape &extent = map->shape;
        if (!chance(random, 20) || map->dense().data.empty()) continue;
        Shape at;
        for (size_t d = 0; d < at.size(); ++d) at[d] = pick(random, 0, extent[d] - 1);
        map->set(at, std::nan(""));
    }
    const Dense q = query.dense(), k = key.dense(), w = entries.dense();
    Written scores("scores", to_entries), grad_weights("grad_weights", to_entries);
    Written gathered("gathered", to_queries), scattered("scattered", to_keys);
    each_query(c, [&](const Shape &at) {
        std::vector<Shape> keys(size_t(window), Shape{at[0], absent, 0, 0, at[4], 0});
        if (!empty_keys) keys = window_of(c, at);
        Shape u = at, x = at;
        for (u[5] = 0; u[5] < window; ++u[5]) {
            Shape there = keys[size_t(u[5])];
            if (there[1] < 0) {
                scores.add(u, there[1] == outside ? fill : -infinity, 0);
                continue;
            }
            for (int64_t channel = 0; channel < c.channels; ++channel) {
                x[5] = there[5] = channel;
                scores.add(u, q[x] * k[there]);
                grad_weights.add(u, q[x] * k[there]);
                gathered.add(x, w[u] * k[there]);
                scattered.add(there, w[u] * q[x]);
            }
        }
    });

    const auto run = [&](const auto &operation, const auto &params, localattn_pass pass, std::vector<Written> results) {
        std::vector<std::string> found;
        operation.check(params, variant, pass, results, element, 32, seed, found);
        for (const std::string &text : found)
            failures.push_back((pass == LOCALATTN_FORWARD ? "forward: " : "backward: ") + text);
    };
    auto s = params_of<localattn_similarity_params>(c);
    s.has_fill = has_fill;
    s.fill = has_fill ? fill : 0;
    s.query = query.view(c.rank);
    s.key = key.view(c.rank);
    s.scores = to_entries.view(c.rank);
    run(similarity, s, LOCALATTN_FORWARD, {scores});
    s.grad_scores = entries.view(c.rank);
    s.grad_query = to_queries.view(c.rank);
    s.grad_key = to_keys.view(c.rank);
    run(similarity, s, LOCALATTN_BACKWARD, {gathered, scattered});

    auto p = params_of<localattn_weighting_params>(c);
    p.weights = entries.view(c.rank);
    p.value = key.view(c.rank);
    p.output = to_queries.view(c.rank);
    run(weighting, p, LOCALATTN_FORWARD, {gathered});
    p.grad_output = query.view(c.rank);
    p.grad_weights = to_entries.view(c.rank);
    p.grad_value = to_keys.view(c.rank);
    run(weighting, p, LOCALATTN_BACKWARD, {grad_weights, scattered});
    return describe(c) + (has_fill ? " fill" : "");
}

}  // namespace

int main(int argc, char **argv) { return run_random("test_window_products", argc, argv, 2000, check); }
