// Attention's backward on tensor cores: launches.
#include "../tensor_core_backward.h"
#include "sm80_parts.h"
#include "sm80_tile_table.h"
#include "tiled_backward.h"

namespace localattn::cuda::sm80 {

namespace {

template <class Of, class T>
const char *run_backward(const Problem &p, const Workspace &w, void *stream) {
    return with_bias<T>(p, w, over_scale(p), [&](const auto &bias) {
        using Bias = std::decay_t<decltype(bias)>;
        const GradientArguments<T, Bias> a = gradient_arguments<T>(p, w, bias);
        using Query = typename Of::GradQuery;
        const char *error = launch_query_gradients<Query, tensor_core_grad_query<Query, T, Bias>>(p, w, a, stream);
        using Key = typename Of::template GradKey<Bias>;
        if constexpr (Of::key_with_value) {
            if (error || !(a.grad_key || a.grad_value)) return error;
            return launch_over_keys<Key, tensor_core_grad_key<Key, T, Bias, true, true>>(p, w, a, stream);
        } else {
            using Value = typename Of::GradValue;
            if (a.grad_key && !error)
                error = launch_over_keys<Key, tensor_core_grad_key<Key, T, Bias, true, false>>(p, w, a, stream);
            if (error || !a.grad_value) return error;
            return launch_over_keys<Value, tensor_core_grad_key<Value, T, Bias, false, true>>(p, w, a, stream);
        }
    });
}

}  // namespace

const char *backward(const Problem &p, const Workspace &w, void *stream) {
    return with_16_bits(p.dtype, [&](auto element) {
        using T = decltype(element);
        return with_tiles(p, [&](auto tiles) -> const char * {
            if constexpr (tiles.has_gradients) return run_backward<decltype(tiles), T>(p, w, stream);
            return "declined";
        });
    });
}

}  // namespace localattn::cuda::sm80
