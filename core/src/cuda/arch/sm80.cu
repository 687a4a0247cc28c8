// Tensor cores from compute capability 8.0: launches of the tiled kernels, and the table of their tiles.
#include "../tensor_core_forward.h"
#include "../variant.h"

namespace localattn::cuda {

namespace {

// Tiles by width of the channels: warp rows, warp columns, patches a warp, chunks a step, blocks a multiprocessor. Two
// patches share every load of key and value; at width 128 their accumulators would not fit the registers.
template <int width>
struct TileFor;
template <>
struct TileFor<32> : Tile<32, 2, 2, 2, 4, 2> {};
template <>
struct TileFor<64> : Tile<64, 2, 2, 2, 2, 2> {};
template <>
struct TileFor<128> : Tile<128, 2, 2, 1, 2, 2> {};

// Calls visit(tile) with the tile whose width the problem needs; it must exist.
template <class Visit>
auto with_tile(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return visit(TileFor<32>());
    if (widest <= 64) return visit(TileFor<64>());
    return visit(TileFor<128>());
}

// At most so many key columns does a tile of `queries` see: the centres' spread, the leader's shift, the kernel.
int64_t box_bound(const Axis &x, int64_t queries) {
    const int64_t centres = x.dilation > 1 ? queries - 1 : ((queries - 1) * x.keys + x.queries - 1) / x.queries;
    const int64_t bound = centres + x.stride - 1 + x.kernel;
    const int64_t longest = (x.keys + x.dilation - 1) / x.dilation;  // but zeros outside the map are seen as well
    return x.border == Border::zero || bound < longest ? bound : longest;
}

template <class C>
int64_t stage_columns(const Problem &p) {
    return box_bound(p.axis[2], C::query_columns) + C::spare_columns;
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
    if (pass == Pass::backward) return "computes the forward only";
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    const Axis &first = p.axis[0], &rows = p.axis[1], &columns = p.axis[2];
    if (first.queries != 1 || first.keys != 1 || first.kernel != 1) return "computes 1 and 2 spatial axes only";
    if (p.batch == 0 || rows.queries == 0 || columns.queries == 0 || rows.keys == 0 || columns.keys == 0)
        return "takes no empty maps";
    if (p.raster) return "a raster-causal window is no rectangle";
    if (p.has_bias()) return "takes no bias";
    if (p.key_mask.data) return "takes no key mask";
    if (!(p.scale > 0 && p.scale < 1e30)) return "the scale must be positive";
    for (const Axis *x : {&rows, &columns})
        if (x->dilation > 1 && x->queries != x->keys) return "dilation needs as many queries as keys";
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest > 128) return "computes at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";
    if (!unit_aligned(p, p.key, 8) || !unit_aligned(p, p.value, 8))
        return "key and value need contiguous channels and 16-byte alignment";
    if (!unit_aligned(p, p.query, 2) || !unit_aligned(p, p.output, 2))
        return "query and output need contiguous channels and 4-byte alignment";
    if (!addressable(p.query, rows.queries, columns.queries) || !addressable(p.output, rows.queries, columns.queries) ||
        !addressable(p.lse, rows.queries, columns.queries) || !addressable(p.key, rows.keys, columns.keys) ||
        !addressable(p.value, rows.keys, columns.keys))
        return "an image spans 2^31 elements or more";
    return with_tile(p, [&](auto tile) -> const char * {
        using C = decltype(tile);
        if (C::shared_bytes(stage_columns<C>(p)) > device.shared_bytes) return "the window is too wide for shared memory";
        const auto tiles = [](const Axis &x, int64_t queries) {
            return double(x.dilation) * (double((x.queries + x.dilation - 1) / x.dilation) / double(queries) + 1);
        };
        if (tiles(rows, C::query_rows) * tiles(columns, C::query_columns) * double(p.batch) * double(p.heads) > INT32_MAX)
            return "more tiles than a grid has blocks";
        return nullptr;
    });
}

size_t workspace(const Problem &p, Pass) { return size_t(p.axis[1].queries + p.axis[2].queries) * sizeof(Range); }

View view_of(const Tensor &t) { return {t.batch, t.head, int32_t(t.axis[1]), int32_t(t.axis[2])}; }

TileAxis tile_axis(const Axis &x, int64_t tile_queries, const Range *range) {
    const int64_t longest = (x.queries + x.dilation - 1) / x.dilation;
    return {int32_t(x.queries), int32_t(x.keys), int32_t(x.dilation), int32_t((longest + tile_queries - 1) / tile_queries),
            range};
}

template <class T>
const char *run_typed(const Problem &p, void *stream, void *workspace) {
    RangeArguments ranges = {{p.axis[1], p.axis[2]}, {static_cast<Range *>(workspace)}};
    ranges.range[1] = ranges.range[0] + p.axis[1].queries;
    const int64_t longest = p.axis[1].queries > p.axis[2].queries ? p.axis[1].queries : p.axis[2].queries;
    const int64_t blocks = (longest + range_threads - 1) / range_threads;
    const char *error = launch(fill_ranges, {int32_t(blocks), 1, 1}, range_threads, 0, stream, ranges);
    if (error) return error;

    return with_tile(p, [&](auto tile) {
        using C = decltype(tile);
        ForwardArguments<T> a{};
        a.query = static_cast<const T *>(p.query.data);
        a.key = static_cast<const T *>(p.key.data);
        a.value = static_cast<const T *>(p.value.data);
        a.output = static_cast<T *>(p.output.data);
        a.lse = static_cast<float *>(p.lse.data);
        a.query_view = view_of(p.query), a.key_view = view_of(p.key), a.value_view = view_of(p.value);
        a.output_view = view_of(p.output), a.lse_view = view_of(p.lse);
        a.rows = tile_axis(p.axis[1], C::query_rows, ranges.range[0]);
        a.columns = tile_axis(p.axis[2], C::query_columns, ranges.range[1]);
        a.heads = int32_t(p.heads);
        a.heads_a_key = int32_t(p.heads / p.kv_heads);
        a.channels = int32_t(p.channels);
        a.value_channels = int32_t(p.value_channels);
        a.stage_columns = int32_t(stage_columns<C>(p));
        a.scale = float(p.scale);
        const int64_t count = int64_t(a.rows.tiles) * a.rows.dilation * a.columns.tiles * a.columns.dilation * p.batch * p.heads;
        return launch(tensor_core_forward<C, T>, {int32_t(count), 1, 1}, C::threads, size_t(C::shared_bytes(a.stage_columns)),
                      stream, a);
    });
}

const char *run(const Problem &p, Pass, void *stream, void *workspace) {
    return p.dtype == Dtype::float16 ? run_typed<float16>(p, stream, workspace) : run_typed<bfloat16>(p, stream, workspace);
}

}  // namespace

extern const Variant sm80_variant;
const Variant sm80_variant = {"cuda_sm80", "tensor cores, float16 and bfloat16, from compute capability 8.0", 80,
                              declines,    workspace,                                                      run};

}  // namespace localattn::cuda
