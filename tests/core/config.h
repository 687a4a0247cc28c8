// One attention problem to test, as plain numbers, and random ones of them.
#pragma once
#include <cstdint>
#include <random>
#include <string>

#include "localattn/localattn.h"

namespace test {

using Random = std::mt19937_64;

inline int64_t pick(Random &random, int64_t least, int64_t most) {
    return least + static_cast<int64_t>(random() % static_cast<uint64_t>(most - least + 1));
}
inline bool chance(Random &random, int percent) { return pick(random, 1, 100) <= percent; }

// The axes that a tensor may have, as bits: which of them a bias broadcasts, or its gradient sums over.
enum Axes : unsigned { batch_axis = 1, spatial_axis_0 = 2, head_axis = 16, channel_axis = 32 };

struct Config {
    uint64_t seed = 1;  // of the values and the memory layouts
    localattn_dtype dtype = LOCALATTN_FLOAT32;
    int rank = 2;
    int64_t batch = 1, heads = 1, kv_heads = 1, channels = 4, value_channels = 4;
    // Entries beyond the rank are 1.
    int64_t query_extent[3] = {1, 1, 1}, key_extent[3] = {1, 1, 1};
    int64_t kernel_size[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1};
    bool is_causal[3] = {false, false, false};
    bool raster_causal = false;
    localattn_border border = LOCALATTN_BORDER_MASK;
    bool has_scale = false;
    double scale = 0;
    bool has_bias = false, has_rel_pos_bias = false, has_axis_bias[3] = {false, false, false}, has_key_mask = false;
    bool has_grad_lse = false;
    unsigned bias_broadcast = 0;  // Axes
    bool plain_layout = false;    // contiguous, in the order of the contract, instead of random strides
    double magnitude = 1;         // of queries and keys: larger ones make the softmax peaked

    int64_t window() const { return kernel_size[0] * kernel_size[1] * kernel_size[2]; }
    int64_t queries() const { return query_extent[0] * query_extent[1] * query_extent[2]; }
    int64_t keys() const { return key_extent[0] * key_extent[1] * key_extent[2]; }
};

// A configuration that is a function of the seed alone, of at most about `work` multiplications.
Config random_config(uint64_t seed, double work);

std::string describe(const Config &config);

}  // namespace test
