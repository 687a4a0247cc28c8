// The window rule as tables, for the fast kernels: per axis and query, the contiguous range of entries of its residue
// class that it sees. A small kernel fills them once a call, so that the 64-bit divisions of the rule are not repeated
// in every block. Queries of one class see ranges whose ends never decrease; the fast kernels rely on it.
#pragma once
#include "../problem.h"
#include "../window.h"
#include "gpu.h"

namespace localattn::cuda {

using namespace gpu;

// In coordinates of the class. With border zero it may reach outside the map, where key and value are 0.
struct Range {
    int32_t begin, end;
};

// Of a query's window along one axis, in the same coordinates: where its entry 0 lies, perhaps outside the map, and its
// centre.
struct Anchor {
    int32_t start, centre;
};

constexpr int range_threads = 128;

// The last two axes only: rows, then columns.
struct RangeArguments {
    Axis axis[2];
    Range *range[2];
    Anchor *anchor[2];  // or NULL
    int32_t *spoilt;    // cleared
};

GPU_KERNEL void GPU_BOUNDS(range_threads, 1) fill_ranges(GPU_ARGUMENT RangeArguments arguments) {
    if (block_index().x == 0 && thread_index() == 0) *arguments.spoilt = 0;
    GPU_UNROLL_FOR (int a = 0; a < 2; ++a) {
        const int64_t step = int64_t(grid_extent().x) * range_threads;
        for (int64_t query = int64_t(block_index().x) * range_threads + thread_index();
             query < arguments.axis[a].queries; query += step) {
            const Window window = window_of(arguments.axis[a], query);
            arguments.range[a][query] = {int32_t(window.start + window.present_begin),
                                         int32_t(window.start + window.present_end)};
            if (arguments.anchor[a]) arguments.anchor[a][query] = {int32_t(window.start), int32_t(window.centre)};
        }
    }
}

// For each key of an axis, the contiguous range of queries of its class that see it, from the queries' ranges: the
// window rule transposed, for the gradients of key and value.
struct KeyRangeArguments {
    int32_t queries[2], keys[2], dilation[2];
    const Range *query_range[2];
    Range *key_range[2];
};

GPU_KERNEL void GPU_BOUNDS(range_threads, 1) fill_key_ranges(GPU_ARGUMENT KeyRangeArguments arguments) {
    GPU_UNROLL_FOR (int a = 0; a < 2; ++a) {
        const int dilation = arguments.dilation[a], step = grid_extent().x * range_threads;
        for (int key = block_index().x * range_threads + thread_index(); key < arguments.keys[a]; key += step) {
            const int residue = key % dilation, place = key / dilation;
            const int queries = (arguments.queries[a] - residue + dilation - 1) / dilation;
            // The first query whose range ends beyond the key, and the first whose range begins beyond it.
            int first[2];
            GPU_UNROLL_FOR (int bound = 0; bound < 2; ++bound) {
                int low = 0, high = queries;
                while (low < high) {
                    const int middle = (low + high) / 2;
                    const Range range = arguments.query_range[a][residue + dilation * middle];
                    if ((bound == 0 ? range.end : range.begin) > place)
                        high = middle;
                    else
                        low = middle + 1;
                }
                first[bound] = low;
            }
            arguments.key_range[a][key] = {first[0], first[1] > first[0] ? first[1] : first[0]};
        }
    }
}

}  // namespace localattn::cuda
