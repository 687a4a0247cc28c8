// Biases, as the tiled kernels of the forward add them to the scores of a window. What a kernel does without them is
// compiled without them: NoBias.
#pragma once
#include "stages.h"

namespace localattn::cuda {

struct NoBias {
    static constexpr bool present = false;
};

template <class T>
struct ScoreBias {
    static constexpr bool present = true;
    const T *whole, *table, *by_row, *by_column;  // each may be NULL
    View whole_view, by_row_view, by_column_view;
    int32_t whole_entry, by_row_entry, by_column_entry;  // strides
    int64_t table_head;
    int32_t table_row, table_column;
    int32_t kernel_rows, kernel_columns;
    const Anchor *rows, *columns;  // of the queries
    float over_scale;              // scores are divided by the magnitude of the scale
};

// Of one query, whose coordinates on the axes are given.
template <class T>
struct QueryBias {
    const ScoreBias<T> &bias;
    int batch, head, row, column;
    Anchor row_anchor, column_anchor;

    GPU_METHOD QueryBias(const ScoreBias<T> &of, int batch_, int head_, int row_, int column_)
        : bias(of),
          batch(batch_),
          head(head_),
          row(row_),
          column(column_),
          row_anchor(of.rows[row_]),
          column_anchor(of.columns[column_]) {}

    GPU_METHOD float read(const T *tensor, const View &view, int offset) const {
        return widen(tensor[batch * view.batch + head * view.head + (row * view.row + column * view.column + offset)]);
    }
    // What a score gets, over the scale; the key is in coordinates of its class. 0 if the window has no such entry.
    GPU_METHOD float of(int key_row, int key_column) const {
        const unsigned rows = unsigned(bias.kernel_rows), row_entry = unsigned(key_row) - unsigned(row_anchor.start);
        const unsigned columns = unsigned(bias.kernel_columns),
                       column_entry = unsigned(key_column) - unsigned(column_anchor.start);
        if (row_entry >= rows || column_entry >= columns) return 0;
        const int u = int(row_entry), v = int(column_entry);
        float sum = 0;
        if (bias.whole) sum += read(bias.whole, bias.whole_view, (u * bias.kernel_columns + v) * bias.whole_entry);
        if (bias.by_row) sum += read(bias.by_row, bias.by_row_view, u * bias.by_row_entry);
        if (bias.by_column) sum += read(bias.by_column, bias.by_column_view, v * bias.by_column_entry);
        if (bias.table)
            sum +=
                widen(bias.table[head * bias.table_head +
                                 ((key_row - row_anchor.centre + bias.kernel_rows - 1) * bias.table_row +
                                  (key_column - column_anchor.centre + bias.kernel_columns - 1) * bias.table_column)]);
        return sum * bias.over_scale;
    }
};

}  // namespace localattn::cuda
