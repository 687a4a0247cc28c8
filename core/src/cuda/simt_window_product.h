// Similarity and weighting, tiled: the window products of ../window_product.h, over the same windows as the tiled
// attention, computed in float32; 16-bit floats are widened on their way into shared memory. Device and launches:
// arch/simt_window_product.cu. Blocks and stages: stages.h. Register tiles, strips and slices: simt_forward.h.
//
// A block owns a tile of one map, its places (queries; keys for the transposed product), and the other map streams by,
// one row at a time. Entries pass through shared memory, a row of every window at a time, so that they are read and
// written in runs of the window's width however they are used:
//
//     product      places   entries in shared memory                      a step of a strip of 4 places
//     score        queries  written: [warp][place][column of the window]  4x2 dot products
//     weigh        queries  read:    the same                             1 row of channels added to 4 sums
//     transposed   keys     read:    [warp][streamed query][column]       the same
//
// The entries that are no keys are written by fill_outside.
#pragma once
#include "../window_product.h"
#include "generic_window_product.h"
#include "simt_tiles.h"

namespace localattn::cuda {

// Per axis and query: the keys that it sees, and the key, perhaps outside the map, that is its window's entry 0; in
// coordinates of its class.
struct WindowTableArguments {
    Axis axis[2];
    Range *keys[2];
    int32_t *start[2];
};

GPU_KERNEL void GPU_BOUNDS(range_threads, 1) fill_window_tables(GPU_ARGUMENT WindowTableArguments a) {
    GPU_UNROLL_FOR (int x = 0; x < 2; ++x) {
        const int64_t step = int64_t(grid_extent().x) * range_threads;
        for (int64_t query = int64_t(block_index().x) * range_threads + thread_index(); query < a.axis[x].queries;
             query += step) {
            const Window window = window_of(a.axis[x], query);
            a.keys[x][query] = {int32_t(window.start + window.begin), int32_t(window.start + window.end)};
            a.start[x][query] = int32_t(window.start);
        }
    }
}

// Writes the entries that are no keys. A warp looks at 32 queries at a time; most have none.
template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) fill_outside(GPU_ARGUMENT WindowProduct p) {
    const int64_t queries = query_count(p);
    for (int64_t first = first_warp() * warp_size; first < queries; first += warp_step() * warp_size) {
        const int64_t mine = first + lane_index();
        bool whole = true;
        if (mine < queries) {
            const Query query = query_at(p, mine);
            GPU_UNROLL_FOR (int a = 0; a < 3; ++a)
                whole = whole && query.window[a].end - query.window[a].begin == p.axis[a].kernel;
        }
        for (uint32_t broken = ballot(!whole); broken; broken &= broken - 1) {
            const Query query = query_at(p, first + count_bits((broken & (0 - broken)) - 1));
            T *const to = row_of<T>(p.entries, query.place);
            for (int64_t entry = lane_index(); entry < entry_end(p); entry += warp_size) {
                int64_t at[3], rest = entry;
                bool is_key = true;
                GPU_UNROLL_FOR (int a = 2; a >= 0; --a) {
                    at[a] = rest % p.axis[a].kernel;
                    rest /= p.axis[a].kernel;
                    is_key = is_key && at[a] >= query.window[a].begin && at[a] < query.window[a].end;
                }
                if (!is_key) narrow(is_absent(p, query, at) ? p.absent : p.outside, to[entry * p.entries.channel]);
            }
        }
    }
}

template <class T>
struct SimtProductArguments {
    const T *streamed;
    const T *given;  // at the places; of score
    T *sums;         // at the places; of the others
    T *entries;      // only score writes them
    View streamed_view, place_view, entry_view;
    int32_t entry_stride, kernel_columns;
    TileAxis rows, columns;
    const int32_t *row_start, *column_start;  // of the queries
    int32_t heads, channels;
    int32_t stage_columns;
};

template <class C, class T>
struct RowLoader {
    Source<T, 4> source;
    int rows, columns;  // extents of the streamed class
    int first_column, stage_columns;

    GPU_METHOD void load(SharedAddress stage, int row) const {
        const int unit = thread_index() % C::units;
        for (int slot = thread_index() / C::units; slot < stage_columns; slot += C::threads / C::units) {
            const int column = first_column + slot;
            const bool in = unsigned(row) < unsigned(rows) && unsigned(column) < unsigned(columns) && source.has_unit;
            const T *from = source.tensor + (in ? row * source.row_step + column * source.column_step : 0);
            const SharedAddress to = stage + SharedAddress(slot * C::slot_bytes + ((unit ^ C::phase(slot)) << 4));
            if constexpr (sizeof(T) == 4) {
                copy_async(to, from, in);
            } else {
                T pairs[4] = {};
                const uint32_t words[] = {in ? load_pair(from) : 0, in ? load_pair(from + 2) : 0};
                memcpy(pairs, words, sizeof words);
                store_shared(to, {widen(pairs[0]), widen(pairs[1]), widen(pairs[2]), widen(pairs[3])});
            }
        }
        copy_commit();
    }
};

// Adds the slices' partial sums of 4 queries and 2 keys; lanes whose slice is q modulo 4 get query q's.
template <class C>
GPU_FUNCTION void reduce_slices(float (&total)[2], const float (&part)[4][2]) {
    const bool odd = lane_index() & 1, high = lane_index() & 2;
    GPU_UNROLL_FOR (int j = 0; j < 2; ++j) {
        float pair[2];
        GPU_UNROLL_FOR (int h = 0; h < 2; ++h)
            pair[h] =
                (odd ? part[2 * h + 1][j] : part[2 * h][j]) + shuffle_xor(odd ? part[2 * h][j] : part[2 * h + 1][j], 1);
        total[j] = (high ? pair[1] : pair[0]) + shuffle_xor(high ? pair[0] : pair[1], 2);
        GPU_UNROLL_FOR (int lanes = 4; lanes < C::slices; lanes *= 2) total[j] += shuffle_xor(total[j], lanes);
    }
}

// The entries that a warp has in shared memory: those of one row of windows at a time.
template <class C, Product product, class T>
struct WarpEntries {
    static constexpr bool transposes = product == Product::transposed;
    const SimtProductArguments<T> &a;
    const Section &rows, &columns;
    SharedAddress memory;
    int first_column, streamed_columns;

    // Key i of a window, counted from the first that it sees; where keys are gathered, from its entry 0.
    GPU_METHOD SharedAddress at(int window, int i) const {
        return memory + SharedAddress(4 * (window * a.kernel_columns + i));
    }
    // Calls visit(shared address, entry in memory) for the entries of place row `row` and a streamed row that are keys.
    template <class Visit>
    GPU_METHOD void for_each(const BlockPlace &block, int row, int streamed_row, Visit visit) const {
        const int query_row = rows.position(a.rows, transposes ? streamed_row : row);
        const int first_entry = ((transposes ? row : streamed_row) - a.row_start[query_row]) * a.kernel_columns;
        const int first_query = transposes ? first_column : columns.first_query;
        const int left = transposes ? columns.keys - first_column : columns.queries - columns.first_query;
        const int count = transposes ? streamed_columns : C::query_columns;
        T *const from = a.entries + (block.batch * a.entry_view.batch + block.head * a.entry_view.head +
                                     query_row * a.entry_view.row);
        int window = lane_index() / a.kernel_columns, u = lane_index() % a.kernel_columns;
        while (window < count && window < left) {
            const int position = columns.position(a.columns, first_query + window);
            const int key = a.column_start[position] + u;
            const Range keys = transposes ? Range{0, columns.queries} : a.columns.range[position];
            if (key >= keys.begin && key < keys.end)
                visit(at(window, transposes ? u : key - keys.begin),
                      from + (position * a.entry_view.column + (first_entry + u) * a.entry_stride));
            window += warp_size / a.kernel_columns;
            u += warp_size % a.kernel_columns;
            if (u >= a.kernel_columns) u -= a.kernel_columns, ++window;
        }
    }
};

template <class C, Product product, class T>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) simt_window_product(GPU_ARGUMENT SimtProductArguments<T> a) {
    constexpr bool scores = product == Product::score, transposes = product == Product::transposed;
    static_assert(C::places == 4 && C::step == (scores ? 2 : 1) && C::stage_rows == 1, "as written below");
    const BlockPlace block(a.rows, a.columns, a.heads);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const int first_row = rows.range(a.rows, 0).begin, end_row = rows.range(a.rows, C::query_rows - 1).end;
    const int first_column = columns.range(a.columns, 0).begin;
    const int streamed_columns = columns.range(a.columns, C::query_columns - 1).end - first_column;
    const RowLoader<C, T> loader = {{a.streamed, a.streamed_view, block.batch, block.head, a.rows, a.columns, rows,
                                     columns, thread_index() % C::units, a.channels},
                                    rows.keys,
                                    columns.keys,
                                    first_column,
                                    streamed_columns + C::spare_columns};
    const Strip<C> strip(a.rows, a.columns, rows, columns, first_column, loader.stage_columns);
    const SharedAddress memory = shared_memory(), stage_bytes = SharedAddress(a.stage_columns * C::slot_bytes);
    const int warp = thread_index() / warp_size, windows = transposes ? a.stage_columns : C::query_columns;
    const WarpEntries<C, product, T> entries = {
        a,
        rows,
        columns,
        memory + 2 * stage_bytes + SharedAddress(4 * warp * windows * a.kernel_columns),
        first_column,
        streamed_columns};

    float place[C::places][C::channels];  // score: given; else sums
    if constexpr (scores)
        strip.load(place, a.given + (block.batch * a.place_view.batch + block.head * a.place_view.head), a.place_view,
                   a.channels);
    else
        clear_slices(place);
    int seen_first[C::places], seen[C::places];  // columns: the first, and how many
    GPU_UNROLL_FOR (int i = 0; i < C::places; ++i) {
        seen_first[i] = strip.columns[i].begin;
        seen[i] = strip.exists(i) ? strip.columns[i].end - seen_first[i] : 0;
    }
    const int first_window = strip.first - columns.first_query;

    const auto step = [&](SharedAddress stage, int at, int column) {
        if constexpr (scores) {
            float part[C::places][C::step], total[C::step];
            GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
                float slice[C::channels];
                load_slice<C>(slice, stage, at + j - first_column);
                GPU_UNROLL_FOR (int i = 0; i < C::places; ++i) part[i][j] = slice_dot(place[i], slice);
            }
            reduce_slices<C>(total, part);
            GPU_UNROLL_FOR (int i = 0; i < C::places; ++i)
                GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
                    const unsigned key = unsigned(column + j) - unsigned(seen_first[i]);
                    if (lane_index() % C::slices == i && key < unsigned(a.kernel_columns))
                        store_shared_number(entries.at(first_window + i, int(key)), total[j]);
                }
        } else {
            float slice[C::channels];
            load_slice<C>(slice, stage, at - first_column);
            // Of the streamed query: which of its entries the strip's first key would be.
            int first_entry = 0;
            if (transposes && column < columns.keys)
                first_entry = strip.first - a.column_start[columns.position(a.columns, column)];
            GPU_UNROLL_FOR (int i = 0; i < C::places; ++i) {
                // Nothing is multiplied by 0 instead: it may be a NaN.
                const unsigned key = unsigned(column) - unsigned(seen_first[i]);
                if (key >= unsigned(seen[i])) continue;
                const SharedAddress weight = transposes ? entries.at(column - first_column, first_entry + i)
                                                        : entries.at(first_window + i, int(key));
                add_scaled(place[i], load_shared_number<float>(weight), slice);
            }
        }
    };

    if (first_row < end_row) loader.load(memory, first_row);
    for (int row = first_row; row < end_row; ++row) {
        if (row + 1 < end_row) {
            loader.load(memory + SharedAddress((row + 1 - first_row) % 2) * stage_bytes, row + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        if (!scores && strip.sees_row(row))
            entries.for_each(block, strip.row, row,
                             [](SharedAddress to, const T *from) { store_shared_number(to, widen(*from)); });
        synchronize();
        if (strip.sees_row(row))
            strip.for_each_step([&](int at, int column) {
                step(memory + SharedAddress((row - first_row) % 2) * stage_bytes, at, column);
            });
        synchronize();
        if (scores && strip.sees_row(row))
            entries.for_each(block, strip.row, row,
                             [](SharedAddress from, T *to) { narrow(load_shared_number<float>(from), *to); });
    }

    if constexpr (!scores)
        GPU_UNROLL_FOR (int i = 0; i < C::places; ++i)
            if (strip.exists(i))
                strip.store(a.sums + (block.batch * a.place_view.batch + block.head * a.place_view.head), a.place_view,
                            a.channels, i, place[i], 1);
}

}  // namespace localattn::cuda
