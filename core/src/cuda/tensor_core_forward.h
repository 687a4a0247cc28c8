// Forward of 2D local attention on tensor cores, for 16-bit floats: any border, stride, dilation, causality or kernel, as
// long as each query's window is a rectangle of keys. Device and launches: arch/sm80.cu. The window rule: ranges.h.
//
// A block computes a tile of queries of one head. A warp owns `patches` patches of 4x4 queries side by side: 16 queries
// are the m of one mma, and a square patch has the smallest joint window that 16 queries can have.
//
// Keys stream through shared memory in stages of 4 rows, two of them in flight. A stage is stored column by column, so
// that any 4 columns are one chunk of 16 keys, the k of an mma:
//
//     slot 4x+y of a stage:   0  4  8 12 ...      a warp's chunks:  [0..15] [16..31] ..., starting at its own first column
//                             1  5  9 13
//                             2  6 10 14
//                             3  7 11 15
//
// The 16-byte units of a slot are permuted by the slot's number (`phase`), which frees ldmatrix of bank conflicts. Inside
// a chunk a lane's keys lie in two columns and two rows, so its mask is two column tests and four row bits. Chunks that no
// query of a patch sees are skipped, chunks that all see are not masked.
//
// A NaN or infinity in a value may reach every query whose patch visits that key: the products of masked keys are 0 * value.
#pragma once
#include "../scalar.h"
#include "ranges.h"

namespace localattn::cuda {

constexpr float log2_of_e = 1.44269504f;

// Element strides. Rows and columns of one image are addressed in 32 bits: 64-bit offsets triple the loader's work.
struct View {
    int64_t batch, head;
    int32_t row, column;
};

struct TileAxis {
    int32_t queries, keys, dilation;
    int32_t tiles;  // of one residue class
    const Range *range;
};

template <class T>
struct ForwardArguments {
    const T *query, *key, *value;
    T *output;
    float *lse;  // or NULL
    View query_view, key_view, value_view, output_view, lse_view;
    TileAxis rows, columns;
    int32_t heads, heads_a_key;
    int32_t channels, value_channels;
    int32_t stage_columns;  // that fit a stage in shared memory
    float scale;            // > 0
};

// Width: channels, rounded up to what the kernel is compiled for. A warp step computes `group` chunks at a time.
template <int width_, int warp_rows_, int warp_columns_, int patches_, int group_, int blocks_>
struct Tile {
    static constexpr int width = width_, warp_rows = warp_rows_, warp_columns = warp_columns_, patches = patches_;
    static constexpr int group = group_, blocks = blocks_;
    static constexpr int threads = warp_size * warp_rows * warp_columns;
    static constexpr int query_rows = 4 * warp_rows, query_columns = 4 * patches * warp_columns;
    static constexpr int slot_bytes = 2 * width, units = width / 8;  // of 16 bytes
    static constexpr int stage_rows = 4;
    static constexpr int spare_columns = 3;  // a warp's last chunk may run past its box
    static_assert(width == 32 || width % 64 == 0, "the phases below");
    static_assert(threads % units == 0, "a thread copies one unit of every slot it visits");

    GPU_METHOD static constexpr int phase(int slot) { return width == 32 ? slot >> 1 & 3 : slot & 7; }
    static constexpr int column_bytes = 2 * stage_rows * slot_bytes;  // of a stage's keys and values
    static int64_t shared_bytes(int64_t columns) { return 2 * columns * column_bytes; }  // of both stages
};

// The part of one axis that a block works on, in coordinates of its residue class.
struct Section {
    int residue, first_query, queries, keys;  // the extents of the class

    GPU_METHOD Section(const TileAxis &axis, int tile, int tile_queries) {
        residue = tile / axis.tiles;
        first_query = tile % axis.tiles * tile_queries;
        queries = (axis.queries - residue + axis.dilation - 1) / axis.dilation;
        keys = (axis.keys - residue + axis.dilation - 1) / axis.dilation;
    }
    // On the whole axis, of the class's query or key i.
    GPU_METHOD int position(const TileAxis &axis, int i) const { return residue + axis.dilation * i; }
    // Of the tile's query i; of the class's last one for those past it, which no one will see.
    GPU_METHOD Range range(const TileAxis &axis, int i) const {
        const int query = first_query + i < queries ? first_query + i : queries - 1;
        return axis.range[position(axis, query)];
    }
};

// Which keys the 4 queries of a patch see along one axis.
struct Box {
    Range all, common;  // by any, by every

    Box() = default;
    GPU_METHOD Box(const TileAxis &axis, const Section &section, int first) {
        const Range low = section.range(axis, first), high = section.range(axis, first + 3);
        all = {low.begin, high.end};
        common = {high.begin, low.end};
    }
};

// Of the first key of the block's class.
GPU_FUNCTION int64_t key_offset(const View &view, int batch, int head, const Section &rows, const Section &columns) {
    return batch * view.batch + head * view.head + int64_t(rows.residue) * view.row + int64_t(columns.residue) * view.column;
}

template <class T>
struct Loader {
    const T *key, *value;  // of this thread's unit of the first key of the class
    int key_row, key_column, value_row, value_column;
    int rows, columns;  // the class's extents
    int first_column, stage_columns;
    bool key_unit, value_unit;  // is there such a unit, or is it padding

    template <class C>
    GPU_METHOD void load(SharedAddress stage, int first_row) const {
        const int unit = thread_index() % C::units;
        const SharedAddress values = SharedAddress(C::stage_rows * stage_columns * C::slot_bytes);
        for (int slot = thread_index() / C::units; slot < C::stage_rows * stage_columns; slot += C::threads / C::units) {
            const int row = first_row + slot % 4, column = first_column + slot / 4;
            const bool inside = unsigned(row) < unsigned(rows) && unsigned(column) < unsigned(columns);
            const int r = inside ? row : 0, c = inside ? column : 0;
            const SharedAddress to = stage + SharedAddress(slot * C::slot_bytes + ((unit ^ C::phase(slot)) << 4));
            copy_async(to, key + (r * key_row + c * key_column), inside && key_unit);
            copy_async(to + values, value + (r * value_row + c * value_column), inside && value_unit);
        }
        copy_commit();
    }
};

template <class C>
struct Accumulators {
    uint32_t query[C::patches][C::width / 16][4];
    float output[C::patches][C::width / 8][4], top[C::patches][2], sum[C::patches][2];
};

// What a lane must know to mask its scores: its two query rows and, per patch, its query column.
template <class C>
struct LaneWindow {
    Range rows[2], columns[C::patches];
};

// Scores of one group of chunks, masked; then the softmax step; then the output's share.
template <class C, class T>
GPU_FUNCTION void attend(Accumulators<C> &state, const LaneWindow<C> &window, const Box &row_box,
                         const Box (&column_box)[C::patches], SharedAddress stage, int stage_row, int first_column,
                         int stage_columns, float scale_log2) {
    const int lane = lane_index();
    const SharedAddress values = SharedAddress(C::stage_rows * stage_columns * C::slot_bytes);
    const int begin = column_box[0].all.begin, end = column_box[C::patches - 1].all.end;
    const int slot = 4 * (begin - first_column), phase = C::phase(slot + lane % 8);

    // Registers 2n and 2n+1 of a matrix load must be one product's pair, or the compiler has to move them: keys and
    // values want different lanes for the same row.
    const int key_in_chunk = lane % 8 + lane / 16 * 8, value_in_chunk = lane % 16;
    const SharedAddress key_row = stage + SharedAddress((slot + key_in_chunk) * C::slot_bytes);
    const SharedAddress value_row = stage + values + SharedAddress((slot + value_in_chunk) * C::slot_bytes);
    SharedAddress key_unit[C::width / 16], value_unit[C::width / 16];
    GPU_UNROLL for (int d = 0; d < C::width / 16; ++d) {
        key_unit[d] = SharedAddress(((2 * d + lane / 8 % 2) ^ phase) << 4);
        value_unit[d] = SharedAddress(((2 * d + lane / 16) ^ phase) << 4);
    }

    uint32_t row_bits = 0;  // bit 2r+b: does query row r see key row b of this lane
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
        const int row = stage_row + lane % 2 * 2 + i % 2;
        if (row >= window.rows[i / 2].begin && row < window.rows[i / 2].end) row_bits |= 1u << i;
    }
    const bool rows_common = stage_row >= row_box.common.begin && stage_row + 4 <= row_box.common.end;

    for (int group = begin; group < end; group += 4 * C::group) {
        const SharedAddress offset = SharedAddress((group - begin) * 4 * C::slot_bytes);
        float score[C::patches][C::group][2][4];
        bool seen[C::patches][C::group];  // the same in all lanes
        GPU_UNROLL for (int c = 0; c < C::group; ++c) {
            const int column = group + 4 * c;
            GPU_UNROLL for (int p = 0; p < C::patches; ++p) {
                seen[p][c] = column < column_box[p].all.end && column + 4 > column_box[p].all.begin;
                GPU_UNROLL for (int i = 0; i < 8; ++i) score[p][c][i / 4][i % 4] = 0;
            }
            if (column >= end) continue;
            GPU_UNROLL for (int d = 0; d < C::width / 16; ++d) {
                uint32_t key[4];
                load_matrix(key, key_row + offset + SharedAddress(c * 16 * C::slot_bytes) + key_unit[d]);
                GPU_UNROLL for (int p = 0; p < C::patches; ++p)
                    if (seen[p][c]) {
                        multiply_add(T(), score[p][c][0], state.query[p][d], key[0], key[1]);
                        multiply_add(T(), score[p][c][1], state.query[p][d], key[2], key[3]);
                    }
            }
        }

        uint32_t weight[C::patches][C::group][4];
        GPU_UNROLL for (int p = 0; p < C::patches; ++p) {
            const bool common = rows_common && group >= column_box[p].common.begin &&
                                group + 4 * C::group <= column_box[p].common.end;
            if (!common) {
                GPU_UNROLL for (int c = 0; c < C::group; ++c)
                    GPU_UNROLL for (int n = 0; n < 2; ++n) {
                        const int column = group + 4 * c + 2 * n + lane % 4 / 2;
                        const bool sees = column >= window.columns[p].begin && column < window.columns[p].end;
                        const uint32_t bits = sees ? row_bits : 0;
                        GPU_UNROLL for (int i = 0; i < 4; ++i)
                            score[p][c][n][i] = bits >> i & 1 ? score[p][c][n][i] : -INFINITY;
                    }
            }
            float top[2] = {state.top[p][0], state.top[p][1]};
            GPU_UNROLL for (int c = 0; c < C::group; ++c)
                GPU_UNROLL for (int i = 0; i < 8; ++i)
                    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], score[p][c][i / 4][i % 4]);
            GPU_UNROLL for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], shuffle_xor(top[r], 1));
                top[r] = fmaxf(top[r], shuffle_xor(top[r], 2));
            }
            if (any_in_warp(top[0] > state.top[p][0] || top[1] > state.top[p][1])) {
                GPU_UNROLL for (int r = 0; r < 2; ++r) {
                    // Equal when both are -infinity, whose difference is NaN.
                    const float old = state.top[p][r];
                    const float shrink = top[r] == old ? 1 : fast_exp2((old - top[r]) * scale_log2);
                    state.top[p][r] = top[r];
                    state.sum[p][r] *= shrink;
                    GPU_UNROLL for (int d = 0; d < C::width / 8; ++d) {
                        state.output[p][d][2 * r] *= shrink;
                        state.output[p][d][2 * r + 1] *= shrink;
                    }
                }
            }
            float base[2];
            GPU_UNROLL for (int r = 0; r < 2; ++r) base[r] = top[r] == -INFINITY ? 0 : top[r] * scale_log2;
            GPU_UNROLL for (int c = 0; c < C::group; ++c)
                GPU_UNROLL for (int h = 0; h < 4; ++h) {
                    const float *pair = score[p][c][h / 2] + h % 2 * 2;
                    const float low = fast_exp2(pair[0] * scale_log2 - base[h % 2]);
                    const float high = fast_exp2(pair[1] * scale_log2 - base[h % 2]);
                    state.sum[p][h % 2] += low + high;
                    weight[p][c][h] = pack(T(), low, high);
                }
        }

        GPU_UNROLL for (int c = 0; c < C::group; ++c) {
            if (group + 4 * c >= end) continue;
            GPU_UNROLL for (int d = 0; d < C::width / 16; ++d) {
                uint32_t value[4];
                load_matrix_transposed(value, value_row + offset + SharedAddress(c * 16 * C::slot_bytes) + value_unit[d]);
                GPU_UNROLL for (int p = 0; p < C::patches; ++p)
                    if (seen[p][c]) {
                        multiply_add(T(), state.output[p][2 * d], weight[p][c], value[0], value[1]);
                        multiply_add(T(), state.output[p][2 * d + 1], weight[p][c], value[2], value[3]);
                    }
            }
        }
    }
}

template <class C, class T>
GPU_KERNEL void GPU_BOUNDS(C::threads, C::blocks) tensor_core_forward(GPU_ARGUMENT ForwardArguments<T> a) {
    const int lane = lane_index(), warp = thread_index() / warp_size;
    const int warp_row = 4 * (warp / C::warp_columns), warp_column = 4 * C::patches * (warp % C::warp_columns);
    int block = block_index().x;
    const int column_tiles = a.columns.tiles * a.columns.dilation, row_tiles = a.rows.tiles * a.rows.dilation;
    const Section columns(a.columns, block % column_tiles, C::query_columns);
    block /= column_tiles;
    const Section rows(a.rows, block % row_tiles, C::query_rows);
    block /= row_tiles;
    const int head = block % a.heads, batch = block / a.heads;
    // Classes differ in length, so the last tile of a shorter one may be empty.
    if (rows.first_query >= rows.queries || columns.first_query >= columns.queries) return;

    const int first_row = rows.range(a.rows, 0).begin, end_row = rows.range(a.rows, C::query_rows - 1).end;
    const int first_column = columns.range(a.columns, 0).begin;
    const int stages = (end_row - first_row + C::stage_rows - 1) / C::stage_rows;
    const bool works = rows.first_query + warp_row < rows.queries && columns.first_query + warp_column < columns.queries;
    const Box row_box(a.rows, rows, warp_row);
    Box column_box[C::patches];
    LaneWindow<C> window;
    GPU_UNROLL for (int p = 0; p < C::patches; ++p) {
        column_box[p] = Box(a.columns, columns, warp_column + 4 * p);
        window.columns[p] = columns.range(a.columns, warp_column + 4 * p + lane / 4 % 4);
    }
    GPU_UNROLL for (int r = 0; r < 2; ++r) window.rows[r] = rows.range(a.rows, warp_row + lane / 16 + 2 * r);

    Loader<T> loader;
    const int unit = thread_index() % C::units;
    loader.first_column = first_column;
    loader.stage_columns = columns.range(a.columns, C::query_columns - 1).end - first_column + C::spare_columns;
    loader.rows = rows.keys;
    loader.columns = columns.keys;
    loader.key = a.key + key_offset(a.key_view, batch, head / a.heads_a_key, rows, columns) + 8 * unit;
    loader.value = a.value + key_offset(a.value_view, batch, head / a.heads_a_key, rows, columns) + 8 * unit;
    loader.key_row = a.key_view.row * a.rows.dilation;
    loader.key_column = a.key_view.column * a.columns.dilation;
    loader.value_row = a.value_view.row * a.rows.dilation;
    loader.value_column = a.value_view.column * a.columns.dilation;
    loader.key_unit = 8 * unit < a.channels;
    loader.value_unit = 8 * unit < a.value_channels;
    const SharedAddress memory = shared_memory();
    const SharedAddress stage_bytes = SharedAddress(a.stage_columns * C::column_bytes);
    loader.template load<C>(memory, first_row);

    Accumulators<C> state;
    const T *query = a.query + (batch * a.query_view.batch + head * a.query_view.head);
    GPU_UNROLL for (int p = 0; p < C::patches; ++p) {
        GPU_UNROLL for (int r = 0; r < 2; ++r) {
            const int row = rows.first_query + warp_row + lane / 16 + 2 * r;
            const int column = columns.first_query + warp_column + 4 * p + lane / 4 % 4;
            const bool exists = row < rows.queries && column < columns.queries;
            const T *from = query;
            if (exists) from += rows.position(a.rows, row) * a.query_view.row + columns.position(a.columns, column) * a.query_view.column;
            GPU_UNROLL for (int d = 0; d < C::width / 16; ++d)
                GPU_UNROLL for (int h = 0; h < 2; ++h) {
                    const int channel = 16 * d + 8 * h + lane % 4 * 2;
                    state.query[p][d][r + 2 * h] = exists && channel < a.channels ? load_pair(from + channel) : 0;
                }
            state.top[p][r] = -INFINITY;
            state.sum[p][r] = 0;
        }
        GPU_UNROLL for (int d = 0; d < C::width / 8; ++d)
            GPU_UNROLL for (int i = 0; i < 4; ++i) state.output[p][d][i] = 0;
    }

    for (int stage = 0; stage < stages; ++stage) {
        const int stage_row = first_row + C::stage_rows * stage;
        if (stage + 1 < stages) {
            loader.template load<C>(memory + SharedAddress((stage + 1) % 2) * stage_bytes, stage_row + C::stage_rows);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        synchronize();
        if (works && stage_row < row_box.all.end && stage_row + C::stage_rows > row_box.all.begin)
            attend<C, T>(state, window, row_box, column_box, memory + SharedAddress(stage % 2) * stage_bytes, stage_row,
                         first_column, loader.stage_columns, a.scale * log2_of_e);
        synchronize();
    }

    T *output = a.output + (batch * a.output_view.batch + head * a.output_view.head);
    GPU_UNROLL for (int p = 0; p < C::patches; ++p)
        GPU_UNROLL for (int r = 0; r < 2; ++r) {
            float sum = state.sum[p][r];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            int row = rows.first_query + warp_row + lane / 16 + 2 * r;
            int column = columns.first_query + warp_column + 4 * p + lane / 4 % 4;
            if (row >= rows.queries || column >= columns.queries) continue;
            row = rows.position(a.rows, row);
            column = columns.position(a.columns, column);
            const float inverse = sum == 0 ? 0 : fast_reciprocal(sum);
            T *to = output + (row * a.output_view.row + column * a.output_view.column);
            GPU_UNROLL for (int d = 0; d < C::width / 8; ++d) {
                const int channel = 8 * d + lane % 4 * 2;
                if (channel < a.value_channels)
                    store_pair(to + channel, pack(T(), state.output[p][d][2 * r] * inverse, state.output[p][d][2 * r + 1] * inverse));
            }
            if (a.lse && lane % 4 == 0)
                a.lse[batch * a.lse_view.batch + head * a.lse_view.head + row * a.lse_view.row + column * a.lse_view.column] =
                    sum == 0 ? -INFINITY : state.top[p][r] * a.scale + fast_log2(sum) * (1 / log2_of_e);
        }
}

}  // namespace localattn::cuda
