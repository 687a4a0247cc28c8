// float32 on the ordinary arithmetic units: launches of the tiled kernels, and the table of its tiles.
#include "../simt_backward.h"
#include "../simt_forward.h"
#include "../variant.h"
#include "simt_operators.h"
#include "tiled_backward.h"

namespace localattn::cuda {

namespace {

// By width of the channels and size of the window: lanes that share a strip, places of a strip, columns a step, warps,
// blocks a multiprocessor. A lane's slices of its places stay in registers, so that wider channels take more lanes; the
// gradients hold three or four slices a place, so that their strips are shorter. A block of 4 rows leaves fewer warps
// without work at a row of keys than one of 8, but two of them must fit the shared memory.
template <int width, int rows>
struct Tiles {
    static constexpr int slices = width <= 64 ? 4 : width / 16, blocks = 8 / rows;
    struct Forward : SimtTile<width, slices, 4, 2, rows, blocks> {};
    struct GradQuery : SimtTile<width, slices, 2, 2, rows, blocks> {};
    struct GradKey : SimtTile<width, slices, 2, 1, rows, blocks> {};
};

template <int width, class Visit>
auto with_rows(const Problem &p, Visit visit) {
    if (p.axis[2].kernel * width <= 13 * 64) return visit(Tiles<width, 4>());
    return visit(Tiles<width, 8>());
}

template <class Visit>
auto with_tiles(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return with_rows<32>(p, visit);
    if (widest <= 64) return with_rows<64>(p, visit);
    if (widest <= 128) return with_rows<128>(p, visit);
    return with_rows<256>(p, visit);
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float32) return "computes float32 only";
    if (const char *reason = declines_window(p)) return reason;
    if (pass == Pass::backward && (p.has_bias() || p.wants_bias_gradient())) return "takes no bias in the backward";
    if (const char *reason = declines_bias(p)) return reason;
    if (p.channels > 256 || p.value_channels > 256) return "computes at most 256 channels a head";
    if (p.channels % 4 || p.value_channels % 4) return "channels must be a multiple of 4";
    if (const char *reason = declines_layout(p, pass, 4, 1)) return reason;
    if (const char *reason = declines_size(p)) return reason;
    const int64_t bytes = with_tiles(p, [&](auto tiles) {
        using Of = decltype(tiles);
        return shared_bytes<typename Of::Forward, typename Of::GradQuery, typename Of::GradKey>(p, pass);
    });
    return bytes > device.shared_bytes ? "the window is too wide for shared memory" : nullptr;
}

template <class Of>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    const GradientArguments<float> a = gradient_arguments<float>(p, w);
    const char *error = nullptr;
    if (a.grad_query) {
        using C = typename Of::GradQuery;
        error = launch_over_queries<C, simt_grad_query<C>>(p, w, a, stream);
    }
    using C = typename Of::GradKey;
    if (!error && (a.grad_key || a.grad_value)) error = launch_over_keys<C, simt_grad_key<C>>(p, w, a, stream);
    return error;
}

const char *run(const Problem &p, Pass pass, void *stream, void *memory) {
    const Workspace w(p, pass, memory);
    if (const char *error = prepare<float>(p, pass, w, stream)) return error;
    return with_tiles(p, [&](auto tiles) {
        using Of = decltype(tiles);
        if (pass == Pass::backward) return run_backward<Of>(p, w, stream);
        using C = typename Of::Forward;
        return with_bias<float>(p, w, [&](const auto &bias) {
            using Bias = std::decay_t<decltype(bias)>;
            return launch_forward<C, float, simt_forward<C, Bias>>(p, w.query, bias, 0, stream);
        });
    });
}

}  // namespace

extern const Variant simt_variant;
const Variant simt_variant = {"cuda_simt",
                              "tiled float32 without tensor cores, from compute capability 7.0",
                              70,
                              declines,
                              workspace_bytes,
                              run,
                              &simt_window_products};

}  // namespace localattn::cuda
