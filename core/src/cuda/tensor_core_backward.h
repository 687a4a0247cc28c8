// Gradients of 2D local attention on tensor cores, for 16-bit floats; the same problems as tensor_core_forward.h.
// Device and launches: arch/sm80.cu. The plan of the backward: gradients.h.
#pragma once
#include "gradients.h"
#include "tensor_core_bias.h"

namespace localattn::cuda {

// Two rows of products, scores and by_weight, become what the pairs give to the gradients.
GPU_FUNCTION void to_gradients(float (&score)[2][4], float (&by_weight)[2][4], int n, int i, float scale_log2,
                               Statistics of) {
    const float weight = fast_exp2(score[n][i] * scale_log2 - of.lse);
    score[n][i] = weight;
    by_weight[n][i] = weight * (by_weight[n][i] - of.delta);
}

// Accumulators of one product as the left operand of the next.
template <class T>
GPU_FUNCTION void pack_fragment(uint32_t (&fragment)[4], const float (&x)[2][4]) {
    GPU_UNROLL_FOR (int h = 0; h < 4; ++h) fragment[h] = pack(T(), x[h / 2][h % 2 * 2], x[h / 2][h % 2 * 2 + 1]);
}

template <int width>
GPU_FUNCTION void clear(float (&sum)[width][4]) {
    GPU_UNROLL_FOR (int d = 0; d < width; ++d)
        GPU_UNROLL_FOR (int i = 0; i < 4; ++i) sum[d][i] = 0;
}

// Is the chunk at `column` seen by a place of the patch, and by all of them?
GPU_FUNCTION bool any_sees(const Box &box, int column) { return column < box.all.end && column + 4 > box.all.begin; }
GPU_FUNCTION bool all_see(const Box &box, int column) {
    return column >= box.common.begin && column + 4 <= box.common.end;
}

template <class C, class T, class Bias>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) tensor_core_grad_query(GPU_ARGUMENT GradientArguments<T, Bias> a) {
    const BlockPlace block(a.rows, a.columns, a.heads, a.first_image);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const WarpTile<C> warp(rows, columns);
    const Box row_box(a.rows, rows, warp.row);
    Box column_box[C::patches];
    LaneWindow<C> window;
    warp.find_windows(a.rows, a.columns, rows, columns, column_box, window);

    const KeyStages<C, T> stages(a, block, rows, columns);
    const int first_column = stages.loader.first_column;

    const WarpBias<C, Bias> bias = {a.bias, block, a.rows, a.columns, rows, columns, warp};
    uint32_t query[C::patches][C::width / 16][4], grad_output[C::patches][C::width / 16][4];
    float sum[C::patches][C::sum_width / 8][4];
    Statistics statistics[C::patches][2];
    const int first_channel = C::parts == 1 ? 0 : a.part * C::sum_width;
    const T *query_head = a.query + (block.batch * a.query_view.batch + block.head * a.query_view.head);
    const T *grad_head =
        a.grad_output + (block.batch * a.grad_output_view.batch + block.head * a.grad_output_view.head);
    const Statistics *image_statistics =
        a.statistics + (int64_t(block.batch) * a.rows.queries * a.columns.queries * a.heads + block.head);
    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
        load_fragments<C>(query[p], query_head, a.query_view, a.rows, a.columns, rows, columns, warp, p, a.channels,
                          sign_bits(a.scale));
        load_fragments<C>(grad_output[p], grad_head, a.grad_output_view, a.rows, a.columns, rows, columns, warp, p,
                          a.value_channels);
        clear(sum[p]);
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            const LanePlace place(rows, columns, warp.row, warp.column, p, r);
            statistics[p][r] = {INFINITY, 0};
            if (place.exists)
                statistics[p][r] = image_statistics[(rows.position(a.rows, place.row) * a.columns.queries +
                                                     columns.position(a.columns, place.column)) *
                                                    a.heads];
        }
    }

    const int begin = column_box[0].all.begin, end = column_box[C::patches - 1].all.end;
    for (int stage = 0; stage < stages.count; ++stage) {
        const int stage_row = stages.row_of_stage(stage);
        stages.advance(stage);
        if (warp.works && stage_row < row_box.all.end && stage_row + C::stage_rows > row_box.all.begin) {
            window.enter_stage(stage_row, row_box);
            const ChunkReader<C> reader(stages.at(stage), 4 * (begin - first_column));
            for (int column = begin; column < end; column += 4) {
                const SharedAddress offset = SharedAddress((column - begin) / 4 * ChunkReader<C>::chunk_bytes);
                float scores[C::patches][1][2][4] = {}, by_weight[C::patches][2][4] = {};
                GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d) {
                    uint32_t key[4], value[4];
                    reader.read(key, offset, d);
                    reader.read(value, offset + stages.loader.second_at(), d);
                    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
                        if (any_sees(column_box[p], column)) {
                            multiply_add(T(), scores[p][0][0], query[p][d], key[0], key[1]);
                            multiply_add(T(), scores[p][0][1], query[p][d], key[2], key[3]);
                            multiply_add(T(), by_weight[p][0], grad_output[p][d], value[0], value[1]);
                            multiply_add(T(), by_weight[p][1], grad_output[p][d], value[2], value[3]);
                        }
                }
                uint32_t by_score[C::patches][4];
                GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
                    if constexpr (Bias::present) bias.apply(scores[p], p, stage_row, column);
                    float (&score)[2][4] = scores[p][0];
                    if (!window.rows_common || !all_see(column_box[p], column)) window.mask(score, p, column);
                    GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                        GPU_UNROLL_FOR (int i = 0; i < 4; ++i) {
                            to_gradients(score, by_weight[p], n, i, fabsf(a.scale) * log2_of_e, statistics[p][i / 2]);
                            // A masked key's value may be a NaN.
                            if (Bias::present && score[n][i] == 0) by_weight[p][n][i] = 0;
                        }
                    if constexpr (Bias::present)
                        if (a.bias.score_gradient && first_channel == 0)
                            bias.store_gradients(by_weight[p], window, p, stage_row, column);
                    pack_fragment<T>(by_score[p], by_weight[p]);
                }
                GPU_UNROLL_FOR (int d = 0; d < C::sum_width / 16; ++d) {
                    uint32_t key[4];
                    reader.read_transposed(key, offset, first_channel / 16 + d);
                    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
                        if (any_sees(column_box[p], column)) {
                            multiply_add(T(), sum[p][2 * d], by_score[p], key[0], key[1]);
                            multiply_add(T(), sum[p][2 * d + 1], by_score[p], key[2], key[3]);
                        }
                }
            }
        }
        synchronize();
    }

    if (!a.grad_query) return;
    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) tell_spoilt(a.spoilt, sum[p]);
    T *to = a.grad_query + (block.batch * a.grad_query_view.batch + block.head * a.grad_query_view.head);
    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            const LanePlace place(rows, columns, warp.row, warp.column, p, r);
            if (place.exists)
                write_row(to + place.offset(a.grad_query_view, a.rows, a.columns, rows, columns), sum[p], r, a.scale,
                          a.channels, first_channel);
        }
}

// Either gradient or both at once, which computes the weights once but takes twice the registers for sums.
template <class C, class T, class Bias, bool with_key, bool with_value>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) tensor_core_grad_key(GPU_ARGUMENT GradientArguments<T, Bias> a) {
    static_assert(C::patches == 1, "two sums of a patch fill the registers");
    const BlockPlace block(a.rows, a.columns, a.heads / a.heads_a_key);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const WarpTile<C> warp(rows, columns);
    const int first_column = columns.range(a.columns, 0).begin;
    const Box row_box(a.rows, rows, warp.row);
    Box column_box[1];
    LaneWindow<C> window;
    warp.find_windows(a.rows, a.columns, rows, columns, column_box, window);

    const QueryStages<C, T> stages(a, block, rows, columns);
    if (stages.count > 0) stages.load(0);

    uint32_t key[C::width / 16][4], value[C::width / 16][4];
    float key_sum[C::sum_width / 8][4], value_sum[C::sum_width / 8][4];
    const int first_channel = C::parts == 1 ? 0 : a.part * C::sum_width;
    load_fragments<C>(key, a.key + (block.batch * a.key_view.batch + block.head * a.key_view.head), a.key_view, a.rows,
                      a.columns, rows, columns, warp, 0, a.channels, sign_bits(a.scale));
    if constexpr (with_key)
        load_fragments<C>(value, a.value + (block.batch * a.value_view.batch + block.head * a.value_view.head),
                          a.value_view, a.rows, a.columns, rows, columns, warp, 0, a.value_channels);
    clear(key_sum);
    clear(value_sum);

    const int begin = column_box[0].all.begin, end = column_box[0].all.end;
    for (int stage = 0; stage < stages.count; ++stage) {
        const int stage_row = stages.row_of_stage(stage);
        stages.advance(stage);
        if (warp.works && stage_row < row_box.all.end && stage_row + C::stage_rows > row_box.all.begin) {
            window.enter_stage(stage_row, row_box);
            const SharedAddress second_at = stages.loader.second_at();
            const ChunkReader<C> reader(stages.queries_at(stage), 4 * (begin - first_column));
            const SharedAddress lane_statistics =
                stages.statistics_at(stage, 4 * (begin - first_column) + lane_index() % 4 * 2);
            for (int column = begin; column < end; column += 4) {
                const SharedAddress offset = SharedAddress((column - begin) / 4 * ChunkReader<C>::chunk_bytes);
                float score[2][4] = {}, by_weight[2][4] = {};
                GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d) {
                    uint32_t query[4], grad[4];
                    reader.read(query, offset, d);
                    multiply_add(T(), score[0], key[d], query[0], query[1]);
                    multiply_add(T(), score[1], key[d], query[2], query[3]);
                    if constexpr (with_key) {
                        reader.read(grad, offset + second_at, d);
                        multiply_add(T(), by_weight[0], value[d], grad[0], grad[1]);
                        multiply_add(T(), by_weight[1], value[d], grad[2], grad[3]);
                    }
                }
                if constexpr (Bias::present)
                    apply_to_keys(score, a.bias, a.rows, a.columns, rows, columns, warp, stages.loader, block.batch,
                                  stages.head_of_stage(stage), stage_row, column);
                if (!window.rows_common || !all_see(column_box[0], column)) window.mask(score, 0, column);
                GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                    GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
                        const SharedAddress at = lane_statistics + SharedAddress((4 * (column - begin) + 8 * n + b) *
                                                                                 int(sizeof(Statistics)));
                        const Statistics of = load_statistics(at);
                        GPU_UNROLL_FOR (int r = 0; r < 2; ++r)
                            to_gradients(score, by_weight, n, 2 * r + b, fabsf(a.scale) * log2_of_e, of);
                    }
                uint32_t weight[4], by_score[4];
                pack_fragment<T>(weight, score);
                pack_fragment<T>(by_score, by_weight);
                GPU_UNROLL_FOR (int d = 0; d < C::sum_width / 16; ++d) {
                    uint32_t query[4], grad[4];
                    if constexpr (with_value) {
                        reader.read_transposed(grad, offset + second_at, first_channel / 16 + d);
                        multiply_add(T(), value_sum[2 * d], weight, grad[0], grad[1]);
                        multiply_add(T(), value_sum[2 * d + 1], weight, grad[2], grad[3]);
                    }
                    if constexpr (with_key) {
                        reader.read_transposed(query, offset, first_channel / 16 + d);
                        multiply_add(T(), key_sum[2 * d], by_score, query[0], query[1]);
                        multiply_add(T(), key_sum[2 * d + 1], by_score, query[2], query[3]);
                    }
                }
            }
        }
        synchronize();
    }

    if constexpr (with_key) tell_spoilt(a.spoilt, key_sum);
    if constexpr (with_value) tell_spoilt(a.spoilt, value_sum);
    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        const LanePlace place(rows, columns, warp.row, warp.column, 0, r);
        if (!place.exists) continue;
        if (with_key && a.grad_key) {
            T *to = a.grad_key + (block.batch * a.grad_key_view.batch + block.head * a.grad_key_view.head);
            write_row(to + place.offset(a.grad_key_view, a.rows, a.columns, rows, columns), key_sum, r, a.scale,
                      a.channels, first_channel);
        }
        if (with_value && a.grad_value) {
            T *to = a.grad_value + (block.batch * a.grad_value_view.batch + block.head * a.grad_value_view.head);
            write_row(to + place.offset(a.grad_value_view, a.rows, a.columns, rows, columns), value_sum, r, 1,
                      a.value_channels, first_channel);
        }
    }
}

}  // namespace localattn::cuda
