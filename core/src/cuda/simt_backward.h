// Gradients of 2D local attention in float32 without tensor cores; the same problems as simt_forward.h. Device and
// launches: arch/simt.cu. Strips of places: simt_tiles.h. The plan of the backward: gradients.h.
#pragma once
#include "gradients.h"
#include "simt_bias.h"

namespace localattn::cuda {

// What a pair gives to the gradients, from its score and dot(grad_output, value); nothing if it is none.
struct PairShare {
    float weight, by_score;

    GPU_METHOD PairShare(bool seen, float score, float by_weight, Statistics of) {
        weight = seen ? fast_exp2((score - of.lse) * log2_of_e) : 0;
        by_score = seen ? weight * (by_weight - of.delta) : 0;
    }
};

template <class C, class Bias>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) simt_grad_query(GPU_ARGUMENT GradientArguments<float, Bias> a) {
    const BlockPlace block(a.rows, a.columns, a.heads, a.first_image);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;

    const KeyStages<C, float> stages(a, block, rows, columns);
    const int first_column = stages.loader.first_column;

    const Strip<C> strip(a.rows, a.columns, rows, columns, first_column, stages.loader.stage_columns);
    const StripBias<C, Bias> bias = {a.bias, block, strip};
    float query[C::places][C::channels], grad_output[C::places][C::channels], sum[C::places][C::channels];
    Statistics statistics[C::places];
    strip.load(query, a.query + (block.batch * a.query_view.batch + block.head * a.query_view.head), a.query_view,
               a.channels);
    strip.load(grad_output,
               a.grad_output + (block.batch * a.grad_output_view.batch + block.head * a.grad_output_view.head),
               a.grad_output_view, a.value_channels);
    clear_slices(sum);
    const Statistics *image_statistics =
        a.statistics + (int64_t(block.batch) * a.rows.queries * a.columns.queries * a.heads + block.head);
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
        statistics[q] = {INFINITY, 0};
        if (strip.exists(q)) statistics[q] = image_statistics[strip.position(q, a.columns.queries * a.heads, a.heads)];
    }

    for (int stage = 0; stage < stages.count; ++stage) {
        stages.advance(stage);
        const int row = stages.row_of_stage(stage);
        if (strip.sees_row(row))
            strip.for_each_step([&](int at, int column) {
                const SharedAddress keys = stages.at(stage);
                GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
                    float key[C::channels], value[C::channels];
                    load_slice<C>(key, keys, at - first_column + j);
                    load_slice<C>(value, keys + stages.loader.second_at(), at - first_column + j);
                    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
                        const bool seen = strip.sees_column(q, column + j);
                        float score = strip_sum<C>(slice_dot(query[q], key)) * a.scale;
                        if constexpr (Bias::present)
                            if (seen && strip.exists(q)) bias.of(q).apply(score, row, column + j);
                        const PairShare pair(seen, score, strip_sum<C>(slice_dot(grad_output[q], value)),
                                             statistics[q]);
                        if constexpr (Bias::present)
                            if (seen && a.bias.score_gradient)
                                bias.store_gradient(pair.weight, pair.by_score, q, row, column + j);
                        add_scaled(sum[q], pair.by_score, key);
                    }
                }
            });
        synchronize();
    }

    if (!a.grad_query) return;
    tell_spoilt(a.spoilt, sum);
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q)
        if (strip.exists(q))
            strip.store(a.grad_query + (block.batch * a.grad_query_view.batch + block.head * a.grad_query_view.head),
                        a.grad_query_view, a.channels, q, sum[q], a.scale);
}

// Both gradients at once: either may be unwanted.
template <class C, class Bias>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) simt_grad_key(GPU_ARGUMENT GradientArguments<float, Bias> a) {
    const BlockPlace block(a.rows, a.columns, a.heads / a.heads_a_key);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const QueryStages<C, float> stages(a, block, rows, columns);
    if (stages.count > 0) stages.load(0);

    const int first_column = stages.loader.first_column;
    const Strip<C> strip(a.rows, a.columns, rows, columns, first_column, stages.loader.stage_columns);
    float key[C::places][C::channels], value[C::places][C::channels];
    float key_sum[C::places][C::channels], value_sum[C::places][C::channels];
    strip.load(key, a.key + (block.batch * a.key_view.batch + block.head * a.key_view.head), a.key_view, a.channels);
    strip.load(value, a.value + (block.batch * a.value_view.batch + block.head * a.value_view.head), a.value_view,
               a.value_channels);
    clear_slices(key_sum);
    clear_slices(value_sum);

    for (int stage = 0; stage < stages.count; ++stage) {
        stages.advance(stage);
        const int row = stages.row_of_stage(stage), head = stages.head_of_stage(stage);
        if (strip.sees_row(row))
            strip.for_each_step([&](int at, int column) {
                GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
                    const int slot = at - first_column + j;
                    const Statistics of = load_statistics(stages.statistics_at(stage, slot));
                    float query[C::channels], grad_output[C::channels];
                    load_slice<C>(query, stages.queries_at(stage), slot);
                    load_slice<C>(grad_output, stages.queries_at(stage) + stages.loader.second_at(), slot);
                    float score[C::places];
                    GPU_UNROLL_FOR (int k = 0; k < C::places; ++k)
                        score[k] = strip_sum<C>(slice_dot(key[k], query)) * a.scale;
                    if constexpr (Bias::present)
                        apply_to_keys(score, a.bias, strip, block.batch, head, row, column + j);
                    GPU_UNROLL_FOR (int k = 0; k < C::places; ++k) {
                        const PairShare pair(strip.sees_column(k, column + j), score[k],
                                             strip_sum<C>(slice_dot(value[k], grad_output)), of);
                        add_scaled(key_sum[k], pair.by_score, query);
                        add_scaled(value_sum[k], pair.weight, grad_output);
                    }
                }
            });
        synchronize();
    }

    tell_spoilt(a.spoilt, key_sum);
    tell_spoilt(a.spoilt, value_sum);
    GPU_UNROLL_FOR (int k = 0; k < C::places; ++k) {
        if (!strip.exists(k)) continue;
        if (a.grad_key)
            strip.store(a.grad_key + (block.batch * a.grad_key_view.batch + block.head * a.grad_key_view.head),
                        a.grad_key_view, a.channels, k, key_sum[k], a.scale);
        if (a.grad_value)
            strip.store(a.grad_value + (block.batch * a.grad_value_view.batch + block.head * a.grad_value_view.head),
                        a.grad_value_view, a.value_channels, k, value_sum[k], 1);
    }
}

}  // namespace localattn::cuda
