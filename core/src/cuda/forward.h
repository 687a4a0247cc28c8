// What the tiled kernels of the forward share.
#pragma once
#include "score_bias.h"
#include "spoilt_rows.h"

namespace localattn::cuda {

template <class T, class Bias>
struct ForwardArguments {
    const T *query, *key, *value;
    T *output;
    float *lse;  // or NULL
    View query_view, key_view, value_view, output_view, lse_view;
    TileAxis rows, columns;
    int32_t heads, heads_a_key;
    int32_t channels, value_channels;
    int32_t stage_columns;  // that fit a stage in shared memory
    float scale, sign;      // what scores are multiplied by is scale * sign: maxima want a positive factor
    int32_t part = 0;       // of the output's channels, where a tile computes parts
    int32_t *spoilt;
    Bias bias;  // NoBias, or ScoreBias<T>
};

}  // namespace localattn::cuda
