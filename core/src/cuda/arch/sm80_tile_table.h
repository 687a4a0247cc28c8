// The table of the tiles of attention on tensor cores.
#pragma once
#include "../../problem.h"
#include "../score_bias.h"
#include "../tensor_core_tiles.h"

namespace localattn::cuda::sm80 {

// Tiles by width of the channels and size of the window: warp rows, warp columns, patches a warp, chunks a step (of the
// forward), blocks a multiprocessor, parts. Two patches share every load from shared memory, where their accumulators
// fit the registers. In small windows a block has one row of warps: with two, each would be idle at every third stage.
// Biases take registers, too.
template <int width, bool small_window>
struct Tiles {
    static constexpr bool wide = width > 128;
    static constexpr int rows = small_window ? 1 : 2;
    static constexpr int patches = width <= 64 ? 2 : 1, blocks = wide ? 1 : 2;
    static constexpr int group = width == 32 ? 4 : wide ? 1 : 2;
    template <class Bias>
    struct Forward : Tile<width, rows, 4 / rows, patches, group, blocks, wide ? (Bias::present ? 4 : 2) : 1> {};

    static constexpr bool has_gradients = !wide;  // two tensors' rows of 256 do not fit the registers
    static constexpr int gradient_patches = width == 32 ? 2 : 1;
    struct GradQuery : Tile<width, rows, 8 / rows / gradient_patches, gradient_patches, 1, gradient_patches> {};
    static constexpr bool key_with_value = width < 128;  // both sums at a time
    template <class Bias>
    struct GradKey : Tile<width, rows, 8 / rows, 1, 1, 1, key_with_value || !Bias::present ? 1 : 2> {};
    using GradValue = GradKey<NoBias>;
};

// So that a stage of theirs fits the shared memory of every device that has tensor cores.
inline bool has_small_window(const Problem &p) {
    for (int x = 1; x < 3; ++x)
        if (p.axis[x].kernel + p.axis[x].stride > 9 || p.axis[x].queries != p.axis[x].keys) return false;
    return true;
}

// Calls visit(tiles) with the tiles that the problem needs, which must exist.
template <class Visit>
auto with_tiles(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    const bool small_window = has_small_window(p);
    if (widest <= 32) return small_window ? visit(Tiles<32, true>()) : visit(Tiles<32, false>());
    if (widest <= 64) return small_window ? visit(Tiles<64, true>()) : visit(Tiles<64, false>());
    if (widest <= 128) return visit(Tiles<128, false>());
    return visit(Tiles<256, false>());
}

}  // namespace localattn::cuda::sm80
