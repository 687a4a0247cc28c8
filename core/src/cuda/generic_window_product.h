// The generic kernels of similarity and weighting: the three window products (../window_product.h), one warp for each
// query or key. Launches: arch/generic_window_product.cu.
#pragma once
#include "../window_product.h"
#include "chunk.h"
#include "pair.h"

namespace localattn::cuda {

// Entries that are no key lie outside the map or are not there at all. Border mask leaves the former out of `present`.
GPU_FUNCTION bool is_absent(const Problem &p, const Query &query, const int64_t (&at)[3]) {
    bool absent = key_map_is_empty(p);
    GPU_UNROLL_FOR (int a = 0; a < 3; ++a) {
        const Window &w = query.window[a];
        absent = absent || (p.axis[a].causal && w.start + at[a] > w.centre) ||
                 (p.axis[a].border == Border::shift && w.start + at[a] >= w.length);
    }
    return absent;
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_score(GPU_ARGUMENT WindowProduct p) {
    using Real = Accumulator<T>;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Query query = query_at(p, index);
        const T *const query_row = row_of<const T>(p.query, query.place);
        T *to = row_of<T>(p.entries, query.place);
        int64_t at[3], left = entry_end(p);
        for (at[0] = 0; at[0] < p.axis[0].kernel; ++at[0])
            for (at[1] = 0; at[1] < p.axis[1].kernel; ++at[1])
                for (at[2] = 0; at[2] < p.axis[2].kernel && left > 0; ++at[2], --left, to += p.entries.channel) {
                    Entry entry;
                    Real score;
                    if (find_entry(p, query, at, entry) && entry.is_key)
                        score = dot(query_row, p.query.channel, row_of<const T>(p.key, key_place(p, query, entry)),
                                    p.key.channel, p.channels);
                    else
                        score = Real(is_absent(p, query, at) ? p.absent : p.outside);
                    if (lane_index() == 0) narrow(score, *to);
                }
    }
}

template <class T>
GPU_FUNCTION Accumulator<T> entry_of(const WindowProduct &p, const Query &query, const Entry &entry) {
    return widen(row_of<const T>(p.entries, query.place)[entry_index(p, entry.at) * p.entries.channel]);
}

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_weigh(GPU_ARGUMENT WindowProduct p) {
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Query query = query_at(p, index);
        for (int64_t first = 0; first < p.channels; first += Chunk<Accumulator<T>>::width) {
            Chunk<Accumulator<T>> sum(first);
            for_each_entry(p, query, [&](const Entry &entry) {
                if (entry.is_key)
                    sum.add(entry_of<T>(p, query, entry), row_of<const T>(p.key, key_place(p, query, entry)),
                            p.key.channel, p.channels);
            });
            sum.write(row_of<T>(p.query, query.place), p.query.channel, p.channels);
        }
    }
}

// Keys gather over the queries that see them.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) generic_transposed(GPU_ARGUMENT WindowProduct p) {
    for (int64_t index = first_warp(); index < key_count(p); index += warp_step()) {
        const Place key = key_at(p, index);
        for (int64_t first = 0; first < p.channels; first += Chunk<Accumulator<T>>::width) {
            Chunk<Accumulator<T>> sum(first);
            for_each_query(p, key, [&](Query &query, const Entry &entry) {
                query.place.head = key.head;
                sum.add(entry_of<T>(p, query, entry), row_of<const T>(p.query, query.place), p.query.channel,
                        p.channels);
            });
            sum.write(row_of<T>(p.key, key), p.key.channel, p.channels);
        }
    }
}

}  // namespace localattn::cuda
