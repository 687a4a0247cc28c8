#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace test {

void Result::reset(const Shape &shape) {
    value = Dense(shape);
    terms = Dense(shape);
    score_terms = Dense(shape);
}

void Result::add(const Shape &at, double x, double magnitude, double spread) {
    value[at] += x;
    terms[at] += magnitude;
    score_terms[at] += magnitude * spread;
}

AxisWindow axis_window(const Config &config, int axis, int64_t query) {
    const int64_t queries = config.query_extent[axis], keys = config.key_extent[axis];
    const int64_t k = config.kernel_size[axis], s = config.stride[axis], d = config.dilation[axis];
    const bool causal = config.is_causal[axis];

    // 1. The nearest key.
    const int64_t nearest = static_cast<int64_t>(std::floor((query + 0.5) * double(keys) / double(queries)));
    // 2. The keys of its residue class, in order, and where among them it stands.
    std::vector<int64_t> members;
    for (int64_t position = nearest % d; position < keys; position += d) members.push_back(position);
    const int64_t n = static_cast<int64_t>(members.size());
    const int64_t centre = std::find(members.begin(), members.end(), nearest) - members.begin();
    // 3. The query whose window the whole group uses.
    const int64_t group = centre / s;
    int64_t leader = causal ? group * s + s - 1 : group * s + s / 2;
    if (causal || config.border == LOCALATTN_BORDER_SHIFT) leader = std::min(leader, n - 1);
    // 4. The entries.
    int64_t start = leader - k / 2;
    if (causal) {
        start = std::max<int64_t>(leader - k + 1, 0);
    } else if (config.border == LOCALATTN_BORDER_SHIFT) {
        start = std::max<int64_t>(0, std::min(leader - k / 2, n - k));
    }
    AxisWindow window;
    for (int64_t u = 0; u < k; ++u) {
        const int64_t x = start + u;
        int64_t entry;
        if (causal && x > centre) {
            entry = absent;
        } else if (x >= 0 && x < n) {
            entry = members[static_cast<size_t>(x)];
        } else {
            entry = config.border == LOCALATTN_BORDER_ZERO ? outside : absent;
        }
        window.entries.push_back(entry);
        window.offsets.push_back(x - centre + k - 1);
    }
    return window;
}

namespace {

struct Entry {
    Shape u;       // entry per axis at 1..3, and its number in raster order at 5
    Shape key;     // batch, position, kv head
    Shape offset;  // of the relative-position table, with the head
    bool zero;     // outside the map
    double score = 0, score_terms = 0, probability = 0;
};

std::vector<Entry> entries_of(const Config &c, const Dense &key_mask, int64_t batch, int64_t head, const Shape &query) {
    std::vector<Entry> entries;
    const AxisWindow w[3] = {axis_window(c, 0, query[1]), axis_window(c, 1, query[2]), axis_window(c, 2, query[3])};
    int64_t number = -1;
    for (int64_t i = 0; i < c.kernel_size[0]; ++i) {
        for (int64_t j = 0; j < c.kernel_size[1]; ++j) {
            for (int64_t k = 0; k < c.kernel_size[2]; ++k) {
                ++number;
                const size_t u[3] = {size_t(i), size_t(j), size_t(k)};
                bool there = !c.raster_causal || number <= c.window() / 2, zero = false;
                Entry e{};
                e.u = {0, i, j, k, 0, number};
                e.key = {batch, 0, 0, 0, head / (c.heads / c.kv_heads), 0};
                e.offset = {0, 0, 0, 0, head, 0};
                for (size_t a = 0; a < 3; ++a) {
                    const int64_t position = w[a].entries[u[a]];
                    there = there && position != absent;
                    zero = zero || position == outside;
                    e.key[1 + a] = position;
                    e.offset[1 + a] = w[a].offsets[u[a]];
                }
                if (!there) continue;
                if (!zero && c.has_key_mask && key_mask[{batch, e.key[1], e.key[2], e.key[3], 0, 0}] == 0) continue;
                e.zero = zero;
                entries.push_back(e);
            }
        }
    }
    return entries;
}

Shape with_channel(Shape at, int64_t channel) {
    at[5] = channel;
    return at;
}

template <class Sum>
void attend(const Config &c, const Inputs &in, const Shape &q, Results &r) {
    const double infinity = std::numeric_limits<double>::infinity();
    const double scale = c.has_scale ? c.scale : 1 / std::sqrt(double(c.channels));
    std::vector<Entry> entries = entries_of(c, in.key_mask, q[0], q[4], q);

    double largest = -infinity, score_terms = 0;
    bool nan = false;
    for (Entry &e : entries) {
        Sum s = 0;
        if (!e.zero) {
            for (int64_t channel = 0; channel < c.channels; ++channel) {
                const double x = in.query[with_channel(q, channel)], y = in.key[with_channel(e.key, channel)];
                s += Sum(x) * Sum(y);
                e.score_terms += std::fabs(scale * x * y);
            }
            s *= Sum(scale);
        }
        const auto add = [&](double bias) {
            s += Sum(bias);
            e.score_terms += std::fabs(bias);
        };
        if (c.has_bias) add(in.bias[with_channel(q, e.u[5])]);
        if (c.has_rel_pos_bias) add(in.rel_pos_bias[e.offset]);
        for (size_t a = 0; a < 3; ++a) {
            if (c.has_axis_bias[a]) add(in.axis_bias[a][with_channel(q, e.u[1 + a])]);
        }
        e.score = double(s);
        largest = std::max(largest, e.score);
        nan = nan || std::isnan(e.score);
        score_terms = std::max(score_terms, e.score_terms);
    }
    const Shape row = with_channel(q, 0);
    if (!nan && largest == -infinity) {
        r.lse.value[row] = -infinity;
        return;
    }

    Sum total = 0;
    for (const Entry &e : entries) total += std::exp(Sum(e.score) - Sum(largest));
    for (Entry &e : entries) e.probability = double(std::exp(Sum(e.score) - Sum(largest)) / total);
    const double lse = !nan && largest == infinity ? infinity : double(Sum(largest) + std::log(total));
    r.lse.add(row, lse, std::fabs(lse), 1);
    r.lse.score_terms[row] += score_terms + 1;

    // A score's error moves its probability by as much, relatively.
    const double spread = 1 + score_terms;
    std::vector<Sum> sums(static_cast<size_t>(c.value_channels)), terms(sums);
    Sum delta = 0;
    double delta_terms = 0;
    for (Entry &e : entries) {
        if (e.zero) continue;
        for (int64_t channel = 0; channel < c.value_channels; ++channel) {
            const Sum x = Sum(e.probability) * Sum(in.value[with_channel(e.key, channel)]);
            sums[size_t(channel)] += x;
            terms[size_t(channel)] += std::fabs(x);
        }
    }
    for (int64_t channel = 0; channel < c.value_channels; ++channel) {
        const size_t i = size_t(channel);
        const double g = in.grad_output[with_channel(q, channel)];
        r.output.add(with_channel(q, channel), double(sums[i]), double(terms[i]), spread);
        delta += Sum(g) * sums[i];
        delta_terms += std::fabs(g) * double(terms[i]);
    }

    const double grad_lse = c.has_grad_lse ? in.grad_lse[row] : 0;
    for (const Entry &e : entries) {
        Sum grad_probability = 0;
        double magnitude = delta_terms + std::fabs(grad_lse);
        for (int64_t channel = 0; channel < c.value_channels && !e.zero; ++channel) {
            const double g = in.grad_output[with_channel(q, channel)], v = in.value[with_channel(e.key, channel)];
            grad_probability += Sum(g) * Sum(v);
            magnitude += std::fabs(g * v);
            r.grad_value.add(with_channel(e.key, channel), double(Sum(e.probability) * Sum(g)),
                             std::fabs(e.probability * g), spread);
        }
        const Sum grad_score = Sum(e.probability) * (grad_probability - delta + Sum(grad_lse));
        magnitude *= e.probability;
        for (int64_t channel = 0; channel < c.channels && !e.zero; ++channel) {
            const double x = in.query[with_channel(q, channel)], y = in.key[with_channel(e.key, channel)];
            const double of_query = double(Sum(scale) * grad_score * Sum(y));
            const double of_key = double(Sum(scale) * grad_score * Sum(x));
            r.grad_query.add(with_channel(q, channel), of_query, std::fabs(scale * magnitude * y), spread);
            r.grad_key.add(with_channel(e.key, channel), of_key, std::fabs(scale * magnitude * x), spread);
        }
        if (c.has_bias) r.grad_bias.add(with_channel(q, e.u[5]), double(grad_score), magnitude, spread);
        if (c.has_rel_pos_bias) r.grad_rel_pos_bias.add(e.offset, double(grad_score), magnitude, spread);
        for (size_t a = 0; a < 3; ++a) {
            if (c.has_axis_bias[a])
                r.grad_axis_bias[a].add(with_channel(q, e.u[1 + a]), double(grad_score), magnitude, spread);
        }
    }
}

}  // namespace

Results attention(const Config &c, const Inputs &in, Sums sums) {
    const auto summed = [&](Shape shape) {
        for (size_t a = 0; a < 6; ++a) {
            if (c.bias_broadcast >> a & 1) shape[a] = 1;
        }
        return shape;
    };
    const int64_t *sq = c.query_extent, *sk = c.key_extent, *k = c.kernel_size;
    Results r;
    r.output.reset({c.batch, sq[0], sq[1], sq[2], c.heads, c.value_channels});
    r.lse.reset({c.batch, sq[0], sq[1], sq[2], c.heads, 1});
    r.grad_query.reset({c.batch, sq[0], sq[1], sq[2], c.heads, c.channels});
    r.grad_key.reset({c.batch, sk[0], sk[1], sk[2], c.kv_heads, c.channels});
    r.grad_value.reset({c.batch, sk[0], sk[1], sk[2], c.kv_heads, c.value_channels});
    if (c.has_bias) r.grad_bias.reset(summed({c.batch, sq[0], sq[1], sq[2], c.heads, c.window()}));
    if (c.has_rel_pos_bias) r.grad_rel_pos_bias.reset({1, 2 * k[0] - 1, 2 * k[1] - 1, 2 * k[2] - 1, c.heads, 1});
    for (int a = 0; a < 3; ++a) {
        if (c.has_axis_bias[a]) r.grad_axis_bias[a].reset(summed({c.batch, sq[0], sq[1], sq[2], c.heads, k[a]}));
    }
    if (c.keys() == 0) {
        std::fill(r.lse.value.data.begin(), r.lse.value.data.end(), -std::numeric_limits<double>::infinity());
        return r;
    }
    const bool is_float64 = c.dtype == LOCALATTN_FLOAT64;
    const auto attend_one = sums == Sums::wider ? (is_float64 ? attend<long double> : attend<double>)
                                                : (is_float64 ? attend<double> : attend<float>);
    Shape q{};
    for (q[0] = 0; q[0] < c.batch; ++q[0])
        for (q[1] = 0; q[1] < sq[0]; ++q[1])
            for (q[2] = 0; q[2] < sq[1]; ++q[2])
                for (q[3] = 0; q[3] < sq[2]; ++q[3])
                    for (q[4] = 0; q[4] < c.heads; ++q[4]) attend_one(c, in, q, r);
    return r;
}

std::vector<Shape> visible_keys(const Config &c, const Dense &key_mask, int64_t batch, const Shape &query) {
    std::vector<Shape> keys;
    if (c.keys() == 0) return keys;
    for (const Entry &e : entries_of(c, key_mask, batch, 0, query)) {
        if (!e.zero) keys.push_back(e.key);
    }
    return keys;
}

}  // namespace test
