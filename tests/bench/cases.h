// What is measured: attention problems by name, and the useful work in one.
#pragma once
#include <localattn/localattn.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace bench {

using Extent = std::array<int64_t, 3>;

struct Case {
    std::string name;
    int rank = 2;
    int64_t batch = 1, heads = 1, channels = 64;
    Extent queries{128, 128, 1}, keys{128, 128, 1}, kernel{7, 7, 1};
    Extent stride{1, 1, 1}, dilation{1, 1, 1};
    std::array<bool, 3> causal{false, false, false};
    bool raster = false;
    localattn_border border = LOCALATTN_BORDER_MASK;
    // (batch, heads, channels, *map) or (batch, heads, *map, channels) in memory; else (batch, *map, heads, channels).
    bool channels_first = false, heads_first = false;
    bool bias = false, rel_pos_bias = false, axis_bias = false, key_mask = false;

    int64_t window() const;
    // Query-key pairs inside the map, over all heads and the batch.
    double pairs() const;
    // Useful operations: two products a pair forward, five backward.
    double flop(localattn_pass pass) const;
};

// The shapes of the README's table; the window rule's options, each beside the plain window; other shapes.
std::vector<Case> cases();

}  // namespace bench
