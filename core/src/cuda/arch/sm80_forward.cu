// Attention's forward on tensor cores: launches.
#include "../tensor_core_forward.h"
#include "sm80_parts.h"
#include "sm80_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda::sm80 {

namespace {

template <class Of, class T>
const char *run_forward(const Problem &p, const Workspace &w, void *stream) {
    return with_bias<T>(p, w, over_scale(p), [&](const auto &bias) {
        using Bias = std::decay_t<decltype(bias)>;
        using C = typename Of::template Forward<Bias>;
        const char *error = nullptr;
        for (int32_t part = 0; part < C::parts && !error; ++part)
            error = launch_forward<C, T, tensor_core_forward<C, T, Bias>>(p, w.query, bias, part, w.spoilt, stream);
        return error;
    });
}

}  // namespace

const char *forward(const Problem &p, const Workspace &w, void *stream) {
    return with_16_bits(p.dtype, [&](auto element) {
        using T = decltype(element);
        return with_tiles(p, [&](auto tiles) { return run_forward<decltype(tiles), T>(p, w, stream); });
    });
}

}  // namespace localattn::cuda::sm80
