// Tensor cores from compute capability 8.0: launches of the tiled kernels, and the table of their tiles.
#include <type_traits>

#include "../tensor_core_backward.h"
#include "../tensor_core_forward.h"
#include "../variant.h"
#include "sm80_operators.h"
#include "tiled_backward.h"

namespace localattn::cuda {

namespace {

// Tiles by kernel and width of the channels: warp rows, warp columns, patches a warp, chunks a step (of the forward),
// blocks a multiprocessor. Two patches share every load from shared memory, where their accumulators fit the registers.
template <int width>
struct ForwardTile : Tile<width, 2, 2, 2, width == 32 ? 4 : 2, 2> {};
template <>
struct ForwardTile<128> : Tile<128, 2, 2, 1, 2, 2> {};
template <>
struct ForwardTile<256> : Tile<256, 2, 2, 1, 1, 1, 2> {};

constexpr int most_gradient_channels = 128;  // two tensors' rows of 256 do not fit the registers

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
    if (widest <= 128) return visit(std::integral_constant<int, 128>());
    return visit(std::integral_constant<int, 256>());
}

int64_t shared_bytes(const Problem &p, Pass pass) {
    return with_width(p, [&](auto width) {
        constexpr int w = decltype(width)::value;
        return cuda::shared_bytes<ForwardTile<w>, GradQueryTile<w>, GradKeyTile<w>>(p, pass);
    });
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    if (const char *reason = declines_window(p)) return reason;
    if (p.scale == 0) return "the scale must not be 0";
    if (p.has_bias() || p.wants_bias_gradient()) return "takes no bias";
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

template <int width, class T>
const char *run_forward(const Problem &p, const Workspace &w, void *stream) {
    using C = ForwardTile<width>;
    const char *error = nullptr;
    for (int32_t part = 0; part < C::parts && !error; ++part)
        error = launch_forward<C, T, tensor_core_forward<C, T>>(p, w.query, part, stream);
    return error;
}

template <int width, class T>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    const GradientArguments<T> a = gradient_arguments<T>(p, w);
    const char *error = nullptr;
    if (a.grad_query) {
        using C = GradQueryTile<width>;
        error = launch_over_queries<C, tensor_core_grad_query<C, T>>(p, w, a, stream);
    }
    if (error || !(a.grad_key || a.grad_value)) return error;
    using C = GradKeyTile<width>;
    if constexpr (width < 128) {
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
    return with_width(p, [&](auto width) {
        constexpr int channels = decltype(width)::value;
        if (pass == Pass::forward) return run_forward<channels, T>(p, w, stream);
        if constexpr (channels <= most_gradient_channels) return run_backward<channels, T>(p, w, stream);
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
