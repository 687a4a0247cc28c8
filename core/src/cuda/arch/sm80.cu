// Tensor cores from compute capability 8.0: launches of the tiled kernels, and the table of their tiles.
#include <type_traits>

#include "../tensor_core_backward.h"
#include "../tensor_core_forward.h"
#include "../variant.h"
#include "sm80_operators.h"
#include "tiled_backward.h"

namespace localattn::cuda {

namespace {

// Tiles by width of the channels and size of the window: warp rows, warp columns, patches a warp, chunks a step (of the
// forward), blocks a multiprocessor, parts. Two patches share every load from shared memory, where their accumulators
// fit the registers. In small windows a block has one row of warps: with two, each would be idle at every third stage.
template <int width, bool small_window>
struct Tiles {
    static constexpr int rows = small_window ? 1 : 2;
    static constexpr int patches = width <= 64 ? 2 : 1, blocks = width <= 128 ? 2 : 1, parts = width <= 128 ? 1 : 2;
    static constexpr int group = width == 32 ? 4 : width <= 128 ? 2 : 1;
    template <class Bias>  // which takes registers
    struct Forward : Tile<width, rows, 4 / rows, patches, group, blocks, Bias::present ? parts * parts : parts> {};
    static constexpr int gradient_patches = width == 32 ? 2 : 1;
    struct GradQuery : Tile<width, rows, 8 / rows / gradient_patches, gradient_patches, 1, gradient_patches> {};
    struct GradKey : Tile<width, rows, 8 / rows, 1, 1, 1> {};
};

constexpr int most_gradient_channels = 128;  // two tensors' rows of 256 do not fit the registers

// So that a stage of theirs fits the shared memory of every device that has tensor cores.
bool has_small_window(const Problem &p) {
    for (int x = 1; x < 3; ++x)
        if (p.axis[x].kernel + p.axis[x].stride > 9 || p.axis[x].queries != p.axis[x].keys) return false;
    return true;
}

// Calls visit(tiles, integral constant) with the tiles that the problem needs, which must exist, and their width.
template <class Visit>
auto with_tiles(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    const bool small_window = has_small_window(p);
    const std::integral_constant<int, 32> w32;
    const std::integral_constant<int, 64> w64;
    if (widest <= 32) return small_window ? visit(Tiles<32, true>(), w32) : visit(Tiles<32, false>(), w32);
    if (widest <= 64) return small_window ? visit(Tiles<64, true>(), w64) : visit(Tiles<64, false>(), w64);
    if (widest <= 128) return visit(Tiles<128, false>(), std::integral_constant<int, 128>());
    return visit(Tiles<256, false>(), std::integral_constant<int, 256>());
}

int64_t shared_bytes(const Problem &p, Pass pass) {
    return with_tiles(p, [&](auto tiles, auto) {
        using Of = decltype(tiles);
        using Forward = typename Of::template Forward<NoBias>;
        return cuda::shared_bytes<Forward, typename Of::GradQuery, typename Of::GradKey>(p, pass);
    });
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    if (const char *reason = declines_window(p)) return reason;
    if (p.scale == 0) return "the scale must not be 0";
    if (pass == Pass::backward && (p.has_bias() || p.wants_bias_gradient())) return "takes no bias in the backward";
    if (const char *reason = declines_bias(p)) return reason;
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest > 256) return "computes at most 256 channels a head";
    if (pass == Pass::backward && widest > most_gradient_channels)
        return "computes gradients of at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";
    if (const char *reason = declines_layout(p, pass, 2, 2)) return reason;
    if (const char *reason = declines_size(p)) return reason;
    if (shared_bytes(p, pass) > device.shared_bytes) return "the window is too wide for shared memory";
    return nullptr;
}

template <class Of, class T>
const char *run_forward(const Problem &p, const Workspace &w, void *stream) {
    return with_bias<T>(p, w, [&](const auto &bias) {
        using Bias = std::decay_t<decltype(bias)>;
        using C = typename Of::template Forward<Bias>;
        const char *error = nullptr;
        for (int32_t part = 0; part < C::parts && !error; ++part)
            error = launch_forward<C, T, tensor_core_forward<C, T, Bias>>(p, w.query, bias, part, stream);
        return error;
    });
}

template <class Of, class T>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    const GradientArguments<T> a = gradient_arguments<T>(p, w);
    const char *error = nullptr;
    if (a.grad_query) {
        using C = typename Of::GradQuery;
        error = launch_over_queries<C, tensor_core_grad_query<C, T>>(p, w, a, stream);
    }
    if (error || !(a.grad_key || a.grad_value)) return error;
    using C = typename Of::GradKey;
    if constexpr (C::width < 128) {
        return launch_over_keys<C, tensor_core_grad_key<C, T, true, true>>(p, w, a, stream);
    } else {
        if (a.grad_key) error = launch_over_keys<C, tensor_core_grad_key<C, T, true, false>>(p, w, a, stream);
        if (error || !a.grad_value) return error;
        return launch_over_keys<C, tensor_core_grad_key<C, T, false, true>>(p, w, a, stream);
    }
}

template <class T>
const char *run_typed(const Problem &p, Pass pass, void *stream, void *memory) {
    const Workspace w(p, pass, memory);
    if (const char *error = prepare<T>(p, pass, w, stream)) return error;
    return with_tiles(p, [&](auto tiles, auto width) {
        using Of = decltype(tiles);
        if (pass == Pass::forward) return run_forward<Of, T>(p, w, stream);
        if constexpr (decltype(width)::value <= most_gradient_channels) return run_backward<Of, T>(p, w, stream);
        return "declined";
    });
}

const char *run(const Problem &p, Pass pass, void *stream, void *workspace) {
    return p.dtype == Dtype::float16 ? run_typed<float16>(p, pass, stream, workspace)
                                     : run_typed<bfloat16>(p, pass, stream, workspace);
}

}  // namespace

extern const Variant sm80_variant;
const Variant sm80_variant = {"cuda_sm80",
                              "tensor cores, float16 and bfloat16, from compute capability 8.0",
                              80,
                              declines,
                              workspace_bytes,
                              run,
                              nullptr,
                              nullptr,
                              &sm80_routed_attention};

}  // namespace localattn::cuda
