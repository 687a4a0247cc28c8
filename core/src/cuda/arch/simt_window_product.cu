// Similarity and weighting, tiled: launches, and the table of the tiles. Device code:
// ../simt_window_product.h.
#include "../simt_window_product.h"

#include <cmath>
#include <type_traits>

#include "simt_parts.h"
#include "tiled.h"

namespace localattn::cuda {

namespace {

// By width of the channels: lanes that share a strip. A lane's slices of its places stay in registers. Steps of the
// sums are of one column, and one block takes all registers: terms that are left out are branches, which want some.
template <int width, Product product>
struct Tile : SimtTile<width, width <= 64 ? 4 : 16, 4, product == Product::score ? 2 : 1, 8,
                       product == Product::score ? 2 : 1> {};

template <Product product, class Visit>
auto with_width(const WindowProduct &p, Visit visit) {
    if (p.channels <= 32) return visit(Tile<32, product>());
    if (p.channels <= 64) return visit(Tile<64, product>());
    if (p.channels <= 128) return visit(Tile<128, product>());
    return visit(Tile<256, product>());
}

// Calls visit(tile, integral constant) with those of the problem.
template <class Visit>
auto with_tile(const WindowProduct &p, Visit visit) {
    const auto with = [&](auto product) {
        return with_width<decltype(product)::value>(p, [&](auto tile) { return visit(tile, product); });
    };
    switch (p.product) {
        case Product::score:
            return with(std::integral_constant<Product, Product::score>());
        case Product::weigh:
            return with(std::integral_constant<Product, Product::weigh>());
        default:
            return with(std::integral_constant<Product, Product::transposed>());
    }
}

template <class C>
int64_t stage_columns(const WindowProduct &p) {
    return p.product == Product::transposed ? query_columns<C>(p.axis[2]) : key_columns<C>(p.axis[2]);
}

template <class C>
int64_t shared_bytes(const WindowProduct &p) {
    const int64_t columns = stage_columns<C>(p),
                  entry_columns = p.product == Product::transposed ? columns : C::query_columns;
    return 2 * columns * C::slot_bytes + 4 * C::query_rows * entry_columns * p.axis[2].kernel;
}

const char *declines(const WindowProduct &p, const Device &device) {
    if (p.dtype == Dtype::float64) return "computes no float64";
    if (const char *reason = declines_window(p)) return reason;
    if (p.channels > 256) return "computes at most 256 channels a head";
    if (p.channels % 4) return "channels must be a multiple of 4";
    const bool transposes = p.product == Product::transposed;
    const int64_t size = p.dtype == Dtype::float32 ? 4 : 2, together = p.dtype == Dtype::float32 ? 4 : 2;
    if (!unit_aligned(p, transposes ? p.query : p.key, together, size))
        return "what is read more than once needs contiguous channels and 16-byte alignment, in 16 bits 4-byte";
    if (!unit_aligned(p, transposes ? p.key : p.query, 1, size)) return "needs contiguous channels";
    if (const char *reason = declines_size(p)) return reason;
    const Tensor &t = p.entries;
    const int64_t longest[] = {p.axis[1].queries, p.axis[2].queries, p.entry_count()},
                  strides[] = {t.axis[1], t.axis[2], t.channel};
    double reach = 0;
    for (int x = 0; x < 3; ++x) reach += double(longest[x]) * std::fabs(double(strides[x]));
    if (reach >= 2147483648.0) return "an image's entries span 2^31 elements or more";
    const int64_t bytes = with_tile(p, [&](auto tile, auto) { return shared_bytes<decltype(tile)>(p); });
    return bytes > device.shared_bytes ? "the window is too wide for shared memory" : nullptr;
}

// Device memory: the window rule as tables.
struct Workspace {
    Range *keys[2], *queries[2];  // that a query sees; that see a key
    int32_t *start[2];
    size_t bytes;

    Workspace(const WindowProduct &p, void *memory) {
        char *at = static_cast<char *>(memory);
        const auto take = [&](int64_t bytes) {
            char *const here = at;
            at += bytes;
            return here;
        };
        for (int x = 0; x < 2; ++x) {
            const Axis &axis = p.axis[1 + x];
            keys[x] = reinterpret_cast<Range *>(take(axis.queries * int64_t(sizeof(Range))));
            queries[x] = reinterpret_cast<Range *>(take(axis.keys * int64_t(sizeof(Range))));
        }
        for (int x = 0; x < 2; ++x)
            start[x] = reinterpret_cast<int32_t *>(take(p.axis[1 + x].queries * int64_t(sizeof(int32_t))));
        bytes = size_t(at - static_cast<char *>(memory));
    }
};

size_t workspace(const WindowProduct &p) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, nowhere).bytes;
}

template <class C, Product product, class T>
const char *launch_tiles(const WindowProduct &p, const Workspace &w, void *stream) {
    constexpr bool transposes = product == Product::transposed;
    const Axis &rows = p.axis[1], &columns = p.axis[2];
    const Tensor &places = transposes ? p.key : p.query, &streamed = transposes ? p.query : p.key;
    SimtProductArguments<T> a{};
    a.streamed = pointer<const T>(streamed);
    a.given = a.sums = pointer<T>(places);
    a.entries = pointer<T>(p.entries);
    a.streamed_view = view_of(streamed), a.place_view = view_of(places), a.entry_view = view_of(p.entries);
    a.entry_stride = int32_t(p.entries.channel), a.kernel_columns = int32_t(columns.kernel);
    a.rows = transposes ? tile_axis(rows.keys, rows.queries, rows.dilation, C::query_rows, w.queries[0])
                        : tile_axis(rows.queries, rows.keys, rows.dilation, C::query_rows, w.keys[0]);
    a.columns = transposes ? tile_axis(columns.keys, columns.queries, columns.dilation, C::query_columns, w.queries[1])
                           : tile_axis(columns.queries, columns.keys, columns.dilation, C::query_columns, w.keys[1]);
    a.row_start = w.start[0], a.column_start = w.start[1];
    a.heads = int32_t(p.heads), a.channels = int32_t(p.channels);
    a.stage_columns = int32_t(stage_columns<C>(p));
    return launch<simt_window_product<C, product, T>>(grid_of(a.rows, a.columns, p.batch * p.heads), C::threads,
                                                      size_t(shared_bytes<C>(p)), stream, a);
}

template <class T>
const char *run_typed(const WindowProduct &p, void *stream, void *memory) {
    const Workspace w(p, memory);
    const WindowTableArguments tables = {{p.axis[1], p.axis[2]}, {w.keys[0], w.keys[1]}, {w.start[0], w.start[1]}};
    const int64_t longest = p.axis[1].queries > p.axis[2].queries ? p.axis[1].queries : p.axis[2].queries;
    const char *error =
        launch<fill_window_tables>(blocks_for(longest, range_threads), range_threads, 0, stream, tables);
    if (!error && p.product == Product::transposed) error = launch_key_ranges(p, w.keys, w.queries, stream);
    if (!error && p.product == Product::score) {
        const int64_t queries = p.batch * p.axis[1].queries * p.axis[2].queries * p.heads;
        error = launch_warps<fill_outside<T>>((queries + warp_size - 1) / warp_size, stream, p);
    }
    if (error) return error;
    return with_tile(p, [&](auto tile, auto product) {
        return launch_tiles<decltype(tile), decltype(product)::value, T>(p, w, stream);
    });
}

const char *run(const WindowProduct &p, void *stream, void *memory) {
    if (p.dtype == Dtype::float32) return run_typed<float>(p, stream, memory);
    return with_16_bits(p.dtype, [&](auto element) { return run_typed<decltype(element)>(p, stream, memory); });
}

}  // namespace

const Kernel<WindowProduct> simt_window_products = {declines, workspace, run};

}  // namespace localattn::cuda
