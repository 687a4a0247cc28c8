// float32 on the ordinary arithmetic units: launches of the tiled kernel, and the table of its tiles. It needs compute
// capability 8.0 for the asynchronous copies.
#include <type_traits>

#include "../simt_forward.h"
#include "../variant.h"
#include "tiled.h"

namespace localattn::cuda {

namespace {

// By width of the channels: lanes that share a strip, warps, blocks a multiprocessor. A lane's slice of 4 queries and
// their outputs stays in registers, so that wider channels take more lanes.
template <int width>
struct TileFor;
template <>
struct TileFor<32> : SimtTile<32, 4, 8, 1> {};
template <>
struct TileFor<64> : SimtTile<64, 4, 8, 1> {};
template <>
struct TileFor<128> : SimtTile<128, 8, 8, 1> {};
template <>
struct TileFor<256> : SimtTile<256, 16, 8, 1> {};

template <class Visit>
auto with_tile(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return visit(TileFor<32>());
    if (widest <= 64) return visit(TileFor<64>());
    if (widest <= 128) return visit(TileFor<128>());
    return visit(TileFor<256>());
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (pass == Pass::backward) return "computes the forward only";
    if (p.dtype != Dtype::float32) return "computes float32 only";
    if (const char *reason = declines_window(p)) return reason;
    if (p.has_bias()) return "takes no bias";
    if (p.channels > 256 || p.value_channels > 256) return "computes at most 256 channels a head";
    if (p.channels % 4 || p.value_channels % 4) return "channels must be a multiple of 4";
    if (!unit_aligned(p, p.key, 4, 4) || !unit_aligned(p, p.value, 4, 4))
        return "key and value need contiguous channels and 16-byte alignment";
    if (!unit_aligned(p, p.query, 1, 4) || !unit_aligned(p, p.output, 1, 4))
        return "query and output need contiguous channels";
    if (const char *reason = declines_size(p)) return reason;
    const int64_t bytes = with_tile(p, [&](auto tile) {
        using C = decltype(tile);
        return C::shared_bytes(key_columns<C>(p.axis[2]));
    });
    return bytes > device.shared_bytes ? "the window is too wide for shared memory" : nullptr;
}

size_t workspace(const Problem &p, Pass) { return size_t(p.axis[1].queries + p.axis[2].queries) * sizeof(Range); }

const char *run(const Problem &p, Pass, void *stream, void *workspace) {
    Range *const row_ranges = static_cast<Range *>(workspace), *const column_ranges = row_ranges + p.axis[1].queries;
    if (const char *error = launch_ranges(p, row_ranges, column_ranges, stream)) return error;
    return with_tile(p, [&](auto tile) {
        using C = decltype(tile);
        const Axis &rows = p.axis[1], &columns = p.axis[2];
        SimtArguments a{};
        a.query = pointer<const float>(p.query), a.key = pointer<const float>(p.key),
        a.value = pointer<const float>(p.value);
        a.output = pointer<float>(p.output), a.lse = pointer<float>(p.lse);
        a.query_view = view_of(p.query), a.key_view = view_of(p.key), a.value_view = view_of(p.value);
        a.output_view = view_of(p.output), a.lse_view = view_of(p.lse);
        a.rows = tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, row_ranges);
        a.columns = tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, column_ranges);
        a.heads = int32_t(p.heads), a.heads_a_key = int32_t(p.heads / p.kv_heads);
        a.channels = int32_t(p.channels), a.value_channels = int32_t(p.value_channels);
        a.stage_columns = int32_t(key_columns<C>(columns));
        a.scale = float(p.scale);
        return launch(simt_forward<C>, grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                      size_t(C::shared_bytes(a.stage_columns)), stream, a);
    });
}

}  // namespace

extern const Variant simt_variant;
const Variant simt_variant = {
    "cuda_simt", "tiled float32 without tensor cores, from compute capability 8.0", 80, declines, workspace, run};

}  // namespace localattn::cuda
