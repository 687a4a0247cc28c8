// What the launches of the tiled kernels have in common for the backward: workspace, tables, arguments, the gradients
// of biases.
#pragma once
#include <algorithm>

#include "../bias_gradient.h"
#include "../gradients.h"
#include "generic_operators.h"
#include "tiled.h"

namespace localattn::cuda {

template <class C>
int64_t grad_key_bytes(int64_t columns) {
    return C::shared_bytes(columns) + 2 * columns * C::stage_rows * int64_t(sizeof(Statistics));
}

// The most shared memory that a kernel of the pass asks for.
template <class Forward, class GradQuery, class GradKey>
int64_t shared_bytes(const Problem &p, Pass pass) {
    const Axis &x = p.axis[2];
    if (pass == Pass::forward) return Forward::shared_bytes(key_columns<Forward>(x));
    const int64_t query = GradQuery::shared_bytes(key_columns<GradQuery>(x));
    const int64_t key = grad_key_bytes<GradKey>(query_columns<GradKey>(x));
    return query > key ? query : key;
}

// Device memory: ranges of the queries; with biases their windows' anchors; for the backward ranges of the keys, and
// the queries' statistics; for the gradients of biases those of the scores of some images. And whether there are spoilt
// rows.
struct Workspace {
    int32_t *spoilt;
    Range *query[2], *key[2];
    Anchor *anchor[2];
    Statistics *statistics;
    float *score_gradient;
    int64_t images;  // that score_gradient holds at a time: whole batches, or of one batch
    size_t bytes;

    Workspace(const Problem &p, Pass pass, void *memory) {
        static_assert(sizeof(Range) == 8 && sizeof(Anchor) == 8 && sizeof(Statistics) == 8,
                      "one follows the other without gaps");
        const Axis &rows = p.axis[1], &columns = p.axis[2];
        int64_t count = 0;
        const auto take = [&](int64_t items) {
            void *at = static_cast<char *>(memory) + 8 * count;
            count += items;
            return at;
        };
        spoilt = static_cast<int32_t *>(take(1));
        query[0] = static_cast<Range *>(take(rows.queries));
        query[1] = static_cast<Range *>(take(columns.queries));
        const bool backward = pass == Pass::backward, biased = has_score_bias(p);
        anchor[0] = biased ? static_cast<Anchor *>(take(rows.queries)) : nullptr;
        anchor[1] = biased ? static_cast<Anchor *>(take(columns.queries)) : nullptr;
        key[0] = static_cast<Range *>(take(backward ? rows.keys : 0));
        key[1] = static_cast<Range *>(take(backward ? columns.keys : 0));
        statistics = static_cast<Statistics *>(take(backward ? p.batch * rows.queries * columns.queries * p.heads : 0));
        const int64_t entries = int64_t(image_entries(p)), all = p.batch * p.heads;
        images =
            backward && p.wants_bias_gradient() ? std::clamp(cached_score_gradients / entries, int64_t(1), all) : 0;
        if (images > p.heads) images -= images % p.heads;
        score_gradient = static_cast<float *>(take((images * entries + 1) / 2));
        bytes = size_t(8 * count);
    }
};

inline size_t workspace_bytes(const Problem &p, Pass pass) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, pass, nowhere).bytes;
}

// What a pass ends with.
inline const char *compute_spoilt_rows(const Problem &p, Pass pass, const Workspace &w, void *stream) {
    const bool forward = pass == Pass::forward;
    const Deltas<float> deltas = {forward ? nullptr : &w.statistics->delta, sizeof(Statistics) / sizeof(float)};
    return generic_spoilt_rows(p, pass, {w.spoilt}, deltas, stream);
}

// Calls visit(NoBias or ScoreBias<T>), whatever the problem has. Biases are multiplied by `factor`.
template <class T, class Visit>
auto with_bias(const Problem &p, const Workspace &w, double factor, Visit visit) {
    return has_score_bias(p) ? visit(bias_of<T>(p, w.anchor[0], w.anchor[1], float(factor))) : visit(NoBias());
}
// Of kernels that divide scores by the magnitude of the scale.
inline double over_scale(const Problem &p) { return p.scale == 0 ? 1 : 1 / std::fabs(p.scale); }

// Fills what the pass needs of the workspace.
template <class T>
const char *prepare(const Problem &p, Pass pass, const Workspace &w, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const char *error = launch_ranges(p, w.query, w.anchor, w.spoilt, stream);
    if (error || pass == Pass::forward) return error;
    error = launch_key_ranges(p, w.query, w.key, stream);
    if (error) return error;
    const StatisticsArguments statistics = {p, w.statistics};
    const int64_t queries = p.batch * rows.queries * columns.queries * p.heads;
    return launch<fill_statistics<T>>(blocks_for(queries, statistics_threads / warp_size), statistics_threads, 0,
                                      stream, statistics);
}

// All but what depends on the tile.
template <class T, class Bias>
GradientArguments<T, Bias> gradient_arguments(const Problem &p, const Workspace &w, const Bias &bias) {
    GradientArguments<T, Bias> a{};
    a.query = pointer<const T>(p.query), a.key = pointer<const T>(p.key), a.value = pointer<const T>(p.value);
    a.grad_output = pointer<const T>(p.grad_output);
    a.grad_query = pointer<T>(p.grad_query), a.grad_key = pointer<T>(p.grad_key),
    a.grad_value = pointer<T>(p.grad_value);
    a.query_view = view_of(p.query), a.key_view = view_of(p.key), a.value_view = view_of(p.value);
    a.grad_output_view = view_of(p.grad_output), a.grad_query_view = view_of(p.grad_query);
    a.grad_key_view = view_of(p.grad_key), a.grad_value_view = view_of(p.grad_value);
    a.statistics = w.statistics;
    a.heads = int32_t(p.heads), a.heads_a_key = int32_t(p.heads / p.kv_heads);
    a.channels = int32_t(p.channels), a.value_channels = int32_t(p.value_channels);
    a.scale = float(p.scale);
    a.spoilt = w.spoilt;
    a.bias = bias;
    return a;
}

// Once for each part of a gradient that the tile computes at a time.
template <class C, auto kernel, class Arguments>
const char *launch_parts(Extent3 grid, int64_t shared_bytes, void *stream, Arguments a) {
    const char *error = nullptr;
    for (a.part = 0; a.part < C::parts && !error; ++a.part)
        error = launch<kernel>(grid, C::threads, size_t(shared_bytes), stream, a);
    return error;
}

// With tiles of queries, over which keys stream; of some images.
template <class C, auto kernel, class T, class Bias>
const char *launch_over_queries(const Problem &p, const Workspace &w, GradientArguments<T, Bias> a, int64_t first_image,
                                int64_t images, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, w.query[0]);
    a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, w.query[1]);
    a.stage_columns = int32_t(key_columns<C>(columns));
    a.first_image = int32_t(first_image);
    return launch_parts<C, kernel>(grid_of(a.rows, a.columns, images), C::shared_bytes(a.stage_columns), stream, a);
}

// Adds up one bias's gradient from those of the scores of `images` images.
inline const char *launch_bias_gradient(BiasGradientArguments a, const Tensor &gradient, const int64_t (&stride)[6],
                                        int64_t first_image, int64_t images, void *stream) {
    if (!gradient.data) return nullptr;
    a.gradient = pointer<float>(gradient);
    const int64_t heads = a.heads, whole = images >= heads ? images / heads : 0;  // batches
    const int32_t begin[] = {int32_t(first_image / heads), int32_t(first_image % heads)};
    const int32_t extent[] = {int32_t(whole ? whole : 1), int32_t(whole ? heads : images)};
    int64_t elements = 1, queries = 1;
    for (int d = 0; d < 6; ++d) {
        if (d < 2) a.begin[d] = begin[d], a.extent[d] = extent[d];
        a.stride[d] = stride[d];
        a.adds = a.adds || (d < 2 && !stride[d] && begin[d] > 0);
        if (stride[d])
            elements *= a.extent[d];
        else if (d >= 4)
            queries *= a.extent[d];
    }
    a.threads_an_element = queries >= 2 * generic_threads ? generic_threads : 1;
    return launch<sum_score_gradients>(grid_for(elements, generic_threads / a.threads_an_element), generic_threads,
                                       generic_warps * sizeof(float), stream, a);
}

// The gradients of all biases, of `images` images from `first_image` on, whose scores' gradients the workspace holds.
inline const char *launch_bias_gradients(const Problem &p, const Workspace &w, int64_t first_image, int64_t images,
                                         void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    BiasGradientArguments a{};
    a.score_gradient = w.score_gradient;
    a.first_image = int32_t(first_image), a.heads = int32_t(p.heads);
    const Axis *const axes[] = {&rows, &columns};
    for (int x = 0; x < 2; ++x) {
        a.kernel[x] = int32_t(axes[x]->kernel), a.queries[x] = int32_t(axes[x]->queries);
        a.range[x] = w.query[x], a.anchor[x] = w.anchor[x];
        a.extent[2 + x] = a.kernel[x], a.extent[4 + x] = a.queries[x];
    }
    const auto sum = [&](const Tensor &t, int64_t row_entry, int64_t column_entry) {
        const int64_t stride[] = {t.batch, t.head, row_entry, column_entry, t.axis[1], t.axis[2]};
        return launch_bias_gradient(a, t, stride, first_image, images, stream);
    };
    const Tensor &whole = p.grad_bias, &table = p.grad_rel_pos_bias;
    const char *error = sum(whole, whole.channel * columns.kernel, whole.channel);
    if (!error) error = sum(p.grad_axis_bias[1], p.grad_axis_bias[1].channel, 0);
    if (!error) error = sum(p.grad_axis_bias[2], 0, p.grad_axis_bias[2].channel);
    if (error) return error;
    a.relative = true;
    for (int x = 0; x < 2; ++x) a.extent[2 + x] = 2 * a.kernel[x] - 1;
    const int64_t stride[] = {0, table.head, table.axis[1], table.axis[2], 0, 0};
    return launch_bias_gradient(a, table, stride, first_image, images, stream);
}

// The gradients of queries and biases.
template <class C, auto kernel, class T, class Bias>
const char *launch_query_gradients(const Problem &p, const Workspace &w, GradientArguments<T, Bias> a, void *stream) {
    const int64_t all = p.batch * p.heads;
    if constexpr (Bias::present) {
        if (p.wants_bias_gradient()) {
            a.bias.score_gradient = w.score_gradient;
            for (int64_t first = 0; first < all;) {
                const int64_t left = w.images < p.heads ? p.heads - first % p.heads : all - first;
                const int64_t images = std::min(w.images, left);
                const char *error = launch_over_queries<C, kernel>(p, w, a, first, images, stream);
                if (!error) error = launch_bias_gradients(p, w, first, images, stream);
                if (error) return error;
                first += images;
            }
            return nullptr;
        }
    }
    return a.grad_query ? launch_over_queries<C, kernel>(p, w, a, 0, all, stream) : nullptr;
}

// With tiles of keys, over which queries stream.
template <class C, auto kernel, class T, class Bias>
const char *launch_over_keys(const Problem &p, const Workspace &w, GradientArguments<T, Bias> a, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    a.rows = tile_axis(rows.keys, rows.queries, rows.dilation, C::query_rows, w.key[0]);
    a.columns = tile_axis(columns.keys, columns.queries, columns.dilation, C::query_columns, w.key[1]);
    a.stage_columns = int32_t(query_columns<C>(columns));
    return launch_parts<C, kernel>(grid_of(a.rows, a.columns, p.batch * p.kv_heads), grad_key_bytes<C>(a.stage_columns),
                                   stream, a);
}

}  // namespace localattn::cuda
