// Tensor cores from compute capability 8.0: launches of the tiled kernels, and the table of their tiles.
#include <type_traits>

#include "../tensor_core_backward.h"
#include "../tensor_core_forward.h"
#include "../variant.h"
#include "tiled.h"

namespace localattn::cuda {

namespace {

// Tiles by kernel and width of the channels: warp rows, warp columns, patches a warp, chunks a step (of the forward),
// blocks a multiprocessor. Two patches share every load from shared memory, where their accumulators fit the registers.
template <int width>
struct ForwardTile : Tile<width, 2, 2, 2, width == 32 ? 4 : 2, 2> {};
template <>
struct ForwardTile<128> : Tile<128, 2, 2, 1, 2, 2> {};

template <int width>
struct GradQueryTile : Tile<width, 2, 4, 1, 1, 1> {};
template <>
struct GradQueryTile<32> : Tile<32, 2, 2, 2, 1, 2> {};

template <int width>
struct GradKeyTile : Tile<width, 2, 4, 1, 1, 1> {};

// Calls visit(integral constant) with the width of the tiles that the problem needs; it must exist.
template <class Visit>
auto with_width(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return visit(std::integral_constant<int, 32>());
    if (widest <= 64) return visit(std::integral_constant<int, 64>());
    return visit(std::integral_constant<int, 128>());
}

// And so many query columns see the keys of a tile; where windows are shifted inwards, those near the border are seen
// by half a kernel more.
template <class C>
int64_t query_columns(const Axis &x) {
    const int64_t centres = C::query_columns + x.kernel + x.stride + (x.border == Border::shift ? x.kernel / 2 : 0);
    const int64_t bound = x.dilation > 1 ? centres : (centres * x.queries + x.keys - 1) / x.keys + 1;
    const int64_t longest = (x.queries + x.dilation - 1) / x.dilation;
    return (bound < longest ? bound : longest) + C::spare_columns;
}

template <class C>
int64_t grad_key_bytes(int64_t columns) {
    return C::shared_bytes(columns) + 2 * columns * C::stage_rows * int64_t(sizeof(Statistics));
}

// The most shared memory that a kernel of the pass asks for.
int64_t shared_bytes(const Problem &p, Pass pass) {
    return with_width(p, [&](auto width) -> int64_t {
        using Forward = ForwardTile<decltype(width)::value>;
        using GradQuery = GradQueryTile<decltype(width)::value>;
        using GradKey = GradKeyTile<decltype(width)::value>;
        const Axis &x = p.axis[2];
        if (pass == Pass::forward) return Forward::shared_bytes(key_columns<Forward>(x));
        const int64_t query = GradQuery::shared_bytes(key_columns<GradQuery>(x));
        const int64_t key = grad_key_bytes<GradKey>(query_columns<GradKey>(x));
        return query > key ? query : key;
    });
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    if (const char *reason = declines_window(p)) return reason;
    if (p.has_bias() || p.wants_bias_gradient()) return "takes no bias";
    if (p.channels > 128 || p.value_channels > 128) return "computes at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";

    const bool backward = pass == Pass::backward;
    if (!unit_aligned(p, p.key, 8, 2) || !unit_aligned(p, p.value, 8, 2))
        return "key and value need contiguous channels and 16-byte alignment";
    if (!unit_aligned(p, p.query, backward ? 8 : 2, 2)) return "query needs contiguous channels and alignment";
    if (backward) {
        if (!unit_aligned(p, p.grad_output, 8, 2)) return "grad_output needs contiguous channels and 16-byte alignment";
        for (const Tensor *t : {&p.grad_query, &p.grad_key, &p.grad_value})
            if (t->data && !unit_aligned(p, *t, 2, 2)) return "gradients need contiguous channels and 4-byte alignment";
    } else if (!unit_aligned(p, p.output, 2, 2)) {
        return "output needs contiguous channels and 4-byte alignment";
    }
    if (const char *reason = declines_size(p)) return reason;
    if (shared_bytes(p, pass) > device.shared_bytes) return "the window is too wide for shared memory";
    return nullptr;
}

// Device memory: ranges of the queries, for the backward those of the keys, and the queries' statistics.
struct Workspace {
    Range *query[2], *key[2];
    Statistics *statistics;
    size_t bytes;

    Workspace(const Problem &p, Pass pass, void *memory) {
        static_assert(sizeof(Range) == 8 && sizeof(Statistics) == 8, "one follows the other without gaps");
        const Axis &rows = p.axis[1], &columns = p.axis[2];
        int64_t count = 0;
        const auto take = [&](int64_t items) {
            void *at = static_cast<char *>(memory) + 8 * count;
            count += items;
            return at;
        };
        query[0] = static_cast<Range *>(take(rows.queries));
        query[1] = static_cast<Range *>(take(columns.queries));
        const bool backward = pass == Pass::backward;
        key[0] = static_cast<Range *>(take(backward ? rows.keys : 0));
        key[1] = static_cast<Range *>(take(backward ? columns.keys : 0));
        statistics = static_cast<Statistics *>(take(backward ? p.batch * rows.queries * columns.queries * p.heads : 0));
        bytes = size_t(8 * count);
    }
};

size_t workspace(const Problem &p, Pass pass) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, pass, nowhere).bytes;
}

const char *prepare_ranges(const Problem &p, Pass pass, const Workspace &w, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const char *error = launch_ranges(p, w.query[0], w.query[1], stream);
    if (error || pass == Pass::forward) return error;
    const KeyRangeArguments keys = {{int32_t(rows.queries), int32_t(columns.queries)},
                                    {int32_t(rows.keys), int32_t(columns.keys)},
                                    {int32_t(rows.dilation), int32_t(columns.dilation)},
                                    {w.query[0], w.query[1]},
                                    {w.key[0], w.key[1]}};
    const int64_t most_keys = rows.keys > columns.keys ? rows.keys : columns.keys;
    return launch(fill_key_ranges, blocks_for(most_keys, range_threads), range_threads, 0, stream, keys);
}

template <int width, class T>
const char *run_forward(const Problem &p, const Workspace &w, void *stream) {
    using C = ForwardTile<width>;
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    ForwardArguments<T> a{};
    a.query = pointer<const T>(p.query), a.key = pointer<const T>(p.key), a.value = pointer<const T>(p.value);
    a.output = pointer<T>(p.output), a.lse = pointer<float>(p.lse);
    a.query_view = view_of(p.query), a.key_view = view_of(p.key), a.value_view = view_of(p.value);
    a.output_view = view_of(p.output), a.lse_view = view_of(p.lse);
    a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, w.query[0]);
    a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, w.query[1]);
    a.heads = int32_t(p.heads), a.heads_a_key = int32_t(p.heads / p.kv_heads);
    a.channels = int32_t(p.channels), a.value_channels = int32_t(p.value_channels);
    a.stage_columns = int32_t(key_columns<C>(columns));
    a.scale = float(p.scale);
    return launch(tensor_core_forward<C, T>, grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                  size_t(C::shared_bytes(a.stage_columns)), stream, a);
}

template <int width, class T>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    const StatisticsArguments statistics = {p, w.statistics};
    const int64_t queries = p.batch * p.axis[1].queries * p.axis[2].queries * p.heads;
    const char *error = launch(fill_statistics<T>, blocks_for(queries, statistics_threads / warp_size),
                               statistics_threads, 0, stream, statistics);
    if (error) return error;

    const Axis &rows = p.axis[1], &columns = p.axis[2];
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
    if (a.grad_query) {
        using C = GradQueryTile<width>;
        a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, w.query[0]);
        a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, w.query[1]);
        a.stage_columns = int32_t(key_columns<C>(columns));
        error = launch(tensor_core_grad_query<C, T>, grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                       size_t(C::shared_bytes(a.stage_columns)), stream, a);
    }
    if (!error && (a.grad_key || a.grad_value)) {
        using C = GradKeyTile<width>;
        a.rows = tile_axis(rows.keys, rows.queries, rows.dilation, C::query_rows, w.key[0]);
        a.columns = tile_axis(columns.keys, columns.queries, columns.dilation, C::query_columns, w.key[1]);
        a.stage_columns = int32_t(query_columns<C>(columns));
        const Extent3 grid = grid_of(a.rows, a.columns, p.batch * p.kv_heads);
        const size_t bytes = size_t(grad_key_bytes<C>(a.stage_columns));
        if constexpr (width < 128) {
            error = launch(tensor_core_grad_key<C, T, true, true>, grid, C::threads, bytes, stream, a);
        } else {
            if (a.grad_key) error = launch(tensor_core_grad_key<C, T, true, false>, grid, C::threads, bytes, stream, a);
            if (!error && a.grad_value)
                error = launch(tensor_core_grad_key<C, T, false, true>, grid, C::threads, bytes, stream, a);
        }
    }
    return error;
}

template <class T>
const char *run_typed(const Problem &p, Pass pass, void *stream, void *memory) {
    const Workspace w(p, pass, memory);
    if (const char *error = prepare_ranges(p, pass, w, stream)) return error;
    return with_width(p, [&](auto width) {
        constexpr int channels = decltype(width)::value;
        return pass == Pass::forward ? run_forward<channels, T>(p, w, stream) : run_backward<channels, T>(p, w, stream);
    });
}

const char *run(const Problem &p, Pass pass, void *stream, void *workspace) {
    return p.dtype == Dtype::float16 ? run_typed<float16>(p, pass, stream, workspace)
                                     : run_typed<bfloat16>(p, pass, stream, workspace);
}

}  // namespace

extern const Variant sm80_variant;
const Variant sm80_variant = {
    "cuda_sm80", "tensor cores, float16 and bfloat16, from compute capability 8.0", 80, declines, workspace, run};

}  // namespace localattn::cuda
