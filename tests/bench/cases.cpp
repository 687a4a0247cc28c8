#include "cases.h"

#include "window.h"

namespace bench {
namespace {

Case square(int64_t heads, int64_t channels, int64_t side, int64_t kernel) {
    Case c;
    c.heads = heads;
    c.channels = channels;
    c.queries = c.keys = {side, side, 1};
    c.kernel = {kernel, kernel, 1};
    c.name = "square/" + std::to_string(heads) + "x" + std::to_string(channels) + "/" + std::to_string(side) + "/k" +
             std::to_string(kernel);
    return c;
}

template <class Change>
Case changed(Case c, const std::string &name, const Change &change) {
    change(c);
    c.name = name;
    return c;
}

}  // namespace

int64_t Case::window() const {
    int64_t n = 1;
    for (int a = 0; a < rank; ++a) n *= kernel[static_cast<size_t>(a)];
    return n;
}

double Case::pairs() const {
    double n = static_cast<double>(batch * heads);
    for (size_t a = 0; a < static_cast<size_t>(rank); ++a) {
        const localattn::Axis axis{
            queries[a], keys[a], kernel[a], stride[a], dilation[a], causal[a], static_cast<localattn::Border>(border)};
        double seen = 0;
        for (int64_t q = 0; q < queries[a]; ++q) {
            const localattn::Window w = localattn::window_of(axis, q);
            seen += static_cast<double>(w.end - w.begin);
        }
        n *= seen;
    }
    return raster ? n * static_cast<double>(window() / 2 + 1) / static_cast<double>(window()) : n;
}

double Case::flop(localattn_pass pass) const {
    return pairs() * static_cast<double>(channels) * (pass == LOCALATTN_FORWARD ? 4 : 10);
}

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const int64_t k : {5, 7, 11, 21}) all.push_back(square(1, 64, 128, k));
    all.push_back(square(4, 32, 64, 7));
    all.push_back(square(4, 32, 64, 13));
    all.push_back(square(8, 32, 128, 7));
    all.push_back(square(4, 32, 512, 7));
    all.push_back(square(1, 64, 512, 21));

    for (const int64_t k : {7, 13}) {
        const Case plain = square(4, 32, 64, k);
        const auto add = [&](const char *name, const auto &change) {
            all.push_back(changed(plain, "option/k" + std::to_string(k) + "/" + name, change));
        };
        add("plain", [](Case &) {});
        add("shift", [](Case &c) { c.border = LOCALATTN_BORDER_SHIFT; });
        add("zero", [](Case &c) { c.border = LOCALATTN_BORDER_ZERO; });
        add("stride2", [](Case &c) { c.stride = {2, 2, 1}; });
        add("stride_k", [](Case &c) { c.stride = c.kernel; });
        add("dilation2", [](Case &c) { c.dilation = {2, 2, 1}; });
        add("dilation3", [](Case &c) { c.dilation = {3, 3, 1}; });
        add("dilation3_bias", [](Case &c) { c.dilation = {3, 3, 1}, c.bias = true; });
        add("dilation3_rel_pos_bias", [](Case &c) { c.dilation = {3, 3, 1}, c.rel_pos_bias = true; });
        add("causal", [](Case &c) { c.causal = {true, true, false}; });
        add("raster", [](Case &c) { c.raster = true; });
        add("finer_queries", [](Case &c) { c.keys = {32, 32, 1}; });
        add("coarser_queries", [](Case &c) { c.queries = {32, 32, 1}; });
        add("ratio_2_3", [](Case &c) { c.keys = {96, 96, 1}; });
        add("bias", [](Case &c) { c.bias = true; });
        add("rel_pos_bias", [](Case &c) { c.rel_pos_bias = true; });
        add("axis_bias", [](Case &c) { c.axis_bias = true; });
        add("key_mask", [](Case &c) { c.key_mask = true; });
        add("channels_first", [](Case &c) { c.channels_first = true; });
        add("1d", [&](Case &c) {
            c.rank = 1;
            c.queries = c.keys = {4096, 1, 1};
            c.kernel = {k * k, 1, 1};
        });
    }
    all.push_back(changed(square(4, 32, 64, 5), "option/k5/plain", [](Case &) {}));
    all.push_back(changed(square(4, 32, 64, 11), "option/k11/plain", [](Case &) {}));
    // 125 and 343 entries, beside 11 x 11 = 121 and 19 x 19 = 361.
    for (const int64_t k : {5, 7}) {
        all.push_back(changed(square(4, 32, 16, k), "option/3d/k" + std::to_string(k), [&](Case &c) {
            c.rank = 3;
            c.queries = c.keys = {16, 16, 16};
            c.kernel = {k, k, k};
        }));
    }
    all.push_back(changed(square(4, 32, 64, 19), "option/k19/plain", [](Case &) {}));
    // Dilated neighbourhood attention as its models use it: classes as long as the window.
    all.push_back(changed(square(4, 32, 56, 7), "option/neighborhood", [](Case &c) {
        c.border = LOCALATTN_BORDER_SHIFT;
        c.dilation = {8, 8, 1};
        c.rel_pos_bias = true;
    }));
    all.push_back(changed(square(8, 32, 128, 7), "heads_first/8x32/128/k7", [](Case &c) { c.heads_first = true; }));
    all.push_back(changed(square(4, 32, 512, 7), "heads_first/4x32/512/k7", [](Case &c) { c.heads_first = true; }));
    for (const int64_t side : {14, 28, 56}) {
        all.push_back(changed(square(4, 32, side, 7), "narrow/" + std::to_string(side), [](Case &c) { c.batch = 8; }));
    }
    for (const int64_t channels : {16, 24, 32, 48, 64, 80, 96, 128, 192, 256}) {
        all.push_back(changed(square(2, channels, 64, 7), "width/" + std::to_string(channels), [](Case &) {}));
    }
    all.push_back(
        changed(square(1, 64, 128, 7), "channels_first/1x64/128/k7", [](Case &c) { c.channels_first = true; }));
    all.push_back(
        changed(square(1, 64, 128, 21), "channels_first/1x64/128/k21", [](Case &c) { c.channels_first = true; }));
    return all;
}

}  // namespace bench
