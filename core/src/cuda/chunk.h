// How the generic kernels share out work: one warp for each item, its lanes sharing the channels. A warp holds a
// chunk of a result's channels in registers and goes over the terms once for each chunk, so widths to 256 (of float64:
// to 128) are computed in one pass and any other width is possible.
#pragma once
#include <type_traits>

#include "../problem.h"
#include "dtype.h"
#include "gpu.h"

namespace localattn::cuda {

using namespace gpu;

constexpr int generic_threads = 256;
constexpr int generic_warps = generic_threads / warp_size;

GPU_FUNCTION int64_t first_warp() { return int64_t(block_index().x) * generic_warps + thread_index() / warp_size; }
GPU_FUNCTION int64_t warp_step() { return int64_t(grid_extent().x) * generic_warps; }

// The sum over a block's warps of a value that each holds in all lanes, in the order of the warps; for thread 0. Takes
// shared memory for a number a warp.
template <class Real>
GPU_FUNCTION Real sum_of_warps(Real value) {
    synchronize();
    const int warp = thread_index() / warp_size;
    if (lane_index() == 0) store_shared_number(shared_memory() + SharedAddress(sizeof(Real) * warp), value);
    synchronize();
    Real sum = 0;
    if (thread_index() == 0)
        for (int i = 0; i < generic_warps; ++i)
            sum += load_shared_number<Real>(shared_memory() + SharedAddress(sizeof(Real) * i));
    return sum;
}

// The chunk of a row of channels that a warp works on: lane l has channels first + l, first + l + 32, ...
template <class Real>
struct Chunk {
    static constexpr int numbers = 32 / sizeof(Real);
    static constexpr int64_t width = numbers * warp_size;
    int64_t first;
    Real value[numbers];

    GPU_METHOD explicit Chunk(int64_t from) : first(from) {
        GPU_UNROLL_FOR (int i = 0; i < numbers; ++i) value[i] = 0;
    }
    GPU_METHOD void scale(Real factor) {
        GPU_UNROLL_FOR (int i = 0; i < numbers; ++i) value[i] *= factor;
    }
    template <class T>
    GPU_METHOD void add(Real factor, const T *row, int64_t stride, int64_t channels) {
        GPU_UNROLL_FOR (int i = 0; i < numbers; ++i) {
            const int64_t c = first + i * warp_size + lane_index();
            if (c < channels) value[i] += factor * widen(row[c * stride]);
        }
    }
    template <class T>
    GPU_METHOD void write(T *row, int64_t stride, int64_t channels) const {
        GPU_UNROLL_FOR (int i = 0; i < numbers; ++i) {
            const int64_t c = first + i * warp_size + lane_index();
            if (c < channels) narrow(value[i], row[c * stride]);
        }
    }
};

// Enough blocks for one warp an item, up to a grid's limit; beyond it each warp takes several.
inline Extent3 grid_for(int64_t items, int64_t items_a_block) {
    const int64_t blocks = (items + items_a_block - 1) / items_a_block, most = INT32_MAX;
    return {int32_t(blocks < most ? blocks : most), 1, 1};
}

// Kernels never start on an empty grid, which CUDA refuses.
template <auto kernel, class Arguments>
const char *launch_warps(int64_t items, void *stream, const Arguments &arguments) {
    if (items == 0) return nullptr;
    return launch<kernel>(grid_for(items, generic_warps), generic_threads, 0, stream, arguments);
}

}  // namespace localattn::cuda
