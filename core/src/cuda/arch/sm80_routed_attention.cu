// Routed attention on tensor cores: launches. Device code: ../tensor_core_routed.h.
#include <type_traits>

#include "../tensor_core_routed.h"
#include "sm80_parts.h"
#include "tiled.h"

namespace localattn::cuda {

namespace {

// Calls visit(tile) with that of the width that the problem needs; it must exist.
template <class Visit>
auto with_tile(const RoutedProblem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return visit(RoutedTile<32>());
    if (widest <= 64) return visit(RoutedTile<64>());
    return visit(RoutedTile<128>());
}

// Warps a block: four share what streams by, fewer if the region has not the pixels.
int64_t warps_for(int64_t pixels) { return pixels > 48 ? 4 : (pixels + 15) / 16; }
int64_t blocks_for_pixels(int64_t pixels) {
    const int64_t own = 16 * warps_for(pixels);
    return (pixels + own - 1) / own;
}

// Where the gradient of the weights is asked for, every 16 slots belong to one entry.
int64_t entry_slots(const RoutedProblem &p) {
    return p.pass == Pass::backward && p.grad_region_weight.data ? (p.keys() + 15) / 16 * 16 : p.keys();
}

const char *declines(const RoutedProblem &p, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    if (p.batch == 0 || p.regions() == 0 || p.topk == 0) return "takes no empty maps and no empty routing";
    if (p.channels > 128 || p.value_channels > 128) return "computes at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";
    if (!(p.scale > -1e30 && p.scale < 1e30)) return "the scale must be finite";
    if (const char *reason = declines_layout(p, p.pass, 2, 2)) return reason;
    for (const Tensor *t : {&p.query, &p.output, &p.lse, &p.grad_output, &p.grad_query})
        if (!addressable(*t, p.grid[0] * p.query_region[0], p.grid[1] * p.query_region[1]))
            return "an image spans 2^31 elements or more";
    for (const Tensor *t : {&p.key, &p.value, &p.grad_key, &p.grad_value})
        if (!addressable(*t, p.grid[0] * p.key_region[0], p.grid[1] * p.key_region[1]))
            return "an image spans 2^31 elements or more";
    constexpr double most = INT32_MAX - 128;
    const double regions = double(p.regions()), pixels = double(p.queries() > p.keys() ? p.queries() : p.keys());
    if (double(p.topk) * double(entry_slots(p)) > most || regions * double(p.topk) * pixels > most)
        return "more pairs of a pixel and a region than 32 bits number";
    if (regions * double(p.batch) * double(p.heads) * (pixels / 16 + 1) > most)
        return "more tiles than a grid has blocks";
    return with_tile(p, [](auto tile) { return int64_t(decltype(tile)::shared_bytes); }) > device.shared_bytes
               ? "needs more shared memory than the device has"
               : nullptr;
}

// Device memory of the backward.
struct Workspace {
    InverseRouting inverse;
    Statistics *statistics;
    float *weight_parts;
    int64_t parts;  // of a choice
    size_t bytes;

    Workspace(const RoutedProblem &p, void *memory) {
        static_assert(sizeof(Choice) == 8 && sizeof(Statistics) == 8, "one follows the other without gaps");
        int64_t count = 0;
        const auto take = [&](int64_t words) {
            void *at = static_cast<char *>(memory) + 8 * count;
            count += words;
            return at;
        };
        const bool backward = p.pass == Pass::backward, inverts = backward && (p.grad_key.data || p.grad_value.data);
        parts = p.heads * blocks_for_pixels(p.queries()) * warps_for(p.queries());
        inverse.begin = static_cast<int64_t *>(take(inverts ? p.batch * (p.regions() + 1) : 0));
        inverse.choices = static_cast<Choice *>(take(inverts ? p.batch * p.regions() * p.topk : 0));
        statistics = static_cast<Statistics *>(take(backward ? p.batch * p.regions() * p.queries() * p.heads : 0));
        const bool weighs = backward && p.grad_region_weight.data;
        weight_parts = static_cast<float *>(take(weighs ? (p.batch * p.regions() * p.topk * parts + 1) / 2 : 0));
        if (!weighs) weight_parts = nullptr;
        bytes = size_t(8 * count);
    }
};

size_t workspace(const RoutedProblem &p) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, nowhere).bytes;
}

RegionMap map_of(const int64_t (&size)[2]) {
    return {int32_t(size[0]), int32_t(size[1]), int32_t(size[0] * size[1]), Divisor(size[1])};
}

template <class T>
RoutedArguments<T> arguments_of(const RoutedProblem &p, const Workspace &w) {
    const auto input = [](const Tensor &t) { return RoutedView<const T>{pointer<const T>(t), view_of(t)}; };
    const auto result = [](const Tensor &t) { return RoutedView<T>{pointer<T>(t), view_of(t)}; };
    RoutedArguments<T> a{};
    a.query = input(p.query), a.key = input(p.key), a.value = input(p.value), a.grad_output = input(p.grad_output);
    a.output = result(p.output), a.grad_query = result(p.grad_query);
    a.grad_key = result(p.grad_key), a.grad_value = result(p.grad_value);
    a.lse = {pointer<float>(p.lse), view_of(p.lse)};
    a.region_index = p.region_index, a.region_weight = p.region_weight;
    a.queries = map_of(p.query_region), a.keys = map_of(p.key_region);
    a.by_grid_columns = Divisor(p.grid[1]);
    a.grid_columns = int32_t(p.grid[1]), a.regions = int32_t(p.regions()), a.topk = int32_t(p.topk);
    a.heads = int32_t(p.heads), a.channels = int32_t(p.channels), a.value_channels = int32_t(p.value_channels);
    a.scale = float(p.scale);
    a.statistics = w.statistics, a.inverse = w.inverse, a.weight_parts = w.weight_parts;
    return a;
}

// A launch whose blocks own `pixels` of every region.
template <class C, auto kernel, class T>
const char *launch_tiles(const RoutedProblem &p, int64_t pixels, int64_t entry_slots, RoutedArguments<T> a,
                         void *stream) {
    a.blocks = int32_t(blocks_for_pixels(pixels));
    a.entry_slots = int32_t(entry_slots);
    a.by_entry_slots = Divisor(entry_slots);
    const Extent3 grid = {int32_t(a.blocks * p.regions() * p.heads * p.batch), 1, 1};
    return launch<kernel>(grid, int(warps_for(pixels)) * warp_size, size_t(C::shared_bytes), stream, a);
}

template <class C, class T>
const char *run_backward(const RoutedProblem &p, const Workspace &w, void *stream) {
    const RoutedArguments<T> a = arguments_of<T>(p, w);
    const char *error = launch_warps<fill_routed_statistics<T>>(p.batch * p.regions() * p.queries() * p.heads, stream,
                                                                RoutedStatisticsArguments<T>{p, w.statistics});
    if (!error && (p.grad_query.data || w.weight_parts))
        error = launch_tiles<C, tensor_core_routed_grad_query<C, T>>(p, p.queries(), entry_slots(p), a, stream);
    if (!error && w.weight_parts) {
        const int64_t choices = p.batch * p.regions() * p.topk;
        error = launch<sum_weight_parts>(
            grid_for(choices, generic_threads), generic_threads, 0, stream,
            WeightPartsArguments{p.batch, p.regions(), p.topk, w.parts, w.weight_parts, p.grad_region_weight});
    }
    if (error || (!p.grad_key.data && !p.grad_value.data)) return error;
    error = launch_inverse(p, w.inverse, stream);
    const int64_t keys = p.keys(), slots = p.queries();
    if constexpr (C::width < 128) {
        if (!error) error = launch_tiles<C, tensor_core_routed_grad_key<C, T, true, true>>(p, keys, slots, a, stream);
    } else {
        if (!error && p.grad_key.data)
            error = launch_tiles<C, tensor_core_routed_grad_key<C, T, true, false>>(p, keys, slots, a, stream);
        if (!error && p.grad_value.data)
            error = launch_tiles<C, tensor_core_routed_grad_key<C, T, false, true>>(p, keys, slots, a, stream);
    }
    return error;
}

template <class T>
const char *run_typed(const RoutedProblem &p, void *stream, void *memory) {
    const Workspace w(p, memory);
    if (const char *error = launch_check(p, stream)) return error;
    return with_tile(p, [&](auto tile) {
        using C = decltype(tile);
        if (p.pass == Pass::backward) return run_backward<C, T>(p, w, stream);
        return launch_tiles<C, tensor_core_routed_forward<C, T>>(p, p.queries(), entry_slots(p), arguments_of<T>(p, w),
                                                                 stream);
    });
}

const char *run(const RoutedProblem &p, void *stream, void *workspace) {
    return p.dtype == Dtype::float16 ? run_typed<float16>(p, stream, workspace)
                                     : run_typed<bfloat16>(p, stream, workspace);
}

}  // namespace

const Kernel<RoutedProblem> sm80_routed_attention = {declines, workspace, run};

}  // namespace localattn::cuda
