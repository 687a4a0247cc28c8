// Attention's forward in float32: launches.
#include "../simt_forward.h"
#include "simt_parts.h"
#include "simt_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda::simt {

const char *forward(const Problem &p, const Workspace &w, void *stream) {
    return with_tiles(p, [&](auto tiles) {
        using C = typename decltype(tiles)::Forward;
        return with_bias<float>(p, w, over_scale(p), [&](const auto &bias) {
            using Bias = std::decay_t<decltype(bias)>;
            return launch_forward<C, float, simt_forward<C, Bias>>(p, w.query, bias, 0, w.spoilt, stream);
        });
    });
}

}  // namespace localattn::cuda::simt
