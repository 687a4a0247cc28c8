// Linear attention, streamed; nothing normalised is stored.
//
//   forward   keys:    P = exp2(K - max) for a chunk of positions at a time, max running; context += P^T V
//             queries: output = softmax(Q) context
//   backward  queries: grad_context += softmax(Q)^T dO;  dQ = S (dO context^T - their mean under S), S = softmax(Q)
//             keys:    dV = P grad_context;  dK = P (V grad_context^T - r),  r[j] = sum over e of grad_context context
//
// r needs no pass of its own: sum over n of P dP = sum over e of grad_context[j, e] sum over n of P[n, j] V[n, e].
// Work: channels * value_channels multiply-adds a position forward (keys and queries each), twice that backward, and an
// exp2 a channel. Bytes: every tensor once. Lanes are positions, in chunks that stay in the L2 cache; what is summed
// over positions is cut into parts, as many as the problem (never the number of workers) says, added up in order.
#pragma once
#include "../linear_attention.h"
#include "product.h"
#include "scores.h"

namespace localattn::cpu {

inline constexpr int64_t linear_chunk = 128;  // positions

template <class V>
struct Linear {
    using T = typename V::T;
    using reg = typename V::reg;

    const LinearProblem &p;
    const Codec<V> &codec;
    int64_t context_row = 0;  // value channels, whole registers
    int64_t chunk_row = 0;    // positions and room for pack_by_channel
    int64_t heads = 0;        // of all batches

    // Shared by all workers.
    T *part_context = nullptr;                   // [heads][parts][channels][context_row]
    T *part_max = nullptr, *part_sum = nullptr;  // [heads][parts][channels]
    T *context = nullptr;                        // [heads][channels][context_row]
    T *grad_context = nullptr;
    T *key_shift = nullptr;  // [heads][channels]: what makes P = exp2(K log2(e) - shift) the softmax
    T *row_mean = nullptr;   // r

    // One worker's.
    struct Buffers {
        T *a, *b, *c;    // [channels or value channels][chunk_row]
        T *by_position;  // [chunk][context_row]
        T *scratch;
    };

    int64_t parts(int64_t positions) const {
        return most(1, least(least(64 / most(1, least(64, heads)), 16), positions / 2048));
    }
    LOCALATTN_INLINE Buffers take_buffers(const Linear &l, Arena &arena) {
        const int64_t widest = most(l.p.channels, l.p.value_channels);
        Buffers w;
        w.a = arena.take<T>(l.p.channels * l.chunk_row);
        w.b = arena.take<T>(widest * l.chunk_row);
        w.c = arena.take<T>(widest * l.chunk_row);
        w.by_position = arena.take<T>(linear_chunk * l.context_row);
        w.scratch = arena.take<T>(widest * V::lanes);
        return w;
    }

    Sequence queries(const Tensor &t, int64_t b, int64_t h) const {
        return sequence_of(b * t.batch + h * t.head, t, p.queries[1], p.queries[2]);
    }
    Sequence keys(const Tensor &t, int64_t b, int64_t h) const {
        return sequence_of(b * t.batch + h * t.head, t, p.keys[1], p.keys[2]);
    }

    // K in units of log 2, -infinity where a position is masked or none.
    void load_keys(int64_t b, int64_t h, int64_t first, int64_t count, T *k) const {
        pack_by_channel(codec, p.key, keys(p.key, b, h), first, count, p.channels, T(log2_e), k, chunk_row);
        const T lowest = -T(__builtin_inf());
        const int64_t end = whole_lanes(count, V::lanes);
        for (int64_t c = 0; c < p.channels; ++c)
            for (int64_t i = count; i < end; ++i) k[c * chunk_row + i] = lowest;
        each_masked(b, first, count, [&](int64_t i) {
            for (int64_t c = 0; c < p.channels; ++c) k[c * chunk_row + i] = lowest;
        });
    }
    template <class Visit>
    void each_masked(int64_t b, int64_t first, int64_t count, const Visit &visit) const {
        if (!p.key_mask.data) return;
        const auto *attends = static_cast<const uint8_t *>(p.key_mask.data);
        const Sequence s = keys(p.key_mask, b, 0);
        each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) {
            for (int64_t x = 0; x < run; ++x)
                if (!attends[offset + x * s.position]) visit(i + x);
        });
    }

    // The softmax of `count` queries over their channels, in place of q.
    void load_queries(int64_t b, int64_t h, int64_t first, int64_t count, T *q) const {
        pack_by_channel(codec, p.query, queries(p.query, b, h), first, count, p.channels, T(log2_e), q, chunk_row);
        for (int64_t i = 0; i < count; i += V::lanes) {
            reg largest = V::load(q + i);
            for (int64_t c = 1; c < p.channels; ++c) largest = V::max(largest, V::load(q + c * chunk_row + i));
            reg total{};
            for (int64_t c = 0; c < p.channels; ++c) {
                const reg x = V::exp2(V::load(q + c * chunk_row + i) - largest);
                V::store(q + c * chunk_row + i, x);
                total += x;
            }
            const reg inverse = V::all(T(1)) / total;
            for (int64_t c = 0; c < p.channels; ++c)
                V::store(q + c * chunk_row + i, inverse * V::load(q + c * chunk_row + i));
        }
    }

    template <class Visit>
    LOCALATTN_INLINE void each_chunk(int64_t begin, int64_t end, const Visit &visit) {
        for (int64_t i = begin; i < end; i += linear_chunk) visit(i, least(linear_chunk, end - i));
    }

    void sum_keys(int64_t job, const Buffers &w) const {
        const int64_t parts_ = parts(p.key_count()), part = job % parts_, head = job / parts_;
        const int64_t b = head / p.heads, h = head % p.heads;
        T *largest = part_max + job * p.channels, *total = part_sum + job * p.channels;
        T *sum = part_context + job * p.channels * context_row;
        for (int64_t c = 0; c < p.channels; ++c) {
            largest[c] = -T(__builtin_inf());
            total[c] = 0;
        }
        clear<V>(sum, p.channels * context_row);
        each_chunk(p.key_count() * part / parts_, p.key_count() * (part + 1) / parts_, [&](int64_t first, int64_t n) {
            load_keys(b, h, first, n, w.a);
            pack_by_position(codec, p.value, keys(p.value, b, h), first, n, p.value_channels, T(1), w.by_position);
            each_masked(b, first, n, [&](int64_t i) { clear<V>(w.by_position + i * context_row, context_row); });
            for (int64_t c = 0; c < p.channels; ++c) {
                T *k = w.a + c * chunk_row;
                reg most_here = V::all(largest[c]);
                for (int64_t i = 0; i < n; i += V::lanes) most_here = larger(V::load(k + i), most_here);
                T m = most_here[0];
                for (int l = 1; l < V::lanes; ++l)
                    m = most_here[l] > m || most_here[l] != most_here[l] ? most_here[l] : m;
                const T shift = m == -T(__builtin_inf()) ? T(0) : m;
                const reg decay = V::exp2(V::all(largest[c] - shift));
                reg here{};
                for (int64_t i = 0; i < n; i += V::lanes) {
                    const reg x = V::exp2(V::load(k + i) - shift);
                    V::store(k + i, x);
                    here += x;
                }
                T added = 0;
                for (int l = 0; l < V::lanes; ++l) added += here[l];
                if (m != largest[c]) {
                    for (int64_t e = 0; e < context_row; e += V::lanes)
                        V::store(sum + c * context_row + e, decay * V::load(sum + c * context_row + e));
                    total[c] *= decay[0];
                    largest[c] = m;
                }
                total[c] += added;
            }
            add_product<V>(w.a, 1, chunk_row, w.by_position, context_row, n, sum, context_row, p.channels, context_row);
        });
    }
    // NaN, once there, stays.
    LOCALATTN_INLINE reg larger(reg x, reg y) { return x > y ? x : (x != x ? x : y); }

    void merge_keys(int64_t head) const {
        const int64_t parts_ = parts(p.key_count());
        for (int64_t c = 0; c < p.channels; ++c) {
            T largest = -T(__builtin_inf()), total = 0;
            for (int64_t part = 0; part < parts_; ++part) {
                const T m = part_max[(head * parts_ + part) * p.channels + c];
                if (m > largest || m != m) largest = m;
            }
            const T shift = largest == -T(__builtin_inf()) ? T(0) : largest;
            T *to = context + (head * p.channels + c) * context_row;
            clear<V>(to, context_row);
            for (int64_t part = 0; part < parts_; ++part) {
                const int64_t row = (head * parts_ + part) * p.channels + c;
                const reg decay = V::exp2(V::all(part_max[row] - shift));
                total += decay[0] * part_sum[row];
                for (int64_t e = 0; e < context_row; e += V::lanes)
                    V::store(to + e, V::load(to + e) + decay * V::load(part_context + row * context_row + e));
            }
            const reg inverse = total == 0 ? reg{} : V::all(1 / total);
            for (int64_t e = 0; e < context_row; e += V::lanes) V::store(to + e, inverse * V::load(to + e));
            const int64_t b = head / p.heads, h = head % p.heads;
            if (const Tensor &t = p.context; t.data) {
                T *out = static_cast<T *>(t.data) + b * t.batch + h * t.head + c * t.axis[2];
                for (int64_t e = 0; e < p.value_channels; ++e) out[e * t.channel] = to[e];
            }
            if (const Tensor &t = p.key_lse; t.data)
                static_cast<T *>(t.data)[b * t.batch + h * t.head + c * t.channel] =
                    ((V::all(largest) + V::log2(V::all(total))) * T(ln_2))[0];
        }
    }

    void write_output(int64_t job, const Buffers &w) const {
        int64_t b, h, first, n;
        query_chunk(job, b, h, first, n);
        const int64_t wide = whole_lanes(n, V::lanes);
        load_queries(b, h, first, n, w.a);
        set_product<V>(context_of(b, h), context_row, 1, w.a, chunk_row, p.channels, w.b, chunk_row, p.value_channels,
                       wide);
        unpack_by_channel(codec, w.b, chunk_row, p.output, queries(p.output, b, h), first, n, p.value_channels, T(1),
                          w.scratch);
    }

    const T *context_of(int64_t b, int64_t h) const { return context + (b * p.heads + h) * p.channels * context_row; }
    void query_chunk(int64_t job, int64_t &b, int64_t &h, int64_t &first, int64_t &n) const {
        const int64_t chunks = (p.query_count() + linear_chunk - 1) / linear_chunk;
        first = job % chunks * linear_chunk;
        n = least(linear_chunk, p.query_count() - first);
        h = job / chunks % p.heads;
        b = job / chunks / p.heads;
    }

    void read_remembered(int64_t head) const {
        const int64_t b = head / p.heads, h = head % p.heads;
        for (int64_t c = 0; c < p.channels; ++c) {
            const Tensor &t = p.context, &l = p.key_lse;
            const T *from = static_cast<const T *>(t.data) + b * t.batch + h * t.head + c * t.axis[2];
            T *to = context + (head * p.channels + c) * context_row;
            clear<V>(to, context_row);
            for (int64_t e = 0; e < p.value_channels; ++e) to[e] = from[e * t.channel];
            const T lse = static_cast<const T *>(l.data)[b * l.batch + h * l.head + c * l.channel];
            // With no key left every weight is 0.
            key_shift[head * p.channels + c] = lse == -T(__builtin_inf()) ? T(__builtin_inf()) : lse * T(log2_e);
        }
    }

    // grad_query, and a part of grad_context.
    void query_pass(int64_t job, const Buffers &w) const {
        const int64_t parts_ = parts(p.query_count()), part = job % parts_, head = job / parts_;
        const int64_t b = head / p.heads, h = head % p.heads;
        T *sum = part_context + job * p.channels * context_row;
        clear<V>(sum, p.channels * context_row);
        each_chunk(p.query_count() * part / parts_, p.query_count() * (part + 1) / parts_,
                   [&](int64_t first, int64_t n) {
                       const int64_t wide = whole_lanes(n, V::lanes);
                       load_queries(b, h, first, n, w.a);
                       if (p.grad_key.data || p.grad_value.data) {
                           pack_by_position(codec, p.grad_output, queries(p.grad_output, b, h), first, n,
                                            p.value_channels, T(1), w.by_position);
                           add_product<V>(w.a, 1, chunk_row, w.by_position, context_row, n, sum, context_row,
                                          p.channels, context_row);
                       }
                       if (!p.grad_query.data) return;
                       pack_by_channel(codec, p.grad_output, queries(p.grad_output, b, h), first, n, p.value_channels,
                                       T(1), w.b, chunk_row);
                       set_product<V>(context_of(b, h), 1, context_row, w.b, chunk_row, p.value_channels, w.c,
                                      chunk_row, p.channels, wide);
                       for (int64_t i = 0; i < n; i += V::lanes) {
                           reg mean{};
                           for (int64_t c = 0; c < p.channels; ++c)
                               mean += V::load(w.a + c * chunk_row + i) * V::load(w.c + c * chunk_row + i);
                           for (int64_t c = 0; c < p.channels; ++c)
                               V::store(w.c + c * chunk_row + i,
                                        V::load(w.a + c * chunk_row + i) * (V::load(w.c + c * chunk_row + i) - mean));
                       }
                       unpack_by_channel(codec, w.c, chunk_row, p.grad_query, queries(p.grad_query, b, h), first, n,
                                         p.channels, T(1), w.scratch);
                   });
    }

    void merge_queries(int64_t head) const {
        const int64_t parts_ = parts(p.query_count());
        for (int64_t c = 0; c < p.channels; ++c) {
            T *to = grad_context + (head * p.channels + c) * context_row;
            const T *forward = context + (head * p.channels + c) * context_row;
            reg mean{};
            for (int64_t e = 0; e < context_row; e += V::lanes) {
                reg sum{};
                for (int64_t part = 0; part < parts_; ++part)
                    sum += V::load(part_context + ((head * parts_ + part) * p.channels + c) * context_row + e);
                V::store(to + e, sum);
                mean += sum * V::load(forward + e);
            }
            T total = 0;
            for (int l = 0; l < V::lanes; ++l) total += mean[l];
            row_mean[head * p.channels + c] = total;
        }
    }

    void key_pass(int64_t job, const Buffers &w) const {
        const int64_t chunks = (p.key_count() + linear_chunk - 1) / linear_chunk;
        const int64_t first = job % chunks * linear_chunk, n = least(linear_chunk, p.key_count() - first);
        const int64_t head = job / chunks, b = head / p.heads, h = head % p.heads, wide = whole_lanes(n, V::lanes);
        const T *gradient = grad_context + head * p.channels * context_row;
        load_keys(b, h, first, n, w.a);
        for (int64_t c = 0; c < p.channels; ++c)
            for (int64_t i = 0; i < n; i += V::lanes)
                V::store(w.a + c * chunk_row + i,
                         V::exp2(V::load(w.a + c * chunk_row + i) - key_shift[head * p.channels + c]));
        if (p.grad_value.data) {
            set_product<V>(gradient, context_row, 1, w.a, chunk_row, p.channels, w.b, chunk_row, p.value_channels,
                           wide);
            unpack_by_channel(codec, w.b, chunk_row, p.grad_value, keys(p.grad_value, b, h), first, n, p.value_channels,
                              T(1), w.scratch);
        }
        if (!p.grad_key.data) return;
        pack_by_channel(codec, p.value, keys(p.value, b, h), first, n, p.value_channels, T(1), w.b, chunk_row);
        set_product<V>(gradient, 1, context_row, w.b, chunk_row, p.value_channels, w.c, chunk_row, p.channels, wide);
        for (int64_t c = 0; c < p.channels; ++c) {
            const T mean = row_mean[head * p.channels + c];
            for (int64_t i = 0; i < n; i += V::lanes) {
                T *to = w.c + c * chunk_row + i;
                V::store(to, V::load(w.a + c * chunk_row + i) * (V::load(to) - mean));
            }
        }
        // Whatever a masked value held.
        each_masked(b, first, n, [&](int64_t i) {
            for (int64_t c = 0; c < p.channels; ++c) w.c[c * chunk_row + i] = 0;
        });
        unpack_by_channel(codec, w.c, chunk_row, p.grad_key, keys(p.grad_key, b, h), first, n, p.channels, T(1),
                          w.scratch);
    }

    // Runs the pass, or, without memory, measures what it needs.
    size_t run(const Workers &workers, void *memory) {
        heads = p.batch * p.heads;
        context_row = whole_lanes(p.value_channels, V::lanes);
        chunk_row = linear_chunk + V::lanes;
        const bool forward = p.pass == Pass::forward;
        const int64_t parts_ = parts(forward ? p.key_count() : p.query_count());
        Arena arena(memory);
        part_context = arena.take<T>(heads * parts_ * p.channels * context_row);
        part_max = arena.take<T>(heads * parts_ * p.channels);
        part_sum = arena.take<T>(heads * parts_ * p.channels);
        context = arena.take<T>(heads * p.channels * context_row);
        grad_context = arena.take<T>(forward ? 0 : heads * p.channels * context_row);
        key_shift = arena.take<T>(heads * p.channels);
        row_mean = arena.take<T>(heads * p.channels);
        Arena measure(nullptr);
        take_buffers(*this, measure);
        const size_t shared = arena.used(), each = measure.used();
        if (!memory) return shared + static_cast<size_t>(workers.count) * each;

        const auto all = [&](int64_t jobs, void (Linear::*pass)(int64_t, const Buffers &) const) {
            run_jobs(workers, jobs, static_cast<char *>(memory) + shared, each, [&](int64_t job, char *own) {
                Arena buffers(own);
                (this->*pass)(job, take_buffers(*this, buffers));
            });
        };
        const int64_t query_chunks = (p.query_count() + linear_chunk - 1) / linear_chunk;
        const int64_t key_chunks = (p.key_count() + linear_chunk - 1) / linear_chunk;
        if (forward) {
            all(heads * parts_, &Linear::sum_keys);
            for (int64_t head = 0; head < heads; ++head) merge_keys(head);
            all(heads * query_chunks, &Linear::write_output);
            return 0;
        }
        for (int64_t head = 0; head < heads; ++head) read_remembered(head);
        all(heads * parts_, &Linear::query_pass);
        if (!p.grad_key.data && !p.grad_value.data) return 0;
        for (int64_t head = 0; head < heads; ++head) merge_queries(head);
        all(heads * key_chunks, &Linear::key_pass);
        return 0;
    }
};

}  // namespace localattn::cpu
