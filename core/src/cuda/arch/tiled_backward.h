// What the launches of the tiled kernels have in common for the backward: workspace, tables, arguments.
#pragma once
#include "../gradients.h"
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

// Device memory: ranges of the queries; for a forward with biases their windows' anchors; for the backward ranges of
// the keys, and the queries' statistics.
struct Workspace {
    Range *query[2], *key[2];
    Anchor *anchor[2];
    Statistics *statistics;
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
        query[0] = static_cast<Range *>(take(rows.queries));
        query[1] = static_cast<Range *>(take(columns.queries));
        const bool backward = pass == Pass::backward, biased = !backward && p.has_bias();
        anchor[0] = biased ? static_cast<Anchor *>(take(rows.queries)) : nullptr;
        anchor[1] = biased ? static_cast<Anchor *>(take(columns.queries)) : nullptr;
        key[0] = static_cast<Range *>(take(backward ? rows.keys : 0));
        key[1] = static_cast<Range *>(take(backward ? columns.keys : 0));
        statistics = static_cast<Statistics *>(take(backward ? p.batch * rows.queries * columns.queries * p.heads : 0));
        bytes = size_t(8 * count);
    }
};

inline size_t workspace_bytes(const Problem &p, Pass pass) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, pass, nowhere).bytes;
}

// Calls visit(NoBias or ScoreBias<T>), whatever the problem has.
template <class T, class Visit>
auto with_bias(const Problem &p, const Workspace &w, Visit visit) {
    return p.has_bias() ? visit(bias_of<T>(p, w.anchor[0], w.anchor[1])) : visit(NoBias());
}

// Fills what the pass needs of the workspace.
template <class T>
const char *prepare(const Problem &p, Pass pass, const Workspace &w, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const char *error = launch_ranges(p, w.query, w.anchor, stream);
    if (error || pass == Pass::forward) return error;
    error = launch_key_ranges(p, w.query, w.key, stream);
    if (error) return error;
    const StatisticsArguments statistics = {p, w.statistics};
    const int64_t queries = p.batch * rows.queries * columns.queries * p.heads;
    return launch<fill_statistics<T>>(blocks_for(queries, statistics_threads / warp_size), statistics_threads, 0,
                                      stream, statistics);
}

// All but what depends on the tile.
template <class T>
GradientArguments<T> gradient_arguments(const Problem &p, const Workspace &w) {
    GradientArguments<T> a{};
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
    return a;
}

// With tiles of queries, over which keys stream.
template <class C, auto kernel, class T>
const char *launch_over_queries(const Problem &p, const Workspace &w, GradientArguments<T> a, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, w.query[0]);
    a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, w.query[1]);
    a.stage_columns = int32_t(key_columns<C>(columns));
    return launch<kernel>(grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                          size_t(C::shared_bytes(a.stage_columns)), stream, a);
}

// With tiles of keys, over which queries stream.
template <class C, auto kernel, class T>
const char *launch_over_keys(const Problem &p, const Workspace &w, GradientArguments<T> a, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    a.rows = tile_axis(rows.keys, rows.queries, rows.dilation, C::query_rows, w.key[0]);
    a.columns = tile_axis(columns.keys, columns.queries, columns.dilation, C::query_columns, w.key[1]);
    a.stage_columns = int32_t(query_columns<C>(columns));
    return launch<kernel>(grid_of(a.rows, a.columns, p.batch * p.kv_heads), C::threads,
                          size_t(grad_key_bytes<C>(a.stage_columns)), stream, a);
}

}  // namespace localattn::cuda
