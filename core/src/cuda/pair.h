// One query and one entry of its window: where they lie, their score, and what they give to the gradients. A warp
// computes one pair at a time, its lanes sharing the channels; every lane gets the result.
#pragma once
#include "../problem.h"
#include "../scalar.h"
#include "../window.h"
#include "gpu.h"
#include "softmax.h"
#include "transposed_window.h"

namespace localattn::cuda {

using namespace gpu;

// Coordinates of one row of a tensor.
struct Place {
    int64_t batch, head, at[3];
};

template <class T>
GPU_FUNCTION T *row_of(const Tensor &tensor, const Place &place) {
    return static_cast<T *>(tensor.data) +
           (place.batch * tensor.batch + place.at[0] * tensor.axis[0] + place.at[1] * tensor.axis[1] +
            place.at[2] * tensor.axis[2] + place.head * tensor.head);
}

struct Query {
    Place place;
    Window window[3];
};

struct Entry {
    int64_t at[3];
    bool is_key;  // else a zero outside the map
};

GPU_FUNCTION int64_t query_count(const Problem &p) {
    return p.batch * p.axis[0].queries * p.axis[1].queries * p.axis[2].queries * p.heads;
}

// Heads run fastest, then the last axis.
GPU_FUNCTION int64_t query_index(const Problem &p, const Place &place) {
    return (((place.batch * p.axis[0].queries + place.at[0]) * p.axis[1].queries + place.at[1]) * p.axis[2].queries +
            place.at[2]) *
               p.heads +
           place.head;
}

GPU_FUNCTION Query query_at(const Problem &p, int64_t index) {
    Query query;
    query.place.head = index % p.heads;
    index /= p.heads;
    GPU_UNROLL_FOR (int a = 2; a >= 0; --a) {
        query.place.at[a] = index % p.axis[a].queries;
        index /= p.axis[a].queries;
        query.window[a] = window_of(p.axis[a], query.place.at[a]);
    }
    query.place.batch = index;
    return query;
}

GPU_FUNCTION int64_t entry_index(const Problem &p, const int64_t (&entry)[3]) {
    return (entry[0] * p.axis[1].kernel + entry[1]) * p.axis[2].kernel + entry[2];
}

// Entries from this one on are absent: under raster causality the centre is the last.
GPU_FUNCTION int64_t entry_end(const Problem &p) {
    const int64_t all = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
    return p.raster ? all / 2 + 1 : all;
}

GPU_FUNCTION bool key_map_is_empty(const Problem &p) {
    return p.axis[0].keys == 0 || p.axis[1].keys == 0 || p.axis[2].keys == 0;
}

// The entry at coordinates `at` of the query's window, if it is present.
GPU_FUNCTION bool find_entry(const Problem &p, const Query &query, const int64_t (&at)[3], Entry &entry) {
    entry.is_key = true;
    GPU_UNROLL_FOR (int a = 0; a < 3; ++a) {
        const Window &w = query.window[a];
        if (at[a] < w.present_begin || at[a] >= w.present_end) return false;
        entry.is_key = entry.is_key && at[a] >= w.begin && at[a] < w.end;
        entry.at[a] = at[a];
    }
    return entry_index(p, at) < entry_end(p) && !key_map_is_empty(p);
}

// Calls visit(entry) for every entry that is present, in raster order.
template <class Visit>
GPU_FUNCTION void for_each_entry(const Problem &p, const Query &query, Visit visit) {
    const Window(&w)[3] = query.window;
    Entry entry;
    int64_t at[3];
    for (at[0] = w[0].present_begin; at[0] < w[0].present_end; ++at[0])
        for (at[1] = w[1].present_begin; at[1] < w[1].present_end; ++at[1])
            for (at[2] = w[2].present_begin; at[2] < w[2].present_end; ++at[2])
                if (find_entry(p, query, at, entry)) visit(entry);
}

// Of an entry that is a key.
GPU_FUNCTION Place key_place(const Problem &p, const Query &query, const Entry &entry) {
    Place key;
    key.batch = query.place.batch;
    key.head = query.place.head / (p.heads / p.kv_heads);
    GPU_UNROLL_FOR (int a = 0; a < 3; ++a)
        key.at[a] = query.window[a].residue + p.axis[a].dilation * (query.window[a].start + entry.at[a]);
    return key;
}

GPU_FUNCTION int64_t key_count(const Problem &p) {
    return p.batch * p.axis[0].keys * p.axis[1].keys * p.axis[2].keys * p.kv_heads;
}

GPU_FUNCTION Place key_at(const Problem &p, int64_t index) {
    Place key;
    key.head = index % p.kv_heads;
    index /= p.kv_heads;
    GPU_UNROLL_FOR (int a = 2; a >= 0; --a) {
        key.at[a] = index % p.axis[a].keys;
        index /= p.axis[a].keys;
    }
    key.batch = index;
    return key;
}

// Calls visit(query, entry) for every query that has the key in its window, in a fixed order; the query's head is not
// set.
template <class Visit>
GPU_FUNCTION void for_each_query(const Problem &p, const Place &key, Visit visit) {
    Query query;
    Entry entry;
    int64_t (&at)[3] = entry.at;
    entry.is_key = true;
    for_each_query_of_key(p.axis[0], key.at[0], [&](int64_t query0, const Window &window0, int64_t entry0) {
        query.place.at[0] = query0, query.window[0] = window0, at[0] = entry0;
        for_each_query_of_key(p.axis[1], key.at[1], [&](int64_t query1, const Window &window1, int64_t entry1) {
            query.place.at[1] = query1, query.window[1] = window1, at[1] = entry1;
            for_each_query_of_key(p.axis[2], key.at[2], [&](int64_t query2, const Window &window2, int64_t entry2) {
                query.place.at[2] = query2, query.window[2] = window2, at[2] = entry2;
                // Or addresses in ten tensors are made ready loop by loop, and spilled.
                query.place.batch = opaque(key.batch);
                query.place.at[0] = opaque(query0), query.place.at[1] = opaque(query1);
                query.place.at[2] = opaque(query2);
                if (entry_index(p, at) < entry_end(p)) visit(query, entry);
            });
        });
    });
}

// The same bits in every lane.
template <class T>
GPU_FUNCTION Accumulator<T> dot(const T *x, int64_t x_stride, const T *y, int64_t y_stride, int64_t channels) {
    Accumulator<T> sum = 0;
    for (int64_t c = lane_index(); c < channels; c += warp_size) sum += widen(x[c * x_stride]) * widen(y[c * y_stride]);
    return warp_sum(sum);
}

template <class T>
GPU_FUNCTION Accumulator<T> bias_of(const Problem &p, const Query &query, const Entry &entry) {
    Accumulator<T> sum = 0;
    if (p.bias.data) sum += widen(row_of<const T>(p.bias, query.place)[entry_index(p, entry.at) * p.bias.channel]);
    if (p.rel_pos_bias.data) {
        Place cell = {0, query.place.head, {0, 0, 0}};
        GPU_UNROLL_FOR (int a = 0; a < 3; ++a)
            cell.at[a] = query.window[a].start + entry.at[a] - query.window[a].centre + p.axis[a].kernel - 1;
        sum += widen(*row_of<const T>(p.rel_pos_bias, cell));
    }
    GPU_UNROLL_FOR (int a = 0; a < 3; ++a) {
        const Tensor &bias = p.axis_bias[a];
        if (bias.data) sum += widen(row_of<const T>(bias, query.place)[entry.at[a] * bias.channel]);
    }
    return sum;
}

// False if the key mask leaves the entry out.
template <class T>
GPU_FUNCTION bool score_of(const Problem &p, const Query &query, const Entry &entry, Accumulator<T> &score) {
    score = 0;
    if (entry.is_key) {
        const Place key = key_place(p, query, entry);
        if (p.key_mask.data && *row_of<const uint8_t>(p.key_mask, key) == 0) return false;
        score = Accumulator<T>(p.scale) * dot(row_of<const T>(p.query, query.place), p.query.channel,
                                              row_of<const T>(p.key, key), p.key.channel, p.channels);
    }
    score += bias_of<T>(p, query, entry);
    return true;
}

// Of one pair: its share of the softmax, and the derivative of the loss by its score.
template <class Real>
struct PairGradient {
    Real weight, by_score;
};

// dot(grad_output, output) - grad_lse of every query, so many numbers apart.
template <class Real>
struct Deltas {
    Real *first;
    int step;

    GPU_METHOD Real &operator[](int64_t query) const { return first[query * step]; }
};

// False if the key mask leaves the entry out.
template <class T>
GPU_FUNCTION bool pair_gradient(const Problem &p, const Query &query, const Entry &entry,
                                const Deltas<Accumulator<T>> &delta, PairGradient<Accumulator<T>> &gradient) {
    using Real = Accumulator<T>;
    Real score;
    if (!score_of<T>(p, query, entry, score)) return false;
    const Real lse = *row_of<const Real>(p.lse, query.place);
    if (lse == -Real(INFINITY)) {  // a query that sees nothing
        gradient.weight = gradient.by_score = 0;
        return true;
    }
    gradient.weight = exponential(score - finite_lse(lse));
    Real by_weight = 0;
    if (entry.is_key)
        by_weight = dot(row_of<const T>(p.grad_output, query.place), p.grad_output.channel,
                        row_of<const T>(p.value, key_place(p, query, entry)), p.value.channel, p.value_channels);
    gradient.by_score = gradient.weight * (by_weight - delta[query_index(p, query.place)]);
    return true;
}

}  // namespace localattn::cuda
