// Forward of 2D local attention in float32 without tensor cores: exact products, register tiles. The same windows as
// tensor_core_forward.h. Device and launches: arch/simt.cu. Strips of queries, stepping two keys at a time:
// simt_tiles.h. The window rule: ranges.h.
//
// A row of k keys costs a strip k+3 loads instead of 4k.
#pragma once
#include "forward.h"
#include "simt_bias.h"

namespace localattn::cuda {

// A strip's online softmax: `top` is the running maximum of the scores, divided by |scale|.
template <class C>
struct StripSoftmax {
    float query[C::places][C::channels], output[C::places][C::channels];
    float top[C::places], sum[C::places];
};

// One step: the keys of `slot` and of the column after it.
template <class C, class Bias>
GPU_FUNCTION void attend_keys(StripSoftmax<C> &state, const Strip<C> &strip, const StripBias<C, Bias> &bias,
                              SharedAddress stage, SharedAddress values, int slot, int row, int column,
                              float scale_log2) {
    float score[C::places][C::step];
    GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
        float key[C::channels];
        load_slice<C>(key, stage, slot + j);
        GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) score[q][j] = slice_dot(state.query[q], key);
    }
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q)
        GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) score[q][j] = strip_sum<C>(score[q][j]);
    if constexpr (Bias::present) bias.apply(score, row, column);
    bool rises = false;
    float top[C::places];
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
        top[q] = state.top[q];
        GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
            if (!strip.sees_column(q, column + j)) score[q][j] = -INFINITY;
            top[q] = fmaxf(top[q], score[q][j]);
        }
        rises = rises || top[q] > state.top[q];
    }
    if (any_in_warp(rises)) {
        GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
            // Equal when both are -infinity, whose difference is NaN.
            const float shrink = top[q] == state.top[q] ? 1 : fast_exp2((state.top[q] - top[q]) * scale_log2);
            state.top[q] = top[q];
            state.sum[q] *= shrink;
            GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) state.output[q][c] *= shrink;
        }
    }
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
        const float base = softmax_base(state.top[q] * scale_log2);
        GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
            score[q][j] = fast_exp2(score[q][j] * scale_log2 - base);
            state.sum[q] += score[q][j];
        }
    }
    GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) {
        float value[C::channels];
        load_slice<C>(value, stage + values, slot + j);
        GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) add_scaled(state.output[q], score[q][j], value);
    }
}

template <class C, class Bias>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) simt_forward(GPU_ARGUMENT ForwardArguments<float, Bias> a) {
    const BlockPlace block(a.rows, a.columns, a.heads);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;

    const KeyStages<C, float> stages(a, block, rows, columns);
    const int first_column = stages.loader.first_column;

    const Strip<C> strip(a.rows, a.columns, rows, columns, first_column, stages.loader.stage_columns);
    const StripBias<C, Bias> bias = {a.bias, block, strip};
    StripSoftmax<C> state;
    strip.load(state.query, a.query + (block.batch * a.query_view.batch + block.head * a.query_view.head), a.query_view,
               a.channels);
    clear_slices(state.output);
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
        GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) state.query[q][c] *= a.sign;
        state.top[q] = -INFINITY;
        state.sum[q] = 0;
    }

    for (int stage = 0; stage < stages.count; ++stage) {
        stages.advance(stage);
        if (strip.sees_row(stages.row_of_stage(stage)))
            strip.for_each_step([&](int at, int column) {
                attend_keys<C>(state, strip, bias, stages.at(stage), stages.loader.second_at(), at - first_column,
                               stages.row_of_stage(stage), column, a.scale * log2_of_e);
            });
        synchronize();
    }

    tell_spoilt(a.spoilt, state.output);
    GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
        if (!strip.exists(q)) continue;
        const float sum = state.sum[q];
        strip.store(a.output + (block.batch * a.output_view.batch + block.head * a.output_view.head), a.output_view,
                    a.value_channels, q, state.output[q], sum == 0 ? 0 : 1 / sum);
        if (a.lse && lane_index() % C::slices == 0)
            a.lse[block.batch * a.lse_view.batch + block.head * a.lse_view.head +
                  strip.position(q, a.lse_view.row, a.lse_view.column)] =
                sum == 0 ? -INFINITY : state.top[q] * a.scale + fast_log2(sum) * (1 / log2_of_e);
    }
}

}  // namespace localattn::cuda
