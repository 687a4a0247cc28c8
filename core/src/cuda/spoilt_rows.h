// A NaN or infinity reaches the rows whose window holds it and no other. But tiled kernels multiply what a row does not
// see by 0, and a NaN stays one. So they tell whether any of their sums came out not finite, and the generic kernels,
// which never touch what a row does not see, compute the rows once more that are not (arch/generic.cu).
#pragma once
#include "chunk.h"

namespace localattn::cuda {

// Sets *spoilt if a sum is a NaN or infinity.
template <int rows, int columns>
GPU_FUNCTION void tell_spoilt(int32_t *spoilt, const float (&sum)[rows][columns]) {
    float zero = 0;
    GPU_UNROLL_FOR (int i = 0; i < rows; ++i)
        GPU_UNROLL_FOR (int j = 0; j < columns; ++j) zero += 0 * sum[i][j];
    if (zero != 0) *spoilt = 1;  // as a NaN is
}

// Which rows of its results a generic kernel computes.
struct ChosenRows {
    const int32_t *spoilt;  // NULL: all of them. Else, if it is set, those that hold a NaN or infinity

    GPU_METHOD bool none() const { return spoilt && *spoilt == 0; }
    template <class T>
    GPU_METHOD bool has(const T *row, int64_t stride, int64_t channels) const {
        if (!spoilt) return true;
        Accumulator<T> zero = 0;
        for (int64_t c = lane_index(); c < channels; c += warp_size) zero += 0 * widen(row[c * stride]);
        return any_in_warp(zero != 0);
    }
    // Most often there is nothing to do, and a block's start is what that costs.
    Extent3 grid(int64_t items) const {
        constexpr int32_t some = 512;
        Extent3 grid = grid_for(items, generic_warps);
        if (spoilt && grid.x > some) grid.x = some;
        return grid;
    }
};

}  // namespace localattn::cuda
