// What the window operators without a softmax come down to. Scores q.k, sums of weighted values, and every derivative
// of either, of any order, are one of three contractions of two of the tensors
//
//     at_queries (batch, *queries, heads, channels)    at_keys (batch, *keys, heads, channels)
//     entries    (batch, *queries, heads, window)
//
// that writes the third:
//
//     score       entries[q, u]    = at_queries[q] . at_keys[k(q, u)]
//     weigh       at_queries[q, c] = sum over u of entries[q, u] * at_keys[k(q, u), c]
//     transposed  at_keys[k, c]    = sum over the (q, u) with k(q, u) = k of entries[q, u] * at_queries[q, c]
//
// Only entries that are keys take part: what the others hold is not read, and `score` gives them fixed numbers.
#pragma once
#include "problem.h"

namespace localattn {

enum class Product { score, weigh, transposed };

// As a Problem, so that what walks windows walks this one too: query, key and the numbers of heads and channels are
// what their names say; value_channels is 0.
struct WindowProduct : Problem {
    Product product = Product::score;
    Tensor entries;
    double outside = 0, absent = 0;  // what `score` gives entries outside the map, and those that are not there

    // Of the window, in raster order; what raster_causal drops is no part of `entries`.
    int64_t entry_count() const {
        const int64_t all = axis[0].kernel * axis[1].kernel * axis[2].kernel;
        return raster ? all / 2 + 1 : all;
    }
};

bool is_empty(const WindowProduct &);
void answer_empty(const WindowProduct &);
inline void check_data(const WindowProduct &) {}

}  // namespace localattn
