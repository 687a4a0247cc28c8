// Linear attention, every option, any architecture. Launches: arch/generic_linear_attention.cu.
//
//     s = softmax of query over its channels    p = softmax of key over the positions     (neither is stored)
//     forward    context = p' v                 output = s context
//     backward   gradient of context: C = s' dO
//                dQ = s (dO context' - mean over channels, weighed by s)      dV = p C      dK = p (v C' - mean)
//                with mean[j] = sum over e of C[j, e] context[j, e]
//
// Every product is tiles of a block (block_product.h). Sums over positions are split into parts, whose number depends
// on the problem alone, and the parts are added in order. The parts of the forward have maxima of their own.
#pragma once
#include "../linear_attention.h"
#include "block_product.h"
#include "chunk.h"

namespace localattn::cuda {

// A map and its positions, numbered row by row.
struct Positions {
    int64_t extent[3];

    GPU_METHOD int64_t offset(const Tensor &t, int64_t n) const {
        if (t.axis[1] == extent[2] * t.axis[2] && t.axis[0] == extent[1] * t.axis[1]) return n * t.axis[2];
        const int64_t row = n / extent[2];
        return row / extent[1] * t.axis[0] + row % extent[1] * t.axis[1] + n % extent[2] * t.axis[2];
    }
};

template <class Real>
struct LinearWorkspace {
    Real *part_max, *part_total;  // (batch * heads, parts, channels)
    Real *part_context;           // (batch * heads, parts, channels, value_channels)
    Real *context;                // (batch * heads, channels, value_channels); in the backward its gradient
    Real *mean;                   // (batch * heads, channels)
    Real *query_lse;              // (batch, queries, heads): over the channels
    int64_t parts;
};

template <class T>
struct LinearArguments {
    using Real = Accumulator<T>;
    LinearProblem problem;
    LinearWorkspace<Real> workspace;
    Positions queries, keys;
    int64_t query_count, key_count;
};

// One batch and head: where its rows are.
template <class T>
struct LinearHead {
    using Real = Accumulator<T>;
    const LinearArguments<T> &arguments;
    int64_t batch, head;

    GPU_METHOD LinearHead(const LinearArguments<T> &a, int64_t index)
        : arguments(a), batch(index / a.problem.heads), head(index % a.problem.heads) {}
    GPU_METHOD int64_t index() const { return batch * arguments.problem.heads + head; }

    template <class Element = T>
    GPU_METHOD Element *element(const Positions &map, const Tensor &t, int64_t n, int64_t channel) const {
        return static_cast<Element *>(t.data) +
               (batch * t.batch + head * t.head + map.offset(t, n) + channel * t.channel);
    }
    GPU_METHOD Real at_query(const Tensor &t, int64_t n, int64_t channel) const {
        return widen(*element<const T>(arguments.queries, t, n, channel));
    }
    GPU_METHOD Real at_key(const Tensor &t, int64_t n, int64_t channel) const {
        return widen(*element<const T>(arguments.keys, t, n, channel));
    }
    GPU_METHOD bool attends(int64_t n) const {
        const Tensor &mask = arguments.problem.key_mask;
        return !mask.data ||
               static_cast<const uint8_t *>(mask.data)[batch * mask.batch + arguments.keys.offset(mask, n)];
    }
    GPU_METHOD Real query_softmax(int64_t n, int64_t channel) const {
        const LinearArguments<T> &a = arguments;
        return exponential(at_query(a.problem.query, n, channel) -
                           a.workspace.query_lse[(batch * a.query_count + n) * a.problem.heads + head]);
    }
    // As the forward remembered it.
    GPU_METHOD Real key_softmax(int64_t n, int64_t channel) const {
        const Tensor &t = arguments.problem.key_lse;
        const Real lse = static_cast<const Real *>(t.data)[batch * t.batch + head * t.head + channel * t.channel];
        if (lse == -Real(INFINITY) || !attends(n)) return 0;
        return exponential(at_key(arguments.problem.key, n, channel) - lse);
    }
    GPU_METHOD Real *given_context(int64_t channel, int64_t value_channel) const {
        const Tensor &t = arguments.problem.context;
        return static_cast<Real *>(t.data) +
               (batch * t.batch + head * t.head + channel * t.axis[2] + value_channel * t.channel);
    }
    GPU_METHOD Real &own_context(int64_t channel, int64_t value_channel) const {
        const LinearProblem &p = arguments.problem;
        return arguments.workspace.context[(index() * p.channels + channel) * p.value_channels + value_channel];
    }
    GPU_METHOD int64_t part_row(int64_t part, int64_t channel) const {
        return (index() * arguments.workspace.parts + part) * arguments.problem.channels + channel;
    }
};

// Block number -> tiles of rows and columns, and the rest.
struct Tiling {
    int64_t rows, columns;  // tiles

    GPU_METHOD Tiling(int64_t of_rows, int64_t of_columns)
        : rows((of_rows + product_tile - 1) / product_tile), columns((of_columns + product_tile - 1) / product_tile) {}
    GPU_METHOD int64_t row(int64_t block) const { return block % rows * product_tile; }
    GPU_METHOD int64_t column(int64_t block) const { return block / rows % columns * product_tile; }
    GPU_METHOD int64_t rest(int64_t block) const { return block / rows / columns; }
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) linear_query_lse(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    for (int64_t index = first_warp(); index < p.batch * a.query_count * p.heads; index += warp_step()) {
        const int64_t n = index / p.heads % a.query_count;
        const LinearHead<T> at(a, index / p.heads / a.query_count * p.heads + index % p.heads);
        Real top = -Real(INFINITY), total = 0;
        for (int64_t c = lane_index(); c < p.channels; c += warp_size) {
            const Real x = at.at_query(p.query, n, c);
            top = x > top ? x : top;
        }
        top = warp_max(top);
        if (top == -Real(INFINITY)) top = 0;
        for (int64_t c = lane_index(); c < p.channels; c += warp_size)
            total += exponential(at.at_query(p.query, n, c) - top);
        total = warp_sum(total);
        if (lane_index() == 0) a.workspace.query_lse[index] = top + logarithm(total);
    }
}

template <class T>
GPU_FUNCTION void write_part(const LinearArguments<T> &a, const LinearHead<T> &at, int64_t part, int64_t first_channel,
                             int64_t first_value, const BlockProduct<Accumulator<T>> &product) {
    const LinearProblem &p = a.problem;
    GPU_UNROLL_FOR (int i = 0; i < product.per_thread; ++i)
        GPU_UNROLL_FOR (int j = 0; j < product.per_thread; ++j) {
            const int64_t channel = first_channel + product.row(i), value = first_value + product.column(j);
            if (channel < p.channels && value < p.value_channels)
                a.workspace.part_context[at.part_row(part, channel) * p.value_channels + value] = product.sum[i][j];
        }
}

// A part of the context: 64 channels, 64 value channels, the positions of the part, relative to the part's maxima.
template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_sum_keys(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    const Tiling tiling(p.channels, p.value_channels);
    const int64_t parts = a.workspace.parts, blocks = tiling.rows * tiling.columns * parts * p.batch * p.heads;
    constexpr int groups = product_threads / product_tile;  // of threads that share a channel's positions
    for (int64_t block = block_index().x; block < blocks; block += grid_extent().x) {
        const int64_t first_channel = tiling.row(block), first_value = tiling.column(block);
        const int64_t part = tiling.rest(block) % parts;
        const LinearHead<T> at(a, tiling.rest(block) / parts);
        const int64_t begin = a.key_count * part / parts, end = a.key_count * (part + 1) / parts;

        const int64_t own = first_channel + thread_index() % product_tile;
        Real top = -Real(INFINITY), total = 0;
        for (int64_t n = begin + thread_index() / product_tile; own < p.channels && n < end; n += groups) {
            if (!at.attends(n)) continue;
            const Real x = at.at_key(p.key, n, own);
            if (x > top) {
                total *= exponential(top - x);
                top = x;
            }
            total += x == -Real(INFINITY) ? Real(0) : exponential(x - top);
        }
        const auto shared = [](int group, int channel, int which) {
            return shared_memory() + SharedAddress(((2 * group + which) * product_tile + channel) * int(sizeof(Real)));
        };
        synchronize();
        store_shared_number(shared(thread_index() / product_tile, thread_index() % product_tile, 0), top);
        store_shared_number(shared(thread_index() / product_tile, thread_index() % product_tile, 1), total);
        synchronize();
        // What a thread reads of the keys below, consecutive threads along the channels, is always the same channel.
        Real shift = -Real(INFINITY), sum = 0;
        for (int group = 0; group < groups; ++group) {
            const Real x = load_shared_number<Real>(shared(group, thread_index() % product_tile, 0));
            shift = x > shift ? x : shift;
        }
        if (shift == -Real(INFINITY)) shift = 0;
        for (int group = 0; group < groups; ++group)
            sum += load_shared_number<Real>(shared(group, thread_index() % product_tile, 1)) *
                   exponential(load_shared_number<Real>(shared(group, thread_index() % product_tile, 0)) - shift);
        if (thread_index() < product_tile && own < p.channels && first_value == 0) {
            a.workspace.part_max[at.part_row(part, own)] = shift;
            a.workspace.part_total[at.part_row(part, own)] = sum;
        }

        BlockProduct<Real> product;
        product.template add<Along::side, Along::side>(
            begin, end,
            [&](int, int64_t n) {
                return own < p.channels && at.attends(n) ? exponential(at.at_key(p.key, n, own) - shift) : Real(0);
            },
            [&](int e, int64_t n) {
                return first_value + e < p.value_channels && at.attends(n) ? at.at_key(p.value, n, first_value + e)
                                                                           : Real(0);
            });
        write_part(a, at, part, first_channel, first_value, product);
    }
}

// A part of the context's gradient.
template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_sum_queries(GPU_ARGUMENT LinearArguments<T> a) {
    const LinearProblem &p = a.problem;
    const Tiling tiling(p.channels, p.value_channels);
    const int64_t parts = a.workspace.parts, blocks = tiling.rows * tiling.columns * parts * p.batch * p.heads;
    for (int64_t block = block_index().x; block < blocks; block += grid_extent().x) {
        const int64_t first_channel = tiling.row(block), first_value = tiling.column(block);
        const int64_t part = tiling.rest(block) % parts;
        const LinearHead<T> at(a, tiling.rest(block) / parts);
        using Real = Accumulator<T>;
        BlockProduct<Real> product;
        product.template add<Along::side, Along::side>(
            a.query_count * part / parts, a.query_count * (part + 1) / parts,
            [&](int c, int64_t n) {
                return first_channel + c < p.channels ? at.query_softmax(n, first_channel + c) : Real(0);
            },
            [&](int e, int64_t n) {
                return first_value + e < p.value_channels ? at.at_query(p.grad_output, n, first_value + e) : Real(0);
            });
        write_part(a, at, part, first_channel, first_value, product);
    }
}

// Adds up the parts: a warp for each channel of a head.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) linear_merge_keys(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    const LinearWorkspace<Real> &w = a.workspace;
    for (int64_t index = first_warp(); index < p.batch * p.heads * p.channels; index += warp_step()) {
        const int64_t c = index % p.channels;
        const LinearHead<T> at(a, index / p.channels);
        Real shift = -Real(INFINITY), total = 0;
        for (int64_t part = 0; part < w.parts; ++part) {
            const int64_t row = at.part_row(part, c);
            if (w.part_total[row] != 0 && !(w.part_max[row] <= shift)) shift = w.part_max[row];
        }
        const auto share = [&](int64_t part) {
            const int64_t row = at.part_row(part, c);
            return w.part_total[row] == 0 ? Real(0) : exponential(w.part_max[row] - shift);
        };
        for (int64_t part = 0; part < w.parts; ++part) total += share(part) * w.part_total[at.part_row(part, c)];
        for (int64_t e = lane_index(); e < p.value_channels; e += warp_size) {
            Real sum = 0;
            for (int64_t part = 0; part < w.parts; ++part)
                if (w.part_total[at.part_row(part, c)] != 0)
                    sum += share(part) * w.part_context[at.part_row(part, c) * p.value_channels + e];
            at.own_context(c, e) = total == 0 ? Real(0) : sum / total;
            if (p.context.data) *at.given_context(c, e) = total == 0 ? Real(0) : sum / total;
        }
        if (p.key_lse.data && lane_index() == 0) {
            const Tensor &t = p.key_lse;
            static_cast<Real *>(t.data)[at.batch * t.batch + at.head * t.head + c * t.channel] =
                total == 0 ? -Real(INFINITY) : shift + logarithm(total);
        }
    }
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) linear_merge_queries(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    for (int64_t index = first_warp(); index < p.batch * p.heads * p.channels; index += warp_step()) {
        const int64_t c = index % p.channels;
        const LinearHead<T> at(a, index / p.channels);
        Real mean = 0;
        for (int64_t e = lane_index(); e < p.value_channels; e += warp_size) {
            Real sum = 0;
            for (int64_t part = 0; part < a.workspace.parts; ++part)
                sum += a.workspace.part_context[at.part_row(part, c) * p.value_channels + e];
            at.own_context(c, e) = sum;
            mean += sum * *at.given_context(c, e);
        }
        mean = warp_sum(mean);
        if (lane_index() == 0) a.workspace.mean[index] = mean;
    }
}

// A map's positions, 64 a block, times the context: softmax(at, n, c) is the left operand, `wanted(at, n)` tells which
// results are not 0.
template <class T, class Softmax, class Wanted>
GPU_FUNCTION void multiply_context(const LinearArguments<T> &a, const Positions &map, int64_t count, const Tensor &to,
                                   Softmax softmax, Wanted wanted) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    const Tiling tiling(count, p.value_channels);
    const int64_t blocks = tiling.rows * tiling.columns * p.batch * p.heads;
    for (int64_t block = block_index().x; block < blocks; block += grid_extent().x) {
        const int64_t first = tiling.row(block), first_value = tiling.column(block);
        const LinearHead<T> at(a, tiling.rest(block));
        BlockProduct<Real> product;
        product.template add<Along::terms, Along::side>(
            0, p.channels, [&](int n, int64_t c) { return first + n < count ? softmax(at, first + n, c) : Real(0); },
            [&](int e, int64_t c) {
                return first_value + e < p.value_channels ? at.own_context(c, first_value + e) : Real(0);
            });
        GPU_UNROLL_FOR (int i = 0; i < product.per_thread; ++i)
            GPU_UNROLL_FOR (int j = 0; j < product.per_thread; ++j) {
                const int64_t n = first + product.row(i), e = first_value + product.column(j);
                if (n < count && e < p.value_channels)
                    narrow(wanted(at, n) ? product.sum[i][j] : Real(0), *at.element(map, to, n, e));
            }
    }
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_output(GPU_ARGUMENT LinearArguments<T> a) {
    multiply_context(
        a, a.queries, a.query_count, a.problem.output,
        [](const LinearHead<T> &at, int64_t n, int64_t c) { return at.query_softmax(n, c); },
        [](const LinearHead<T> &, int64_t) { return true; });
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_grad_value(GPU_ARGUMENT LinearArguments<T> a) {
    multiply_context(
        a, a.keys, a.key_count, a.problem.grad_value,
        [](const LinearHead<T> &at, int64_t n, int64_t c) { return at.key_softmax(n, c); },
        [](const LinearHead<T> &at, int64_t n) { return at.attends(n); });
}

// A block has 64 queries and all of their channels, 64 at a time: once for the mean, once for the result.
template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_grad_query(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    const Tiling tiling(a.query_count, p.channels);
    for (int64_t block = block_index().x; block < tiling.rows * p.batch * p.heads; block += grid_extent().x) {
        const int64_t first = block % tiling.rows * product_tile;
        const LinearHead<T> at(a, block / tiling.rows);
        constexpr int per_thread = BlockProduct<Real>::per_thread;
        Real mean[per_thread] = {};
        for (int pass = 0; pass < 2; ++pass) {
            for (int64_t first_channel = 0; first_channel < p.channels; first_channel += product_tile) {
                BlockProduct<Real> product;
                product.template add<Along::terms, Along::terms>(
                    0, p.value_channels,
                    [&](int n, int64_t e) {
                        return first + n < a.query_count ? at.at_query(p.grad_output, first + n, e) : Real(0);
                    },
                    [&](int c, int64_t e) {
                        return first_channel + c < p.channels ? *at.given_context(first_channel + c, e) : Real(0);
                    });
                GPU_UNROLL_FOR (int i = 0; i < per_thread; ++i)
                    GPU_UNROLL_FOR (int j = 0; j < per_thread; ++j) {
                        const int64_t n = first + product.row(i), c = first_channel + product.column(j);
                        if (n >= a.query_count || c >= p.channels) continue;
                        const Real softmax = at.query_softmax(n, c);
                        if (pass == 0)
                            mean[i] += softmax * product.sum[i][j];
                        else
                            narrow(softmax * (product.sum[i][j] - mean[i]), *at.element(a.queries, p.grad_query, n, c));
                    }
            }
            // The threads that share rows are neighbours in a warp.
            if (pass == 0)
                GPU_UNROLL_FOR (int i = 0; i < per_thread; ++i)
                    mean[i] = warp_sum<BlockProduct<Real>::threads_a_row>(mean[i]);
        }
    }
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(product_threads, 1) linear_grad_key(GPU_ARGUMENT LinearArguments<T> a) {
    using Real = Accumulator<T>;
    const LinearProblem &p = a.problem;
    const Tiling tiling(a.key_count, p.channels);
    const int64_t blocks = tiling.rows * tiling.columns * p.batch * p.heads;
    for (int64_t block = block_index().x; block < blocks; block += grid_extent().x) {
        const int64_t first = tiling.row(block), first_channel = tiling.column(block);
        const LinearHead<T> at(a, tiling.rest(block));
        BlockProduct<Real> product;
        product.template add<Along::terms, Along::terms>(
            0, p.value_channels,
            [&](int n, int64_t e) {
                return first + n < a.key_count && at.attends(first + n) ? at.at_key(p.value, first + n, e) : Real(0);
            },
            [&](int c, int64_t e) {
                return first_channel + c < p.channels ? at.own_context(first_channel + c, e) : Real(0);
            });
        GPU_UNROLL_FOR (int i = 0; i < product.per_thread; ++i)
            GPU_UNROLL_FOR (int j = 0; j < product.per_thread; ++j) {
                const int64_t n = first + product.row(i), c = first_channel + product.column(j);
                if (n >= a.key_count || c >= p.channels) continue;
                const Real mean = a.workspace.mean[at.index() * p.channels + c];
                const Real gradient = at.attends(n) ? at.key_softmax(n, c) * (product.sum[i][j] - mean) : Real(0);
                narrow(gradient, *at.element(a.keys, p.grad_key, n, c));
            }
    }
}

}  // namespace localattn::cuda
