// The sizes at which kernels go wrong: partial tiles, single rows, windows beyond the map, nothing at all. Every
// variant, every border, every dtype.
#include <string>
#include <vector>

#include "harness.h"

namespace {

using test::Config;

struct Named {
    std::string name;
    Config config;
};

class List {
public:
    // Adds the configuration once for each dtype, contiguous and strided.
    void add(const std::string &name, const Config &config) {
        for (int dtype = LOCALATTN_FLOAT32; dtype <= LOCALATTN_BFLOAT16; ++dtype) {
            Config c = config;
            c.dtype = static_cast<localattn_dtype>(dtype);
            c.seed = all.size() + 1;
            c.plain_layout = all.size() % 2 == 0;
            all.push_back({name, c});
        }
    }
    void add_borders(const std::string &name, Config config) {
        for (int border = LOCALATTN_BORDER_MASK; border <= LOCALATTN_BORDER_SHIFT; ++border) {
            config.border = static_cast<localattn_border>(border);
            add(name, config);
        }
    }
    std::vector<Named> all;
};

Config image(int64_t height, int64_t width, int64_t kernel_height, int64_t kernel_width) {
    Config c;
    c.rank = 2;
    c.query_extent[0] = c.key_extent[0] = height;
    c.query_extent[1] = c.key_extent[1] = width;
    c.kernel_size[0] = kernel_height;
    c.kernel_size[1] = kernel_width;
    return c;
}

void set_channels(Config &c, int64_t channels, int64_t value_channels) {
    c.channels = channels;
    c.value_channels = value_channels;
}

void add_sizes(List &list) {
    for (const int64_t width : {1, 2, 15, 16, 17, 31, 32, 33, 48, 49}) {
        Config c = image(3, width, 3, 5);
        set_channels(c, 16, 16);
        list.add_borders("width " + std::to_string(width), c);
        c = image(2, width, 2, 4);
        set_channels(c, 5, 7);
        list.add_borders("width " + std::to_string(width) + ", even kernel", c);
    }
    for (const int64_t channels : {1, 2, 7, 15, 16, 17, 63, 64, 65, 128, 200}) {
        Config c = image(4, 9, 3, 3);
        set_channels(c, channels, channels);
        list.add("channels " + std::to_string(channels), c);
        set_channels(c, channels, 3);
        list.add("channels " + std::to_string(channels) + ", narrow value", c);
        set_channels(c, 3, channels);
        list.add("value channels " + std::to_string(channels), c);
    }
    list.add_borders("one pixel", image(1, 1, 1, 1));
    list.add_borders("one pixel, large window", image(1, 1, 7, 7));
    list.add_borders("one row", image(1, 20, 7, 7));
    list.add_borders("one column", image(20, 1, 7, 7));
    list.add_borders("window larger than the image", image(4, 5, 15, 17));
    list.add_borders("window one larger than the image", image(6, 6, 7, 7));
    list.add_borders("window as large as the image", image(6, 6, 6, 6));
    list.add_borders("window of one", image(5, 18, 1, 1));
    list.add_borders("window of one row", image(5, 18, 1, 9));
    list.add_borders("window of one column", image(9, 18, 9, 1));
    Config c = image(5, 37, 13, 13);
    set_channels(c, 8, 8);
    list.add_borders("large window", c);

    c = Config();
    c.rank = 1;
    c.query_extent[0] = c.key_extent[0] = 67;
    c.kernel_size[0] = 9;
    set_channels(c, 24, 24);
    list.add_borders("a signal", c);
    c.query_extent[0] = c.key_extent[0] = 300;
    c.kernel_size[0] = 41;
    set_channels(c, 6, 10);
    list.add_borders("a signal, whose neighbouring tiles go together", c);
    c = Config();
    c.rank = 3;
    const int64_t extents[] = {3, 4, 18}, kernel[] = {3, 2, 5};
    for (int a = 0; a < 3; ++a) {
        c.query_extent[a] = c.key_extent[a] = extents[a];
        c.kernel_size[a] = kernel[a];
    }
    list.add_borders("video", c);
    c.is_causal[0] = true;
    list.add_borders("video, causal in time", c);
}

// Too wide for one strip of columns, with phases on either side. Single precision: they take long.
void add_wide(List &list) {
    Config c = image(3, 1000, 3, 3);
    set_channels(c, 64, 64);
    c.key_extent[1] = 1500;
    list.all.push_back({"wide, two queries to three keys", c});
    c.query_extent[1] = 750;
    c.border = LOCALATTN_BORDER_SHIFT;
    list.all.push_back({"wide, coarser queries", c});
    c.query_extent[1] = 1500;
    c.stride[1] = 3;
    list.all.push_back({"wide, with stride", c});
    c.stride[1] = 1;
    c.dilation[1] = 3;
    list.all.push_back({"wide, dilated", c});
}

// More than caches keep, so that results go past them, as whole lines where they can.
void add_large(List &list) {
    Config c = image(50, 128, 1, 3);
    set_channels(c, 128, 128);
    c.plain_layout = true;
    for (const localattn_dtype dtype : {LOCALATTN_FLOAT32, LOCALATTN_FLOAT64, LOCALATTN_BFLOAT16}) {
        c.dtype = dtype;
        list.all.push_back({"large", c});
    }
    c.heads = c.kv_heads = 2;
    set_channels(c, 64, 72);
    list.all.push_back({"large, two heads", c});
    c.dtype = LOCALATTN_FLOAT32;
    c.query_extent[1] = c.key_extent[1] = 123;
    list.all.push_back({"large, two heads", c});
    c.query_extent[1] = c.key_extent[1] = 128;
    c.plain_layout = false;
    for (c.seed = 2; c.seed < 7; ++c.seed) list.all.push_back({"large, any layout", c});
    // Blocks of queries that share a window.
    c = image(56, 128, 4, 4);
    c.plain_layout = true;
    c.stride[0] = c.stride[1] = 4;
    set_channels(c, 112, 112);
    list.all.push_back({"large, blocks", c});
}

void add_windows(List &list) {
    for (const int64_t stride : {2, 3, 5}) {
        Config c = image(7, 19, 5, 5);
        c.stride[0] = c.stride[1] = stride;
        list.add_borders(stride == 5 ? "stride as large as the kernel" : "stride", c);
        c.is_causal[1] = true;
        list.add_borders("causal with stride", c);
        c.is_causal[0] = true;
        c.dilation[1] = 2;
        list.add_borders("causal with stride and dilation", c);
    }
    // Halo attention: blocks of 4 with a halo of 2.
    Config c = image(8, 16, 8, 8);
    c.stride[0] = c.stride[1] = 4;
    c.border = LOCALATTN_BORDER_ZERO;
    list.add("halo", c);

    for (const int64_t dilation : {2, 3, 7, 30}) {
        c = image(7, 23, 3, 5);
        c.dilation[0] = 2;
        c.dilation[1] = dilation;
        list.add_borders("dilation " + std::to_string(dilation), c);
    }
    // Dilated windows on narrow maps: the lanes of a register belong to several residue classes.
    for (const int64_t width : {22, 37, 64, 83}) {
        c = image(4, width, 3, 5);
        set_channels(c, 19, 9);
        c.heads = c.kv_heads = 2;
        c.has_grad_lse = true;
        for (const int64_t dilation : {3, 5, 16}) {
            c.dilation[1] = dilation;
            c.has_key_mask = false;
            c.is_causal[1] = dilation == 5;
            const std::string name = "width " + std::to_string(width) + ", dilation " + std::to_string(dilation);
            list.add_borders(name, c);
            c.is_causal[1] = false;
            c.has_key_mask = true;
            list.add(name + ", key mask", c);
            c.raster_causal = true;
            list.add(name + ", raster", c);
            c.raster_causal = c.has_key_mask = false;
            Config biased = c;
            biased.has_bias = biased.has_rel_pos_bias = biased.has_axis_bias[0] = biased.has_axis_bias[1] = true;
            list.add_borders(name + ", biases", biased);
            biased.bias_broadcast = static_cast<unsigned>(dilation + width);
            list.add_borders(name + ", shared biases", biased);
        }
    }
    const int64_t extents[][2] = {{8, 4}, {4, 8}, {7, 5}, {5, 7}, {1, 9}, {9, 1}, {12, 3}, {3, 35}, {35, 3}};
    for (const auto &e : extents) {
        c = image(4, 1, 3, 4);
        c.query_extent[1] = e[0];
        c.key_extent[1] = e[1];
        c.key_extent[0] = 3;
        const std::string name = "queries and keys " + std::to_string(e[0]) + ", " + std::to_string(e[1]);
        list.add_borders(name, c);
        c.is_causal[1] = true;
        c.stride[0] = 2;
        list.add_borders(name + ", causal", c);
    }
    for (const localattn_border border : {LOCALATTN_BORDER_MASK, LOCALATTN_BORDER_ZERO}) {
        for (const int64_t width : {1, 5, 16, 35}) {
            c = image(5, width, 5, 3);
            c.raster_causal = true;
            c.border = border;
            list.add("raster", c);
            c.key_extent[0] = 10;
            c.dilation[1] = 2;
            c.has_bias = true;
            list.add("raster, finer keys, dilated, biased", c);
        }
    }
}

void add_heads_and_biases(List &list) {
    Config c = image(3, 17, 3, 3);
    c.batch = 2;
    c.heads = 6;
    c.kv_heads = 2;
    set_channels(c, 8, 12);
    list.add_borders("shared kv heads", c);
    c.has_grad_lse = true;
    c.has_rel_pos_bias = true;
    list.add_borders("shared kv heads, relative position bias", c);
    c.has_key_mask = true;
    list.add_borders("key mask", c);
    c.has_rel_pos_bias = false;
    c.has_axis_bias[0] = c.has_axis_bias[1] = true;
    list.add_borders("bias per axis", c);
    for (const unsigned broadcast : {0u, 1u, 14u, 15u, 16u, 31u, 32u, 63u, 47u}) {
        c = image(3, 18, 3, 5);
        c.batch = 2;
        c.heads = 2;
        c.kv_heads = 1;
        c.has_bias = c.has_axis_bias[1] = true;
        c.bias_broadcast = broadcast;
        list.add_borders("bias, broadcast " + std::to_string(broadcast), c);
    }
    c = image(6, 33, 5, 5);
    c.has_bias = c.has_rel_pos_bias = c.has_axis_bias[0] = c.has_axis_bias[1] = c.has_key_mask = c.has_grad_lse = true;
    c.magnitude = 20;
    list.add_borders("everything, peaked", c);
    c.has_scale = true;
    c.scale = 0;
    list.add_borders("everything, a scale of 0", c);
    c.scale = -3;
    list.add_borders("everything, a negative scale", c);
}

void add_empty(List &list) {
    for (const unsigned broadcast : {0u, 1u, 31u, 63u}) {
        Config c = image(3, 6, 3, 3);
        c.has_bias = c.has_rel_pos_bias = c.has_axis_bias[1] = c.has_key_mask = true;
        c.bias_broadcast = broadcast;
        c.batch = 0;
        list.add("no batch", c);
        c.batch = 2;
        c.query_extent[1] = 0;
        list.add_borders("no queries", c);
        c.key_extent[0] = 0;
        list.add_borders("no queries, no keys", c);
        c.query_extent[1] = 6;
        list.add_borders("no keys", c);
    }
}

}  // namespace

int main() {
    List list;
    add_sizes(list);
    add_wide(list);
    add_large(list);
    add_windows(list);
    add_heads_and_biases(list);
    add_empty(list);
    const std::vector<std::string> variants = test::available_variants();
    test::Report report;
    for (const Named &named : list.all) {
        report.check(named.config, variants, "test_shapes \"" + named.name + "\"");
    }
    return report.finish("shapes") == 0 ? 0 : 1;
}
