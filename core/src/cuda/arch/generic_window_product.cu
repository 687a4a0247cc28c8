// Launches of the generic window products.
#include "../generic_window_product.h"

#include "generic_operators.h"

namespace localattn::cuda {

namespace {

template <class T>
const char *run_typed(const WindowProduct &p, void *stream) {
    int64_t queries = p.batch * p.heads, keys = p.batch * p.heads;
    for (const Axis &x : p.axis) queries *= x.queries, keys *= x.keys;
    switch (p.product) {
        case Product::score:
            return launch_warps<generic_score<T>>(queries, stream, p);
        case Product::weigh:
            return launch_warps<generic_weigh<T>>(queries, stream, p);
        case Product::transposed:
            return launch_warps<generic_transposed<T>>(keys, stream, p);
    }
    return "unknown product";
}

const char *declines(const WindowProduct &, const Device &) { return nullptr; }

size_t workspace(const WindowProduct &) { return 0; }

const char *run(const WindowProduct &p, void *stream, void *) {
    return with_type(p.dtype, [&](auto element) { return run_typed<decltype(element)>(p, stream); });
}

}  // namespace

const Kernel<WindowProduct> generic_window_product = {declines, workspace, run};

}  // namespace localattn::cuda
