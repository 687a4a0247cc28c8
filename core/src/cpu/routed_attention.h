// Routed attention: every region of queries attends to its own list of regions of keys.
//
//   s = w scale q.k    p = exp(s - lse)    output = sum p w v          for a choice of weight w
//   dp = w dO.v    ds = p (dp - delta)     delta = dO.output - grad_lse
//   dQ = scale sum w ds k    dK = scale sum w ds q    dV = sum w p dO    dw = sum ds scale q.k + p dO.v
//
// Forward: lanes are 64 queries of a region, so that the softmax and the sums over keys stay within a lane. A job is
// one such block and head. It goes through the chosen regions in order, 64 pixels at a time, read where they lie: no
// gathered keys or values, no attention matrix.
//
// Backward, one pass of five products: lanes are 64 keys of a region. A job owns a group of such blocks of one head and
// goes through the regions that chose each of them by the inverse of the routing, a counting sort, whose order is the
// order of the sums: no atomics. It finishes its keys' and values' gradients; the queries' it adds up in memory of its
// own, and the groups' sums are added in order. Groups get like numbers of pairs, whatever the routing; how many there
// are is the problem's to say, as each costs the memory of a query gradient.
//
// Work a pair: one exp2 a pass and the products. Bytes: the lanes' side once; the other side once for each block that
// reads it, from L2 or L3, and each number of it is used by 64 lanes.
#pragma once
#include "../routed_attention.h"
#include "product.h"
#include "scores.h"
#include "softmax.h"

namespace localattn::cpu {

inline constexpr int64_t routed_block = 64;  // pixels, of either side
inline constexpr int64_t least_jobs = 8;     // of the backward, if there are as many regions

template <class V>
struct Routed {
    using T = typename V::T;
    using reg = typename V::reg;

    const RoutedProblem &p;
    const Codec<V> &codec;
    int64_t row = routed_block + V::lanes;  // of buffers by channel
    int64_t key_row = 0, value_row = 0;     // of buffers by position

    int64_t *inverse = nullptr, *inverse_begin = nullptr;  // (region * topk + choice) by chosen region, per batch
    int64_t groups = 1;
    T *grad_queries = nullptr;  // [batch * heads][groups][region][query][key_row]
    T *grad_weight = nullptr;   // [batch][regions][topk][heads][key blocks]

    struct Buffers {
        T *a, *b;                // lanes' side by channel: query; or key and value
        T *sum_a, *sum_b;        // what is accumulated for them
        T *key, *value, *other;  // the other side by position: key, value; or query, dO, output
        T *lanes_key;            // the lanes' keys by position
        T *s, *dp;               // [block][row]
        T *maximum, *total, *lse, *delta;
        T *scratch;
    };
    LOCALATTN_INLINE Buffers take_buffers(const Routed &r, Arena &arena) {
        const int64_t widest = most(r.p.channels, r.p.value_channels);
        Buffers w;
        w.a = arena.take<T>(r.p.channels * r.row);
        w.b = arena.take<T>(r.p.value_channels * r.row);
        w.sum_a = arena.take<T>(r.p.channels * r.row);
        w.sum_b = arena.take<T>(r.p.value_channels * r.row);
        w.key = arena.take<T>(routed_block * r.key_row);
        w.value = arena.take<T>(routed_block * r.value_row);
        w.other = arena.take<T>(routed_block * r.value_row);
        w.lanes_key = arena.take<T>(routed_block * r.key_row);
        w.s = arena.take<T>(routed_block * r.row);
        w.dp = arena.take<T>(routed_block * r.row);
        w.maximum = arena.take<T>(r.row);
        w.total = arena.take<T>(r.row);
        w.lse = arena.take<T>(r.row);
        w.delta = arena.take<T>(r.row);
        w.scratch = arena.take<T>(most(routed_block, widest) * V::lanes);
        return w;
    }

    // One block of pixels of a region.
    struct Place {
        int64_t batch, head, region, block, first, count;
        int64_t wide() const { return whole_lanes(count, V::lanes); }
    };
    LOCALATTN_INLINE int64_t blocks(int64_t pixels) { return (pixels + routed_block - 1) / routed_block; }
    LOCALATTN_INLINE Place place(int64_t b, int64_t h, int64_t region, int64_t block, int64_t pixels) {
        return {b, h, region, block, block * routed_block, least(routed_block, pixels - block * routed_block)};
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

    void forward(int64_t job, const Buffers &w) const {
        const int64_t per_region = blocks(p.queries()), region = job / per_region / p.heads;
        const Place x = place(region / p.regions(), job / per_region % p.heads, region % p.regions(), job % per_region,
                              p.queries());
        const int64_t wide = x.wide();
        const StreamedSoftmax<V> softmax{w.maximum, w.total};
        pack_by_channel(codec, p.query, of_queries(p.query, x.batch, x.head, x.region), x.first, x.count, p.channels,
                        T(p.scale * log2_e), w.a, row);
        clear_rows(w.sum_b, p.value_channels, row, wide);
        softmax.begin(softmax, wide);
        for (int64_t choice = 0; choice < p.topk; ++choice) {
            const int64_t region = p.index(x.batch, x.region, choice);
            const T factor = weight(x.batch, x.region, choice);
            const Sequence keys = of_keys(p.key, x.batch, x.head, region);
            const Sequence values = of_keys(p.value, x.batch, x.head, region);
            for (int64_t first = 0; first < p.keys(); first += routed_block) {
                const int64_t n = least(routed_block, p.keys() - first);
                pack_by_position(codec, p.key, keys, first, n, p.channels, factor, w.key);
                pack_by_position(codec, p.value, values, first, n, p.value_channels, factor, w.value);
                clear_rows(w.s, n, row, wide);
                multiply<V>(w.key, 1, key_row, w.a, row, p.channels, w.s, row, n, wide);
                softmax.add(softmax, w.s, row, n, wide, w.sum_b, p.value_channels);
                multiply<V>(w.value, value_row, 1, w.s, row, n, w.sum_b, row, p.value_channels, wide);
            }
        }
        softmax.finish(softmax, row, wide, w.sum_b, p.value_channels, w.lse);
        unpack_by_channel(codec, w.sum_b, row, p.output, of_queries(p.output, x.batch, x.head, x.region), x.first,
                          x.count, p.value_channels, T(1), w.scratch);
        if (p.lse.data) write_numbers<V>(w.lse, p.lse, of_queries(p.lse, x.batch, x.head, x.region), x.first, x.count);
    }

    void write_grad_weights() const {
        const int64_t terms = p.heads * blocks(p.keys());
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

    // The blocks of keys of group g: from this one on, those before which that part of all pairs lies.
    int64_t group_begin(int64_t b, int64_t g) const {
        const int64_t *begin = inverse_begin + b * (p.regions() + 1), per_region = blocks(p.keys());
        const int64_t before = p.regions() * p.topk * per_region * g / groups;
        for (int64_t r = 0; r < p.regions(); ++r)
            for (int64_t i = 0; i < per_region; ++i)
                if (begin[r] * per_region + i * (begin[r + 1] - begin[r]) >= before) return r * per_region + i;
        return p.regions() * per_region;
    }

    T *group_grad_queries(int64_t head, int64_t group) const {
        return grad_queries + (head * groups + group) * p.regions() * p.queries() * key_row;
    }

    void backward(int64_t job, const Buffers &w) const {
        const int64_t group = job % groups, head = job / groups, b = head / p.heads;
        T *gradient = nullptr;
        if (p.grad_query.data) {
            gradient = group_grad_queries(head, group);
            clear<V>(gradient, p.regions() * p.queries() * key_row);
        }
        const int64_t per_region = blocks(p.keys());
        const int64_t end = group + 1 == groups ? p.regions() * per_region : group_begin(b, group + 1);
        for (int64_t i = group_begin(b, group); i < end; ++i)
            differentiate_keys(place(b, head % p.heads, i / per_region, i % per_region, p.keys()), gradient, w);
    }

    void differentiate_keys(const Place &x, T *gradient, const Buffers &w) const {
        const int64_t wide = x.wide();
        const auto load = [&](const Tensor &t, int64_t channels, T factor, T *to) {
            pack_by_channel(codec, t, of_keys(t, x.batch, x.head, x.region), x.first, x.count, channels, factor, to,
                            row);
            for (int64_t c = 0; c < channels; ++c)  // so that lanes beyond the keys add nothing to a weight's gradient
                for (int64_t i = x.count; i < wide; ++i) to[c * row + i] = 0;
        };
        load(p.key, p.channels, T(p.scale * log2_e), w.a);
        load(p.value, p.value_channels, T(1), w.b);
        pack_by_position(codec, p.key, of_keys(p.key, x.batch, x.head, x.region), x.first, x.count, p.channels, T(1),
                         w.lanes_key);
        clear_rows(w.sum_a, p.channels, row, wide);
        clear_rows(w.sum_b, p.value_channels, row, wide);
        const int64_t *begin = inverse_begin + x.batch * (p.regions() + 1);
        const int64_t *list = inverse + x.batch * p.regions() * p.topk;
        for (int64_t j = begin[x.region]; j < begin[x.region + 1]; ++j) {
            const int64_t region = list[j] / p.topk;
            const T factor = weight(x.batch, region, list[j] % p.topk);
            reg of_weight{};
            for (int64_t first = 0; first < p.queries(); first += routed_block)
                of_weight += add_queries(x, region, factor, first, least(routed_block, p.queries() - first),
                                         gradient ? gradient + (region * p.queries() + first) * key_row : nullptr, w);
            if (p.grad_region_weight.data) {
                T total = 0;
                for (int l = 0; l < V::lanes; ++l) total += of_weight[l];
                grad_weight[((x.batch * p.regions() * p.topk + list[j]) * p.heads + x.head) * blocks(p.keys()) +
                            x.block] = total;
            }
        }
        const auto store = [&](const Tensor &t, int64_t channels, T factor, const T *from) {
            if (t.data)
                unpack_by_channel(codec, from, row, t, of_keys(t, x.batch, x.head, x.region), x.first, x.count,
                                  channels, factor, w.scratch);
        };
        store(p.grad_key, p.channels, T(p.scale), w.sum_a);
        store(p.grad_value, p.value_channels, T(1), w.sum_b);
    }

    // Pairs n queries of a region with the lanes' keys; returns the terms of the weight's gradient.
    reg add_queries(const Place &x, int64_t region, T factor, int64_t first, int64_t n, T *gradient,
                    const Buffers &w) const {
        const int64_t wide = x.wide();
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
        reg of_weight{};
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
                const reg s = V::load(w.s + q * row + i), dp = V::load(w.dp + q * row + i);
                const reg probability = V::exp2(s * factor - shift);
                const reg ds = probability * (dp * factor - less);
                V::store(w.s + q * row + i, probability * factor);
                V::store(w.dp + q * row + i, ds * factor);
                of_weight += ds * s * T(ln_2) + probability * dp;
            }
        }
        if (p.grad_value.data) multiply<V>(w.value, value_row, 1, w.s, row, n, w.sum_b, row, p.value_channels, wide);
        if (p.grad_key.data) multiply<V>(w.key, key_row, 1, w.dp, row, n, w.sum_a, row, p.channels, wide);
        if (gradient) multiply<V>(w.dp, 1, row, w.lanes_key, key_row, x.count, gradient, key_row, n, key_row);
        return of_weight;
    }

    // The groups' sums of one region of queries.
    void write_grad_queries(int64_t job, const Buffers &w) const {
        const int64_t region = job % p.regions(), head = job / p.regions(), elements = p.queries() * key_row;
        T *sum = group_grad_queries(head, 0) + region * elements;
        for (int64_t g = 1; g < groups; ++g) {
            const T *more = group_grad_queries(head, g) + region * elements;
            for (int64_t i = 0; i < elements; i += V::lanes) V::store(sum + i, V::load(sum + i) + V::load(more + i));
        }
        unpack_by_position(codec, sum, p.grad_query, of_queries(p.grad_query, head / p.heads, head % p.heads, region),
                           p.queries(), p.channels, T(p.scale), w.scratch);
    }

    // Runs the pass, or, without memory, measures what it needs.
    size_t run(const Workers &workers, void *memory) {
        key_row = whole_lanes(p.channels, V::lanes);
        value_row = whole_lanes(p.value_channels, V::lanes);
        const int64_t choices = p.batch * p.regions() * p.topk, heads = p.batch * p.heads;
        const bool backward = p.pass == Pass::backward, weights = backward && p.grad_region_weight.data;
        groups = most(1, least(least_jobs / heads, p.regions()));
        Arena arena(memory);
        inverse = arena.take<int64_t>(backward ? choices : 0);
        inverse_begin = arena.take<int64_t>(backward ? p.batch * (p.regions() + 1) : 0);
        grad_queries =
            arena.take<T>(backward && p.grad_query.data ? heads * groups * p.regions() * p.queries() * key_row : 0);
        grad_weight = arena.take<T>(weights ? choices * p.heads * blocks(p.keys()) : 0);
        Arena measure(nullptr);
        take_buffers(*this, measure);
        const size_t shared = arena.used(), each = measure.used();
        if (!memory) return shared + static_cast<size_t>(workers.count) * each;

        const auto all = [&](int64_t jobs, void (Routed::*pass)(int64_t, const Buffers &) const) {
            run_jobs(workers, jobs, static_cast<char *>(memory) + shared, each, [&](int64_t job, char *own) {
                Arena buffers(own);
                (this->*pass)(job, take_buffers(*this, buffers));
            });
        };
        if (!backward) {
            all(heads * p.regions() * blocks(p.queries()), &Routed::forward);
            return 0;
        }
        invert();
        all(heads * groups, &Routed::backward);
        if (p.grad_query.data) all(heads * p.regions(), &Routed::write_grad_queries);
        if (weights) write_grad_weights();
        return 0;
    }
};

}  // namespace localattn::cpu
