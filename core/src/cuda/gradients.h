// What the tiled kernels of the backward share. The scores are computed again, so nothing of the size of the windows is
// ever stored. Three kernels, no atomics:
//   fill_statistics  per query: log-sum-exp, and delta = dot(grad_output, output) - grad_lse
//   ..._grad_query   tiles of queries, keys and values stream by:  grad_query += dS K
//   ..._grad_key     tiles of keys, queries and grad_outputs stream by, over the transposed window and the query heads
//                    that share the key:  grad_value += P' dO,  grad_key += dS' Q
// with P = exp(S - lse), dS = P (dO V' - delta).
#pragma once
#include "pair.h"
#include "score_bias.h"
#include "spoilt_rows.h"

namespace localattn::cuda {

struct Statistics {
    float lse;  // for 16-bit floats in base 2, which spares a multiplication a pair and costs a few units of float32
    float delta;
};

// Of a query that sees nothing: +infinity makes its weights 0.
template <class T>
GPU_FUNCTION Statistics query_statistics(float lse, float delta) {
    constexpr float base = sizeof(T) == 2 ? log2_of_e : 1;
    return {lse == -INFINITY ? INFINITY : finite_lse(lse) * base, delta};
}

constexpr int statistics_threads = 256;

struct StatisticsArguments {
    Problem problem;
    Statistics *statistics;  // in the order of query_index
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(statistics_threads, 1) fill_statistics(GPU_ARGUMENT StatisticsArguments arguments) {
    const Problem &p = arguments.problem;
    constexpr int warps = statistics_threads / warp_size;
    const int64_t queries = query_count(p), step = int64_t(grid_extent().x) * warps;
    for (int64_t index = int64_t(block_index().x) * warps + thread_index() / warp_size; index < queries;
         index += step) {
        Place place = {0, index % p.heads, {0, 0, 0}};
        int64_t rest = index / p.heads;
        place.at[2] = rest % p.axis[2].queries;
        rest /= p.axis[2].queries;
        place.at[1] = rest % p.axis[1].queries;
        place.batch = rest / p.axis[1].queries;
        float delta = dot(row_of<const T>(p.grad_output, place), p.grad_output.channel,
                          row_of<const T>(p.output, place), p.output.channel, p.value_channels);
        if (p.grad_lse.data) delta -= *row_of<const float>(p.grad_lse, place);
        if (lane_index() == 0)
            arguments.statistics[index] = query_statistics<T>(*row_of<const float>(p.lse, place), delta);
    }
}

// `rows` and `columns` tile the queries in ..._grad_query, the keys in ..._grad_key.
template <class T, class Bias>
struct GradientArguments {
    const T *query, *key, *value, *grad_output;
    T *grad_query, *grad_key, *grad_value;  // each may be NULL
    View query_view, key_view, value_view, grad_output_view, grad_query_view, grad_key_view, grad_value_view;
    const Statistics *statistics;
    TileAxis rows, columns;
    int32_t heads, heads_a_key;
    int32_t channels, value_channels;
    int32_t stage_columns;
    float scale;
    int32_t first_image;  // of the launch, an image being one head of one batch
    int32_t part;         // of the channels, where a tile computes parts of a gradient
    int32_t *spoilt;
    Bias bias;  // NoBias, or ScoreBias<T>
};

// What streams by in ..._grad_key: stages of queries, their grad_outputs and their statistics, two of each in shared
// memory, of one query head after the other.
template <class C, class T>
struct QueryStages {
    Loader<C, T> loader;  // of head 0
    int64_t query_head, grad_output_head;
    const Statistics *statistics;  // of the image, head 0
    int heads, first_head;
    int count;
    int all_columns;  // of the map
    int row_residue, row_dilation, column_residue, column_dilation;
    SharedAddress memory, stage_bytes, statistics_bytes;

    template <class Arguments>
    GPU_METHOD QueryStages(const Arguments &a, const BlockPlace &block, const Section &rows, const Section &columns)
        : loader({a.query, a.query_view, 0, a.channels}, {a.grad_output, a.grad_output_view, 0, a.value_channels},
                 block.batch, a.rows, a.columns, rows, columns),
          query_head(a.query_view.head),
          grad_output_head(a.grad_output_view.head),
          statistics(a.statistics + int64_t(block.batch) * a.rows.keys * a.columns.keys * a.heads),
          heads(a.heads),
          first_head(block.head * a.heads_a_key),
          count(loader.stages * a.heads_a_key),
          all_columns(a.columns.keys),
          row_residue(rows.residue),
          row_dilation(a.rows.dilation),
          column_residue(columns.residue),
          column_dilation(a.columns.dilation),
          memory(shared_memory()),
          stage_bytes(SharedAddress(a.stage_columns * C::column_bytes)),
          statistics_bytes(SharedAddress(a.stage_columns * C::stage_rows * int(sizeof(Statistics)))) {}

    GPU_METHOD int head_of_stage(int stage) const { return first_head + stage / loader.stages; }
    GPU_METHOD int row_of_stage(int stage) const { return loader.row_of_stage(stage % loader.stages); }
    GPU_METHOD SharedAddress queries_at(int stage) const { return memory + SharedAddress(stage % 2) * stage_bytes; }
    GPU_METHOD SharedAddress statistics_at(int stage, int slot) const {
        return memory + 2 * stage_bytes + SharedAddress(stage % 2) * statistics_bytes +
               SharedAddress(slot * int(sizeof(Statistics)));
    }
    GPU_METHOD void load(int stage) const {
        const int head = head_of_stage(stage), row = row_of_stage(stage);
        Loader<C, T> of_head = loader;
        of_head.first.tensor += head * query_head;
        of_head.second.tensor += head * grad_output_head;
        of_head.load(queries_at(stage), row);
        for (int slot = thread_index(); slot < loader.slots(); slot += C::threads) {
            const int slot_row = row + slot % C::stage_rows, column = loader.first_column + slot / C::stage_rows;
            Statistics of = {INFINITY, 0};
            if (loader.inside(slot_row, column))
                of = statistics[((row_residue + row_dilation * slot_row) * all_columns + column_residue +
                                 column_dilation * column) *
                                    heads +
                                head];
            const SharedAddress to = statistics_at(stage, slot);
            store_shared_number(to, of.lse);
            store_shared_number(to + 4, of.delta);
        }
    }
    GPU_METHOD void advance(int stage) const { advance_stage(*this, stage); }
};

GPU_FUNCTION Statistics load_statistics(SharedAddress at) {
    return {load_shared_number<float>(at), load_shared_number<float>(at + 4)};
}

}  // namespace localattn::cuda
