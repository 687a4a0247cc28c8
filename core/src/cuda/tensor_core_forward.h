// Forward of 2D local attention on tensor cores, for 16-bit floats: any border, stride, dilation, causality or kernel,
// as long as each query's window is a rectangle of keys. Device and launches: arch/sm80.cu. Tiles, stages and masks:
// tensor_core_tiles.h. The window rule: ranges.h.
//
// The softmax is online, in registers: a running maximum and sum per query row, rescaled when the maximum rises.
#pragma once
#include "forward.h"
#include "tensor_core_bias.h"

namespace localattn::cuda {

template <class C>
struct Accumulators {
    uint32_t query[C::patches][C::width / 16][4];
    float output[C::patches][C::sum_width / 8][4], top[C::patches][2], sum[C::patches][2];
};

// Adds one stage of keys, which starts at `stage` with `first_column` in its first slot.
template <class C, class T, class Bias>
GPU_FUNCTION void attend(Accumulators<C> &state, const LaneWindow<C> &window, const Box (&column_box)[C::patches],
                         const WarpBias<C, Bias> &bias, SharedAddress stage, SharedAddress values, int stage_row,
                         int first_column, float scale_log2, int first_channel) {
    const int begin = column_box[0].all.begin, end = column_box[C::patches - 1].all.end;
    const ChunkReader<C> reader(stage, 4 * (begin - first_column));

    for (int group = begin; group < end; group += 4 * C::group) {
        const SharedAddress offset = SharedAddress((group - begin) / 4 * ChunkReader<C>::chunk_bytes);
        float score[C::patches][C::group][2][4];
        bool seen[C::patches][C::group];  // the same in all lanes
        GPU_UNROLL_FOR (int c = 0; c < C::group; ++c) {
            const int column = group + 4 * c;
            GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
                seen[p][c] = column < column_box[p].all.end && column + 4 > column_box[p].all.begin;
                GPU_UNROLL_FOR (int i = 0; i < 8; ++i) score[p][c][i / 4][i % 4] = 0;
            }
            if (column >= end) continue;
            GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d) {
                uint32_t key[4];
                reader.read(key, offset + SharedAddress(c * ChunkReader<C>::chunk_bytes), d);
                GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
                    if (seen[p][c]) {
                        multiply_add(T(), score[p][c][0], state.query[p][d], key[0], key[1]);
                        multiply_add(T(), score[p][c][1], state.query[p][d], key[2], key[3]);
                    }
            }
        }

        uint32_t weight[C::patches][C::group][4];
        GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
            if constexpr (Bias::present) bias.apply(score[p], p, stage_row, group);
            if (!window.rows_common || group < column_box[p].common.begin ||
                group + 4 * C::group > column_box[p].common.end) {
                GPU_UNROLL_FOR (int c = 0; c < C::group; ++c) window.mask(score[p][c], p, group + 4 * c);
            }
            float top[2] = {state.top[p][0], state.top[p][1]};
            GPU_UNROLL_FOR (int c = 0; c < C::group; ++c)
                GPU_UNROLL_FOR (int i = 0; i < 8; ++i)
                    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], score[p][c][i / 4][i % 4]);
            GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], shuffle_xor(top[r], 1));
                top[r] = fmaxf(top[r], shuffle_xor(top[r], 2));
            }
            if (any_in_warp(top[0] > state.top[p][0] || top[1] > state.top[p][1])) {
                GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                    // Equal when both are -infinity, whose difference is NaN.
                    const float old = state.top[p][r];
                    const float shrink = top[r] == old ? 1 : fast_exp2((old - top[r]) * scale_log2);
                    state.top[p][r] = top[r];
                    state.sum[p][r] *= shrink;
                    GPU_UNROLL_FOR (int d = 0; d < C::sum_width / 8; ++d) {
                        state.output[p][d][2 * r] *= shrink;
                        state.output[p][d][2 * r + 1] *= shrink;
                    }
                }
            }
            float base[2];
            GPU_UNROLL_FOR (int r = 0; r < 2; ++r) base[r] = softmax_base(top[r] * scale_log2);
            GPU_UNROLL_FOR (int c = 0; c < C::group; ++c)
                GPU_UNROLL_FOR (int h = 0; h < 4; ++h) {
                    const float *pair = score[p][c][h / 2] + h % 2 * 2;
                    const float low = fast_exp2(pair[0] * scale_log2 - base[h % 2]);
                    const float high = fast_exp2(pair[1] * scale_log2 - base[h % 2]);
                    state.sum[p][h % 2] += low + high;
                    weight[p][c][h] = pack(T(), low, high);
                }
        }

        GPU_UNROLL_FOR (int c = 0; c < C::group; ++c) {
            if (group + 4 * c >= end) continue;
            GPU_UNROLL_FOR (int d = 0; d < C::sum_width / 16; ++d) {
                uint32_t value[4];
                reader.read_transposed(value, offset + values + SharedAddress(c * ChunkReader<C>::chunk_bytes),
                                       first_channel / 16 + d);
                GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
                    if (seen[p][c]) {
                        multiply_add(T(), state.output[p][2 * d], weight[p][c], value[0], value[1]);
                        multiply_add(T(), state.output[p][2 * d + 1], weight[p][c], value[2], value[3]);
                    }
            }
        }
    }
}

template <class C, class T, class Bias>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) tensor_core_forward(GPU_ARGUMENT ForwardArguments<T, Bias> a) {
    const BlockPlace block(a.rows, a.columns, a.heads);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    // Classes differ in length, so the last tile of a shorter one may be empty.
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const WarpTile<C> warp(rows, columns);
    const Box row_box(a.rows, rows, warp.row);
    Box column_box[C::patches];
    LaneWindow<C> window;
    warp.find_windows(a.rows, a.columns, rows, columns, column_box, window);

    const KeyStages<C, T> stages(a, block, rows, columns);
    const int first_column = stages.loader.first_column;

    const int first_channel = C::parts == 1 ? 0 : a.part * C::sum_width;
    const WarpBias<C, Bias> bias = {a.bias, block, a.rows, a.columns, rows, columns, warp};
    Accumulators<C> state;
    const T *query = a.query + (block.batch * a.query_view.batch + block.head * a.query_view.head);
    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
        load_fragments<C>(state.query[p], query, a.query_view, a.rows, a.columns, rows, columns, warp, p, a.channels,
                          sign_bits(a.sign));
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            state.top[p][r] = -INFINITY;
            state.sum[p][r] = 0;
        }
        GPU_UNROLL_FOR (int d = 0; d < C::sum_width / 8; ++d)
            GPU_UNROLL_FOR (int i = 0; i < 4; ++i) state.output[p][d][i] = 0;
    }

    for (int stage = 0; stage < stages.count; ++stage) {
        const int stage_row = stages.row_of_stage(stage);
        stages.advance(stage);
        if (warp.works && stage_row < row_box.all.end && stage_row + C::stage_rows > row_box.all.begin) {
            window.enter_stage(stage_row, row_box);
            attend<C, T>(state, window, column_box, bias, stages.at(stage), stages.loader.second_at(), stage_row,
                         first_column, a.scale * log2_of_e, first_channel);
        }
        synchronize();
    }

    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) tell_spoilt(a.spoilt, state.output[p]);
    T *output = a.output + (block.batch * a.output_view.batch + block.head * a.output_view.head);
    GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p)
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            float sum = state.sum[p][r];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const LanePlace place(rows, columns, warp.row, warp.column, p, r);
            if (!place.exists) continue;
            const int row = rows.position(a.rows, place.row), column = columns.position(a.columns, place.column);
            write_row(output + (row * a.output_view.row + column * a.output_view.column), state.output[p], r,
                      sum == 0 ? 0 : fast_reciprocal(sum), a.value_channels, first_channel);
            if (a.lse && first_channel == 0 && lane_index() % 4 == 0)
                a.lse[block.batch * a.lse_view.batch + block.head * a.lse_view.head + row * a.lse_view.row +
                      column * a.lse_view.column] =
                    sum == 0 ? -INFINITY : state.top[p][r] * a.scale + fast_log2(sum) * (1 / log2_of_e);
        }
}

}  // namespace localattn::cuda
