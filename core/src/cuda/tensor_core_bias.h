// Biases and the key mask of a warp's scores, on tensor cores; and the gradients of scores.
#pragma once
#include "score_bias.h"
#include "tensor_core_tiles.h"

namespace localattn::cuda {

// Where the key of accumulator [n][2 * r + b] lies in a chunk that starts at `row` and `column`; in the gradients of
// key and value the query does.
GPU_FUNCTION int chunk_row(int row, int b) { return row + lane_index() % 2 * 2 + b; }
GPU_FUNCTION int chunk_column(int column, int n) { return column + 2 * n + lane_index() % 4 / 2; }

// Of a warp's queries, over which keys stream.
template <class C, class Bias>
struct WarpBias {
    const Bias &bias;
    const BlockPlace &block;
    const TileAxis &row_axis, &column_axis;
    const Section &rows, &columns;
    const WarpTile<C> &warp;

    // Calls visit(query, r) for the lane's queries of a patch.
    template <class Visit>
    GPU_METHOD void for_each_query(int patch, Visit visit) const {
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            // Most tiles have no registers to keep addresses from chunk to chunk.
            const bool keeps = C::width < 64, keeps_image = C::width < 128;
            const LanePlace place(rows, columns, keeps ? warp.row : opaque(warp.row),
                                  keeps ? warp.column : opaque(warp.column), patch, r);
            const int batch = keeps_image ? block.batch : opaque(block.batch);
            const int head = keeps_image ? block.head : opaque(block.head);
            if (place.exists)
                visit(QueryBias(bias, row_axis, column_axis, rows, columns, batch, head, place.row, place.column), r);
        }
    }
    template <int chunks>
    GPU_METHOD void apply(float (&score)[chunks][2][4], int patch, int row, int column) const {
        for_each_query(patch, [&](const auto &query, int r) {
            GPU_UNROLL_FOR (int c = 0; c < chunks; ++c)
                GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                    GPU_UNROLL_FOR (int b = 0; b < 2; ++b)
                        query.apply(score[c][n][2 * r + b], chunk_row(row, b), chunk_column(column + 4 * c, n));
        });
    }
    GPU_METHOD void store_gradients(const float (&by_score)[2][4], const LaneWindow<C> &window, int patch, int row,
                                    int column) const {
        for_each_query(patch, [&](const auto &query, int r) {
            GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                GPU_UNROLL_FOR (int b = 0; b < 2; ++b)
                    if (window.sees(patch, column, n, 2 * r + b))
                        query.store_gradient(by_score[n][2 * r + b], block.image, chunk_row(row, b),
                                             chunk_column(column, n));
        });
    }
};

// Of a warp's keys, over which the queries of `head` stream.
template <class C, class Bias, class Loader>
GPU_FUNCTION void apply_to_keys(float (&score)[2][4], const Bias &bias, const TileAxis &row_axis,
                                const TileAxis &column_axis, const Section &rows, const Section &columns,
                                const WarpTile<C> &warp, const Loader &loader, int of_batch, int of_head, int row,
                                int column) {
    // Addresses are not kept from chunk to chunk: there are no registers for them.
    const int batch = opaque(of_batch), head = opaque(of_head);
    const LanePlace key[] = {{rows, columns, opaque(warp.row), warp.column, 0, 0},
                             {rows, columns, opaque(warp.row), warp.column, 0, 1}};
    GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
        GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
            const int query_row = chunk_row(row, b), query_column = chunk_column(column, n);
            if (!loader.inside(query_row, query_column)) continue;
            const QueryBias query(bias, row_axis, column_axis, rows, columns, batch, head, query_row, query_column);
            GPU_UNROLL_FOR (int r = 0; r < 2; ++r) query.apply(score[n][2 * r + b], key[r].row, key[r].column);
        }
}

}  // namespace localattn::cuda
