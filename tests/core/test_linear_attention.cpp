// linear_attention on random configurations, each variant in turn, against its definition in doubles.
//
//     test_linear_attention [--case SEED] [--variant NAME]
#include <algorithm>
#include <limits>
#include <sstream>

#include "operators.h"

namespace {

using namespace test;

const double infinity = std::numeric_limits<double>::infinity();

const Operation<localattn_linear_attention_params> operation = {
    localattn_linear_attention_forward, localattn_linear_attention_backward, localattn_linear_attention_workspace_size,
    localattn_linear_attention_variant};

template <class Visit>
void each(const int64_t (&extent)[3], const Visit &visit) {
    for (int64_t i = 0; i < extent[0]; ++i)
        for (int64_t j = 0; j < extent[1]; ++j)
            for (int64_t k = 0; k < extent[2]; ++k) visit(i, j, k);
}

std::string check(uint64_t seed, const std::string &variant, std::vector<std::string> &failures) {
    Random random(seed);
    const localattn_dtype dtypes[] = {LOCALATTN_FLOAT32, LOCALATTN_FLOAT64, LOCALATTN_FLOAT16, LOCALATTN_BFLOAT16};
    const localattn_dtype dtype = dtypes[pick(random, 0, 3)];
    const Element element = element_of(dtype), wide = wide_element_of(dtype);
    const int rank = static_cast<int>(pick(random, 1, 3));
    const int64_t batch = pick(random, 0, 20) ? pick(random, 1, 3) : 0, heads = pick(random, 1, 3);
    const int64_t channels = pick(random, 1, chance(random, 20) ? 40 : 9);
    const int64_t width = pick(random, 1, chance(random, 20) ? 70 : 9);
    int64_t sq[3] = {1, 1, 1}, sk[3] = {1, 1, 1};
    const bool same = chance(random, 50), large = chance(random, 5);
    for (int a = 0; a < rank; ++a) {
        const int64_t most = large && a == 0 ? 5000 / (rank * rank * rank) : rank == 1 ? 300 : rank == 2 ? 25 : 7;
        sq[a] = chance(random, 3) ? 0 : pick(random, 1, most);
        sk[a] = same ? sq[a] : chance(random, 3) ? 0 : pick(random, 1, most);
    }
    const bool plain = chance(random, 40), has_mask = chance(random, 40), none_left = chance(random, 10);
    const double magnitude = chance(random, 20) ? 20 : 2;

    // Where masked elements are overwritten below, none may lie on another.
    const auto input = [&](const Shape &shape, double size) {
        Memory m(random, element, shape, 0, plain, has_mask);
        m.fill_random(random, size);
        return m;
    };
    const auto result = [&](Element type, const Shape &shape) { return Memory(random, type, shape, 0, plain, true); };
    const Shape queries = {batch, sq[0], sq[1], sq[2], heads, channels},
                keys = {batch, sk[0], sk[1], sk[2], heads, channels};
    const Shape outputs = {batch, sq[0], sq[1], sq[2], heads, width},
                values = {batch, sk[0], sk[1], sk[2], heads, width};
    Memory query = input(queries, magnitude), key = input(keys, magnitude), value = input(values, 1);
    Memory grad_output = input(outputs, 1), output = result(element, outputs);
    Memory context = result(wide, {batch, channels, 1, 1, heads, width});
    Memory key_lse = result(wide, {batch, 1, 1, 1, heads, channels});
    Memory grad_query = result(element, queries), grad_key = result(element, keys),
           grad_value = result(element, values);
    Memory mask(random, Element::uint8, {batch, sk[0], sk[1], sk[2], 1, 1}, 0, plain, true);
    mask.fill_mask(random);
    if (none_left)
        each(sk, [&](int64_t i, int64_t j, int64_t k) {
            if (batch > 0) mask.set({0, i, j, k, 0, 0}, 0);
        });

    const auto attends = [&](int64_t b, int64_t i, int64_t j, int64_t k) {
        return !has_mask || mask.get({b, i, j, k, 0, 0}) != 0;
    };
    // What masked keys and values hold must reach nothing.
    const Dense q = query.dense(), k = key.dense(), v = value.dense(), g = grad_output.dense();
    Written o("output", output), c("context", context), l("key_lse", key_lse);
    Written gq("grad_query", grad_query), gk("grad_key", grad_key), gv("grad_value", grad_value);
    std::vector<double> s(size_t(channels), 0.0);
    const auto softmax = [&](Shape at) {
        double most = -infinity, total = 0;
        for (at[5] = 0; at[5] < channels; ++at[5]) most = std::max(most, q[at]);
        for (at[5] = 0; at[5] < channels; ++at[5]) total += s[size_t(at[5])] = std::exp(q[at] - most);
        for (double &x : s) x /= total;
    };
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            std::vector<double> lse(size_t(channels), -infinity);
            for (int64_t j = 0; j < channels; ++j) {
                double most = -infinity, total = 0;
                each(sk, [&](int64_t x, int64_t y, int64_t z) {
                    if (attends(b, x, y, z)) most = std::max(most, k[{b, x, y, z, h, j}]);
                });
                each(sk, [&](int64_t x, int64_t y, int64_t z) {
                    if (attends(b, x, y, z)) total += std::exp(k[{b, x, y, z, h, j}] - most);
                });
                if (total > 0) lse[size_t(j)] = most + std::log(total);
                l.add({b, 0, 0, 0, h, j}, lse[size_t(j)], total > 0 ? 1 + std::fabs(most) : 0);
                each(sk, [&](int64_t x, int64_t y, int64_t z) {
                    if (!attends(b, x, y, z)) return;
                    for (int64_t e = 0; e < width; ++e) {
                        const double p = std::exp(k[{b, x, y, z, h, j}] - lse[size_t(j)]) * v[{b, x, y, z, h, e}];
                        c.add({b, j, 0, 0, h, e}, p, std::fabs(p) * (1 + magnitude));
                    }
                });
            }
            Dense grad_context({1, channels, 1, 1, 1, width}), grad_terms({1, channels, 1, 1, 1, width});
            each(sq, [&](int64_t x, int64_t y, int64_t z) {
                softmax({b, x, y, z, h, 0});
                double mean = 0, mean_terms = 0;
                std::vector<double> gs(size_t(channels), 0.0), gs_terms(size_t(channels), 0.0);
                for (int64_t j = 0; j < channels; ++j) {
                    for (int64_t e = 0; e < width; ++e) {
                        const double up = g[{b, x, y, z, h, e}];
                        o.add({b, x, y, z, h, e}, s[size_t(j)] * c.exact[{b, j, 0, 0, h, e}],
                              s[size_t(j)] * c.terms[{b, j, 0, 0, h, e}] * (2 + magnitude));
                        gs[size_t(j)] += up * c.exact[{b, j, 0, 0, h, e}];
                        gs_terms[size_t(j)] += std::fabs(up) * c.terms[{b, j, 0, 0, h, e}];
                        grad_context[{0, j, 0, 0, 0, e}] += s[size_t(j)] * up;
                        grad_terms[{0, j, 0, 0, 0, e}] += std::fabs(s[size_t(j)] * up) * (1 + magnitude);
                    }
                    mean += s[size_t(j)] * gs[size_t(j)];
                    mean_terms += s[size_t(j)] * gs_terms[size_t(j)];
                }
                for (int64_t j = 0; j < channels; ++j)
                    gq.add({b, x, y, z, h, j}, s[size_t(j)] * (gs[size_t(j)] - mean),
                           s[size_t(j)] * (gs_terms[size_t(j)] + mean_terms) * (2 + magnitude));
            });
            each(sk, [&](int64_t x, int64_t y, int64_t z) {
                if (!attends(b, x, y, z)) return;
                for (int64_t j = 0; j < channels; ++j) {
                    const double p = std::exp(k[{b, x, y, z, h, j}] - lse[size_t(j)]);
                    for (int64_t e = 0; e < width; ++e) {
                        const double gc = grad_context[{0, j, 0, 0, 0, e}], gt = grad_terms[{0, j, 0, 0, 0, e}];
                        const double from = v[{b, x, y, z, h, e}], mean = c.exact[{b, j, 0, 0, h, e}];
                        gv.add({b, x, y, z, h, e}, p * gc, p * gt * (2 + magnitude));
                        gk.add({b, x, y, z, h, j}, p * gc * (from - mean),
                               p * gt * (std::fabs(from) + c.terms[{b, j, 0, 0, h, e}]) * (2 + magnitude));
                    }
                }
            });
        }
    }
    if (has_mask) {
        each(sk, [&](int64_t x, int64_t y, int64_t z) {
            for (int64_t b = 0; b < batch; ++b) {
                if (attends(b, x, y, z)) continue;
                for (int64_t h = 0; h < heads; ++h) {
                    for (int64_t j = 0; j < channels; ++j) key.set({b, x, y, z, h, j}, std::nan(""));
                    for (int64_t e = 0; e < width; ++e) value.set({b, x, y, z, h, e}, std::nan(""));
                }
            }
        });
    }

    auto p = LOCALATTN_INIT(localattn_linear_attention_params);
    p.dtype = dtype;
    p.rank = rank;
    p.batch = batch;
    p.heads = heads;
    p.channels = channels;
    p.value_channels = width;
    for (int a = 0; a < rank; ++a) {
        p.query_extent[a] = sq[a];
        p.key_extent[a] = sk[a];
    }
    p.query = query.view(rank);
    p.key = key.view(rank);
    p.value = value.view(rank);
    if (has_mask) p.key_mask = mask.view(rank);
    p.output = output.view(rank);
    p.context = context.view(1);
    p.context.spatial_stride[0] = context.strides[1];
    p.key_lse = key_lse.view(1);
    const auto run = [&](localattn_pass pass, std::vector<Written> results) {
        std::vector<std::string> found;
        operation.check(p, variant, pass, results, element, 32, seed, found);
        for (const std::string &text : found)
            failures.push_back((pass == LOCALATTN_FORWARD ? "forward: " : "backward: ") + text);
    };
    run(LOCALATTN_FORWARD, {o, c, l});
    p.grad_output = grad_output.view(rank);
    p.grad_query = grad_query.view(rank);
    p.grad_key = grad_key.view(rank);
    p.grad_value = grad_value.view(rank);
    run(LOCALATTN_BACKWARD, {gq, gk, gv});

    std::ostringstream text;
    text << "dtype " << dtype << " rank " << rank << " batch " << batch << " heads " << heads << " channels "
         << channels << "/" << width << " query " << sq[0] << "," << sq[1] << "," << sq[2] << " key " << sk[0] << ","
         << sk[1] << "," << sk[2] << (has_mask ? " mask" : "") << (plain ? " contiguous" : " strided") << " magnitude "
         << magnitude;
    return text.str();
}

}  // namespace

int main(int argc, char **argv) { return run_random("test_linear_attention", argc, argv, 600, check); }
