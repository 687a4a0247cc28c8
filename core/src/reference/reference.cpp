// The slow, obviously right variant: every result element is written once, as the sum that defines it, accumulated in
// double. The backward gathers: an element of a gradient visits the (query, entry) pairs that it has a share in and
// computes each pair's share from the inputs. Nothing is stored, nothing is added to twice, and the order of a sum does
// not depend on the number of workers.
//
//     P[q, u]  = exp(score[q, u] - lse[q])
//     dP[q, u] = dot(grad_output[q], value[k(q, u)])
//     dS[q, u] = P[q, u] * (dP[q, u] - dot(grad_output[q], output[q]) + grad_lse[q])
#include <algorithm>
#include <cmath>
#include <limits>

#include "../window.h"
#include "operators.h"
#include "walk.h"

namespace localattn {

namespace {

using namespace reference;

// What an entry of a query's window is.
enum class Entry { absent, zero, key };

template <class T, class Wide>
class Reference {
public:
    explicit Reference(const Problem &p) : p_(p) {}

    void forward(const Workers &workers, double *scratch) const {
        each(workers, query_count() * p_.heads,
             [&](int64_t row, int32_t worker) { forward_row(row_of(row), scratch + worker * p_.value_channels); });
    }

    void backward(const Workers &workers, double *scratch) const {
        const int64_t width = std::max(p_.channels, p_.value_channels);
        if (p_.grad_query.data) {
            each(workers, query_count() * p_.heads,
                 [&](int64_t row, int32_t worker) { write_grad_query(row_of(row), scratch + worker * width); });
        }
        for (const bool of_key : {true, false}) {
            if (!(of_key ? p_.grad_key : p_.grad_value).data) continue;
            each(workers, key_count() * p_.kv_heads, [&](int64_t row, int32_t worker) {
                write_grad_of_key_or_value(of_key, row, scratch + worker * width);
            });
        }
        if (p_.grad_bias.data) write_grad_bias(workers, p_.grad_bias, -1);
        for (int a = 0; a < 3; ++a) {
            if (p_.grad_axis_bias[a].data) write_grad_bias(workers, p_.grad_axis_bias[a], a);
        }
        if (p_.grad_rel_pos_bias.data) write_grad_rel_pos_bias(workers);
    }

private:
    struct Row {
        int64_t batch, head;
        Position query;
    };

    struct Windows {
        Window axis[3];
    };

    int64_t query_count() const { return p_.batch * p_.axis[0].queries * p_.axis[1].queries * p_.axis[2].queries; }
    int64_t key_count() const { return p_.batch * p_.axis[0].keys * p_.axis[1].keys * p_.axis[2].keys; }

    Row row_of(int64_t number) const {
        Row row;
        row.head = digit(number, p_.heads);
        for (int a = 2; a >= 0; --a) row.query.axis[a] = digit(number, p_.axis[a].queries);
        row.batch = number;
        return row;
    }

    Windows windows_of(const Position &query) const {
        Windows w;
        for (int a = 0; a < 3; ++a) w.axis[a] = window_of(p_.axis[a], query.axis[a]);
        return w;
    }

    int64_t kv_head_of(int64_t head) const { return head / (p_.heads / p_.kv_heads); }

    int64_t entry_number(const Position &u) const {
        return (u.axis[0] * p_.axis[1].kernel + u.axis[1]) * p_.axis[2].kernel + u.axis[2];
    }

    Position key_at(const Windows &w, const Position &u) const {
        Position key;
        for (int a = 0; a < 3; ++a) {
            key.axis[a] = w.axis[a].residue + p_.axis[a].dilation * (w.axis[a].start + u.axis[a]);
        }
        return key;
    }

    Entry entry(int64_t batch, const Windows &w, const Position &u) const {
        bool present = true, inside = true;
        for (int a = 0; a < 3; ++a) {
            present = present && w.axis[a].present_begin <= u.axis[a] && u.axis[a] < w.axis[a].present_end;
            inside = inside && w.axis[a].begin <= u.axis[a] && u.axis[a] < w.axis[a].end;
        }
        if (!present) return Entry::absent;
        const int64_t entries = p_.axis[0].kernel * p_.axis[1].kernel * p_.axis[2].kernel;
        if (p_.raster && entry_number(u) > entries / 2) return Entry::absent;
        if (!inside) return Entry::zero;
        if (p_.key_mask.data) {
            const auto *mask = static_cast<const uint8_t *>(p_.key_mask.data);
            if (!mask[at(p_.key_mask, batch, key_at(w, u), 0)]) return Entry::absent;
        }
        return Entry::key;
    }

    // Calls visit(u, entry) for every entry that is there, in raster order.
    template <class Visit>
    void each_entry(int64_t batch, const Windows &w, const Visit &visit) const {
        const Window *x = w.axis;
        Position u;
        for (u.axis[0] = x[0].present_begin; u.axis[0] < x[0].present_end; ++u.axis[0]) {
            for (u.axis[1] = x[1].present_begin; u.axis[1] < x[1].present_end; ++u.axis[1]) {
                for (u.axis[2] = x[2].present_begin; u.axis[2] < x[2].present_end; ++u.axis[2]) {
                    const Entry kind = entry(batch, w, u);
                    if (kind != Entry::absent) visit(u, kind);
                }
            }
        }
    }

    static double dot(const Tensor &x, int64_t x_offset, const Tensor &y, int64_t y_offset, int64_t channels) {
        double sum = 0;
        for (int64_t c = 0; c < channels; ++c) {
            sum += load<T>(x, x_offset + c * x.channel) * load<T>(y, y_offset + c * y.channel);
        }
        return sum;
    }

    double score(const Row &row, const Windows &w, const Position &u, Entry kind) const {
        double s = 0;
        if (kind == Entry::key) {
            s = p_.scale * dot(p_.query, at(p_.query, row.batch, row.query, row.head), p_.key,
                               at(p_.key, row.batch, key_at(w, u), kv_head_of(row.head)), p_.channels);
        }
        if (p_.bias.data) {
            s += load<T>(p_.bias, at(p_.bias, row.batch, row.query, row.head) + entry_number(u) * p_.bias.channel);
        }
        if (p_.rel_pos_bias.data) {
            s += load<T>(p_.rel_pos_bias, at(p_.rel_pos_bias, 0, table_index(w, u), row.head));
        }
        for (int a = 0; a < 3; ++a) {
            const Tensor &t = p_.axis_bias[a];
            if (t.data) s += load<T>(t, at(t, row.batch, row.query, row.head) + u.axis[a] * t.channel);
        }
        return s;
    }

    Position table_index(const Windows &w, const Position &u) const {
        Position index;
        for (int a = 0; a < 3; ++a) {
            index.axis[a] = w.axis[a].start + u.axis[a] - w.axis[a].centre + p_.axis[a].kernel - 1;
        }
        return index;
    }

    void forward_row(const Row &row, double *sum) const {
        const Windows w = windows_of(row.query);
        double largest = -std::numeric_limits<double>::infinity();
        bool nan = false;
        each_entry(row.batch, w, [&](const Position &u, Entry kind) {
            const double s = score(row, w, u, kind);
            if (s > largest) largest = s;
            nan = nan || std::isnan(s);
        });

        double total = 0, lse = largest;
        std::fill(sum, sum + p_.value_channels, 0.0);
        if (nan || largest > -std::numeric_limits<double>::infinity()) {
            each_entry(row.batch, w, [&](const Position &u, Entry kind) {
                const double weight = std::exp(score(row, w, u, kind) - largest);
                total += weight;
                if (kind != Entry::key) return;
                const int64_t v = at(p_.value, row.batch, key_at(w, u), kv_head_of(row.head));
                for (int64_t c = 0; c < p_.value_channels; ++c) {
                    sum[c] += weight * load<T>(p_.value, v + c * p_.value.channel);
                }
            });
            for (int64_t c = 0; c < p_.value_channels; ++c) sum[c] /= total;
            const bool infinite = !nan && largest > std::numeric_limits<double>::max();
            lse = infinite ? largest : largest + std::log(total);
        }
        const int64_t out = at(p_.output, row.batch, row.query, row.head);
        for (int64_t c = 0; c < p_.value_channels; ++c) store<T>(p_.output, out + c * p_.output.channel, sum[c]);
        if (p_.lse.data) store<Wide>(p_.lse, at(p_.lse, row.batch, row.query, row.head), lse);
    }

    double lse_of(const Row &row) const { return load<Wide>(p_.lse, at(p_.lse, row.batch, row.query, row.head)); }

    bool sees_nothing(const Row &row) const { return lse_of(row) == -std::numeric_limits<double>::infinity(); }

    double probability(const Row &row, const Windows &w, const Position &u, Entry kind) const {
        const double lse = lse_of(row);
        // An infinite score makes the whole softmax NaN.
        if (lse > std::numeric_limits<double>::max()) return std::numeric_limits<double>::quiet_NaN();
        return std::exp(score(row, w, u, kind) - lse);
    }

    double grad_score(const Row &row, const Windows &w, const Position &u, Entry kind) const {
        const int64_t g = at(p_.grad_output, row.batch, row.query, row.head);
        double grad =
            -dot(p_.grad_output, g, p_.output, at(p_.output, row.batch, row.query, row.head), p_.value_channels);
        if (kind == Entry::key) {
            grad += dot(p_.grad_output, g, p_.value, at(p_.value, row.batch, key_at(w, u), kv_head_of(row.head)),
                        p_.value_channels);
        }
        if (p_.grad_lse.data) grad += load<Wide>(p_.grad_lse, at(p_.grad_lse, row.batch, row.query, row.head));
        return probability(row, w, u, kind) * grad;
    }

    void write_grad_query(const Row &row, double *sum) const {
        const Windows w = windows_of(row.query);
        std::fill(sum, sum + p_.channels, 0.0);
        if (!sees_nothing(row)) {
            each_entry(row.batch, w, [&](const Position &u, Entry kind) {
                if (kind != Entry::key) return;
                const double grad = p_.scale * grad_score(row, w, u, kind);
                const int64_t k = at(p_.key, row.batch, key_at(w, u), kv_head_of(row.head));
                for (int64_t c = 0; c < p_.channels; ++c) sum[c] += grad * load<T>(p_.key, k + c * p_.key.channel);
            });
        }
        const int64_t out = at(p_.grad_query, row.batch, row.query, row.head);
        for (int64_t c = 0; c < p_.channels; ++c) store<T>(p_.grad_query, out + c * p_.grad_query.channel, sum[c]);
    }

    // Whether a key of the axis is in the window, and if so as which entry.
    static bool find(const Axis &axis, const Window &w, int64_t key, int64_t &u) {
        if (key % axis.dilation != w.residue) return false;
        u = key / axis.dilation - w.start;
        return w.begin <= u && u < w.end;
    }

    // Sums over the queries that see one key, of all heads that share its kv head.
    void write_grad_of_key_or_value(bool of_key, int64_t number, double *sum) const {
        const int64_t kv_head = digit(number, p_.kv_heads), group = p_.heads / p_.kv_heads;
        Position key;
        for (int a = 2; a >= 0; --a) key.axis[a] = digit(number, p_.axis[a].keys);
        const Tensor &from = of_key ? p_.query : p_.grad_output, &to = of_key ? p_.grad_key : p_.grad_value;
        const int64_t channels = of_key ? p_.channels : p_.value_channels;

        std::fill(sum, sum + channels, 0.0);
        Row row;
        row.batch = number;
        Windows w;
        Position u;
        const auto visit_heads = [&] {
            const Entry kind = entry(row.batch, w, u);
            if (kind == Entry::absent) return;
            for (row.head = kv_head * group; row.head < (kv_head + 1) * group; ++row.head) {
                if (sees_nothing(row)) continue;
                const double grad = of_key ? p_.scale * grad_score(row, w, u, kind) : probability(row, w, u, kind);
                const int64_t x = at(from, row.batch, row.query, row.head);
                for (int64_t c = 0; c < channels; ++c) sum[c] += grad * load<T>(from, x + c * from.channel);
            }
        };
        int64_t *i = row.query.axis;
        for (i[0] = 0; i[0] < p_.axis[0].queries; ++i[0]) {
            w.axis[0] = window_of(p_.axis[0], i[0]);
            if (!find(p_.axis[0], w.axis[0], key.axis[0], u.axis[0])) continue;
            for (i[1] = 0; i[1] < p_.axis[1].queries; ++i[1]) {
                w.axis[1] = window_of(p_.axis[1], i[1]);
                if (!find(p_.axis[1], w.axis[1], key.axis[1], u.axis[1])) continue;
                for (i[2] = 0; i[2] < p_.axis[2].queries; ++i[2]) {
                    w.axis[2] = window_of(p_.axis[2], i[2]);
                    if (find(p_.axis[2], w.axis[2], key.axis[2], u.axis[2])) visit_heads();
                }
            }
        }
        const int64_t out = at(to, number, key, kv_head);
        for (int64_t c = 0; c < channels; ++c) store<T>(to, out + c * to.channel, sum[c]);
    }

    // What an element of a bias gradient sums over: rows, and in each row entries or, for the relative-position table,
    // the entries at some offset. Per dimension one coordinate, or all where the caller's tensor has a stride of 0.
    struct Range {
        int64_t begin, end;

        // Takes a dimension's coordinate off an element's number.
        static Range taken(int64_t &number, int64_t extent, bool sums) {
            if (sums) return {0, extent};
            const int64_t x = digit(number, extent);
            return {x, x + 1};
        }
        static int64_t elements(int64_t extent, bool sums) { return sums ? 1 : extent; }
    };

    template <class Visit>
    static void each_position(const Range (&range)[3], const Visit &visit) {
        Position x;
        for (x.axis[0] = range[0].begin; x.axis[0] < range[0].end; ++x.axis[0]) {
            for (x.axis[1] = range[1].begin; x.axis[1] < range[1].end; ++x.axis[1]) {
                for (x.axis[2] = range[2].begin; x.axis[2] < range[2].end; ++x.axis[2]) visit(x);
            }
        }
    }

    template <class Visit>
    void each_row_that_sees(const Range &batches, const Range (&queries)[3], const Range &heads,
                            const Visit &visit) const {
        Row row;
        for (row.batch = batches.begin; row.batch < batches.end; ++row.batch) {
            each_position(queries, [&](const Position &query) {
                row.query = query;
                for (row.head = heads.begin; row.head < heads.end; ++row.head) {
                    if (!sees_nothing(row)) visit(row, windows_of(query));
                }
            });
        }
    }

    // The gradient of `bias` (only_axis -1), or of one axis' bias, which sums over the window's other axes.
    void write_grad_bias(const Workers &workers, const Tensor &to, int only_axis) const {
        const bool sums_batch = to.batch == 0, sums_heads = to.head == 0;
        bool sums_queries[3], sums_entries[3];
        int64_t count = Range::elements(p_.batch, sums_batch) * Range::elements(p_.heads, sums_heads);
        for (int a = 0; a < 3; ++a) {
            sums_queries[a] = to.axis[a] == 0;
            sums_entries[a] = to.channel == 0 || (only_axis >= 0 && only_axis != a);
            count *= Range::elements(p_.axis[a].queries, sums_queries[a]);
            count *= Range::elements(p_.axis[a].kernel, sums_entries[a]);
        }
        each(workers, count, [&](int64_t number, int32_t) {
            Range queries[3], entries[3];
            for (int a = 2; a >= 0; --a) entries[a] = Range::taken(number, p_.axis[a].kernel, sums_entries[a]);
            const Range heads = Range::taken(number, p_.heads, sums_heads);
            for (int a = 2; a >= 0; --a) queries[a] = Range::taken(number, p_.axis[a].queries, sums_queries[a]);
            const Range batches = Range::taken(number, p_.batch, sums_batch);

            double sum = 0;
            each_row_that_sees(batches, queries, heads, [&](const Row &row, const Windows &w) {
                each_position(entries, [&](const Position &u) {
                    const Entry kind = entry(row.batch, w, u);
                    if (kind != Entry::absent) sum += grad_score(row, w, u, kind);
                });
            });
            const Position first = {{entries[0].begin, entries[1].begin, entries[2].begin}};
            const int64_t element = only_axis < 0 ? entry_number(first) : first.axis[only_axis];
            const Position query = {{queries[0].begin, queries[1].begin, queries[2].begin}};
            store<Wide>(to, at(to, batches.begin, query, heads.begin) + element * to.channel, sum);
        });
    }

    void write_grad_rel_pos_bias(const Workers &workers) const {
        const Tensor &to = p_.grad_rel_pos_bias;
        const bool sums_heads = to.head == 0;
        bool sums_offsets[3];
        int64_t width[3], count = Range::elements(p_.heads, sums_heads);
        for (int a = 0; a < 3; ++a) {
            width[a] = 2 * p_.axis[a].kernel - 1;
            sums_offsets[a] = to.axis[a] == 0;
            count *= Range::elements(width[a], sums_offsets[a]);
        }
        const Range all_batches = {0, p_.batch};
        const Range all_queries[3] = {{0, p_.axis[0].queries}, {0, p_.axis[1].queries}, {0, p_.axis[2].queries}};
        each(workers, count, [&](int64_t number, int32_t) {
            Range offsets[3];
            for (int a = 2; a >= 0; --a) offsets[a] = Range::taken(number, width[a], sums_offsets[a]);
            const Range heads = Range::taken(number, p_.heads, sums_heads);

            double sum = 0;
            each_row_that_sees(all_batches, all_queries, heads, [&](const Row &row, const Windows &w) {
                const Position none = {{0, 0, 0}};
                const Position first = table_index(w, none);
                each_position(offsets, [&](const Position &offset) {
                    const Position u = {{offset.axis[0] - first.axis[0], offset.axis[1] - first.axis[1],
                                         offset.axis[2] - first.axis[2]}};
                    const Entry kind = entry(row.batch, w, u);
                    if (kind != Entry::absent) sum += grad_score(row, w, u, kind);
                });
            });
            const Position element = {{offsets[0].begin, offsets[1].begin, offsets[2].begin}};
            store<Wide>(to, at(to, 0, element, heads.begin), sum);
        });
    }

    const Problem &p_;
};

template <class T, class Wide>
void run_as(const Problem &problem, Pass pass, const Workers &workers, double *scratch) {
    const Reference<T, Wide> reference(problem);
    pass == Pass::forward ? reference.forward(workers, scratch) : reference.backward(workers, scratch);
}

const char *declines(const Problem &, Pass) { return nullptr; }

// One sum over channels a worker.
size_t workspace(const Problem &p, Pass pass, int32_t workers) {
    const int64_t width = pass == Pass::forward ? p.value_channels : std::max(p.channels, p.value_channels);
    return static_cast<size_t>(width) * static_cast<size_t>(workers) * sizeof(double);
}

void run(const Problem &p, Pass pass, const Workers &workers, void *workspace) {
    double *scratch = static_cast<double *>(workspace);
    switch (p.dtype) {
        case Dtype::float32:
            return run_as<float, float>(p, pass, workers, scratch);
        case Dtype::float64:
            return run_as<double, double>(p, pass, workers, scratch);
        case Dtype::float16:
            return run_as<float16, float>(p, pass, workers, scratch);
        case Dtype::bfloat16:
            return run_as<bfloat16, float>(p, pass, workers, scratch);
    }
}

}  // namespace

extern const Variant reference_variant;
const Variant reference_variant = {"reference",
                                   "slow and obviously right, accumulating in double",
                                   0,
                                   declines,
                                   workspace,
                                   run,
                                   {window_product_workspace, run_window_product},
                                   {linear_attention_workspace, run_linear_attention},
                                   {routed_attention_workspace, run_routed_attention}};

}  // namespace localattn
