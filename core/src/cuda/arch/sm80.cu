// Tensor cores from compute capability 8.0: launches of the tiled kernels, and the table of their tiles.
#include <type_traits>

#include "../tensor_core_backward.h"
#include "../tensor_core_forward.h"
#include "../variant.h"

namespace localattn::cuda {

namespace {

// Tiles by kernel and width of the channels: warp rows, warp columns, patches a warp, chunks a step (of the forward),
// blocks a multiprocessor. Two patches share every load from shared memory, where their accumulators fit the registers.
template <int width>
struct ForwardTile : Tile<width, 2, 2, 2, width == 32 ? 4 : 2, 2> {};
template <>
struct ForwardTile<128> : Tile<128, 2, 2, 1, 2, 2> {};

template <int width>
struct GradQueryTile : Tile<width, 2, 2, width == 128 ? 1 : 2, 1, 2> {};

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

// At most so many key columns do the queries of a tile see: the spread of the centres, the leader's shift, the kernel.
template <class C>
int64_t key_columns(const Axis &x) {
    const int64_t tile = C::query_columns;
    const int64_t centres = x.dilation > 1 ? tile - 1 : ((tile - 1) * x.keys + x.queries - 1) / x.queries;
    const int64_t bound = centres + x.stride - 1 + x.kernel;
    const int64_t longest = (x.keys + x.dilation - 1) / x.dilation;  // but zeros outside the map are seen as well
    return (x.border == Border::zero || bound < longest ? bound : longest) + C::spare_columns;
}

// And so many query columns see the keys of a tile; where windows are shifted inwards, those near the border are seen by
// half a kernel more.
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

bool unit_aligned(const Problem &p, const Tensor &t, int64_t elements) {
    if (t.channel != 1 || reinterpret_cast<uintptr_t>(t.data) % uintptr_t(2 * elements)) return false;
    if (p.batch > 1 && t.batch % elements) return false;
    return t.head % elements == 0 && t.axis[1] % elements == 0 && t.axis[2] % elements == 0;
}

// Does every offset inside one image, of `rows` by `columns`, fit 31 bits?
bool addressable(const Tensor &t, int64_t rows, int64_t columns) {
    const auto reach = [](int64_t extent, int64_t stride) { return double(extent) * double(stride < 0 ? -stride : stride); };
    return reach(rows, t.axis[1]) + reach(columns, t.axis[2]) < 2147483648.0;
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    const Axis &first = p.axis[0], &rows = p.axis[1], &columns = p.axis[2];
    if (first.queries != 1 || first.keys != 1 || first.kernel != 1) return "computes 1 and 2 spatial axes only";
    if (p.batch == 0 || rows.queries == 0 || columns.queries == 0 || rows.keys == 0 || columns.keys == 0)
        return "takes no empty maps";
    if (p.raster) return "a raster-causal window is no rectangle";
    if (p.has_bias() || p.wants_bias_gradient()) return "takes no bias";
    if (p.key_mask.data) return "takes no key mask";
    if (!(p.scale > 0 && p.scale < 1e30)) return "the scale must be positive";
    for (const Axis *x : {&rows, &columns})
        if (x->dilation > 1 && x->queries != x->keys) return "dilation needs as many queries as keys";
    if (p.channels > 128 || p.value_channels > 128) return "computes at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";

    const bool backward = pass == Pass::backward;
    if (!unit_aligned(p, p.key, 8) || !unit_aligned(p, p.value, 8))
        return "key and value need contiguous channels and 16-byte alignment";
    if (!unit_aligned(p, p.query, backward ? 8 : 2)) return "query needs contiguous channels and alignment";
    if (backward) {
        if (!unit_aligned(p, p.grad_output, 8)) return "grad_output needs contiguous channels and 16-byte alignment";
        for (const Tensor *t : {&p.grad_query, &p.grad_key, &p.grad_value})
            if (t->data && !unit_aligned(p, *t, 2)) return "gradients need contiguous channels and 4-byte alignment";
    } else if (!unit_aligned(p, p.output, 2)) {
        return "output needs contiguous channels and 4-byte alignment";
    }
    for (const Tensor *t : {&p.query, &p.output, &p.lse, &p.grad_output, &p.grad_query})
        if (!addressable(*t, rows.queries, columns.queries)) return "an image spans 2^31 elements or more";
    for (const Tensor *t : {&p.key, &p.value, &p.grad_key, &p.grad_value})
        if (!addressable(*t, rows.keys, columns.keys)) return "an image spans 2^31 elements or more";
    if (double(rows.queries) * double(columns.queries) * double(p.heads) > INT32_MAX)
        return "an image spans 2^31 elements or more";

    if (shared_bytes(p, pass) > device.shared_bytes) return "the window is too wide for shared memory";
    const auto tiles = [](int64_t extent, int64_t dilation) {  // of 8 places, the least that a tile has
        return double(dilation) * (double(extent) / double(dilation) / 8 + 2);
    };
    const double most_rows = tiles(rows.queries > rows.keys ? rows.queries : rows.keys, rows.dilation);
    const double most_columns = tiles(columns.queries > columns.keys ? columns.queries : columns.keys, columns.dilation);
    if (most_rows * most_columns * double(p.batch) * double(p.heads) > INT32_MAX) return "more tiles than a grid has blocks";
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

View view_of(const Tensor &t) { return {t.batch, t.head, int32_t(t.axis[1]), int32_t(t.axis[2])}; }

TileAxis tile_axis(int64_t tiled, int64_t streamed, int64_t dilation, int64_t tile_places, const Range *range) {
    const int64_t longest = (tiled + dilation - 1) / dilation;
    return {int32_t(tiled), int32_t(streamed), int32_t(dilation), int32_t((longest + tile_places - 1) / tile_places), range};
}

Extent3 grid_of(const TileAxis &rows, const TileAxis &columns, int64_t images) {
    return {int32_t(int64_t(rows.tiles) * rows.dilation * columns.tiles * columns.dilation * images), 1, 1};
}

Extent3 blocks_for(int64_t items, int64_t items_a_block) {
    const int64_t blocks = (items + items_a_block - 1) / items_a_block, most = INT32_MAX;
    return {int32_t(blocks < most ? blocks : most), 1, 1};
}

template <class Real>
Real *pointer(const Tensor &t) {
    return static_cast<Real *>(t.data);
}

const char *prepare_ranges(const Problem &p, Pass pass, const Workspace &w, void *stream) {
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const RangeArguments queries = {{rows, columns}, {w.query[0], w.query[1]}};
    const int64_t most_queries = rows.queries > columns.queries ? rows.queries : columns.queries;
    const char *error = launch(fill_ranges, blocks_for(most_queries, range_threads), range_threads, 0, stream, queries);
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
    const char *error = launch(fill_statistics<T>, blocks_for(queries, statistics_threads / warp_size), statistics_threads, 0,
                               stream, statistics);
    if (error) return error;

    const Axis &rows = p.axis[1], &columns = p.axis[2];
    GradientArguments<T> a{};
    a.query = pointer<const T>(p.query), a.key = pointer<const T>(p.key), a.value = pointer<const T>(p.value);
    a.grad_output = pointer<const T>(p.grad_output);
    a.grad_query = pointer<T>(p.grad_query), a.grad_key = pointer<T>(p.grad_key), a.grad_value = pointer<T>(p.grad_value);
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
const Variant sm80_variant = {"cuda_sm80", "tensor cores, float16 and bfloat16, from compute capability 8.0", 80,
                              declines,    workspace,                                                      run};

}  // namespace localattn::cuda
