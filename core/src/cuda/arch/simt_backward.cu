// Attention's backward in float32: launches.
#include "../simt_backward.h"
#include "simt_parts.h"
#include "simt_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda::simt {

namespace {

template <class Of>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    return with_bias<float>(p, w, 1, [&](const auto &bias) {
        using Bias = std::decay_t<decltype(bias)>;
        const GradientArguments<float, Bias> a = gradient_arguments<float>(p, w, bias);
        using Query = typename Of::GradQuery;
        const char *error = launch_query_gradients<Query, simt_grad_query<Query, Bias>>(p, w, a, stream);
        if (error || !(a.grad_key || a.grad_value)) return error;
        using Key = typename Of::GradKey;
        return launch_over_keys<Key, simt_grad_key<Key, Bias>>(p, w, a, stream);
    });
}

}  // namespace

const char *backward(const Problem &p, const Workspace &w, void *stream) {
    return with_tiles(p, [&](auto tiles) { return run_backward<decltype(tiles)>(p, w, stream); });
}

}  // namespace localattn::cuda::simt
