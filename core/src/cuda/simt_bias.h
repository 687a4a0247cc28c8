// Biases and the key mask of a strip's scores, in float32; and the gradients of scores.
#pragma once
#include "score_bias.h"
#include "simt_tiles.h"

namespace localattn::cuda {

// Of a strip's queries, over which keys stream.
template <class C, class Bias>
struct StripBias {
    const Bias &bias;
    const BlockPlace &block;
    const Strip<C> &strip;

    GPU_METHOD auto of(int q) const {
        return QueryBias(bias, strip.row_axis, strip.column_axis, strip.row_section, strip.column_section, block.batch,
                         block.head, strip.row, strip.first + q);
    }
    // To the scores of the keys of a row, from `column` on.
    GPU_METHOD void apply(float (&score)[C::places][C::step], int row, int column) const {
        GPU_UNROLL_FOR (int q = 0; q < C::places; ++q) {
            if (!strip.exists(q)) continue;
            const auto query = of(q);
            GPU_UNROLL_FOR (int j = 0; j < C::step; ++j) query.apply(score[q][j], row, column + j);
        }
    }
    // Of query q and a key that it sees. The strip's lanes, which all have it, take turns. A masked key's weight is 0,
    // but its value may be a NaN.
    GPU_METHOD void store_gradient(float weight, float by_score, int q, int row, int column) const {
        if (strip.exists(q) && lane_index() % C::slices == q % C::slices)
            of(q).store_gradient(weight == 0 ? 0 : by_score, block.image, row, column);
    }
};

// Of a strip's keys, to the scores of one query of the streamed map, if there is such a query.
template <class C, class Bias>
GPU_FUNCTION void apply_to_keys(float (&score)[C::places], const Bias &bias, const Strip<C> &strip, int batch, int head,
                                int row, int column) {
    if (unsigned(column) >= unsigned(strip.column_section.keys)) return;  // the stage has whole rows of the map
    // Addresses are not kept from column to column: there are no registers for them.
    const QueryBias query(bias, strip.row_axis, strip.column_axis, strip.row_section, strip.column_section,
                          opaque(batch), opaque(head), row, column);
    const int key_row = opaque(strip.row), first = opaque(strip.first);
    GPU_UNROLL_FOR (int k = 0; k < C::places; ++k) query.apply(score[k], key_row, first + k);
}

}  // namespace localattn::cuda
