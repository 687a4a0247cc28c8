// What the tensor-core kernels share: tiles of 2D maps, stages of the streamed map in shared memory, masks.
//
// A block computes a tile of one head's map. A warp owns patches of 4x4 places side by side: 16 places are the m of one
// mma, and a square patch has the smallest joint window that 16 places can have. In the forward and for the gradient of
// the query the places are queries, and keys stream by; for the gradients of key and value it is the other way round.
// Names here are those of the former.
//
// Keys stream through shared memory in stages of 4 rows, two of them in flight. A stage is stored column by column, so
// that any 4 columns are one chunk of 16 keys, the n (or k) of an mma:
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
// A NaN or infinity may reach every query whose patch visits its key: the products of masked keys are 0 times that value.
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

// Which keys the 4 queries of a patch see along one axis (or which queries see its 4 keys, in the backward).
struct Box {
    Range all, common;  // by any, by every

    Box() = default;
    GPU_METHOD Box(const TileAxis &axis, const Section &section, int first) {
        const Range low = section.range(axis, first), high = section.range(axis, first + 3);
        all = {low.begin, high.end};
        common = {high.begin, low.end};
    }
};

// A tensor that stages are copied from: this thread's unit of 8 channels of the block's class.
template <class T>
struct Source {
    const T *tensor;
    int row_step, column_step;
    bool has_unit;  // else it is padding

    GPU_METHOD Source(const T *data, const View &view, int batch, int head, const TileAxis &row_axis, const TileAxis &column_axis,
                      const Section &rows, const Section &columns, int unit, int channels)
        : tensor(data + (batch * view.batch + head * view.head + rows.residue * int64_t(view.row) + columns.residue * int64_t(view.column) + 8 * unit)),
          row_step(view.row * row_axis.dilation),
          column_step(view.column * column_axis.dilation),
          has_unit(8 * unit < channels) {}
};

// Copies stages of two tensors, one behind the other, asynchronously. Places outside the map and padding are zeros.
template <class C, class T>
struct Loader {
    Source<T> first, second;
    int rows, columns;  // extents of the streamed class
    int first_column, stage_columns;

    GPU_METHOD static int unit() { return thread_index() % C::units; }
    GPU_METHOD int slots() const { return C::stage_rows * stage_columns; }
    GPU_METHOD bool inside(int row, int column) const {
        return unsigned(row) < unsigned(rows) && unsigned(column) < unsigned(columns);
    }
    // Bytes from a stage's first tensor to its second.
    GPU_METHOD SharedAddress second_at() const { return SharedAddress(slots() * C::slot_bytes); }
    GPU_METHOD void load(SharedAddress stage, int first_row) const {
        for (int slot = thread_index() / C::units; slot < slots(); slot += C::threads / C::units) {
            const int row = first_row + slot % C::stage_rows, column = first_column + slot / C::stage_rows;
            const bool in = inside(row, column);
            const int r = in ? row : 0, c = in ? column : 0;
            const SharedAddress to = stage + SharedAddress(slot * C::slot_bytes + ((unit() ^ C::phase(slot)) << 4));
            copy_async(to, first.tensor + (r * first.row_step + c * first.column_step), in && first.has_unit);
            copy_async(to + second_at(), second.tensor + (r * second.row_step + c * second.column_step), in && second.has_unit);
        }
        copy_commit();
    }
};

// Reads a warp's chunks from a stage. `offset` is chunk_bytes times the chunk, and second_at() more for the second tensor;
// d counts 16 channels, two units. Slots are aligned to their size, so that a unit is chosen by an exclusive or of the whole address.
// Registers 2n and 2n+1 of a load must be the pair of one product, or the compiler has to move them: plain and transposed
// reads want different lanes for the same row.
template <class C>
struct ChunkReader {
    static constexpr int chunk_bytes = 16 * C::slot_bytes;
    SharedAddress plain, transposed;

    GPU_METHOD ChunkReader(SharedAddress tensor, int first_slot) {
        const int lane = lane_index(), phase = C::phase(first_slot + lane % 8);
        plain = tensor + SharedAddress((first_slot + lane % 8 + lane / 16 * 8) * C::slot_bytes + ((lane / 8 % 2 ^ phase) << 4));
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
        GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const int row = stage_row + lane_index() % 2 * 2 + i % 2;
            if (row >= rows[i / 2].begin && row < rows[i / 2].end) row_bits |= 1u << i;
        }
        rows_common = stage_row >= row_box.common.begin && stage_row + C::stage_rows <= row_box.common.end;
    }
    // Makes the scores of the keys that a query does not see -infinity; `column` is the chunk's first.
    GPU_METHOD void mask(float (&score)[2][4], int patch, int column) const {
        GPU_UNROLL for (int n = 0; n < 2; ++n) {
            const int mine = column + 2 * n + lane_index() % 4 / 2;
            const uint32_t bits = mine >= columns[patch].begin && mine < columns[patch].end ? row_bits : 0;
            GPU_UNROLL for (int i = 0; i < 4; ++i) score[n][i] = bits >> i & 1 ? score[n][i] : -INFINITY;
        }
    }
};

// The part of a block's tile that a warp computes.
template <class C>
struct WarpTile {
    int row, column;  // of its first place, in the tile
    bool works;       // else its places all lie outside the map

    GPU_METHOD WarpTile(const Section &rows, const Section &columns) {
        const int warp = thread_index() / warp_size;
        row = 4 * (warp / C::warp_columns);
        column = 4 * C::patches * (warp % C::warp_columns);
        works = rows.first_query + row < rows.queries && columns.first_query + column < columns.queries;
    }
    GPU_METHOD void find_windows(const TileAxis &row_axis, const TileAxis &column_axis, const Section &rows,
                                 const Section &columns, Box (&column_box)[C::patches], LaneWindow<C> &window) const {
        const int lane = lane_index();
        GPU_UNROLL for (int p = 0; p < C::patches; ++p) {
            column_box[p] = Box(column_axis, columns, column + 4 * p);
            window.columns[p] = columns.range(column_axis, column + 4 * p + lane / 4 % 4);
        }
        GPU_UNROLL for (int r = 0; r < 2; ++r) window.rows[r] = rows.range(row_axis, row + lane / 16 + 2 * r);
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

// The patch's rows of a tensor as the left operand of products over channels; zeros where there is no place or channel.
template <class C, class T>
GPU_FUNCTION void load_fragments(uint32_t (&fragments)[C::width / 16][4], const T *head, const View &view,
                                 const TileAxis &row_axis, const TileAxis &column_axis, const Section &rows,
                                 const Section &columns, const WarpTile<C> &warp, int patch, int channels) {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const LanePlace place(rows, columns, warp.row, warp.column, patch, r);
        const T *from = head + place.offset(view, row_axis, column_axis, rows, columns);
        GPU_UNROLL for (int d = 0; d < C::width / 16; ++d)
            GPU_UNROLL for (int h = 0; h < 2; ++h) {
                const int channel = 16 * d + 8 * h + lane_index() % 4 * 2;
                fragments[d][r + 2 * h] = place.exists && channel < channels ? load_pair(from + channel) : 0;
            }
    }
}

// Writes row r of a patch's accumulators, times `factor`.
template <class C, class T>
GPU_FUNCTION void write_row(T *to, const float (&sum)[C::width / 8][4], int r, float factor, int channels) {
    GPU_UNROLL for (int d = 0; d < C::width / 8; ++d) {
        const int channel = 8 * d + lane_index() % 4 * 2;
        if (channel < channels) store_pair(to + channel, pack(T(), sum[d][2 * r] * factor, sum[d][2 * r + 1] * factor));
    }
}

// What the blocks of a launch have in common: which tile, head and batch each computes.
struct BlockPlace {
    int row_tile, column_tile, head, batch;

    GPU_METHOD BlockPlace(const TileAxis &rows, const TileAxis &columns, int heads) {
        int block = block_index().x;
        column_tile = block % (columns.tiles * columns.dilation);
        block /= columns.tiles * columns.dilation;
        row_tile = block % (rows.tiles * rows.dilation);
        block /= rows.tiles * rows.dilation;
        head = block % heads;
        batch = block / heads;
    }
};

}  // namespace localattn::cuda
