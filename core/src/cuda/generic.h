// The generic kernels of attention: every option, any architecture, one warp for each query or key. Simple and right;
// the yardstick for the fast ones. Device and launches: arch/generic.cu. What a pair contributes: pair.h. Channels go
// by chunks: chunk.h.
#pragma once
#include "chunk.h"
#include "pair.h"
#include "spoilt_rows.h"

namespace localattn::cuda {

struct GenericForwardArguments {
    Problem problem;
    ChosenRows rows;
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_forward(GPU_ARGUMENT GenericForwardArguments arguments) {
    using Real = Accumulator<T>;
    if (arguments.rows.none()) return;
    const Problem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Query query = query_at(p, index);
        if (!arguments.rows.has(row_of<T>(p.output, query.place), p.output.channel, p.value_channels)) continue;
        for (int64_t first = 0; first < p.value_channels; first += Chunk<Real>::width) {
            Chunk<Real> sum(first);
            Real top = -Real(INFINITY), total = 0;
            for_each_entry(p, query, [&](const Entry &entry) {
                Real score;
                if (!score_of<T>(p, query, entry, score)) return;
                if (score > top) {  // a NaN never is: it makes the total NaN below
                    const Real next = finite_score(score), shrink = exponential(top - next);
                    total *= shrink;
                    sum.scale(shrink);
                    top = next;
                }
                const Real weight = score == -Real(INFINITY) ? Real(0) : exponential(score - top);
                total += weight;
                if (entry.is_key)
                    sum.add(weight, row_of<const T>(p.value, key_place(p, query, entry)), p.value.channel,
                            p.value_channels);
            });
            // No entry, or every score -infinity: zeros. (A NaN total is not 0 and goes through.)
            if (total != 0) sum.scale(1 / total);
            sum.write(row_of<T>(p.output, query.place), p.output.channel, p.value_channels);
            if (first == 0 && p.lse.data && lane_index() == 0)
                *row_of<Real>(p.lse, query.place) = total == 0 ? -Real(INFINITY) : top + logarithm(total);
        }
    }
}

template <class T>
struct BackwardArguments {
    Problem problem;
    Deltas<Accumulator<T>> delta;
    ChosenRows rows;  // of the gradients of query, key and value
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_delta(GPU_ARGUMENT BackwardArguments<T> arguments) {
    const Problem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Place place = query_at(p, index).place;
        Accumulator<T> delta = dot(row_of<const T>(p.grad_output, place), p.grad_output.channel,
                                   row_of<const T>(p.output, place), p.output.channel, p.value_channels);
        if (p.grad_lse.data) delta -= *row_of<const Accumulator<T>>(p.grad_lse, place);
        if (lane_index() == 0) arguments.delta[index] = delta;
    }
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_grad_query(GPU_ARGUMENT BackwardArguments<T> arguments) {
    using Real = Accumulator<T>;
    if (arguments.rows.none()) return;
    const Problem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Query query = query_at(p, index);
        if (!arguments.rows.has(row_of<T>(p.grad_query, query.place), p.grad_query.channel, p.channels)) continue;
        for (int64_t first = 0; first < p.channels; first += Chunk<Real>::width) {
            Chunk<Real> sum(first);
            for_each_entry(p, query, [&](const Entry &entry) {
                PairGradient<Real> pair;
                if (entry.is_key && pair_gradient<T>(p, query, entry, arguments.delta, pair))
                    sum.add(pair.by_score, row_of<const T>(p.key, key_place(p, query, entry)), p.key.channel,
                            p.channels);
            });
            sum.scale(Real(p.scale));
            sum.write(row_of<T>(p.grad_query, query.place), p.grad_query.channel, p.channels);
        }
    }
}

// Keys gather over the queries that see them, and over the query heads that share them.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_grad_key_value(GPU_ARGUMENT BackwardArguments<T> arguments) {
    using Real = Accumulator<T>;
    if (arguments.rows.none()) return;
    const Problem &p = arguments.problem;
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels, group = p.heads / p.kv_heads;
    for (int64_t index = first_warp(); index < key_count(p); index += warp_step()) {
        const Place key = key_at(p, index);
        const bool computes_key =
            p.grad_key.data && arguments.rows.has(row_of<T>(p.grad_key, key), p.grad_key.channel, p.channels);
        const bool computes_value = p.grad_value.data && arguments.rows.has(row_of<T>(p.grad_value, key),
                                                                            p.grad_value.channel, p.value_channels);
        if (!computes_key && !computes_value) continue;
        for (int64_t first = 0; first < widest; first += Chunk<Real>::width) {
            Chunk<Real> key_sum(first), value_sum(first);
            for_each_query(p, key, [&](Query &query, const Entry &entry) {
                PairGradient<Real> pair;
                for (int64_t head = key.head * group; head < (key.head + 1) * group; ++head) {
                    query.place.head = opaque(head);
                    if (!pair_gradient<T>(p, query, entry, arguments.delta, pair)) return;
                    key_sum.add(pair.by_score, row_of<const T>(p.query, query.place), p.query.channel, p.channels);
                    value_sum.add(pair.weight, row_of<const T>(p.grad_output, query.place), p.grad_output.channel,
                                  p.value_channels);
                }
            });
            key_sum.scale(Real(p.scale));
            if (computes_key) key_sum.write(row_of<T>(p.grad_key, key), p.grad_key.channel, p.channels);
            if (computes_value) value_sum.write(row_of<T>(p.grad_value, key), p.grad_value.channel, p.value_channels);
        }
    }
}

// The gradient of a bias, of any kind. Pairs are numbered by eight coordinates: batch, three query axes, head, and
// three of the window (entries, or cells of the relative-position table). Along a coordinate whose stride is 0 the
// gradient is summed; along the others it has elements of its own.
template <class T>
struct BiasGradientArguments {
    BackwardArguments<T> backward;
    Accumulator<T> *gradient;
    int64_t extent[8], stride[8];
    bool relative;             // the last three coordinates are cells of the table
    int32_t warps_an_element;  // 1, or all of a block, which then share the sum
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_grad_bias(GPU_ARGUMENT BiasGradientArguments<T> arguments) {
    using Real = Accumulator<T>;
    const Problem &p = arguments.backward.problem;
    int64_t elements = 1, terms = 1;
    GPU_UNROLL_FOR (int d = 0; d < 8; ++d) (arguments.stride[d] ? elements : terms) *= arguments.extent[d];
    const int warp = thread_index() / warp_size, sharers = arguments.warps_an_element;
    const int64_t elements_a_block = generic_warps / sharers;

    for (int64_t base = block_index().x * elements_a_block; base < elements;
         base += grid_extent().x * elements_a_block) {
        const int64_t element = base + warp / sharers;
        int64_t at[8], offset = 0, rest = element;
        GPU_UNROLL_FOR (int d = 7; d >= 0; --d) {
            at[d] = 0;
            if (!arguments.stride[d]) continue;
            at[d] = rest % arguments.extent[d];
            rest /= arguments.extent[d];
            offset += at[d] * arguments.stride[d];
        }
        Real sum = 0;
        for (int64_t term = warp % sharers; element < elements && term < terms; term += sharers) {
            rest = term;
            GPU_UNROLL_FOR (int d = 7; d >= 0; --d) {
                if (arguments.stride[d]) continue;
                at[d] = rest % arguments.extent[d];
                rest /= arguments.extent[d];
            }
            Query query;
            query.place.batch = at[0];
            query.place.head = at[4];
            int64_t entry_at[3];
            GPU_UNROLL_FOR (int a = 0; a < 3; ++a) {
                query.place.at[a] = at[1 + a];
                query.window[a] = window_of(p.axis[a], at[1 + a]);
                entry_at[a] = at[5 + a];
                if (arguments.relative)
                    entry_at[a] += query.window[a].centre - query.window[a].start - (p.axis[a].kernel - 1);
            }
            Entry entry;
            PairGradient<Real> pair;
            if (find_entry(p, query, entry_at, entry) &&
                pair_gradient<T>(p, query, entry, arguments.backward.delta, pair))
                sum += pair.by_score;
        }
        if (sharers > 1) {  // a block's partial sums, added in the order of its warps
            synchronize();
            if (lane_index() == 0) store_shared_number(shared_memory() + SharedAddress(sizeof(Real) * warp), sum);
            synchronize();
            sum = 0;
            if (warp == 0)
                for (int i = 0; i < sharers; ++i)
                    sum += load_shared_number<Real>(shared_memory() + SharedAddress(sizeof(Real) * i));
        }
        if (element < elements && warp % sharers == 0 && lane_index() == 0) arguments.gradient[offset] = sum;
    }
}

}  // namespace localattn::cuda
