// Biases and the key mask, as the tiled kernels apply them to the scores of a window; and where those kernels put the
// gradients of the scores, of which the gradients of biases are sums (bias_gradient.h). What a kernel does without them
// is compiled without them: NoBias.
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
    float factor;                  // of biases: where scores are divided by the magnitude of the scale, 1 over it
    const uint8_t *key_mask;       // or NULL
    View mask_view;                // head: 0
    int32_t key_rows, key_columns;
    // (image, entry of the window, query), or NULL: where the gradients of the scores are written. Entries that no key
    // has are left alone. An image is one head of one batch.
    float *score_gradient;
    int32_t query_rows, query_columns;
};

// Of one query, whose coordinates are those of its class; keys too.
template <class T>
struct QueryBias {
    const ScoreBias<T> &bias;
    const TileAxis &row_axis, &column_axis;
    const Section &rows, &columns;
    int batch, head, row, column;  // on the whole axes
    Anchor row_anchor, column_anchor;

    GPU_METHOD QueryBias(const ScoreBias<T> &of, const TileAxis &row_axis_, const TileAxis &column_axis_,
                         const Section &rows_, const Section &columns_, int batch_, int head_, int row_, int column_)
        : bias(of),
          row_axis(row_axis_),
          column_axis(column_axis_),
          rows(rows_),
          columns(columns_),
          batch(batch_),
          head(head_),
          row(rows_.position(row_axis_, row_)),
          column(columns_.position(column_axis_, column_)),
          row_anchor(of.rows[row]),
          column_anchor(of.columns[column]) {}

    GPU_METHOD float read(const T *tensor, const View &view, int offset) const {
        return widen(tensor[batch * view.batch + head * view.head + (row * view.row + column * view.column + offset)]);
    }
    GPU_METHOD bool is_masked(int key_row, int key_column) const {
        const int r = rows.position(row_axis, key_row), c = columns.position(column_axis, key_column);
        if (unsigned(r) >= unsigned(bias.key_rows) || unsigned(c) >= unsigned(bias.key_columns)) return false;
        const View &view = bias.mask_view;
        return bias.key_mask[batch * view.batch + (r * view.row + c * view.column)] == 0;
    }
    // Leaves a score alone if the window has no such entry.
    GPU_METHOD void apply(float &score, int key_row, int key_column) const {
        const unsigned entry_rows = unsigned(bias.kernel_rows), entry_columns = unsigned(bias.kernel_columns);
        const unsigned u = unsigned(key_row) - unsigned(row_anchor.start);
        const unsigned v = unsigned(key_column) - unsigned(column_anchor.start);
        if (u >= entry_rows || v >= entry_columns) return;
        float sum = 0;
        if (bias.whole) sum += read(bias.whole, bias.whole_view, int(u * entry_columns + v) * bias.whole_entry);
        if (bias.by_row) sum += read(bias.by_row, bias.by_row_view, int(u) * bias.by_row_entry);
        if (bias.by_column) sum += read(bias.by_column, bias.by_column_view, int(v) * bias.by_column_entry);
        if (bias.table)
            sum +=
                widen(bias.table[head * bias.table_head +
                                 ((key_row - row_anchor.centre + bias.kernel_rows - 1) * bias.table_row +
                                  (key_column - column_anchor.centre + bias.kernel_columns - 1) * bias.table_column)]);
        score += sum * bias.factor;
        if (bias.key_mask && is_masked(key_row, key_column)) score = -INFINITY;
    }
    // Of a key that the query sees; `image` counts from the first that score_gradient has.
    GPU_METHOD void store_gradient(float gradient, int image, int key_row, int key_column) const {
        const int entry = (key_row - row_anchor.start) * bias.kernel_columns + (key_column - column_anchor.start);
        const int row_of_entry = (image * bias.kernel_rows * bias.kernel_columns + entry) * bias.query_rows + row;
        bias.score_gradient[row_of_entry * bias.query_columns + column] = gradient;
    }
};

}  // namespace localattn::cuda
