// Window attention whose stride makes blocks of queries share one window (halo attention): dense products of a block's
// queries and its window, where the walk of plan.h would leave most lanes empty.
//
//   s = scale q.k + biases of the window's row and column    p = exp(s - lse)    output = sum p v
//   dp = dO.v    ds = p (dp - delta)    dQ = scale sum ds k    dK = scale sum ds q    dV = sum p dO
//
// Lanes are the queries of a block, up to 64 at a time, so that the softmax and the sums over keys stay within a lane.
// Keys and values lie packed by position, a panel at a time: the rows of the map that one row of blocks sees, and as
// many columns as fit the L2 cache; each block multiplies its window's rows where they lie there. A job goes down
// several rows of blocks, and packs only the rows that the last did not see, into a ring. Entries of the window outside
// the map have no product, only their biases.
//
// The backward is one pass of five products: a job owns a strip, several rows of blocks of one head, and adds up its
// keys' and values' gradients in memory of its own, block after block. Rows of keys that several strips see are written
// aside and added in the order of the strips. How many strips there are is the problem's to say, never the workers'.
#pragma once
#include "../problem.h"
#include "product.h"
#include "scores.h"
#include "softmax.h"

namespace localattn::cpu {

inline constexpr int64_t block_queries = 64, panel_bytes = 512 * 1024;

// Queries of one axis that share a window, and those windows' extremes.
struct QueryRun {
    int64_t first, count;
    Window window;
    int64_t begin() const { return window.start + window.begin; }  // keys
    int64_t end() const { return window.start + window.end; }
};
struct QueryRuns {
    int64_t count = 0;
    QueryRun *run = nullptr;
};
LOCALATTN_INLINE bool same_window(const Window &a, const Window &b) {
    return a.start == b.start && a.begin == b.begin && a.end == b.end;
}
// Counts them only, if `arena` does.
LOCALATTN_INLINE QueryRuns query_runs(const Axis &axis, Arena *arena) {
    QueryRuns runs;
    for (int64_t q = 0; q < axis.queries; ++q)
        if (q == 0 || !same_window(window_of(axis, q), window_of(axis, q - 1))) ++runs.count;
    if (!arena) return runs;
    runs.run = arena->take<QueryRun>(runs.count);
    if (arena->counting()) return runs;
    int64_t n = -1;
    for (int64_t q = 0; q < axis.queries; ++q) {
        const Window w = window_of(axis, q);
        if (q == 0 || !same_window(w, runs.run[n].window)) runs.run[++n] = {q, 0, w};
        ++runs.run[n].count;
    }
    return runs;
}

template <class V>
struct Blocked {
    using T = typename V::T;
    using reg = typename V::reg;

    const Problem &p;
    const Codec<V> &codec;
    static constexpr int64_t row = block_queries + V::lanes;  // of buffers by channel
    int64_t key_row = 0, value_row = 0;                       // of buffers by position
    QueryRuns rows{}, columns{};
    int64_t panels = 0, *panel_begin = nullptr;  // [panels + 1] runs of columns
    int64_t panel_height = 0, panel_width = 0;   // keys, at most
    int64_t row_jobs = 1;                        // of the forward: rows of blocks are cut into as many

    // Rows of blocks [begin, end) and the rows of keys [y, end_y) that they see; together the strips see every row.
    struct Strip {
        int64_t begin, end, y, end_y;
        int64_t unshared, end_unshared;  // rows of keys that no other strip sees
        int64_t shared_before;           // rows that earlier strips share
        int64_t height() const { return end_y - y; }
        bool is_shared(int64_t at) const { return at < unshared || at >= end_unshared; }
        // Of a shared row, among those of all strips.
        int64_t index(int64_t at) const {
            return shared_before + at - y - (at < unshared ? 0 : end_unshared - unshared);
        }
    };
    static constexpr int64_t most_strips = 32, least_row_jobs = 32;
    Strip strip[most_strips] = {};
    int64_t strips = 0, strip_height = 0;  // rows of keys, at most
    int64_t shared_rows = 0;               // of all strips of a head
    T *aside = nullptr;                    // [batch * heads][shared_rows][keys of a row][key_row + value_row]

    // Whether blocks of this problem are large enough, and nothing in it needs the walk.
    static bool takes(const Problem &p, Pass pass) {
        if (p.raster || p.bias.data || p.rel_pos_bias.data || p.axis_bias[0].data || p.key_mask.data) return false;
        if (p.heads != p.kv_heads || p.axis[0].queries != 1 || p.axis[0].keys != 1 || p.axis[0].kernel != 1)
            return false;
        int64_t blocks = 1, queries = 1;
        for (int a = 1; a < 3; ++a) {
            const Axis &axis = p.axis[a];
            if (axis.causal || axis.dilation != 1 || axis.keys == 0) return false;
            // A gradient that sums over a broadcast axis meets other jobs'. Asked of the bias too, so that no gradient
            // depends on which others are wanted.
            const auto sums = [&](const Tensor &t) {
                return t.data && ((t.batch == 0 && p.batch > 1) || (t.head == 0 && p.heads > 1) ||
                                  (t.axis[1] == 0 && p.axis[1].queries > 1) ||
                                  (t.axis[2] == 0 && p.axis[2].queries > 1) || (t.channel == 0 && axis.kernel > 1));
            };
            if (sums(p.axis_bias[a]) || (pass == Pass::backward && sums(p.grad_axis_bias[a]))) return false;
            blocks *= query_runs(axis, nullptr).count;
            queries *= axis.queries;
        }
        return blocks * V::lanes <= queries;
    }

    struct Buffers {
        T *keys, *values;           // [panel_height, a ring][panel_width][key_row or value_row]
        T *q, *grad_o, *o;          // by channel
        T *sum;                     // output or query's gradient, by channel
        T *q_rows, *grad_o_rows;    // by position
        T *s, *dp;                  // [entries][row]
        T *bias[2], *grad_bias[2];  // [kernel][row]
        T *reference, *total, *lse, *delta;
        T *scratch;                  // for unpacking
        T *grad_keys, *grad_values;  // [strip_height][keys of a row][key_row or value_row]
    };
    int64_t window_rows_at_once(int64_t width) const { return most(1, block_queries / most(1, width)); }
    LOCALATTN_INLINE Buffers take_buffers(const Blocked &b, Arena &arena) {
        const Problem &p = b.p;
        const bool backward = b.strips > 0;
        const int64_t entries = most(block_queries, p.axis[2].kernel), keys = p.axis[2].keys;
        Buffers w;
        w.keys = arena.take<T>(b.panel_height * b.panel_width * b.key_row);
        w.values = arena.take<T>(b.panel_height * b.panel_width * b.value_row);
        w.q = arena.take<T>(p.channels * row);
        w.grad_o = arena.take<T>(backward ? p.value_channels * row : 0);
        w.o = arena.take<T>(backward ? p.value_channels * row : 0);
        w.sum = arena.take<T>(most(p.channels, p.value_channels) * row);
        w.q_rows = arena.take<T>(backward ? block_queries * b.key_row : 0);
        w.grad_o_rows = arena.take<T>(backward ? block_queries * b.value_row : 0);
        w.s = arena.take<T>(entries * row);
        w.dp = arena.take<T>(backward ? entries * row : 0);
        for (int a = 0; a < 2; ++a) {
            w.bias[a] = arena.take<T>(p.axis_bias[a + 1].data ? p.axis[a + 1].kernel * row : 0);
            w.grad_bias[a] = arena.take<T>(p.grad_axis_bias[a + 1].data ? p.axis[a + 1].kernel * row : 0);
        }
        w.reference = arena.take<T>(row);
        w.total = arena.take<T>(row);
        w.lse = arena.take<T>(row);
        w.delta = arena.take<T>(row);
        w.scratch = arena.take<T>(most(block_queries, most(p.channels, p.value_channels)) * V::lanes);
        w.grad_keys = arena.take<T>(b.strip_height * keys * b.key_row);
        w.grad_values = arena.take<T>(b.strip_height * keys * b.value_row);
        return w;
    }

    // ---- panels of keys and values

    struct Panel {
        int64_t row_run, first_run, end_run;  // runs of rows and of columns
        int64_t y, x, height, width;          // keys
    };
    Panel panel(int64_t row_run, int64_t i) const {
        Panel n{row_run, panel_begin[i], panel_begin[i + 1], rows.run[row_run].begin(), 0, 0, 0};
        n.height = rows.run[row_run].end() - n.y;
        n.x = columns.run[n.first_run].begin();
        n.width = columns.run[n.end_run - 1].end() - n.x;
        return n;
    }
    void make_panels(Arena &arena) {
        panel_begin = arena.take<int64_t>(columns.count + 1);
        panel_height = p.axis[1].kernel < p.axis[1].keys ? p.axis[1].kernel : p.axis[1].keys;
        const int64_t room = panel_bytes / static_cast<int64_t>(sizeof(T)) / (panel_height * (key_row + value_row));
        panels = 0;
        panel_width = least(p.axis[2].keys, most(room, p.axis[2].kernel));
        if (arena.counting()) return;
        int64_t begin = 0;
        for (int64_t i = 0; i < columns.count; ++i) {
            if (i == 0 || columns.run[i].end() - begin > panel_width) {
                panel_begin[panels++] = i;
                begin = columns.run[i].begin();
            }
        }
        panel_begin[panels] = columns.count;
    }
    T *panel_row(T *panel, int64_t y, int64_t elements) const {
        return panel + y % panel_height * panel_width * elements;
    }
    // Rows of the map from `y` on; those before are there from the row of blocks above.
    void load_panel(int64_t b, int64_t h, const Panel &n, int64_t y, const Buffers &w) const {
        for (y = most(y, n.y); y < n.y + n.height; ++y) {
            load_row(p.key, b, h, n, y, p.channels, panel_row(w.keys, y, key_row));
            load_row(p.value, b, h, n, y, p.value_channels, panel_row(w.values, y, value_row));
        }
    }
    void load_row(const Tensor &t, int64_t b, int64_t h, const Panel &n, int64_t y, int64_t channels, T *to) const {
        const int64_t offset = b * t.batch + h * t.head + y * t.axis[1] + n.x * t.axis[2];
        pack_by_position(codec, t, sequence_of(offset, t, 1, n.width), 0, n.width, channels, T(1), to);
    }
    // Calls visit(panel) for the panels of rows of blocks [begin, end), loaded.
    template <class Visit>
    LOCALATTN_INLINE void each_panel(const Blocked &k, int64_t b, int64_t h, int64_t i, int64_t begin, int64_t end,
                                     const Buffers &w, const Visit &visit) {
        for (int64_t run = begin, loaded = 0; run < end; ++run) {
            const Panel n = k.panel(run, i);
            k.load_panel(b, h, n, loaded, w);
            loaded = most(loaded, n.y + n.height);
            visit(n);
        }
    }

    // ---- one block, up to 64 of its queries

    struct Block {
        int64_t batch, head;
        const QueryRun *y, *x;
        int64_t first, count;
        int64_t column;  // of the window's first key, in the panel
        int64_t wide() const { return whole_lanes(count, V::lanes); }
        int64_t width() const { return x->window.present_end - x->window.present_begin; }
        // Of the window's columns present, how many lie before the map.
        int64_t before() const { return x->window.begin - x->window.present_begin; }
        int64_t inside() const { return x->window.end - x->window.begin; }
        bool on_map(int64_t u) const { return y->window.begin <= u && u < y->window.end; }
    };
    template <class Visit>
    LOCALATTN_INLINE void each_block(const Blocked &k, int64_t b, int64_t h, const Panel &n, const Visit &visit) {
        for (int64_t i = n.first_run; i < n.end_run; ++i) {
            const QueryRun &y = k.rows.run[n.row_run], &x = k.columns.run[i];
            const int64_t queries = y.count * x.count, column = x.begin() - n.x;
            for (int64_t first = 0; first < queries; first += block_queries)
                visit(Block{b, h, &y, &x, first, least(block_queries, queries - first), column});
        }
    }
    // Keys or values of row u of the window, from its first one on the map on.
    const T *window_row(T *panel, const Block &x, int64_t u, int64_t elements) const {
        return panel_row(panel, x.y->window.start + u, elements) + x.column * elements;
    }
    Sequence queries(const Tensor &t, const Block &x) const {
        return sequence_of(x.batch * t.batch + x.head * t.head + x.y->first * t.axis[1] + x.x->first * t.axis[2], t,
                           x.y->count, x.x->count);
    }
    void load(const Tensor &t, const Block &x, int64_t channels, T factor, T *to) const {
        pack_by_channel(codec, t, queries(t, x), x.first, x.count, channels, factor, to, row);
    }
    void load_biases(const Block &x, const Buffers &w) const {
        for (int a = 0; a < 2; ++a)
            if (const Tensor &t = p.axis_bias[a + 1]; t.data) load(t, x, p.axis[a + 1].kernel, T(log2_e), w.bias[a]);
    }
    // Scores of window rows [begin, end) to s, in units of log 2: [row][column present][lane].
    void score(const Block &x, int64_t begin, int64_t end, const Buffers &w) const {
        const int64_t width = x.width(), wide = x.wide();
        for (int64_t u = begin; u < end; ++u) {
            T *s = w.s + (u - begin) * width * row;
            const T *by_row = w.bias[0] + u * row, *by_column = w.bias[1] + x.x->window.present_begin * row;
            const bool rows_biased = p.axis_bias[1].data, columns_biased = p.axis_bias[2].data;
            for (int64_t i = 0; i < wide; i += V::lanes) {
                const reg of_row = rows_biased ? V::load(by_row + i) : reg{};
                for (int64_t v = 0; v < width; ++v)
                    V::store(s + v * row + i, columns_biased ? of_row + V::load(by_column + v * row + i) : of_row);
            }
            if (x.on_map(u))
                add_product<V>(window_row(w.keys, x, u, key_row), 1, key_row, w.q, row, p.channels,
                               s + x.before() * row, row, x.inside(), wide);
        }
    }
    template <class Visit>
    LOCALATTN_INLINE void each_rows(const Blocked &k, const Block &x, const Visit &visit) {
        const Window &w = x.y->window;
        if (x.width() <= 0) return;
        const int64_t step = k.window_rows_at_once(x.width());
        for (int64_t u = w.present_begin; u < w.present_end; u += step) visit(u, least(u + step, w.present_end));
    }
    template <class Visit>
    LOCALATTN_INLINE void each_row_on_map(const Block &x, int64_t begin, int64_t end, const Visit &visit) {
        if (x.inside() <= 0) return;
        for (int64_t u = begin; u < end; ++u)
            if (x.on_map(u)) visit(u, ((u - begin) * x.width() + x.before()) * row);
    }

    void attend(const Block &x, const Buffers &w) const {
        const int64_t wide = x.wide();
        const StreamedSoftmax<V> softmax{w.reference, w.total};
        load(p.query, x, p.channels, T(p.scale * log2_e), w.q);
        load_biases(x, w);
        for (int64_t e = 0; e < p.value_channels; ++e) clear<V>(w.sum + e * row, wide);
        softmax.begin(softmax, wide);
        each_rows(*this, x, [&](int64_t begin, int64_t end) {
            score(x, begin, end, w);
            softmax.add(softmax, w.s, row, (end - begin) * x.width(), wide, w.sum, p.value_channels);
            each_row_on_map(x, begin, end, [&](int64_t u, int64_t entry) {
                add_product<V>(window_row(w.values, x, u, value_row), value_row, 1, w.s + entry, row, x.inside(), w.sum,
                               row, p.value_channels, wide);
            });
        });
        softmax.finish(softmax, row, wide, w.sum, p.value_channels, w.lse);
        unpack_by_channel(codec, w.sum, row, p.output, queries(p.output, x), x.first, x.count, p.value_channels, T(1),
                          w.scratch);
        if (p.lse.data) write_numbers<V>(w.lse, p.lse, queries(p.lse, x), x.first, x.count);
    }
    void forward(int64_t job, const Buffers &w) const {
        const int64_t i = job % panels, part = job / panels % row_jobs, head = job / panels / row_jobs;
        const int64_t b = head / p.heads, h = head % p.heads;
        each_panel(*this, b, h, i, rows.count * part / row_jobs, rows.count * (part + 1) / row_jobs, w,
                   [&](const Panel &n) { each_block(*this, b, h, n, [&](const Block &x) { attend(x, w); }); });
    }

    // ---- backward

    void make_strips() {
        const Axis &axis = p.axis[1];
        strips = most(1, least(rows.count, most_strips / most(1, p.batch * p.heads)));
        int64_t run = -1, n = -1;
        for (int64_t q = 0; q < axis.queries; ++q) {
            const Window w = window_of(axis, q);
            if (q > 0 && same_window(w, window_of(axis, q - 1))) continue;
            if (++run == rows.count * (n + 1) / strips) strip[++n] = {run, run, w.start + w.begin, 0, 0, 0, 0};
            strip[n].end = run + 1;
            strip[n].end_y = w.start + w.end;
        }
        strip[0].y = 0;
        strip[strips - 1].end_y = axis.keys;
        for (n = 1; n < strips; ++n) strip[n].y = least(strip[n].y, strip[n - 1].end_y);
        for (n = 0; n < strips; ++n) {
            Strip &s = strip[n];
            s.unshared = n == 0 ? 0 : strip[n - 1].end_y;
            s.end_unshared = most(s.unshared, n == strips - 1 ? axis.keys : strip[n + 1].y);
            s.shared_before = shared_rows;
            shared_rows += s.height() - (s.end_unshared - s.unshared);
            strip_height = most(strip_height, s.height());
        }
    }

    void load_statistics(const Block &x, const Buffers &w) const {
        read_numbers<V>(p.lse, queries(p.lse, x), x.first, x.count, w.lse);
        if (p.grad_lse.data) read_numbers<V>(p.grad_lse, queries(p.grad_lse, x), x.first, x.count, w.delta);
        for (int64_t i = 0; i < x.wide(); i += V::lanes) {
            reg sum{};
            for (int64_t e = 0; e < p.value_channels; ++e)
                sum += V::load(w.grad_o + e * row + i) * V::load(w.o + e * row + i);
            if (p.grad_lse.data) sum -= V::load(w.delta + i);
            store_statistics<V>(V::load(w.lse + i) * T(log2_e), sum, w.lse + i, w.delta + i);
        }
    }
    // s to p, dp to ds; adds ds to the biases' gradients.
    void differentiate(const Block &x, int64_t begin, int64_t end, const Buffers &w) const {
        const int64_t width = x.width();
        const bool of_rows = p.grad_axis_bias[1].data, of_columns = p.grad_axis_bias[2].data;
        for (int64_t i = 0; i < x.wide(); i += V::lanes) {
            const reg lse = V::load(w.lse + i), delta = V::load(w.delta + i);
            for (int64_t u = begin; u < end; ++u) {
                T *s = w.s + (u - begin) * width * row + i, *dp = w.dp + (u - begin) * width * row + i;
                T *column = of_columns ? w.grad_bias[1] + x.x->window.present_begin * row + i : nullptr;
                reg sum{};
                for (int64_t v = 0; v < width; ++v) {
                    const reg probability = V::exp2(V::load(s + v * row) - lse);
                    const reg ds = probability * (V::load(dp + v * row) - delta);
                    V::store(s + v * row, probability);
                    V::store(dp + v * row, ds);
                    sum += ds;
                    if (of_columns) V::store(column + v * row, V::load(column + v * row) + ds);
                }
                if (of_rows) V::store(w.grad_bias[0] + u * row + i, sum);
            }
        }
    }
    // The gradients of one block; those of keys and values are added to the strip's rows, of which the first is told.
    void differentiate_block(const Block &x, int64_t first_row, const Buffers &w) const {
        const int64_t wide = x.wide(), keys = p.axis[2].keys;
        load(p.query, x, p.channels, T(p.scale * log2_e), w.q);
        load(p.grad_output, x, p.value_channels, T(1), w.grad_o);
        load(p.output, x, p.value_channels, T(1), w.o);
        pack_by_position(codec, p.query, queries(p.query, x), x.first, x.count, p.channels, T(1), w.q_rows);
        pack_by_position(codec, p.grad_output, queries(p.grad_output, x), x.first, x.count, p.value_channels, T(1),
                         w.grad_o_rows);
        load_biases(x, w);
        load_statistics(x, w);
        for (int64_t c = 0; c < p.channels; ++c) clear<V>(w.sum + c * row, wide);
        for (int a = 0; a < 2; ++a)
            if (p.grad_axis_bias[a + 1].data) clear<V>(w.grad_bias[a], p.axis[a + 1].kernel * row);
        each_rows(*this, x, [&](int64_t begin, int64_t end) {
            score(x, begin, end, w);
            clear<V>(w.dp, (end - begin) * x.width() * row);
            each_row_on_map(x, begin, end, [&](int64_t u, int64_t entry) {
                add_product<V>(window_row(w.values, x, u, value_row), 1, value_row, w.grad_o, row, p.value_channels,
                               w.dp + entry, row, x.inside(), wide);
            });
            differentiate(x, begin, end, w);
            each_row_on_map(x, begin, end, [&](int64_t u, int64_t entry) {
                const int64_t at = (x.y->window.start + u - first_row) * keys + x.x->begin();
                if (p.grad_query.data)
                    add_product<V>(window_row(w.keys, x, u, key_row), key_row, 1, w.dp + entry, row, x.inside(), w.sum,
                                   row, p.channels, wide);
                if (p.grad_key.data)
                    add_product<V>(w.dp + entry, 1, row, w.q_rows, key_row, x.count, w.grad_keys + at * key_row,
                                   key_row, x.inside(), key_row);
                if (p.grad_value.data)
                    add_product<V>(w.s + entry, 1, row, w.grad_o_rows, value_row, x.count,
                                   w.grad_values + at * value_row, value_row, x.inside(), value_row);
            });
        });
        if (p.grad_query.data)
            unpack_by_channel(codec, w.sum, row, p.grad_query, queries(p.grad_query, x), x.first, x.count, p.channels,
                              T(p.scale), w.scratch);
        for (int a = 0; a < 2; ++a) {
            const Tensor &t = p.grad_axis_bias[a + 1];
            if (!t.data) continue;
            Sequence to = queries(t, x);
            for (int64_t u = 0; u < p.axis[a + 1].kernel; ++u, to.offset += t.channel)
                write_numbers<V>(w.grad_bias[a] + u * row, t, to, x.first, x.count);
        }
    }
    void backward(int64_t job, const Buffers &w) const {
        const int64_t head = job / strips, b = head / p.heads, h = head % p.heads, keys = p.axis[2].keys;
        const Strip &s = strip[job % strips];
        clear<V>(w.grad_keys, s.height() * keys * key_row);
        clear<V>(w.grad_values, s.height() * keys * value_row);
        for (int64_t i = 0; i < panels; ++i)
            each_panel(*this, b, h, i, s.begin, s.end, w, [&](const Panel &n) {
                each_block(*this, b, h, n, [&](const Block &x) { differentiate_block(x, s.y, w); });
            });
        for (int64_t y = s.y; y < s.end_y; ++y) {
            const T *of_keys = w.grad_keys + (y - s.y) * keys * key_row;
            const T *of_values = w.grad_values + (y - s.y) * keys * value_row;
            if (!s.is_shared(y)) {
                write_row(b, h, y, of_keys, of_values, w.scratch);
                continue;
            }
            T *to = shared_row(head, s.index(y));
            for (int64_t i = 0; i < keys * key_row; i += V::lanes) V::store(to + i, V::load(of_keys + i));
            to += keys * key_row;
            for (int64_t i = 0; i < keys * value_row; i += V::lanes) V::store(to + i, V::load(of_values + i));
        }
    }
    T *shared_row(int64_t head, int64_t index) const {
        return aside + (head * shared_rows + index) * p.axis[2].keys * (key_row + value_row);
    }
    void write_row(int64_t b, int64_t h, int64_t y, const T *of_keys, const T *of_values, T *scratch) const {
        const auto write = [&](const Tensor &t, int64_t channels, T factor, const T *from) {
            if (!t.data) return;
            const Sequence to = sequence_of(b * t.batch + h * t.head + y * t.axis[1], t, 1, p.axis[2].keys);
            unpack_by_position(codec, from, t, to, p.axis[2].keys, channels, factor, scratch);
        };
        write(p.grad_key, p.channels, T(p.scale), of_keys);
        write(p.grad_value, p.value_channels, T(1), of_values);
    }
    // The rows that several strips saw, of one head.
    void add_shared(int64_t head, const Buffers &w) const {
        const int64_t elements = p.axis[2].keys * (key_row + value_row);
        for (int64_t i = 0; i + 1 < strips; ++i) {
            // The rows that strip i is the first to see.
            for (int64_t y = i == 0 ? 0 : strip[i - 1].end_y; y < strip[i].end_y; ++y) {
                if (!strip[i].is_shared(y)) continue;
                T *sum = shared_row(head, strip[i].index(y));
                for (int64_t n = i + 1; n < strips && strip[n].y <= y; ++n) {
                    const T *more = shared_row(head, strip[n].index(y));
                    for (int64_t j = 0; j < elements; j += V::lanes)
                        V::store(sum + j, V::load(sum + j) + V::load(more + j));
                }
                write_row(head / p.heads, head % p.heads, y, sum, sum + p.axis[2].keys * key_row, w.scratch);
            }
        }
    }

    // Runs the pass, or, without memory, measures what it needs.
    size_t run(Pass pass, const Workers &workers, void *memory) {
        Arena arena(memory);
        key_row = whole_lanes(p.channels, V::lanes);
        value_row = whole_lanes(p.value_channels, V::lanes);
        rows = query_runs(p.axis[1], &arena);
        columns = query_runs(p.axis[2], &arena);
        make_panels(arena);
        if (pass == Pass::backward) {
            make_strips();
            aside = arena.take<T>(p.batch * p.heads * shared_rows * p.axis[2].keys * (key_row + value_row));
        }
        Arena measure(nullptr);
        take_buffers(*this, measure);
        const size_t shared = arena.used(), each = measure.used();
        if (!memory) return shared + static_cast<size_t>(workers.count) * each;

        const auto all = [&](int64_t jobs, void (Blocked::*work)(int64_t, const Buffers &) const) {
            run_jobs(workers, jobs, static_cast<char *>(memory) + shared, each, [&](int64_t job, char *own) {
                Arena buffers(own);
                (this->*work)(job, take_buffers(*this, buffers));
            });
        };
        const int64_t heads = p.batch * p.heads;
        if (pass == Pass::forward) {
            row_jobs = least(rows.count, most(1, least_row_jobs / most(1, heads * panels)));
            all(heads * row_jobs * panels, &Blocked::forward);
            return 0;
        }
        all(heads * strips, &Blocked::backward);
        if (strips > 1 && (p.grad_key.data || p.grad_value.data)) all(heads, &Blocked::add_shared);
        return 0;
    }
};

}  // namespace localattn::cpu
