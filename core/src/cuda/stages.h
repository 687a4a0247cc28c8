// What the tiled kernels share: which part of the maps a block computes, and stages of the other map that stream
// through shared memory, a few rows at a time, two of them in flight.
//
// In the forward and for the gradient of the query a block's places are queries, and keys stream by; for the gradients
// of key and value it is the other way round. Names here are those of the former.
//
// A stage is stored column by column, a slot a place: slot = stage_rows * column + row. The 16-byte units of a slot are
// permuted by exclusive or with a phase that the kernel chooses, against bank conflicts.
#pragma once
#include "../scalar.h"
#include "ranges.h"
#include "softmax.h"

namespace localattn::cuda {

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

// What the blocks of a launch have in common: which tile, head and batch each computes.
struct BlockPlace {
    int row_tile, column_tile, head, batch;
    int image;  // the how many-th of the launch: heads run fastest

    GPU_METHOD BlockPlace(const TileAxis &rows, const TileAxis &columns, int heads, int first_image = 0) {
        int block = block_index().x;
        column_tile = block % (columns.tiles * columns.dilation);
        block /= columns.tiles * columns.dilation;
        row_tile = block % (rows.tiles * rows.dilation);
        image = block / (rows.tiles * rows.dilation);
        head = (first_image + image) % heads;
        batch = (first_image + image) / heads;
    }
};

// A tensor that stages are copied from: this thread's unit of channels, 16 bytes in shared memory, of the block's
// class.
template <class T, int unit_channels = 16 / int(sizeof(T))>
struct Source {
    const T *tensor;
    int row_step, column_step;
    bool has_unit;  // else it is padding

    GPU_METHOD Source(const T *data, const View &view, int batch, int head, const TileAxis &row_axis,
                      const TileAxis &column_axis, const Section &rows, const Section &columns, int unit, int channels)
        : tensor(data + (batch * view.batch + head * view.head + rows.residue * int64_t(view.row) +
                         columns.residue * int64_t(view.column) + unit_channels * unit)),
          row_step(view.row * row_axis.dilation),
          column_step(view.column * column_axis.dilation),
          has_unit(unit_channels * unit < channels) {}
};

// One head of a tensor that streams by.
template <class T>
struct Streamed {
    const T *tensor;
    const View &view;
    int head, channels;
};

// Copies stages of two tensors, one behind the other, asynchronously: of the rectangle that the tile's places see.
// Places outside the map and padding are zeros.
template <class C, class T>
struct Loader {
    Source<T> first, second;
    int rows, columns;  // extents of the streamed class
    int first_row, stages;
    int first_column, stage_columns;

    GPU_METHOD Loader(const Streamed<T> &one, const Streamed<T> &other, int batch, const TileAxis &row_axis,
                      const TileAxis &column_axis, const Section &row_section, const Section &column_section)
        : first(one.tensor, one.view, batch, one.head, row_axis, column_axis, row_section, column_section, unit(),
                one.channels),
          second(other.tensor, other.view, batch, other.head, row_axis, column_axis, row_section, column_section,
                 unit(), other.channels),
          rows(row_section.keys),
          columns(column_section.keys),
          first_row(row_section.range(row_axis, 0).begin),
          stages((row_section.range(row_axis, C::query_rows - 1).end - first_row + C::stage_rows - 1) / C::stage_rows),
          first_column(column_section.range(column_axis, 0).begin),
          stage_columns(column_section.range(column_axis, C::query_columns - 1).end - first_column + C::spare_columns) {
    }
    GPU_METHOD static int unit() { return thread_index() % C::units; }
    GPU_METHOD int slots() const { return C::stage_rows * stage_columns; }
    GPU_METHOD bool inside(int row, int column) const {
        return unsigned(row) < unsigned(rows) && unsigned(column) < unsigned(columns);
    }
    // Bytes from a stage's first tensor to its second.
    GPU_METHOD SharedAddress second_at() const { return SharedAddress(slots() * C::slot_bytes); }
    GPU_METHOD int row_of_stage(int stage) const { return first_row + C::stage_rows * stage; }
    GPU_METHOD void load(SharedAddress stage, int stage_row) const {
        for (int slot = thread_index() / C::units; slot < slots(); slot += C::threads / C::units) {
            const int row = stage_row + slot % C::stage_rows, column = first_column + slot / C::stage_rows;
            const bool in = inside(row, column);
            const int r = in ? row : 0, c = in ? column : 0;
            const SharedAddress to = stage + SharedAddress(slot * C::slot_bytes + ((unit() ^ C::phase(slot)) << 4));
            copy_async(to, first.tensor + (r * first.row_step + c * first.column_step), in && first.has_unit);
            copy_async(to + second_at(), second.tensor + (r * second.row_step + c * second.column_step),
                       in && second.has_unit);
        }
        copy_commit();
    }
};

// Loads the stage after this one and waits for this one.
template <class Stages>
GPU_FUNCTION void advance_stage(const Stages &stages, int stage) {
    if (stage + 1 < stages.count) {
        stages.load(stage + 1);
        copy_wait<1>();
    } else {
        copy_wait<0>();
    }
    synchronize();
}

// What streams by in the forward and for the gradient of the query: stages of keys and values, two of them in shared
// memory.
template <class C, class T>
struct KeyStages {
    Loader<C, T> loader;
    int count;
    SharedAddress memory, stage_bytes;

    template <class Arguments>
    GPU_METHOD KeyStages(const Arguments &a, const BlockPlace &block, const Section &rows, const Section &columns)
        : loader({a.key, a.key_view, block.head / a.heads_a_key, a.channels},
                 {a.value, a.value_view, block.head / a.heads_a_key, a.value_channels}, block.batch, a.rows, a.columns,
                 rows, columns),
          count(loader.stages),
          memory(shared_memory()),
          stage_bytes(SharedAddress(a.stage_columns * C::column_bytes)) {
        load(0);
    }

    GPU_METHOD int row_of_stage(int stage) const { return loader.row_of_stage(stage); }
    GPU_METHOD SharedAddress at(int stage) const { return memory + SharedAddress(stage % 2) * stage_bytes; }
    GPU_METHOD void load(int stage) const { loader.load(at(stage), row_of_stage(stage)); }
    GPU_METHOD void advance(int stage) const { advance_stage(*this, stage); }
};

}  // namespace localattn::cuda
