// Routed attention: every region of queries attends to its own list of regions of keys.
//
//   s = w scale q.k    p = exp(s - lse)    output = sum p w v          for a choice of weight w
//   dp = w dO.v    ds = p (dp - delta)     delta = dO.output - grad_lse
//   dQ = scale sum w ds k    dK = scale sum w ds q    dV = sum w p dO    dw = sum ds scale q.k + p dO.v
//
// Forward: lanes are 64 queries of a region, so that the softmax and the sums over keys stay within a lane. A job is
// a few such blocks, of one head. It goes through the chosen regions in order, 64 pixels at a time, read where they lie
// and packed once for all of the job's blocks: no gathered keys or values, no attention matrix.
//
// Backward, one pass of five products: lanes are 64 keys of a region. A job owns a group of such blocks of one head and
// goes through the regions that chose each of them by the inverse of the routing, a counting sort, whose order is the
// order of the sums: no atomics. It finishes its keys' and values' gradients; the queries' it adds up in memory of its
// own, and the groups' sums are added in order. Groups get like numbers of pairs, whatever the routing; how many there
// are is the problem's to say, as each costs the memory of a query gradient. What is one number a query, shift and
// delta, is computed once, before.
//
// Work a pair: one exp2 a pass and the products. Bytes: the lanes' side once; the other side once for each few blocks
// that read it, from L2 or L3, and each number of it is used by up to 512 lanes.
#pragma once
#include "../routed_attention.h"
#include "product.h"
#include "scores.h"
#include "softmax.h"

namespace localattn::cpu {

inline constexpr int64_t routed_block = 64;  // pixels, of either side
inline constexpr int64_t most_blocks = 8;    // that share what is packed
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
    T *statistics = nullptr;    // [batch * heads][region][query][2]: shift and delta

    // Of one block of lanes.
    struct Lanes {
        T *a, *b;          // by channel: query; or key and value
        T *sum_a, *sum_b;  // what is accumulated for them
        T *key;            // keys by position
        T *reference, *total;
        reg of_weight;
    };
    struct Buffers {
        Lanes lanes[most_blocks];
        T *key, *value;  // the other side by position: key, value; or query, dO
        T *s, *dp;       // [block][row]
        T *lse;
        T *scratch;
    };
    LOCALATTN_INLINE Buffers take_buffers(const Routed &r, Arena &arena) {
        const int64_t widest = most(r.p.channels, r.p.value_channels);
        const bool backward = r.p.pass == Pass::backward;
        Buffers w;
        for (Lanes &l : w.lanes) {
            l.a = arena.take<T>(r.p.channels * r.row);
            l.b = arena.take<T>(backward ? r.p.value_channels * r.row : 0);
            l.sum_a = arena.take<T>(backward ? r.p.channels * r.row : 0);
            l.sum_b = arena.take<T>(r.p.value_channels * r.row);
            l.key = arena.take<T>(backward ? routed_block * r.key_row : 0);
            l.reference = arena.take<T>(r.row);
            l.total = arena.take<T>(r.row);
        }
        w.key = arena.take<T>(routed_block * r.key_row);
        w.value = arena.take<T>(routed_block * r.value_row);
        w.s = arena.take<T>(routed_block * r.row);
        w.dp = arena.take<T>(backward ? routed_block * r.row : 0);
        w.lse = arena.take<T>(r.row);
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

    // The jobs of a region: blocks in as many groups of like size as needed.
    LOCALATTN_INLINE int64_t block_groups(int64_t pixels) { return (blocks(pixels) + most_blocks - 1) / most_blocks; }

    // Calls visit(region, choice's factor, first key, count) for the keys that a region sees, a block at a time.
    template <class Visit>
    LOCALATTN_INLINE void each_keys(const Routed &r, int64_t b, int64_t region, const Visit &visit) {
        for (int64_t choice = 0; choice < r.p.topk; ++choice) {
            const int64_t chosen = r.p.index(b, region, choice);
            const T factor = r.weight(b, region, choice);
            for (int64_t first = 0; first < r.p.keys(); first += routed_block)
                visit(choice, chosen, factor, first, least(routed_block, r.p.keys() - first));
        }
    }

    void forward(int64_t job, Buffers &w) const {
        const int64_t per_region = block_groups(p.queries()), group = job % per_region, count = blocks(p.queries());
        const int64_t h = job / per_region % p.heads, b = job / per_region / p.heads / p.regions();
        const int64_t region = job / per_region / p.heads % p.regions();
        const int64_t begin = count * group / per_region, n = count * (group + 1) / per_region - begin;
        Place x[most_blocks];
        for (int64_t i = 0; i < n; ++i) {
            const Lanes &l = w.lanes[i];
            x[i] = place(b, h, region, begin + i, p.queries());
            pack_by_channel(codec, p.query, of_queries(p.query, b, h, region), x[i].first, x[i].count, p.channels,
                            T(p.scale * log2_e), l.a, row);
            clear_rows(l.sum_b, p.value_channels, row, x[i].wide());
            StreamedSoftmax<V>::begin({l.reference, l.total}, x[i].wide());
        }
        each_keys(*this, b, region, [&](int64_t choice, int64_t chosen, T factor, int64_t first, int64_t keys) {
            pack_by_position(codec, p.key, of_keys(p.key, b, h, chosen), first, keys, p.channels, factor, w.key);
            pack_by_position(codec, p.value, of_keys(p.value, b, h, chosen), first, keys, p.value_channels, factor,
                             w.value);
            prefetch_keys(b, h, region, choice, chosen, first + routed_block);
            for (int64_t i = 0; i < n; ++i) {
                const Lanes &l = w.lanes[i];
                const int64_t wide = x[i].wide();
                set_product<V>(w.key, 1, key_row, l.a, row, p.channels, w.s, row, keys, wide);
                StreamedSoftmax<V>::add({l.reference, l.total}, w.s, row, keys, wide, l.sum_b, p.value_channels);
                add_product<V>(w.value, value_row, 1, w.s, row, keys, l.sum_b, row, p.value_channels, wide);
            }
        });
        for (int64_t i = 0; i < n; ++i) {
            const Lanes &l = w.lanes[i];
            StreamedSoftmax<V>::finish({l.reference, l.total}, row, x[i].wide(), l.sum_b, p.value_channels, w.lse);
            unpack_by_channel(codec, l.sum_b, row, p.output, of_queries(p.output, b, h, region), x[i].first, x[i].count,
                              p.value_channels, T(1), w.scratch);
            if (p.lse.data) write_numbers<V>(w.lse, p.lse, of_queries(p.lse, b, h, region), x[i].first, x[i].count);
        }
    }
    // The block of keys from `first` on, or, where the region has no more, the first one of the next choice.
    void prefetch_keys(int64_t b, int64_t h, int64_t region, int64_t choice, int64_t chosen, int64_t first) const {
        if (first >= p.keys()) {
            if (choice + 1 == p.topk) return;
            chosen = p.index(b, region, choice + 1);
            first = 0;
        }
        const int64_t n = least(routed_block, p.keys() - first);
        prefetch(codec, p.key, of_keys(p.key, b, h, chosen), first, n, p.channels);
        prefetch(codec, p.value, of_keys(p.value, b, h, chosen), first, n, p.value_channels);
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

    void backward(int64_t job, Buffers &w) const {
        const int64_t group = job % groups, head = job / groups, b = head / p.heads;
        T *gradient = nullptr;
        if (p.grad_query.data) {
            gradient = group_grad_queries(head, group);
            clear<V>(gradient, p.regions() * p.queries() * key_row);
        }
        const int64_t per_region = blocks(p.keys());
        const int64_t end = group + 1 == groups ? p.regions() * per_region : group_begin(b, group + 1);
        for (int64_t i = group_begin(b, group); i < end;) {
            const int64_t n = least(most_blocks, least(end, (i / per_region + 1) * per_region) - i);
            differentiate_keys(b, head % p.heads, i / per_region, i % per_region, n, gradient, w);
            i += n;
        }
    }

    // n blocks of keys of a region, from one on.
    void differentiate_keys(int64_t b, int64_t h, int64_t region, int64_t block, int64_t n, T *gradient,
                            Buffers &w) const {
        Place x[most_blocks];
        for (int64_t i = 0; i < n; ++i) {
            x[i] = place(b, h, region, block + i, p.keys());
            load_keys(x[i], w.lanes[i]);
        }
        const int64_t *begin = inverse_begin + b * (p.regions() + 1), *list = inverse + b * p.regions() * p.topk;
        for (int64_t j = begin[region]; j < begin[region + 1]; ++j) {
            const int64_t by = list[j] / p.topk;
            const T factor = weight(b, by, list[j] % p.topk);
            for (int64_t i = 0; i < n; ++i) w.lanes[i].of_weight = reg{};
            for (int64_t first = 0; first < p.queries(); first += routed_block) {
                const int64_t count = least(routed_block, p.queries() - first);
                pack_by_position(codec, p.query, of_queries(p.query, b, h, by), first, count, p.channels, T(1), w.key);
                pack_by_position(codec, p.grad_output, of_queries(p.grad_output, b, h, by), first, count,
                                 p.value_channels, T(1), w.value);
                if (const int64_t next = first + routed_block; next < p.queries() || j + 1 < begin[region + 1])
                    prefetch_queries(b, h, next < p.queries() ? by : list[j + 1] / p.topk, next % p.queries());
                for (int64_t i = 0; i < n; ++i)
                    add_queries(x[i], by, factor, first, count,
                                gradient ? gradient + (by * p.queries() + first) * key_row : nullptr, w.lanes[i], w);
            }
            if (!p.grad_region_weight.data) continue;
            for (int64_t i = 0; i < n; ++i) {
                T total = 0;
                for (int l = 0; l < V::lanes; ++l) total += w.lanes[i].of_weight[l];
                grad_weight[((b * p.regions() * p.topk + list[j]) * p.heads + h) * blocks(p.keys()) + x[i].block] =
                    total;
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const auto store = [&](const Tensor &t, int64_t channels, T factor, const T *from) {
                if (t.data)
                    unpack_by_channel(codec, from, row, t, of_keys(t, b, h, region), x[i].first, x[i].count, channels,
                                      factor, w.scratch);
            };
            store(p.grad_key, p.channels, T(p.scale), w.lanes[i].sum_a);
            store(p.grad_value, p.value_channels, T(1), w.lanes[i].sum_b);
        }
    }
    void load_keys(const Place &x, const Lanes &l) const {
        const int64_t wide = x.wide();
        const auto load = [&](const Tensor &t, int64_t channels, T factor, T *to) {
            pack_by_channel(codec, t, of_keys(t, x.batch, x.head, x.region), x.first, x.count, channels, factor, to,
                            row);
            for (int64_t c = 0; c < channels; ++c)  // so that lanes beyond the keys add nothing to a weight's gradient
                for (int64_t i = x.count; i < wide; ++i) to[c * row + i] = 0;
        };
        load(p.key, p.channels, T(p.scale * log2_e), l.a);
        load(p.value, p.value_channels, T(1), l.b);
        pack_by_position(codec, p.key, of_keys(p.key, x.batch, x.head, x.region), x.first, x.count, p.channels, T(1),
                         l.key);
        clear_rows(l.sum_a, p.channels, row, wide);
        clear_rows(l.sum_b, p.value_channels, row, wide);
    }
    void prefetch_queries(int64_t b, int64_t h, int64_t region, int64_t first) const {
        first = first / routed_block * routed_block;
        const int64_t n = least(routed_block, p.queries() - first);
        prefetch(codec, p.query, of_queries(p.query, b, h, region), first, n, p.channels);
        prefetch(codec, p.grad_output, of_queries(p.grad_output, b, h, region), first, n, p.value_channels);
    }

    // Pairs n queries of a region, packed, with one block of keys; adds the terms of the weight's gradient.
    void add_queries(const Place &x, int64_t region, T factor, int64_t first, int64_t n, T *gradient, Lanes &l,
                     const Buffers &w) const {
        const int64_t wide = x.wide();
        const T *numbers = statistics_of(x.batch * p.heads + x.head, region) + 2 * first;
        set_product<V>(w.key, 1, key_row, l.a, row, p.channels, w.s, row, n, wide);
        set_product<V>(w.value, 1, value_row, l.b, row, p.value_channels, w.dp, row, n, wide);
        for (int64_t q = 0; q < n; ++q) {
            const reg shift = V::all(numbers[2 * q]), less = V::all(numbers[2 * q + 1]);
            for (int64_t i = 0; i < wide; i += V::lanes) {
                const reg s = V::load(w.s + q * row + i), dp = V::load(w.dp + q * row + i);
                const reg probability = V::exp2(s * factor - shift);
                const reg ds = probability * (dp * factor - less);
                V::store(w.s + q * row + i, probability * factor);
                V::store(w.dp + q * row + i, ds * factor);
                l.of_weight += ds * s * T(ln_2) + probability * dp;
            }
        }
        if (p.grad_value.data) add_product<V>(w.value, value_row, 1, w.s, row, n, l.sum_b, row, p.value_channels, wide);
        if (p.grad_key.data) add_product<V>(w.key, key_row, 1, w.dp, row, n, l.sum_a, row, p.channels, wide);
        if (gradient) add_product<V>(w.dp, 1, row, l.key, key_row, x.count, gradient, key_row, n, key_row);
    }

    T *statistics_of(int64_t head, int64_t region) const {
        return statistics + (head * p.regions() + region) * p.queries() * 2;
    }
    // Shift and delta of one region's queries.
    void prepare(int64_t job, Buffers &w) const {
        const int64_t region = job % p.regions(), head = job / p.regions(), b = head / p.heads, h = head % p.heads;
        T *to = statistics_of(head, region), *grad_output = w.lanes[0].b, *output = w.lanes[0].sum_b;
        for (int64_t block = 0; block < blocks(p.queries()); ++block) {
            const Place x = place(b, h, region, block, p.queries());
            const auto load = [&](const Tensor &t, T *channels) {
                pack_by_channel(codec, t, of_queries(t, b, h, region), x.first, x.count, p.value_channels, T(1),
                                channels, row);
            };
            load(p.grad_output, grad_output);
            load(p.output, output);
            read_numbers<V>(p.lse, of_queries(p.lse, b, h, region), x.first, x.count, w.lse);
            T *delta = w.lanes[0].reference;
            if (p.grad_lse.data)
                read_numbers<V>(p.grad_lse, of_queries(p.grad_lse, b, h, region), x.first, x.count, delta);
            for (int64_t i = 0; i < x.wide(); i += V::lanes) {
                reg sum{};
                for (int64_t e = 0; e < p.value_channels; ++e)
                    sum += V::load(grad_output + e * row + i) * V::load(output + e * row + i);
                if (p.grad_lse.data) sum -= V::load(delta + i);
                store_statistics<V>(V::load(w.lse + i) * T(log2_e), sum, w.lse + i, delta + i);
            }
            for (int64_t i = 0; i < x.count; ++i) {
                to[2 * (x.first + i)] = w.lse[i];
                to[2 * (x.first + i) + 1] = delta[i];
            }
        }
    }

    // The groups' sums of one region of queries.
    void write_grad_queries(int64_t job, Buffers &w) const {
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
        statistics = arena.take<T>(backward ? heads * p.regions() * p.queries() * 2 : 0);
        Arena measure(nullptr);
        take_buffers(*this, measure);
        const size_t shared = arena.used(), each = measure.used();
        if (!memory) return shared + static_cast<size_t>(workers.count) * each;

        const auto all = [&](int64_t jobs, void (Routed::*pass)(int64_t, Buffers &) const) {
            run_jobs(workers, jobs, static_cast<char *>(memory) + shared, each, [&](int64_t job, char *own) {
                Arena arena_of_worker(own);
                Buffers buffers = take_buffers(*this, arena_of_worker);
                (this->*pass)(job, buffers);
            });
        };
        if (!backward) {
            all(heads * p.regions() * block_groups(p.queries()), &Routed::forward);
            return 0;
        }
        invert();
        all(heads * p.regions(), &Routed::prepare);
        all(heads * groups, &Routed::backward);
        if (p.grad_query.data) all(heads * p.regions(), &Routed::write_grad_queries);
        if (weights) write_grad_weights();
        return 0;
    }
};

}  // namespace localattn::cpu
