// Forward of 2D local attention in float32 without tensor cores: exact products, register tiles. The same windows as
// tensor_core_forward.h. Device and launches: arch/simt.cu. Blocks and stages: stages.h. The window rule: ranges.h.
//
// A warp owns one row of queries. `slices` neighbouring lanes share a strip of `queries` queries and split its
// channels; for every two keys of a row that the strip sees, a lane loads its slice of the keys once and uses it for
// all queries of the strip. So a row of k keys costs the strip k+3 loads instead of 4k, and no row is visited that the
// warp does not see. The slices' partial scores meet by shuffles.
//
// Two strips read shared memory at the same time, `queries` columns apart: the phase sends them to different halves of
// the banks.
#pragma once
#include "stages.h"

namespace localattn::cuda {

template <int width_, int slices_, int warps_, int blocks_>
struct SimtTile {
    static constexpr int width = width_, slices = slices_, blocks = blocks_;
    static constexpr int queries = 4, keys = 2;  // of a strip's step
    static constexpr int strips = warp_size / slices, channels = width / slices;
    static constexpr int threads = warp_size * warps_;
    static constexpr int query_rows = warps_, query_columns = strips * queries;
    static constexpr int slot_bytes = 4 * width, units = width / 4;
    static constexpr int stage_rows = 1;  // a row of wide channels is as much as shared memory holds twice, everywhere
    static constexpr int spare_columns = keys - 1;  // a strip's last step may run past its box
    static constexpr int column_bytes = 2 * stage_rows * slot_bytes;
    static_assert(threads % units == 0, "a thread copies one unit of every slot it visits");
    static_assert(channels % 4 == 0 && units >= 8, "the phase and the slices are made of units");

    GPU_METHOD static constexpr int phase(int slot) { return slot / (queries * stage_rows) % 2 * 4; }
    static int64_t shared_bytes(int64_t columns) { return 2 * columns * column_bytes; }
};

struct SimtArguments {
    const float *query, *key, *value;
    float *output, *lse;  // lse may be NULL
    View query_view, key_view, value_view, output_view, lse_view;
    TileAxis rows, columns;
    int32_t heads, heads_a_key;
    int32_t channels, value_channels;
    int32_t stage_columns;
    float scale;  // > 0
};

// A lane's slice of `slot`, as it lies in the stage's tensor at `tensor`.
template <class C>
GPU_FUNCTION void load_slice(float (&slice)[C::channels], SharedAddress tensor, int slot) {
    const int mine = lane_index() % C::slices;
    GPU_UNROLL_FOR (int i = 0; i < C::channels / 4; ++i) {
        float values[4];
        load_shared(values,
                    tensor + SharedAddress(slot * C::slot_bytes + (((C::slices * i + mine) ^ C::phase(slot)) << 4)));
        GPU_UNROLL_FOR (int c = 0; c < 4; ++c) slice[4 * i + c] = values[c];
    }
}

// The channel of element i of a lane's slice.
template <class C>
GPU_FUNCTION int slice_channel(int i) {
    return 4 * (C::slices * (i / 4) + lane_index() % C::slices) + i % 4;
}

template <class C>
struct Strip {
    float query[C::queries][C::channels], output[C::queries][C::channels];
    float top[C::queries], sum[C::queries];
    Range columns[C::queries];
};

// One step: the keys of `slot` and of the column after it.
template <class C>
GPU_FUNCTION void attend_keys(Strip<C> &strip, SharedAddress stage, SharedAddress values, int slot, int column,
                              float scale_log2) {
    float score[C::queries][C::keys];
    GPU_UNROLL_FOR (int j = 0; j < C::keys; ++j) {
        float key[C::channels];
        load_slice<C>(key, stage, slot + j * C::stage_rows);
        GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
            float dot = 0;
            GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) dot += strip.query[q][c] * key[c];
            score[q][j] = dot;
        }
    }
    bool rises = false;
    float top[C::queries];
    GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
        top[q] = strip.top[q];
        GPU_UNROLL_FOR (int j = 0; j < C::keys; ++j) {
            GPU_UNROLL_FOR (int lanes = 1; lanes < C::slices; lanes *= 2)
                score[q][j] += shuffle_xor(score[q][j], lanes);
            if (column + j < strip.columns[q].begin || column + j >= strip.columns[q].end) score[q][j] = -INFINITY;
            top[q] = fmaxf(top[q], score[q][j]);
        }
        rises = rises || top[q] > strip.top[q];
    }
    if (any_in_warp(rises)) {
        GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
            // Equal when both are -infinity, whose difference is NaN.
            const float shrink = top[q] == strip.top[q] ? 1 : fast_exp2((strip.top[q] - top[q]) * scale_log2);
            strip.top[q] = top[q];
            strip.sum[q] *= shrink;
            GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) strip.output[q][c] *= shrink;
        }
    }
    GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
        const float base = strip.top[q] == -INFINITY ? 0 : strip.top[q] * scale_log2;
        GPU_UNROLL_FOR (int j = 0; j < C::keys; ++j) {
            score[q][j] = fast_exp2(score[q][j] * scale_log2 - base);
            strip.sum[q] += score[q][j];
        }
    }
    GPU_UNROLL_FOR (int j = 0; j < C::keys; ++j) {
        float value[C::channels];
        load_slice<C>(value, stage + values, slot + j * C::stage_rows);
        GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q)
            GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) strip.output[q][c] += score[q][j] * value[c];
    }
}

template <class C>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) simt_forward(GPU_ARGUMENT SimtArguments a) {
    const BlockPlace block(a.rows, a.columns, a.heads);
    const Section rows(a.rows, block.row_tile, C::query_rows), columns(a.columns, block.column_tile, C::query_columns);
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;
    const int warp_row = thread_index() / warp_size, strip_column = lane_index() / C::slices * C::queries;
    const int first_row = rows.range(a.rows, 0).begin, end_row = rows.range(a.rows, C::query_rows - 1).end;
    const int first_column = columns.range(a.columns, 0).begin;
    const int stages = (end_row - first_row + C::stage_rows - 1) / C::stage_rows;
    const Range warp_rows = rows.range(a.rows, warp_row);
    const bool works = rows.first_query + warp_row < rows.queries;

    const int key_head = block.head / a.heads_a_key, unit = Loader<C, float>::unit();
    const Loader<C, float> loader = {
        {a.key, a.key_view, block.batch, key_head, a.rows, a.columns, rows, columns, unit, a.channels},
        {a.value, a.value_view, block.batch, key_head, a.rows, a.columns, rows, columns, unit, a.value_channels},
        rows.keys,
        columns.keys,
        first_column,
        columns.range(a.columns, C::query_columns - 1).end - first_column + C::spare_columns};
    const SharedAddress memory = shared_memory(), stage_bytes = SharedAddress(a.stage_columns * C::column_bytes);
    loader.load(memory, first_row);

    Strip<C> strip;
    const int row = rows.position(a.rows, rows.first_query + warp_row);
    const float *query_head = a.query + (block.batch * a.query_view.batch + block.head * a.query_view.head);
    GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
        const int place = columns.first_query + strip_column + q;
        const bool exists = works && place < columns.queries;
        const float *from = query_head;
        if (exists) from += row * a.query_view.row + columns.position(a.columns, place) * a.query_view.column;
        GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c) {
            strip.query[q][c] = exists && slice_channel<C>(c) < a.channels ? from[slice_channel<C>(c)] : 0;
            strip.output[q][c] = 0;
        }
        strip.top[q] = -INFINITY;
        strip.sum[q] = 0;
        strip.columns[q] = columns.range(a.columns, strip_column + q);
    }
    // Strips step together, so that shuffles meet; those with narrower boxes mask what is not theirs.
    const int begin = strip.columns[0].begin;
    int steps = (strip.columns[C::queries - 1].end - begin + C::keys - 1) / C::keys;
    GPU_UNROLL_FOR (int lanes = C::slices; lanes < warp_size; lanes *= 2) {
        const int other = int(shuffle_xor(float(steps), lanes));
        steps = other > steps ? other : steps;
    }
    const int last_column = first_column + loader.stage_columns - C::keys;

    for (int stage = 0; stage < stages; ++stage) {
        const int stage_row = first_row + C::stage_rows * stage;
        if (stage + 1 < stages) {
            loader.load(memory + SharedAddress((stage + 1) % 2) * stage_bytes, stage_row + C::stage_rows);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        synchronize();
        for (int y = 0; works && y < C::stage_rows; ++y) {
            if (stage_row + y < warp_rows.begin || stage_row + y >= warp_rows.end) continue;
            for (int step = 0; step < steps; ++step) {
                // Past its own box a strip reads what is there, and masks it.
                const int wanted = begin + C::keys * step, column = wanted < last_column ? wanted : last_column;
                attend_keys<C>(strip, memory + SharedAddress(stage % 2) * stage_bytes, loader.second_at(),
                               C::stage_rows * (column - first_column) + y,
                               wanted == column ? column : INT32_MAX - C::keys, a.scale * log2_of_e);
            }
        }
        synchronize();
    }

    if (!works) return;
    float *output_head = a.output + (block.batch * a.output_view.batch + block.head * a.output_view.head);
    GPU_UNROLL_FOR (int q = 0; q < C::queries; ++q) {
        const int place = columns.first_query + strip_column + q;
        if (place >= columns.queries) continue;
        const int column = columns.position(a.columns, place);
        const float sum = strip.sum[q], inverse = sum == 0 ? 0 : 1 / sum;
        float *to = output_head + (row * a.output_view.row + column * a.output_view.column);
        GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c)
            if (slice_channel<C>(c) < a.value_channels) to[slice_channel<C>(c)] = strip.output[q][c] * inverse;
        if (a.lse && lane_index() % C::slices == 0)
            a.lse[block.batch * a.lse_view.batch + block.head * a.lse_view.head + row * a.lse_view.row +
                  column * a.lse_view.column] =
                sum == 0 ? -INFINITY : strip.top[q] * a.scale + fast_log2(sum) * (1 / log2_of_e);
    }
}

}  // namespace localattn::cuda
