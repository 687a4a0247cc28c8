// The routing of routed attention: which regions a region's queries attend to, and, for the backward, the inverse:
// which choices fell on a region. The inverse is a stable counting sort, so that the order of every sum over it is
// fixed.
#pragma once
#include "../routed_attention.h"
#include "chunk.h"

namespace localattn::cuda {

GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) check_routing(GPU_ARGUMENT RoutedProblem p) {
    const int64_t choices = p.batch * p.regions() * p.topk;
    for (int64_t i = int64_t(block_index().x) * generic_threads + thread_index(); i < choices;
         i += int64_t(grid_extent().x) * generic_threads) {
        const int64_t index = p.index(i / p.topk / p.regions(), i / p.topk % p.regions(), i % p.topk);
        require(index >= 0 && index < p.regions(), "region_index must be from 0 to the number of regions - 1");
    }
}

// A choice: which region made it, and the how many-th of its own it was.
struct Choice {
    int32_t region, number;
};

// In the workspace, per batch: the choices sorted by the region chosen, and where each region's begin.
struct InverseRouting {
    int64_t *begin;   // (batch, regions + 1)
    Choice *choices;  // (batch, regions * topk)

    GPU_METHOD int64_t first(const RoutedProblem &p, int64_t batch, int64_t region) const {
        return begin[batch * (p.regions() + 1) + region];
    }
    GPU_METHOD Choice at(const RoutedProblem &p, int64_t batch, int64_t i) const {
        return choices[batch * p.regions() * p.topk + i];
    }
};

struct InverseArguments {
    RoutedProblem problem;
    InverseRouting inverse;
};

// A warp for each chosen region: its lanes go over all choices of the batch, 32 at a time, once to count those of
// regions before it and once to write its own down.
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) invert_routing(GPU_ARGUMENT InverseArguments arguments) {
    const RoutedProblem &p = arguments.problem;
    const int64_t regions = p.regions(), choices = regions * p.topk;
    for (int64_t item = first_warp(); item < p.batch * regions; item += warp_step()) {
        const int64_t batch = item / regions, region = item % regions;
        const auto chosen = [&](int64_t i) { return p.index(batch, i / p.topk, i % p.topk); };
        int64_t before = 0;
        for (int64_t i = lane_index(); i < choices; i += warp_size) before += chosen(i) < region;
        int64_t next = warp_sum(before);
        int64_t *const begin = arguments.inverse.begin + batch * (regions + 1);
        if (lane_index() == 0) {
            begin[region] = next;
            if (region == 0) begin[regions] = choices;
        }
        for (int64_t first = 0; first < choices; first += warp_size) {
            const int64_t i = first + lane_index();
            const bool own = i < choices && chosen(i) == region;
            const uint32_t owners = ballot(own);
            if (own)
                arguments.inverse.choices[batch * choices + next + count_bits(owners & ((1u << lane_index()) - 1))] = {
                    int32_t(i / p.topk), int32_t(i % p.topk)};
            next += count_bits(owners);
        }
    }
}

inline const char *launch_check(const RoutedProblem &p, void *stream) {
    const int64_t choices = p.batch * p.regions() * p.topk;
    if (choices == 0) return nullptr;
    return launch<check_routing>(grid_for(choices, generic_threads), generic_threads, 0, stream, p);
}

inline const char *launch_inverse(const RoutedProblem &p, const InverseRouting &inverse, void *stream) {
    return launch_warps<invert_routing>(p.batch * p.regions(), stream, InverseArguments{p, inverse});
}

}  // namespace localattn::cuda
