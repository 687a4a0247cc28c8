// Routed attention: every region of queries attends to its own list of regions of keys.
//
//   s = w scale q.k    p = exp(s - lse)    output = sum p w v          for a choice of weight w
//   dp = w dO.v    ds = p (dp - delta)     delta = dO.output - grad_lse
//   query pass: dQ = scale sum w ds k;  dw = sum ds scale q.k + p dO.v
//   key pass:   dV = sum w p dO;        dK = scale sum w ds q
//
// Lanes are the accumulating side's pixels: 64 queries of a region forward and in the query pass, 64 keys in the key
// pass. So the softmax and every sum stay within a lane, whatever the widths, and rows of the other side are read one
// number at a time (product.h). Lanes = keys in the forward would need a sum across lanes for each query and choice.
//
// A job is one block of lanes of one region and head. It goes through the chosen regions in order, 64 pixels at a time,
// read where they lie: no gathered keys or values, no attention matrix. The key pass finds the regions that chose its
// own through the inverse of the routing, a counting sort, whose order is the order of the sums: no atomics. Work a
// pair: one exp2 a pass, and products of `channels` or `value channels` multiply-adds: 2 forward, 3 in the query pass,
// 4 in the key pass. Bytes: queries and results once; the other side once for each block that reads it, from L2 or L3,
// and each number of it is used by 64 lanes.
#pragma once
#include "../routed_attention.h"
#include "product.h"
#include "scores.h"

namespace localattn::cpu {

inline constexpr int64_t routed_block = 64;  // pixels, of either side

template <class V>
struct Routed {
    using T = typename V::T;
    using reg = typename V::reg;

    const RoutedProblem &p;
    const Codec<V> &codec;
    int64_t row = routed_block + V::lanes;  // of buffers by channel
    int64_t key_row = 0, value_row = 0;     // of buffers by position

    int64_t *inverse = nullptr, *inverse_begin = nullptr;  // (region * topk + choice) by chosen region, per batch
    T *grad_weight = nullptr;                              // [batch][regions][topk][heads][query blocks]

    struct Buffers {
        T *a, *b, *o;            // lanes' side by channel: query or key; dO or value; output
        T *sum_a, *sum_b;        // what is accumulated for them
        T *key, *value, *other;  // the other side by position
        T *s, *dp;               // [block][row]
        T *maximum, *total, *lse, *delta;
        T *scratch;
    };
    LOCALATTN_INLINE Buffers take_buffers(const Routed &r, Arena &arena) {
        const int64_t widest = most(r.p.channels, r.p.value_channels);
        Buffers w;
        w.a = arena.take<T>(r.p.channels * r.row);
        w.b = arena.take<T>(r.p.value_channels * r.row);
        w.o = arena.take<T>(r.p.value_channels * r.row);
        w.sum_a = arena.take<T>(r.p.channels * r.row);
        w.sum_b = arena.take<T>(r.p.value_channels * r.row);
        w.key = arena.take<T>(routed_block * r.key_row);
        w.value = arena.take<T>(routed_block * r.value_row);
        w.other = arena.take<T>(routed_block * r.value_row);
        w.s = arena.take<T>(routed_block * r.row);
        w.dp = arena.take<T>(routed_block * r.row);
        w.maximum = arena.take<T>(r.row);
        w.total = arena.take<T>(r.row);
        w.lse = arena.take<T>(r.row);
        w.delta = arena.take<T>(r.row);
        w.scratch = arena.take<T>(widest * V::lanes);
        return w;
    }

    // One block of pixels of a region.
    struct Place {
        int64_t batch, head, region, block, first, count;
        int64_t wide() const { return whole_lanes(count, V::lanes); }
    };
    LOCALATTN_INLINE int64_t blocks(int64_t pixels) { return (pixels + routed_block - 1) / routed_block; }
    Place place(int64_t job, int64_t pixels) const {
        Place x;
        x.block = job % blocks(pixels);
        job /= blocks(pixels);
        x.head = job % p.heads;
        job /= p.heads;
        x.region = job % p.regions();
        x.batch = job / p.regions();
        x.first = x.block * routed_block;
        x.count = least(routed_block, pixels - x.first);
        return x;
    }
    Sequence of_queries(const Tensor &t, int64_t b, int64_t h, int64_t region) const {
        return sequence_of(p.region_offset(t, b, h, region, p.query_region), t, p.query_region[0], p.query_region[1]);
    }
    Sequence of_keys(const Tensor &t, int64_t b, int64_t h, int64_t region) const {
        return sequence_of(p.region_offset(t, b, h, region, p.key_region), t, p.key_region[0], p.key_region[1]);
    }
    T weight(int64_t b, int64_t region, int64_t choice) const {
        const Tensor &t = p.region_weight;
        if (!t.data) return T(1);
        T one[V::lanes];
        codec.pack(at(codec, t, p.choice_offset(t, b, region, choice)), 1, 1, 0, 1, V::lanes, 1, T(1), one, V::lanes);
        return one[0];
    }

    LOCALATTN_INLINE void clear_rows(T *rows, int64_t channels, ptrdiff_t row, int64_t wide) {
        for (int64_t c = 0; c < channels; ++c) clear<V>(rows + c * row, wide);
    }

    // Calls body(choice, weight, region, first, count) for the chosen regions' pixels, a block at a time.
    template <class Body>
    LOCALATTN_INLINE void each_block_of_keys(const Routed &r, const Place &x, const Body &body) {
        for (int64_t choice = 0; choice < r.p.topk; ++choice) {
            const int64_t region = r.p.index(x.batch, x.region, choice);
            const T w = r.weight(x.batch, x.region, choice);
            for (int64_t first = 0; first < r.p.keys(); first += routed_block)
                body(choice, w, region, first, least(routed_block, r.p.keys() - first));
        }
    }
    void load_keys(const Place &x, int64_t region, int64_t first, int64_t n, const Buffers &w) const {
        pack_by_position(codec, p.key, of_keys(p.key, x.batch, x.head, region), first, n, p.channels, T(1), w.key);
        pack_by_position(codec, p.value, of_keys(p.value, x.batch, x.head, region), first, n, p.value_channels, T(1),
                         w.value);
    }

    void forward(int64_t job, const Buffers &w) const {
        const Place x = place(job, p.queries());
        const int64_t wide = x.wide();
        const reg lowest = V::all(-T(__builtin_inf()));
        pack_by_channel(codec, p.query, of_queries(p.query, x.batch, x.head, x.region), x.first, x.count, p.channels,
                        T(p.scale * log2_e), w.a, row);
        clear_rows(w.sum_b, p.value_channels, row, wide);
        for (int64_t i = 0; i < wide; i += V::lanes) {
            V::store(w.maximum + i, lowest);
            V::store(w.total + i, reg{});
        }
        each_block_of_keys(*this, x, [&](int64_t, T weight, int64_t region, int64_t first, int64_t n) {
            load_keys(x, region, first, n, w);
            clear_rows(w.s, n, row, wide);
            multiply<V>(w.key, 1, key_row, w.a, row, p.channels, w.s, row, n, wide);
            for (int64_t i = 0; i < wide; i += V::lanes) {
                const reg before = V::load(w.maximum + i);
                reg m0 = before, m1 = lowest;
                int64_t k = 0;
                for (; k + 2 <= n; k += 2) {
                    const reg s0 = V::load(w.s + k * row + i) * weight, s1 = V::load(w.s + (k + 1) * row + i) * weight;
                    V::store(w.s + k * row + i, s0);
                    V::store(w.s + (k + 1) * row + i, s1);
                    m0 = V::max(s0, m0);
                    m1 = V::max(s1, m1);
                }
                if (k < n) {
                    const reg s0 = V::load(w.s + k * row + i) * weight;
                    V::store(w.s + k * row + i, s0);
                    m0 = V::max(s0, m0);
                }
                m0 = V::max(m0, m1);
                V::store(w.maximum + i, m0);
                const reg shift = V::shift_of(m0);
                const reg decay = V::exp2(before - shift);
                reg t0 = decay * V::load(w.total + i), t1{};
                for (k = 0; k + 2 <= n; k += 2) {
                    const reg p0 = V::exp2(V::load(w.s + k * row + i) - shift);
                    const reg p1 = V::exp2(V::load(w.s + (k + 1) * row + i) - shift);
                    V::store(w.s + k * row + i, p0 * weight);
                    V::store(w.s + (k + 1) * row + i, p1 * weight);
                    t0 += p0;
                    t1 += p1;
                }
                if (k < n) {
                    const reg p0 = V::exp2(V::load(w.s + k * row + i) - shift);
                    V::store(w.s + k * row + i, p0 * weight);
                    t0 += p0;
                }
                V::store(w.total + i, t0 + t1);
                for (int64_t e = 0; e < p.value_channels; ++e)
                    V::store(w.sum_b + e * row + i, decay * V::load(w.sum_b + e * row + i));
            }
            multiply<V>(w.value, value_row, 1, w.s, row, n, w.sum_b, row, p.value_channels, wide);
        });
        for (int64_t i = 0; i < wide; i += V::lanes) {
            const reg total = V::load(w.total + i);
            const reg inverse = V::inverse_of(total);
            for (int64_t e = 0; e < p.value_channels; ++e)
                V::store(w.sum_b + e * row + i, inverse * V::load(w.sum_b + e * row + i));
            V::store(w.lse + i, (V::load(w.maximum + i) + V::log2(total)) * T(ln_2));
        }
        unpack_by_channel(codec, w.sum_b, row, p.output, of_queries(p.output, x.batch, x.head, x.region), x.first,
                          x.count, p.value_channels, T(1), w.scratch);
        if (p.lse.data) write_numbers<V>(w.lse, p.lse, of_queries(p.lse, x.batch, x.head, x.region), x.first, x.count);
    }

    // lse in units of log 2 and delta of some queries, from dO and output by channel.
    void finish_statistics(int64_t b, int64_t h, int64_t region, int64_t first, int64_t n, const T *grad_output,
                           const T *output, const Buffers &w) const {
        read_numbers<V>(p.lse, of_queries(p.lse, b, h, region), first, n, w.lse);
        if (p.grad_lse.data) read_numbers<V>(p.grad_lse, of_queries(p.grad_lse, b, h, region), first, n, w.delta);
        for (int64_t i = 0; i < n; i += V::lanes) {
            const reg lse = V::load(w.lse + i);
            reg sum{};
            for (int64_t e = 0; e < p.value_channels; ++e)
                sum += V::load(grad_output + e * row + i) * V::load(output + e * row + i);
            if (p.grad_lse.data) sum -= V::load(w.delta + i);
            store_statistics<V>(lse * T(log2_e), sum, w.lse + i, w.delta + i);
        }
    }

    void query_pass(int64_t job, const Buffers &w) const {
        const Place x = place(job, p.queries());
        const int64_t wide = x.wide();
        const auto load = [&](const Tensor &t, int64_t channels, T factor, T *to) {
            pack_by_channel(codec, t, of_queries(t, x.batch, x.head, x.region), x.first, x.count, channels, factor, to,
                            row);
        };
        load(p.query, p.channels, T(p.scale * log2_e), w.a);
        load(p.grad_output, p.value_channels, T(1), w.b);
        load(p.output, p.value_channels, T(1), w.o);
        finish_statistics(x.batch, x.head, x.region, x.first, x.count, w.b, w.o, w);
        clear_rows(w.sum_a, p.channels, row, wide);
        reg sum{};
        each_block_of_keys(*this, x, [&](int64_t choice, T weight, int64_t region, int64_t first, int64_t n) {
            load_keys(x, region, first, n, w);
            clear_rows(w.s, n, row, wide);
            clear_rows(w.dp, n, row, wide);
            multiply<V>(w.key, 1, key_row, w.a, row, p.channels, w.s, row, n, wide);
            multiply<V>(w.value, 1, value_row, w.b, row, p.value_channels, w.dp, row, n, wide);
            if (first == 0) sum = reg{};
            for (int64_t i = 0; i < wide; i += V::lanes) {
                const reg lse = V::load(w.lse + i), delta = V::load(w.delta + i);
                reg here{};
                for (int64_t k = 0; k < n; ++k) {
                    const reg s = V::load(w.s + k * row + i), dp = V::load(w.dp + k * row + i);
                    const reg probability = V::exp2(s * weight - lse);
                    const reg ds = probability * (dp * weight - delta);
                    here += ds * s * T(ln_2) + probability * dp;
                    V::store(w.s + k * row + i, ds * weight);
                }
                for (int l = 0; l < V::lanes; ++l) sum[l] += i + l < x.count ? here[l] : T(0);
            }
            multiply<V>(w.key, key_row, 1, w.s, row, n, w.sum_a, row, p.channels, wide);
            if (p.grad_region_weight.data && first + n == p.keys()) {
                T total = 0;
                for (int l = 0; l < V::lanes; ++l) total += sum[l];
                grad_weight[(((x.batch * p.regions() + x.region) * p.topk + choice) * p.heads + x.head) *
                                blocks(p.queries()) +
                            x.block] = total;
            }
        });
        if (p.grad_query.data)
            unpack_by_channel(codec, w.sum_a, row, p.grad_query, of_queries(p.grad_query, x.batch, x.head, x.region),
                              x.first, x.count, p.channels, T(p.scale), w.scratch);
    }

    void write_grad_weights() const {
        const int64_t terms = p.heads * blocks(p.queries());
        const Tensor &t = p.grad_region_weight;
        for (int64_t i = 0; i < p.batch * p.regions() * p.topk; ++i) {
            T sum = 0;
            for (int64_t j = 0; j < terms; ++j) sum += grad_weight[i * terms + j];
            static_cast<T *>(
                t.data)[p.choice_offset(t, i / p.topk / p.regions(), i / p.topk % p.regions(), i % p.topk)] = sum;
        }
    }

    void invert() const {
        const int64_t n = p.regions() * p.topk;
        for (int64_t b = 0; b < p.batch; ++b) {
            int64_t *begin = inverse_begin + b * (p.regions() + 1), *list = inverse + b * n;
            for (int64_t r = 0; r <= p.regions(); ++r) begin[r] = 0;
            for (int64_t i = 0; i < n; ++i) ++begin[p.index(b, i / p.topk, i % p.topk) + 1];
            for (int64_t r = 0; r < p.regions(); ++r) begin[r + 1] += begin[r];
            for (int64_t i = 0; i < n; ++i) list[begin[p.index(b, i / p.topk, i % p.topk)]++] = i;
            for (int64_t r = p.regions(); r > 0; --r) begin[r] = begin[r - 1];
            begin[0] = 0;
        }
    }

    void key_pass(int64_t job, const Buffers &w) const {
        const Place x = place(job, p.keys());
        const int64_t wide = x.wide();
        const auto load = [&](const Tensor &t, int64_t channels, T factor, T *to) {
            pack_by_channel(codec, t, of_keys(t, x.batch, x.head, x.region), x.first, x.count, channels, factor, to,
                            row);
        };
        load(p.key, p.channels, T(p.scale * log2_e), w.a);
        load(p.value, p.value_channels, T(1), w.b);
        clear_rows(w.sum_a, p.channels, row, wide);
        clear_rows(w.sum_b, p.value_channels, row, wide);
        const int64_t *begin = inverse_begin + x.batch * (p.regions() + 1);
        const int64_t *list = inverse + x.batch * p.regions() * p.topk;
        for (int64_t j = begin[x.region]; j < begin[x.region + 1]; ++j) {
            const int64_t region = list[j] / p.topk;
            const T weight = this->weight(x.batch, region, list[j] % p.topk);
            for (int64_t first = 0; first < p.queries(); first += routed_block)
                add_queries(x, region, weight, first, least(routed_block, p.queries() - first), wide, w);
        }
        const auto store = [&](const Tensor &t, int64_t channels, T factor, const T *from) {
            if (t.data)
                unpack_by_channel(codec, from, row, t, of_keys(t, x.batch, x.head, x.region), x.first, x.count,
                                  channels, factor, w.scratch);
        };
        store(p.grad_key, p.channels, T(p.scale), w.sum_a);
        store(p.grad_value, p.value_channels, T(1), w.sum_b);
    }

    void add_queries(const Place &x, int64_t region, T weight, int64_t first, int64_t n, int64_t wide,
                     const Buffers &w) const {
        const auto of = [&](const Tensor &t) { return of_queries(t, x.batch, x.head, region); };
        pack_by_position(codec, p.query, of(p.query), first, n, p.channels, T(1), w.key);
        pack_by_position(codec, p.grad_output, of(p.grad_output), first, n, p.value_channels, T(1), w.value);
        pack_by_position(codec, p.output, of(p.output), first, n, p.value_channels, T(1), w.other);
        read_numbers<V>(p.lse, of(p.lse), first, n, w.lse);
        if (p.grad_lse.data) read_numbers<V>(p.grad_lse, of(p.grad_lse), first, n, w.delta);
        clear_rows(w.s, n, row, wide);
        clear_rows(w.dp, n, row, wide);
        multiply<V>(w.key, 1, key_row, w.a, row, p.channels, w.s, row, n, wide);
        multiply<V>(w.value, 1, value_row, w.b, row, p.value_channels, w.dp, row, n, wide);
        for (int64_t q = 0; q < n; ++q) {
            reg sum{};
            for (int64_t e = 0; e < value_row; e += V::lanes)
                sum += V::load(w.value + q * value_row + e) * V::load(w.other + q * value_row + e);
            T delta = p.grad_lse.data ? -w.delta[q] : T(0);
            for (int l = 0; l < V::lanes; ++l) delta += sum[l];
            alignas(64) T one[2][V::lanes];
            store_statistics<V>(V::all(w.lse[q] * T(log2_e)), V::all(delta), one[0], one[1]);
            const reg shift = V::load(one[0]), less = V::load(one[1]);
            for (int64_t i = 0; i < wide; i += V::lanes) {
                const reg probability = V::exp2(V::load(w.s + q * row + i) * weight - shift);
                const reg ds = probability * (V::load(w.dp + q * row + i) * weight - less);
                V::store(w.s + q * row + i, probability * weight);
                V::store(w.dp + q * row + i, ds * weight);
            }
        }
        if (p.grad_value.data) multiply<V>(w.value, value_row, 1, w.s, row, n, w.sum_b, row, p.value_channels, wide);
        if (p.grad_key.data) multiply<V>(w.key, key_row, 1, w.dp, row, n, w.sum_a, row, p.channels, wide);
    }

    // Runs the pass, or, without memory, measures what it needs.
    size_t run(const Workers &workers, void *memory) {
        key_row = whole_lanes(p.channels, V::lanes);
        value_row = whole_lanes(p.value_channels, V::lanes);
        const int64_t choices = p.batch * p.regions() * p.topk;
        const bool keys = p.pass == Pass::backward && (p.grad_key.data || p.grad_value.data);
        const bool weights = p.pass == Pass::backward && p.grad_region_weight.data;
        Arena arena(memory);
        inverse = arena.take<int64_t>(keys ? choices : 0);
        inverse_begin = arena.take<int64_t>(keys ? p.batch * (p.regions() + 1) : 0);
        grad_weight = arena.take<T>(weights ? choices * p.heads * blocks(p.queries()) : 0);
        Arena measure(nullptr);
        take_buffers(*this, measure);
        const size_t shared = arena.used(), each = measure.used();
        if (!memory) return shared + static_cast<size_t>(workers.count) * each;

        const auto all = [&](int64_t pixels, void (Routed::*pass)(int64_t, const Buffers &) const) {
            run_jobs(workers, p.batch * p.regions() * p.heads * blocks(pixels), static_cast<char *>(memory) + shared,
                     each, [&](int64_t job, char *own) {
                         Arena buffers(own);
                         (this->*pass)(job, take_buffers(*this, buffers));
                     });
        };
        if (p.pass == Pass::forward) {
            all(p.queries(), &Routed::forward);
            return 0;
        }
        if (p.grad_query.data || weights) all(p.queries(), &Routed::query_pass);
        if (weights) write_grad_weights();
        if (keys) {
            invert();
            all(p.keys(), &Routed::key_pass);
        }
        return 0;
    }
};

}  // namespace localattn::cpu
