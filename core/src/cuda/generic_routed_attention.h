// The generic kernels of routed attention: every option, any architecture, one warp for each query or key. Launches:
// arch/generic_routed_attention.cu. The routing and its inverse: routing.h.
//
//     s = w scale q.k    p = exp(s - lse)    output = sum p w v          for a choice of weight w
//     ds = p (w dO.v - delta)    delta = dO.output - grad_lse
//     dQ = scale sum w ds k    dK = scale sum w ds q    dV = sum w p dO    dw = sum ds scale q.k + p dO.v
#pragma once
#include "pair.h"
#include "routing.h"

namespace localattn::cuda {

// One pixel, of one head, of a region of queries or keys.
struct Site {
    int64_t batch, head, region, pixel;

    // Heads run fastest, then pixels of a region.
    GPU_METHOD static Site at(const RoutedProblem &p, int64_t index, int64_t pixels) {
        Site site;
        site.head = index % p.heads;
        index /= p.heads;
        site.pixel = index % pixels;
        index /= pixels;
        site.region = index % p.regions();
        site.batch = index / p.regions();
        return site;
    }
};

template <class T>
GPU_FUNCTION T *row_of(const RoutedProblem &p, const Tensor &t, const Site &site, const int64_t (&size)[2]) {
    return static_cast<T *>(t.data) + (p.region_offset(t, site.batch, site.head, site.region, size) +
                                       site.pixel / size[1] * t.axis[1] + site.pixel % size[1] * t.axis[2]);
}
template <class T>
GPU_FUNCTION T *query_row(const RoutedProblem &p, const Tensor &t, const Site &query) {
    return row_of<T>(p, t, query, p.query_region);
}
template <class T>
GPU_FUNCTION T *key_row(const RoutedProblem &p, const Tensor &t, const Site &key) {
    return row_of<T>(p, t, key, p.key_region);
}

GPU_FUNCTION int64_t query_count(const RoutedProblem &p) { return p.batch * p.regions() * p.queries() * p.heads; }
GPU_FUNCTION int64_t key_count(const RoutedProblem &p) { return p.batch * p.regions() * p.keys() * p.heads; }

template <class T>
GPU_FUNCTION Accumulator<T> choice_weight(const RoutedProblem &p, int64_t batch, int64_t region, int64_t choice) {
    const Tensor &t = p.region_weight;
    return t.data ? widen(static_cast<const T *>(t.data)[p.choice_offset(t, batch, region, choice)])
                  : Accumulator<T>(1);
}

// Without the choice's weight.
template <class T>
GPU_FUNCTION Accumulator<T> routed_score(const RoutedProblem &p, const Site &query, const Site &key) {
    return Accumulator<T>(p.scale) * dot(query_row<const T>(p, p.query, query), p.query.channel,
                                         key_row<const T>(p, p.key, key), p.key.channel, p.channels);
}

// Calls visit(key, choice, weight) for all pixels of the regions that the query's region chose.
template <class T, class Visit>
GPU_FUNCTION void for_each_key(const RoutedProblem &p, const Site &query, Visit visit) {
    Site key = query;
    for (int64_t choice = 0; choice < p.topk; ++choice) {
        key.region = p.index(query.batch, query.region, choice);
        const Accumulator<T> weight = choice_weight<T>(p, query.batch, query.region, choice);
        for (key.pixel = 0; key.pixel < p.keys(); ++key.pixel) visit(key, weight);
    }
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_routed_forward(GPU_ARGUMENT RoutedProblem p) {
    using Real = Accumulator<T>;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Site query = Site::at(p, index, p.queries());
        for (int64_t first = 0; first < p.value_channels; first += Chunk<Real>::width) {
            Chunk<Real> sum(first);
            Real top = -Real(INFINITY), total = 0;
            for_each_key<T>(p, query, [&](const Site &key, Real weight) {
                const Real score = weight * routed_score<T>(p, query, key);
                if (score > top) {  // a NaN never is: it makes the total NaN below
                    const Real next = finite_score(score), shrink = exponential(top - next);
                    total *= shrink;
                    sum.scale(shrink);
                    top = next;
                }
                const Real probability = score == -Real(INFINITY) ? Real(0) : exponential(score - top);
                total += probability;
                sum.add(probability * weight, key_row<const T>(p, p.value, key), p.value.channel, p.value_channels);
            });
            if (total != 0) sum.scale(1 / total);
            sum.write(query_row<T>(p, p.output, query), p.output.channel, p.value_channels);
            if (first == 0 && p.lse.data && lane_index() == 0)
                *query_row<Real>(p, p.lse, query) = total == 0 ? -Real(INFINITY) : top + logarithm(total);
        }
    }
}

template <class T>
struct RoutedBackwardArguments {
    RoutedProblem problem;
    Accumulator<T> *delta;  // one per query, in the order of Site::at
    InverseRouting inverse;
};

template <class T>
GPU_FUNCTION Accumulator<T> routed_delta(const RoutedProblem &p, const Site &query) {
    Accumulator<T> delta = dot(query_row<const T>(p, p.grad_output, query), p.grad_output.channel,
                               query_row<const T>(p, p.output, query), p.output.channel, p.value_channels);
    if (p.grad_lse.data) delta -= *query_row<const Accumulator<T>>(p, p.grad_lse, query);
    return delta;
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_routed_delta(GPU_ARGUMENT RoutedBackwardArguments<T> arguments) {
    const RoutedProblem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Accumulator<T> delta = routed_delta<T>(p, Site::at(p, index, p.queries()));
        if (lane_index() == 0) arguments.delta[index] = delta;
    }
}

// What a pair contributes, in the terms of the formulas above.
template <class Real>
struct RoutedPair {
    Real score, probability, by_probability, by_score;  // the first and third without the weight
};

template <class T>
GPU_FUNCTION RoutedPair<Accumulator<T>> routed_pair(const RoutedBackwardArguments<T> &arguments, const Site &query,
                                                    const Site &key, Accumulator<T> weight) {
    using Real = Accumulator<T>;
    const RoutedProblem &p = arguments.problem;
    const Real lse = *query_row<const Real>(p, p.lse, query);
    if (lse == -Real(INFINITY)) return {0, 0, 0, 0};
    RoutedPair<Real> pair;
    pair.score = routed_score<T>(p, query, key);
    pair.probability = exponential(weight * pair.score - finite_lse(lse));
    pair.by_probability = dot(query_row<const T>(p, p.grad_output, query), p.grad_output.channel,
                              key_row<const T>(p, p.value, key), p.value.channel, p.value_channels);
    const int64_t index =
        ((query.batch * p.regions() + query.region) * p.queries() + query.pixel) * p.heads + query.head;
    pair.by_score = pair.probability * (weight * pair.by_probability - arguments.delta[index]);
    return pair;
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1)
    generic_routed_grad_query(GPU_ARGUMENT RoutedBackwardArguments<T> arguments) {
    using Real = Accumulator<T>;
    const RoutedProblem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Site query = Site::at(p, index, p.queries());
        for (int64_t first = 0; first < p.channels; first += Chunk<Real>::width) {
            Chunk<Real> sum(first);
            for_each_key<T>(p, query, [&](const Site &key, Real weight) {
                const Real by_score = routed_pair(arguments, query, key, weight).by_score;
                sum.add(weight * by_score, key_row<const T>(p, p.key, key), p.key.channel, p.channels);
            });
            sum.scale(Real(p.scale));
            sum.write(query_row<T>(p, p.grad_query, query), p.grad_query.channel, p.channels);
        }
    }
}

// Keys gather over the choices of their region.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1)
    generic_routed_grad_key_value(GPU_ARGUMENT RoutedBackwardArguments<T> arguments) {
    using Real = Accumulator<T>;
    const RoutedProblem &p = arguments.problem;
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    for (int64_t index = first_warp(); index < key_count(p); index += warp_step()) {
        const Site key = Site::at(p, index, p.keys());
        const int64_t begin = arguments.inverse.first(p, key.batch, key.region);
        const int64_t end = arguments.inverse.first(p, key.batch, key.region + 1);
        for (int64_t first = 0; first < widest; first += Chunk<Real>::width) {
            Chunk<Real> key_sum(first), value_sum(first);
            for (int64_t i = begin; i < end; ++i) {
                const Choice choice = arguments.inverse.at(p, key.batch, i);
                const Real weight = choice_weight<T>(p, key.batch, choice.region, choice.number);
                Site query = {key.batch, key.head, choice.region, 0};
                for (; query.pixel < p.queries(); ++query.pixel) {
                    const RoutedPair<Real> pair = routed_pair(arguments, query, key, weight);
                    key_sum.add(weight * pair.by_score, query_row<const T>(p, p.query, query), p.query.channel,
                                p.channels);
                    value_sum.add(weight * pair.probability, query_row<const T>(p, p.grad_output, query),
                                  p.grad_output.channel, p.value_channels);
                }
            }
            key_sum.scale(Real(p.scale));
            if (p.grad_key.data) key_sum.write(key_row<T>(p, p.grad_key, key), p.grad_key.channel, p.channels);
            if (p.grad_value.data)
                value_sum.write(key_row<T>(p, p.grad_value, key), p.grad_value.channel, p.value_channels);
        }
    }
}

// A block for each choice. Its warps share the queries of all heads; their sums are added in order.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1)
    generic_grad_region_weight(GPU_ARGUMENT RoutedBackwardArguments<T> arguments) {
    using Real = Accumulator<T>;
    const RoutedProblem &p = arguments.problem;
    const int64_t choices = p.batch * p.regions() * p.topk;
    const int warp = thread_index() / warp_size;
    for (int64_t item = block_index().x; item < choices; item += grid_extent().x) {
        const int64_t choice = item % p.topk, region = item / p.topk % p.regions(), batch = item / p.topk / p.regions();
        const Real weight = choice_weight<T>(p, batch, region, choice);
        Real sum = 0;
        for (int64_t i = warp; i < p.heads * p.queries(); i += generic_warps) {
            const Site query = {batch, i / p.queries(), region, i % p.queries()};
            Site key = {batch, query.head, p.index(batch, region, choice), 0};
            for (; key.pixel < p.keys(); ++key.pixel) {
                const RoutedPair<Real> pair = routed_pair(arguments, query, key, weight);
                sum += pair.by_score * pair.score + pair.probability * pair.by_probability;
            }
        }
        sum = sum_of_warps(sum);
        if (thread_index() == 0) {
            const Tensor &t = p.grad_region_weight;
            static_cast<Real *>(t.data)[p.choice_offset(t, batch, region, choice)] = sum;
        }
    }
}

}  // namespace localattn::cuda
