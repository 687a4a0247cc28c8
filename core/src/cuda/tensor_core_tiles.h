// What the tensor-core kernels share: patches of places and chunks of the streamed map, as operands of mma, and masks.
// Blocks and stages: stages.h.
//
// A warp owns patches of 4x4 places side by side: 16 places are the m of one mma, and a square patch has the smallest
// joint window that 16 places can have. A stage has 4 rows, so that any 4 columns of it are one chunk of 16 keys:
//
//     slot 4x+y of a stage:   0  4  8 12 ...      a warp's chunks:  [0..15] [16..31] ..., starting at its own first
//     column
//                             1  5  9 13
//                             2  6 10 14
//                             3  7 11 15
//
// With the slot's number as phase, ldmatrix has no bank conflicts. Inside a chunk a lane's keys lie in two columns and
// two rows, so its mask is two column tests and four row bits. Chunks that no query of a patch sees are skipped, chunks
// that all see are not masked.
//
// The products of what a place does not see are 0 times that, NaN or infinity or not: spoilt_rows.h.
#pragma once
#include "stages.h"

namespace localattn::cuda {

// Width: channels, rounded up to what the kernel is compiled for. A warp step computes `group` chunks at a time. Sums
// as wide as the tile do not always fit the registers: a launch then computes one of `parts` of them.
template <int width_, int warp_rows_, int warp_columns_, int patches_, int group_, int blocks_, int parts_ = 1>
struct Tile {
    static constexpr int width = width_, warp_rows = warp_rows_, warp_columns = warp_columns_, patches = patches_;
    static constexpr int group = group_, blocks = blocks_, parts = parts_;
    static constexpr int sum_width = width / parts;
    static constexpr int threads = warp_size * warp_rows * warp_columns;
    static constexpr int query_rows = 4 * warp_rows, query_columns = 4 * patches * warp_columns;
    static constexpr int slot_bytes = 2 * width, units = width / 8;  // of 16 bytes
    static constexpr int stage_rows = 4;
    static constexpr int spare_columns = 3;  // a warp's last chunk may run past its box
    static_assert(width == 32 || width % 64 == 0, "the phases below");
    static_assert(threads % units == 0, "a thread copies one unit of every slot it visits");

    GPU_METHOD static constexpr int phase(int slot) { return width == 32 ? slot >> 1 & 3 : slot & 7; }
    static constexpr int column_bytes = 2 * stage_rows * slot_bytes;                     // of a stage's keys and values
    static int64_t shared_bytes(int64_t columns) { return 2 * columns * column_bytes; }  // of both stages
};

// Which keys the 4 queries of a warp's patch see along one axis (or which queries see its 4 keys, in the backward).
struct Box {
    Range all, common;  // by any, by every

    Box() = default;
    GPU_METHOD Box(const TileAxis &axis, const Section &section, int first) {
        const Range low = section.range(axis, first), high = section.range(axis, first + 3);
        all = {uniform(low.begin), uniform(high.end)};
        common = {uniform(high.begin), uniform(low.end)};
    }
};

// Reads a warp's chunks from a stage. `offset` is chunk_bytes times the chunk, and second_at() more for the second
// tensor; d counts 16 channels, two units. Slots are aligned to their size, so that a unit is chosen by an exclusive or
// of the whole address. Registers 2n and 2n+1 of a load must be the pair of one product, or the compiler has to move
// them: plain and transposed reads want different lanes for the same row.
template <class C>
struct ChunkReader {
    static constexpr int chunk_bytes = 16 * C::slot_bytes;
    SharedAddress plain, transposed;

    GPU_METHOD ChunkReader(SharedAddress tensor, int first_slot) {
        const int lane = lane_index(), phase = C::phase(first_slot + lane % 8);
        plain = tensor +
                SharedAddress((first_slot + lane % 8 + lane / 16 * 8) * C::slot_bytes + ((lane / 8 % 2 ^ phase) << 4));
        transposed = tensor + SharedAddress((first_slot + lane % 16) * C::slot_bytes + ((lane / 16 ^ phase) << 4));
    }
    // For products over channels: pair n belongs to keys 8n .. 8n+7.
    GPU_METHOD void read(uint32_t (&registers)[4], SharedAddress offset, int d) const {
        load_matrix(registers, (plain + offset) ^ SharedAddress(32 * d));
    }
    // For products over keys: pair n belongs to channels 8n .. 8n+7 of the 16.
    GPU_METHOD void read_transposed(uint32_t (&registers)[4], SharedAddress offset, int d) const {
        load_matrix_transposed(registers, (transposed + offset) ^ SharedAddress(32 * d));
    }
};

// What a lane must know to mask its scores: its two query rows and, per patch, its query column.
template <class C>
struct LaneWindow {
    Range rows[2], columns[C::patches];
    uint32_t row_bits;  // of the current stage. Bit 2r+b: does query row r see row b of this lane's keys
    bool rows_common;   // do all queries of the patch see all rows of the stage

    GPU_METHOD void enter_stage(int stage_row, const Box &row_box) {
        row_bits = 0;
        GPU_UNROLL_FOR (int i = 0; i < 4; ++i) {
            const int row = stage_row + lane_index() % 2 * 2 + i % 2;
            if (row >= rows[i / 2].begin && row < rows[i / 2].end) row_bits |= 1u << i;
        }
        rows_common = stage_row >= row_box.common.begin && stage_row + C::stage_rows <= row_box.common.end;
    }
    // Does the query of accumulator [n][i] see its key in the chunk that starts at `column`?
    GPU_METHOD bool sees(int patch, int column, int n, int i) const {
        const int mine = column + 2 * n + lane_index() % 4 / 2;
        return mine >= columns[patch].begin && mine < columns[patch].end && (row_bits >> i & 1);
    }
    // Makes the scores of the keys that a query does not see -infinity; `column` is the chunk's first.
    GPU_METHOD void mask(float (&score)[2][4], int patch, int column) const {
        GPU_UNROLL_FOR (int n = 0; n < 2; ++n) {
            const int mine = column + 2 * n + lane_index() % 4 / 2;
            const uint32_t bits = mine >= columns[patch].begin && mine < columns[patch].end ? row_bits : 0;
            GPU_UNROLL_FOR (int i = 0; i < 4; ++i) score[n][i] = bits >> i & 1 ? score[n][i] : -INFINITY;
        }
    }
};

// The part of a block's tile that a warp computes.
template <class C>
struct WarpTile {
    int row, column;  // of its first place, in the tile
    bool works;       // else its places all lie outside the map

    GPU_METHOD WarpTile(const Section &rows, const Section &columns) {
        const int warp = uniform(thread_index() / warp_size);
        row = 4 * (warp / C::warp_columns);
        column = 4 * C::patches * (warp % C::warp_columns);
        works = rows.first_query + row < rows.queries && columns.first_query + column < columns.queries;
    }
    GPU_METHOD void find_windows(const TileAxis &row_axis, const TileAxis &column_axis, const Section &rows,
                                 const Section &columns, Box (&column_box)[C::patches], LaneWindow<C> &window) const {
        const int lane = lane_index();
        GPU_UNROLL_FOR (int p = 0; p < C::patches; ++p) {
            column_box[p] = Box(column_axis, columns, column + 4 * p);
            window.columns[p] = columns.range(column_axis, column + 4 * p + lane / 4 % 4);
        }
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) window.rows[r] = rows.range(row_axis, row + lane / 16 + 2 * r);
    }
};

// The place of the map that row r (0 or 1) of this lane's accumulators belongs to, in coordinates of the class.
struct LanePlace {
    int row, column;
    bool exists;

    GPU_METHOD LanePlace(const Section &rows, const Section &columns, int warp_row, int warp_column, int patch, int r) {
        const int lane = lane_index();
        row = rows.first_query + warp_row + lane / 16 + 2 * r;
        column = columns.first_query + warp_column + 4 * patch + lane / 4 % 4;
        exists = row < rows.queries && column < columns.queries;
    }
    // Of the place from the image's first, in elements; 0 if it does not exist.
    GPU_METHOD int offset(const View &view, const TileAxis &row_axis, const TileAxis &column_axis, const Section &rows,
                          const Section &columns) const {
        if (!exists) return 0;
        return rows.position(row_axis, row) * view.row + columns.position(column_axis, column) * view.column;
    }
};

// Of a pair of 16-bit floats, if the factor is negative: exclusive or with them negates the pair.
GPU_FUNCTION uint32_t sign_bits(float factor) { return factor < 0 ? 0x80008000u : 0; }

// The patch's rows of a tensor as the left operand of products over channels, with `flip` exclusive-or-ed into each
// pair; zeros where there is no place or channel.
template <class C, class T>
GPU_FUNCTION void load_fragments(uint32_t (&fragments)[C::width / 16][4], const T *head, const View &view,
                                 const TileAxis &row_axis, const TileAxis &column_axis, const Section &rows,
                                 const Section &columns, const WarpTile<C> &warp, int patch, int channels,
                                 uint32_t flip = 0) {
    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        const LanePlace place(rows, columns, warp.row, warp.column, patch, r);
        const T *from = head + place.offset(view, row_axis, column_axis, rows, columns);
        GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d)
            GPU_UNROLL_FOR (int h = 0; h < 2; ++h) {
                const int channel = 16 * d + 8 * h + lane_index() % 4 * 2;
                fragments[d][r + 2 * h] = place.exists && channel < channels ? load_pair(from + channel) ^ flip : 0;
            }
    }
}

// Writes row r of a patch's accumulators, times `factor`. They begin at channel `first`.
template <int eights, class T>
GPU_FUNCTION void write_row(T *to, const float (&sum)[eights][4], int r, float factor, int channels, int first = 0) {
    GPU_UNROLL_FOR (int d = 0; d < eights; ++d) {
        const int channel = first + 8 * d + lane_index() % 4 * 2;
        if (channel < channels) store_pair(to + channel, pack(T(), sum[d][2 * r] * factor, sum[d][2 * r + 1] * factor));
    }
}

}  // namespace localattn::cuda
