// What the float32 kernels without tensor cores share: how a block's places are dealt to lanes.
//
// A warp owns one row of places. `slices` neighbouring lanes share a strip of `places` places and split its channels;
// for every `step` columns of a streamed row that the strip sees, a lane loads its slice of them once and uses it for
// all places of the strip. No row is visited that the warp does not see. The slices' partial sums meet by shuffles.
//
// Two strips read shared memory at the same time, `places` columns apart: the phase sends them to different halves of
// the banks.
#pragma once
#include "stages.h"

namespace localattn::cuda {

template <int width_, int slices_, int places_, int step_, int warps_, int blocks_>
struct SimtTile {
    static constexpr int width = width_, slices = slices_, places = places_, step = step_, blocks = blocks_;
    static constexpr int parts = 1;
    static constexpr int strips = warp_size / slices, channels = width / slices;
    static constexpr int threads = warp_size * warps_;
    static constexpr int query_rows = warps_, query_columns = strips * places;
    static constexpr int slot_bytes = 4 * width, units = width / 4;
    static constexpr int stage_rows = 1;  // a row of wide channels is as much as shared memory holds twice, everywhere
    static constexpr int spare_columns = step - 1;  // a strip's last step may run past its box
    static constexpr int column_bytes = 2 * stage_rows * slot_bytes;
    static_assert(threads % units == 0, "a thread copies one unit of every slot it visits");
    static_assert(channels % 4 == 0 && units >= 8, "the phase and the slices are made of units");

    GPU_METHOD static constexpr int phase(int slot) { return slot / (places * stage_rows) % 2 * 4; }
    static int64_t shared_bytes(int64_t columns) { return 2 * columns * column_bytes; }
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

// The sum over the strip's lanes, the same bits in each.
template <class C>
GPU_FUNCTION float strip_sum(float partial) {
    GPU_UNROLL_FOR (int lanes = 1; lanes < C::slices; lanes *= 2) partial += shuffle_xor(partial, lanes);
    return partial;
}

template <int channels>
GPU_FUNCTION float slice_dot(const float (&x)[channels], const float (&y)[channels]) {
    float sum = 0;
    GPU_UNROLL_FOR (int c = 0; c < channels; ++c) sum += x[c] * y[c];
    return sum;
}

// sum += factor * x
template <int channels>
GPU_FUNCTION void add_scaled(float (&sum)[channels], float factor, const float (&x)[channels]) {
    GPU_UNROLL_FOR (int c = 0; c < channels; ++c) sum[c] += factor * x[c];
}

// The places of a lane's strip, and the columns that the warp's strips step through together, so that shuffles meet;
// those with narrower boxes mask what is not theirs.
template <class C>
struct Strip {
    const TileAxis &row_axis, &column_axis;
    const Section &row_section, &column_section;
    int row, first;                  // of the strip's first place, in coordinates of the class
    bool works;                      // else the warp's row lies outside the map
    Range rows, columns[C::places];  // that the places see
    int begin, steps, last;          // where stepping begins, how often, and the last column that a step may begin at

    GPU_METHOD Strip(const TileAxis &of_rows, const TileAxis &of_columns, const Section &rows_, const Section &columns_,
                     int first_column, int stage_columns)
        : row_axis(of_rows), column_axis(of_columns), row_section(rows_), column_section(columns_) {
        const int warp = thread_index() / warp_size, offset = lane_index() / C::slices * C::places;
        row = row_section.first_query + warp;
        first = column_section.first_query + offset;
        works = row < row_section.queries;
        rows = row_section.range(row_axis, warp);
        GPU_UNROLL_FOR (int i = 0; i < C::places; ++i) columns[i] = column_section.range(column_axis, offset + i);
        begin = columns[0].begin;
        steps = (columns[C::places - 1].end - begin + C::step - 1) / C::step;
        GPU_UNROLL_FOR (int lanes = C::slices; lanes < warp_size; lanes *= 2) {
            const int other = int(shuffle_xor(float(steps), lanes));
            steps = other > steps ? other : steps;
        }
        last = first_column + stage_columns - C::step;
    }
    GPU_METHOD bool exists(int i) const { return works && first + i < column_section.queries; }
    GPU_METHOD bool sees_row(int stage_row) const { return works && stage_row >= rows.begin && stage_row < rows.end; }
    GPU_METHOD bool sees_column(int i, int column) const {
        return column >= columns[i].begin && column < columns[i].end;
    }
    // Calls visit(at, column) for every step: the column to read from, and the one that it stands for. Past its own box
    // a strip reads what is there, and takes it for columns that no place sees.
    template <class Visit>
    GPU_METHOD void for_each_step(Visit visit) const {
        for (int i = 0; i < steps; ++i) {
            const int wanted = begin + C::step * i, at = wanted < last ? wanted : last;
            visit(at, wanted == at ? at : INT32_MAX - C::step);
        }
    }

    // Of place i, which exists, from the image's first.
    GPU_METHOD int position(int i, int row_stride, int column_stride) const {
        return row_section.position(row_axis, row) * row_stride +
               column_section.position(column_axis, first + i) * column_stride;
    }
    // A lane's slices of the places' rows of a tensor; zeros where there is no place or channel.
    template <class T>
    GPU_METHOD void load(float (&slices)[C::places][C::channels], const T *head, const View &view, int channels) const {
        GPU_UNROLL_FOR (int i = 0; i < C::places; ++i) {
            const T *from = exists(i) ? head + position(i, view.row, view.column) : head;
            GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c)
                slices[i][c] = exists(i) && slice_channel<C>(c) < channels ? widen(from[slice_channel<C>(c)]) : 0;
        }
    }
    template <class T>
    GPU_METHOD void store(T *head, const View &view, int channels, int i, const float (&slice)[C::channels],
                          float factor) const {
        T *to = head + position(i, view.row, view.column);
        GPU_UNROLL_FOR (int c = 0; c < C::channels; ++c)
            if (slice_channel<C>(c) < channels) narrow(slice[c] * factor, to[slice_channel<C>(c)]);
    }
};

template <int places, int channels>
GPU_FUNCTION void clear_slices(float (&sum)[places][channels]) {
    GPU_UNROLL_FOR (int i = 0; i < places; ++i)
        GPU_UNROLL_FOR (int c = 0; c < channels; ++c) sum[i][c] = 0;
}

}  // namespace localattn::cuda
