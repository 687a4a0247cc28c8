// float32 on the ordinary arithmetic units: which problems the tiled kernels take.
#include "../simt_backward.h"
#include "../simt_forward.h"
#include "simt_parts.h"
#include "simt_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda {

namespace {

const char *declines(const Problem &p, Pass pass, const Device &device) {
    if (p.dtype != Dtype::float32) return "computes float32 only";
    if (const char *reason = declines_window(p)) return reason;
    if (const char *reason = declines_bias(p)) return reason;
    if (p.channels > 256 || p.value_channels > 256) return "computes at most 256 channels a head";
    if (p.channels % 4 || p.value_channels % 4) return "channels must be a multiple of 4";
    if (const char *reason = declines_layout(p, pass, 4, 1)) return reason;
    if (const char *reason = declines_size(p)) return reason;
    const int64_t bytes = simt::with_tiles(p, [&](auto tiles) {
        using Of = decltype(tiles);
        return shared_bytes<typename Of::Forward, typename Of::GradQuery, typename Of::GradKey>(p, pass);
    });
    return bytes > device.shared_bytes ? "the window is too wide for shared memory" : nullptr;
}

const char *run(const Problem &p, Pass pass, void *stream, void *memory) {
    const Workspace w(p, pass, memory);
    const char *error = prepare<float>(p, pass, w, stream);
    if (error) return error;
    error = pass == Pass::forward ? simt::forward(p, w, stream) : simt::backward(p, w, stream);
    return error ? error : compute_spoilt_rows(p, pass, w, stream);
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
