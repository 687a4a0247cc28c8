// Gradients of biases: sums of the gradients of scores, which ..._grad_query has written for some images
// (score_bias.h).
//
//     gradient[element] = sum of dS over the pairs that the element was added to
//
// Pairs are numbered by six coordinates: batch, head, two of the window (entries, or cells of the relative-position
// table), two of the query. Along a coordinate whose stride is 0 the gradient is summed; along the others it has
// elements of its own. A thread has an element, or all of a block's threads share the queries of one.
#pragma once
#include "chunk.h"
#include "ranges.h"

namespace localattn::cuda {

struct BiasGradientArguments {
    const float *score_gradient;
    float *gradient;
    int32_t first_image, heads;
    int32_t begin[6], extent[6];  // of the pairs, or cells, that the images hold
    int64_t stride[6];
    int32_t kernel[2], queries[2];
    const Range *range[2];  // of the queries
    const Anchor *anchor[2];
    int32_t threads_an_element;  // 1 or a block's
    bool relative;               // the window's coordinates are cells of the table
    bool adds;                   // to what earlier images gave
};

GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) sum_score_gradients(GPU_ARGUMENT BiasGradientArguments a) {
    int32_t elements = 1;
    GPU_UNROLL_FOR (int d = 0; d < 6; ++d)
        if (a.stride[d]) elements *= a.extent[d];
    const int sharers = a.threads_an_element, elements_a_block = generic_threads / sharers;
    for (int64_t base = int64_t(block_index().x) * elements_a_block; base < elements;
         base += int64_t(grid_extent().x) * elements_a_block) {
        const int64_t element = base + thread_index() / sharers;
        int begin[6], end[6], rest = int(element);
        int64_t offset = 0;
        GPU_UNROLL_FOR (int d = 5; d >= 0; --d) {
            begin[d] = a.begin[d];
            end[d] = begin[d] + a.extent[d];
            if (!a.stride[d]) continue;
            begin[d] += rest % a.extent[d];
            end[d] = begin[d] + 1;
            rest /= a.extent[d];
            offset += begin[d] * a.stride[d];
        }
        const int columns = end[5] - begin[5], queries = element < elements ? (end[4] - begin[4]) * columns : 0;
        float sum = 0;
        for (int batch = begin[0]; batch < end[0]; ++batch)
            for (int head = begin[1]; head < end[1]; ++head)
                for (int u = begin[2]; u < end[2]; ++u)
                    for (int v = begin[3]; v < end[3]; ++v)
                        for (int query = thread_index() % sharers; query < queries; query += sharers) {
                            const int at[2] = {begin[4] + query / columns, begin[5] + query % columns};
                            int entry[2] = {u, v};
                            bool present = true;
                            GPU_UNROLL_FOR (int x = 0; x < 2; ++x) {
                                const Anchor anchor = a.anchor[x][at[x]];
                                const Range range = a.range[x][at[x]];
                                if (a.relative) entry[x] += anchor.centre - anchor.start - (a.kernel[x] - 1);
                                const int key = anchor.start + entry[x];
                                present = present && key >= range.begin && key < range.end;
                            }
                            if (!present) continue;
                            const int image = batch * a.heads + head - a.first_image;
                            const int row =
                                ((image * a.kernel[0] + entry[0]) * a.kernel[1] + entry[1]) * a.queries[0] + at[0];
                            sum += a.score_gradient[row * a.queries[1] + at[1]];
                        }
        if (sharers > 1) sum = sum_of_warps(warp_sum(sum));
        if (element < elements && thread_index() % sharers == 0)
            a.gradient[offset] = a.adds ? a.gradient[offset] + sum : sum;
    }
}

}  // namespace localattn::cuda
