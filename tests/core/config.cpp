#include "config.h"

#include <algorithm>
#include <sstream>

namespace test {

namespace {

const int64_t some_channels[] = {1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65};

int64_t pick_channels(Random &random) {
    return some_channels[pick(random, 0, sizeof some_channels / sizeof *some_channels - 1)];
}

int64_t pick_extent(Random &random, int rank, bool fastest) {
    if (chance(random, 2)) return 0;
    if (chance(random, 8)) return 1;
    if (fastest && chance(random, 40)) return pick(random, 2, rank == 1 ? 100 : 40);
    return pick(random, 1, rank == 1 ? 24 : rank == 2 ? 9 : 5);
}

}  // namespace

Config random_config(uint64_t seed, double work) {
    Random random(seed);
    Config c;
    c.seed = random();
    const int dtype = static_cast<int>(pick(random, 0, 9));
    c.dtype = dtype < 4   ? LOCALATTN_FLOAT32
              : dtype < 6 ? LOCALATTN_FLOAT64
              : dtype < 8 ? LOCALATTN_FLOAT16
                          : LOCALATTN_BFLOAT16;
    const int rank = static_cast<int>(pick(random, 0, 9));
    c.rank = rank < 2 ? 1 : rank < 8 ? 2 : 3;
    c.border = static_cast<localattn_border>(pick(random, 0, 2));
    c.batch = chance(random, 70) ? 1 : pick(random, 0, 3);
    c.kv_heads = chance(random, 60) ? 1 : pick(random, 1, 4);
    c.heads = c.kv_heads * (chance(random, 70) ? 1 : pick(random, 2, 4));
    c.channels = pick_channels(random);
    c.value_channels = chance(random, 60) ? c.channels : pick_channels(random);
    c.raster_causal = c.border != LOCALATTN_BORDER_SHIFT && chance(random, 10);
    const bool cross = chance(random, 25), causal = !c.raster_causal && chance(random, 25);
    for (int a = 0; a < c.rank; ++a) {
        c.query_extent[a] = pick_extent(random, c.rank, a == c.rank - 1);
        c.key_extent[a] = cross ? pick_extent(random, c.rank, a == c.rank - 1) : c.query_extent[a];
        // Keys finer by an integer factor, coarser, or any ratio.
        if (cross && chance(random, 30)) c.key_extent[a] = c.query_extent[a] * pick(random, 1, 3);
        if (cross && chance(random, 30)) c.query_extent[a] = c.key_extent[a] * pick(random, 1, 3);
        c.kernel_size[a] = chance(random, 10) ? pick(random, 8, 15) : pick(random, 1, c.rank == 3 ? 4 : 7);
        if (c.raster_causal) {
            c.kernel_size[a] |= 1;
        } else if (chance(random, 25)) {
            c.stride[a] = chance(random, 30) ? c.kernel_size[a] : pick(random, 1, c.kernel_size[a]);
        }
        if (chance(random, 20)) c.dilation[a] = pick(random, 1, 4);
        c.is_causal[a] = causal && chance(random, 60);
    }
    if (chance(random, 30)) {
        c.has_scale = true;
        c.scale = chance(random, 10) ? 0 : double(pick(random, -10, 30)) / 16;
    }
    c.has_bias = chance(random, 20);
    c.bias_broadcast = chance(random, 50) ? 0 : static_cast<unsigned>(random() % 64);
    c.has_rel_pos_bias = chance(random, 20);
    for (int a = 0; a < c.rank; ++a) c.has_axis_bias[a] = chance(random, 12);
    c.has_key_mask = chance(random, 20);
    c.has_grad_lse = chance(random, 30);
    c.plain_layout = chance(random, 40);
    c.magnitude = chance(random, 10) ? 8 : 1;

    // Halve what is largest until the problem is as small as was asked for.
    const auto cost = [&c] {
        return double(c.batch) * double(c.heads) * double(c.queries()) * double(c.window()) *
               double(c.channels + c.value_channels);
    };
    while (cost() > work) {
        if (c.channels + c.value_channels > 16) {
            c.channels = (c.channels + 1) / 2;
            c.value_channels = (c.value_channels + 1) / 2;
        } else if (c.batch > 1 || c.heads > c.kv_heads) {
            c.batch = std::min<int64_t>(c.batch, 1);
            c.heads = c.kv_heads;
        } else {
            int a = 0;
            for (int b = 1; b < c.rank; ++b) {
                if (c.query_extent[b] * c.kernel_size[b] > c.query_extent[a] * c.kernel_size[a]) a = b;
            }
            if (c.query_extent[a] > c.kernel_size[a]) {
                c.query_extent[a] = (c.query_extent[a] + 1) / 2;
                c.key_extent[a] = (c.key_extent[a] + 1) / 2;
            } else {
                c.kernel_size[a] = std::max<int64_t>(1, c.kernel_size[a] - 2);
                c.stride[a] = std::min(c.stride[a], c.kernel_size[a]);
            }
        }
    }
    return c;
}

std::string describe(const Config &c) {
    static const char *const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    static const char *const borders[] = {"mask", "zero", "shift"};
    std::ostringstream text;
    const auto list = [&](const char *name, const auto &values) {
        text << " " << name << "=";
        for (int a = 0; a < c.rank; ++a) text << (a ? "," : "") << values[a];
    };
    text << dtypes[c.dtype] << " batch=" << c.batch << " heads=" << c.heads << "/" << c.kv_heads
         << " channels=" << c.channels << "/" << c.value_channels;
    list("query", c.query_extent);
    list("key", c.key_extent);
    list("kernel", c.kernel_size);
    list("stride", c.stride);
    list("dilation", c.dilation);
    list("causal", c.is_causal);
    if (c.raster_causal) text << " raster";
    text << " border=" << borders[c.border];
    if (c.has_scale) text << " scale=" << c.scale;
    if (c.has_bias) text << " bias(broadcast " << c.bias_broadcast << ")";
    if (c.has_rel_pos_bias) text << " rel_pos_bias";
    for (int a = 0; a < c.rank; ++a) {
        if (c.has_axis_bias[a]) text << " axis_bias[" << a << "](broadcast " << c.bias_broadcast << ")";
    }
    if (c.has_key_mask) text << " key_mask";
    if (c.has_grad_lse) text << " grad_lse";
    text << (c.plain_layout ? " contiguous" : " strided");
    if (c.magnitude != 1) text << " magnitude=" << c.magnitude;
    return text.str();
}

}  // namespace test
