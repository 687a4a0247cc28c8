// Launches of the generic kernels of routed attention.
#include "../generic_routed_attention.h"

#include "generic_operators.h"

namespace localattn::cuda {

namespace {

// Device memory of the backward.
struct Workspace {
    int64_t *begin;
    Choice *choices;
    void *delta;  // one number of the accumulator's type for each query
    size_t bytes;

    Workspace(const RoutedProblem &p, void *memory) {
        static_assert(sizeof(Choice) == 8, "one follows the other without gaps");
        int64_t count = 0;
        const auto take = [&](int64_t items) {
            void *at = static_cast<char *>(memory) + 8 * count;
            count += items;
            return at;
        };
        const bool inverts = p.pass == Pass::backward && (p.grad_key.data || p.grad_value.data);
        begin = static_cast<int64_t *>(take(inverts ? p.batch * (p.regions() + 1) : 0));
        choices = static_cast<Choice *>(take(inverts ? p.batch * p.regions() * p.topk : 0));
        delta = take(p.pass == Pass::backward ? p.batch * p.regions() * p.queries() * p.heads : 0);
        bytes = size_t(8 * count);
    }
};

const char *declines(const RoutedProblem &, const Device &) { return nullptr; }

size_t workspace(const RoutedProblem &p) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return Workspace(p, nowhere).bytes;
}

template <class T>
const char *run_typed(const RoutedProblem &p, void *stream, void *memory) {
    const int64_t places = p.batch * p.regions() * p.heads, choices = p.batch * p.regions() * p.topk;
    const char *error = launch_check(p, stream);
    if (error) return error;
    if (p.pass == Pass::forward) return launch_warps<generic_routed_forward<T>>(places * p.queries(), stream, p);

    const Workspace w(p, memory);
    const RoutedBackwardArguments<T> arguments{p, static_cast<Accumulator<T> *>(w.delta), {w.begin, w.choices}};
    error = launch_warps<generic_routed_delta<T>>(places * p.queries(), stream, arguments);
    if (!error && p.grad_query.data)
        error = launch_warps<generic_routed_grad_query<T>>(places * p.queries(), stream, arguments);
    if (!error && (p.grad_key.data || p.grad_value.data)) {
        error = launch_inverse(p, arguments.inverse, stream);
        if (!error) error = launch_warps<generic_routed_grad_key_value<T>>(places * p.keys(), stream, arguments);
    }
    if (!error && p.grad_region_weight.data && choices > 0)
        error = launch<generic_grad_region_weight<T>>(grid_for(choices, 1), generic_threads,
                                                      generic_warps * sizeof(Accumulator<T>), stream, arguments);
    return error;
}

const char *run(const RoutedProblem &p, void *stream, void *workspace) {
    return with_type(p.dtype, [&](auto element) { return run_typed<decltype(element)>(p, stream, workspace); });
}

}  // namespace

const Kernel<RoutedProblem> generic_routed_attention = {declines, workspace, run};

}  // namespace localattn::cuda
