// Tensor cores from compute capability 8.0: which problems the tiled kernels take.
#include "../tensor_core_backward.h"
#include "../tensor_core_forward.h"
#include "sm80_parts.h"
#include "sm80_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda {

namespace {

int64_t shared_bytes(const Problem &p, Pass pass) {
    return sm80::with_tiles(p, [&](auto tiles) {
        using Of = decltype(tiles);
        using Forward = typename Of::template Forward<NoBias>;
        return cuda::shared_bytes<Forward, typename Of::GradQuery, typename Of::GradValue>(p, pass);
    });
}

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float16 && p.dtype != Dtype::bfloat16) return "computes float16 and bfloat16 only";
    if (const char *reason = declines_window(p)) return reason;
    if (p.scale == 0) return "the scale must not be 0";
    if (const char *reason = declines_bias(p)) return reason;
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest > 256) return "computes at most 256 channels a head";
    if (pass == Pass::backward && !sm80::with_tiles(p, [](auto tiles) { return tiles.has_gradients; }))
        return "computes gradients of at most 128 channels a head";
    if (p.channels % 8 || p.value_channels % 8) return "channels must be a multiple of 8";
    if (const char *reason = declines_layout(p, pass, 2, 2)) return reason;
    if (const char *reason = declines_size(p)) return reason;
    if (shared_bytes(p, pass) > device.shared_bytes) return "the window is too wide for shared memory";
    return nullptr;
}

const char *run(const Problem &p, Pass pass, void *stream, void *memory) {
    const Workspace w(p, pass, memory);
    const char *error =
        with_16_bits(p.dtype, [&](auto element) { return prepare<decltype(element)>(p, pass, w, stream); });
    if (error) return error;
    error = pass == Pass::forward ? sm80::forward(p, w, stream) : sm80::backward(p, w, stream);
    return error ? error : compute_spoilt_rows(p, pass, w, stream);
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
