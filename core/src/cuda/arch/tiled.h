// What the launches of the tiled kernels have in common: which windows and tensors they take, and their arguments.
#pragma once
#include <cmath>

#include "../forward.h"
#include "../variant.h"

namespace localattn::cuda {

// At most so many key columns do the queries of a tile see: the spread of the centres, the leader's shift, the kernel.
template <class C>
int64_t key_columns(const Axis &x) {
    const int64_t tile = C::query_columns;
    const int64_t centres = x.dilation > 1 ? tile - 1 : ((tile - 1) * x.keys + x.queries - 1) / x.queries;
    const int64_t bound = centres + x.stride - 1 + x.kernel;
    const int64_t longest = (x.keys + x.dilation - 1) / x.dilation;  // but zeros outside the map are seen as well
    return (x.border == Border::zero || bound < longest ? bound : longest) + C::spare_columns;
}

// And so many query columns see the keys of a tile of keys; where windows are shifted inwards, those near the border
// are seen by half a kernel more.
template <class C>
int64_t query_columns(const Axis &x) {
    const int64_t centres = C::query_columns + x.kernel + x.stride + (x.border == Border::shift ? x.kernel / 2 : 0);
    const int64_t bound = x.dilation > 1 ? centres : (centres * x.queries + x.keys - 1) / x.keys + 1;
    const int64_t longest = (x.queries + x.dilation - 1) / x.dilation;
    return (bound < longest ? bound : longest) + C::spare_columns;
}

// Are the channels contiguous, and is every row of them aligned to `elements` elements of `size` bytes?
template <class OneProblem>
bool unit_aligned(const OneProblem &p, const Tensor &t, int64_t elements, int64_t size) {
    if (t.channel != 1 || reinterpret_cast<uintptr_t>(t.data) % uintptr_t(size * elements)) return false;
    if (p.batch > 1 && t.batch % elements) return false;
    return t.head % elements == 0 && t.axis[1] % elements == 0 && t.axis[2] % elements == 0;
}

// NULL if rows of channels can be copied by 16 bytes and written `together` elements at a time, else why not.
template <class OneProblem>
const char *declines_layout(const OneProblem &p, Pass pass, int64_t element_bytes, int64_t together) {
    const int64_t unit = 16 / element_bytes;
    const auto fits = [&](const Tensor &t, int64_t elements) { return unit_aligned(p, t, elements, element_bytes); };
    if (!fits(p.key, unit) || !fits(p.value, unit))
        return "key and value need contiguous channels and 16-byte alignment";
    if (pass == Pass::forward) {
        if (!fits(p.query, together)) return "query needs contiguous channels and 4-byte alignment";
        return fits(p.output, together) ? nullptr : "output needs contiguous channels and 4-byte alignment";
    }
    if (!fits(p.query, unit) || !fits(p.grad_output, unit))
        return "query and grad_output need contiguous channels and 16-byte alignment";
    for (const Tensor *t : {&p.grad_query, &p.grad_key, &p.grad_value})
        if (t->data && !fits(*t, together)) return "gradients need contiguous channels and 4-byte alignment";
    return nullptr;
}

// Does every offset inside one image, of `rows` by `columns`, fit 31 bits?
inline bool addressable(const Tensor &t, int64_t rows, int64_t columns) {
    const auto reach = [](int64_t extent, int64_t stride) {
        return double(extent) * double(stride < 0 ? -stride : stride);
    };
    return reach(rows, t.axis[1]) + reach(columns, t.axis[2]) < 2147483648.0;
}

// NULL if the tiled kernels compute such windows, else why not.
inline const char *declines_window(const Problem &p) {
    const Axis &first = p.axis[0], &rows = p.axis[1], &columns = p.axis[2];
    if (first.queries != 1 || first.keys != 1 || first.kernel != 1) return "computes 1 and 2 spatial axes only";
    if (p.batch == 0 || rows.queries == 0 || columns.queries == 0 || rows.keys == 0 || columns.keys == 0)
        return "takes no empty maps";
    if (p.raster) return "a raster-causal window is no rectangle";
    const double magnitude = std::fabs(p.scale);
    if (p.scale != 0 && !(magnitude > 1e-30 && magnitude < 1e30))
        return "the scale must be 0, or from 1e-30 to 1e30 in magnitude";
    for (const Axis *x : {&rows, &columns})
        if (x->dilation > 1 && x->queries != x->keys) return "dilation needs as many queries as keys";
    return nullptr;
}

// NULL if 32 bits number every element of an image and every tile, else why not.
inline const char *declines_size(const Problem &p) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    for (const Tensor *t : {&p.query, &p.output, &p.lse, &p.grad_output, &p.grad_query})
        if (!addressable(*t, rows.queries, columns.queries)) return "an image spans 2^31 elements or more";
    for (const Tensor *t : {&p.key, &p.value, &p.grad_key, &p.grad_value})
        if (!addressable(*t, rows.keys, columns.keys)) return "an image spans 2^31 elements or more";
    if (double(rows.queries) * double(columns.queries) * double(p.heads) > INT32_MAX)
        return "an image spans 2^31 elements or more";

    const auto tiles = [](int64_t extent, int64_t dilation) {  // of 8 places, the least that a tile has
        return double(dilation) * (double(extent) / double(dilation) / 8 + 2);
    };
    const double most_rows = tiles(rows.queries > rows.keys ? rows.queries : rows.keys, rows.dilation);
    const double most_columns =
        tiles(columns.queries > columns.keys ? columns.queries : columns.keys, columns.dilation);
    if (most_rows * most_columns * double(p.batch) * double(p.heads) > INT32_MAX)
        return "more tiles than a grid has blocks";
    return nullptr;
}

inline View view_of(const Tensor &t) { return {t.batch, t.head, int32_t(t.axis[1]), int32_t(t.axis[2])}; }

inline TileAxis tile_axis(int64_t tiled, int64_t streamed, int64_t dilation, int64_t tile_places, const Range *range) {
    const int64_t longest = (tiled + dilation - 1) / dilation;
    return {int32_t(tiled), int32_t(streamed), int32_t(dilation), int32_t((longest + tile_places - 1) / tile_places),
            range};
}

inline Extent3 grid_of(const TileAxis &rows, const TileAxis &columns, int64_t images) {
    return {int32_t(int64_t(rows.tiles) * rows.dilation * columns.tiles * columns.dilation * images), 1, 1};
}

inline Extent3 blocks_for(int64_t items, int64_t items_a_block) {
    const int64_t blocks = (items + items_a_block - 1) / items_a_block, most = INT32_MAX;
    return {int32_t(blocks < most ? blocks : most), 1, 1};
}

template <class Real>
Real *pointer(const Tensor &t) {
    return static_cast<Real *>(t.data);
}

// Are scores more than products, or their gradients wanted?
inline bool has_score_bias(const Problem &p) { return p.has_bias() || p.wants_bias_gradient() || p.key_mask.data; }

// Entries of the windows of an image, one head of one batch.
inline double image_entries(const Problem &p) {
    return double(p.axis[1].queries) * double(p.axis[2].queries) * double(p.axis[1].kernel) * double(p.axis[2].kernel);
}

// NULL if 32 bits number every element of an image's biases, else why not.
inline const char *declines_bias(const Problem &p) {
    if (p.axis_bias[0].data || p.grad_axis_bias[0].data) return "takes no bias of a third axis";
    if (!addressable(p.key_mask, p.axis[1].keys, p.axis[2].keys)) return "the key mask spans 2^31 elements or more";
    if (p.wants_bias_gradient() && image_entries(p) > 268435456)
        return "gradients of biases want at most 2^28 entries in the windows of an image";
    const int64_t kernel[] = {p.axis[1].kernel, p.axis[2].kernel};
    const auto entries_fit = [&](Tensor t, int64_t entries) {
        const double reach = double(entries) * std::fabs(double(t.channel));
        return reach < 1073741824.0 && addressable(t, 2 * p.axis[1].queries, 2 * p.axis[2].queries);
    };
    if (!entries_fit(p.bias, kernel[0] * kernel[1]) || !entries_fit(p.axis_bias[1], kernel[0]) ||
        !entries_fit(p.axis_bias[2], kernel[1]) || !addressable(p.rel_pos_bias, 2 * kernel[0], 2 * kernel[1]))
        return "an image's biases span 2^30 elements or more";
    return nullptr;
}

template <class T>
ScoreBias<T> bias_of(const Problem &p, const Anchor *rows, const Anchor *columns, float factor) {
    ScoreBias<T> b{};
    b.whole = pointer<const T>(p.bias), b.table = pointer<const T>(p.rel_pos_bias);
    b.by_row = pointer<const T>(p.axis_bias[1]), b.by_column = pointer<const T>(p.axis_bias[2]);
    b.whole_view = view_of(p.bias), b.by_row_view = view_of(p.axis_bias[1]);
    b.by_column_view = view_of(p.axis_bias[2]);
    b.whole_entry = int32_t(p.bias.channel), b.by_row_entry = int32_t(p.axis_bias[1].channel);
    b.by_column_entry = int32_t(p.axis_bias[2].channel);
    b.table_head = p.rel_pos_bias.head;
    b.table_row = int32_t(p.rel_pos_bias.axis[1]), b.table_column = int32_t(p.rel_pos_bias.axis[2]);
    b.kernel_rows = int32_t(p.axis[1].kernel), b.kernel_columns = int32_t(p.axis[2].kernel);
    b.rows = rows, b.columns = columns;
    b.factor = factor;
    b.key_mask = pointer<const uint8_t>(p.key_mask), b.mask_view = view_of(p.key_mask);
    b.key_rows = int32_t(p.axis[1].keys), b.key_columns = int32_t(p.axis[2].keys);
    b.query_rows = int32_t(p.axis[1].queries), b.query_columns = int32_t(p.axis[2].queries);
    return b;
}

// Over tiles of queries; part of the output's channels, where a tile computes parts.
template <class C, class T, auto kernel, class Bias>
const char *launch_forward(const Problem &p, Range *const (&queries)[2], const Bias &bias, int32_t part,
                           int32_t *spoilt, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    ForwardArguments<T, Bias> a{};
    a.query = pointer<const T>(p.query), a.key = pointer<const T>(p.key), a.value = pointer<const T>(p.value);
    a.output = pointer<T>(p.output), a.lse = pointer<float>(p.lse);
    a.query_view = view_of(p.query), a.key_view = view_of(p.key), a.value_view = view_of(p.value);
    a.output_view = view_of(p.output), a.lse_view = view_of(p.lse);
    a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, queries[0]);
    a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, queries[1]);
    a.heads = int32_t(p.heads), a.heads_a_key = int32_t(p.heads / p.kv_heads);
    a.channels = int32_t(p.channels), a.value_channels = int32_t(p.value_channels);
    a.stage_columns = int32_t(key_columns<C>(columns));
    a.scale = p.scale == 0 ? 1 : float(std::fabs(p.scale));
    a.sign = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    a.part = part;
    a.spoilt = spoilt;
    a.bias = bias;
    return launch<kernel>(grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                          size_t(C::shared_bytes(a.stage_columns)), stream, a);
}

inline const char *launch_ranges(const Problem &p, Range *const (&ranges)[2], Anchor *const (&anchors)[2],
                                 int32_t *spoilt, void *stream) {
    const RangeArguments arguments = {{p.axis[1], p.axis[2]}, {ranges[0], ranges[1]}, {anchors[0], anchors[1]}, spoilt};
    const int64_t longest = p.axis[1].queries > p.axis[2].queries ? p.axis[1].queries : p.axis[2].queries;
    return launch<fill_ranges>(blocks_for(longest, range_threads), range_threads, 0, stream, arguments);
}

inline const char *launch_key_ranges(const Problem &p, Range *const (&queries)[2], Range *const (&keys)[2],
                                     void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const KeyRangeArguments arguments = {{int32_t(rows.queries), int32_t(columns.queries)},
                                         {int32_t(rows.keys), int32_t(columns.keys)},
                                         {int32_t(rows.dilation), int32_t(columns.dilation)},
                                         {queries[0], queries[1]},
                                         {keys[0], keys[1]}};
    const int64_t longest = rows.keys > columns.keys ? rows.keys : columns.keys;
    return launch<fill_key_ranges>(blocks_for(longest, range_threads), range_threads, 0, stream, arguments);
}

}  // namespace localattn::cuda
