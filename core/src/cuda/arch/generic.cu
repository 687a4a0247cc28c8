// The variant that takes everything: launches of the generic kernels.
#include "../generic.h"

#include "../variant.h"
#include "generic_operators.h"

namespace localattn::cuda {

namespace {

int64_t count_of_queries(const Problem &p) {
    return p.batch * p.axis[0].queries * p.axis[1].queries * p.axis[2].queries * p.heads;
}

template <class T>
const char *launch_bias_gradient(BiasGradientArguments<T> arguments, const Tensor &gradient, void *stream) {
    if (!gradient.data) return nullptr;
    arguments.gradient = static_cast<Accumulator<T> *>(gradient.data);
    int64_t elements = 1, terms = 1;
    for (int d = 0; d < 8; ++d) {
        if (arguments.extent[d] == 1) arguments.stride[d] = 0;
        (arguments.stride[d] ? elements : terms) *= arguments.extent[d];
    }
    if (elements == 0) return nullptr;
    arguments.warps_an_element = terms >= 4 * generic_warps ? generic_warps : 1;
    const Extent3 grid = grid_for(elements, generic_warps / arguments.warps_an_element);
    return launch<generic_grad_bias<T>>(grid, generic_threads, generic_warps * sizeof(Accumulator<T>), stream,
                                        arguments);
}

template <class T>
const char *run_bias_gradients(const BackwardArguments<T> &backward, void *stream) {
    const Problem &p = backward.problem;
    const Axis(&x)[3] = p.axis;
    const auto start = [&](const Tensor &t) {
        BiasGradientArguments<T> arguments{};
        arguments.backward = backward;
        const int64_t extent[8] = {p.batch, x[0].queries, x[1].queries, x[2].queries,
                                   p.heads, x[0].kernel,  x[1].kernel,  x[2].kernel};
        const int64_t stride[5] = {t.batch, t.axis[0], t.axis[1], t.axis[2], t.head};
        for (int d = 0; d < 8; ++d) arguments.extent[d] = extent[d];
        for (int d = 0; d < 5; ++d) arguments.stride[d] = stride[d];
        return arguments;
    };

    BiasGradientArguments<T> whole = start(p.grad_bias);
    whole.stride[7] = p.grad_bias.channel;
    whole.stride[6] = whole.stride[7] * x[2].kernel;
    whole.stride[5] = whole.stride[6] * x[1].kernel;
    const char *error = launch_bias_gradient(whole, p.grad_bias, stream);

    for (int a = 0; a < 3 && !error; ++a) {
        BiasGradientArguments<T> axis = start(p.grad_axis_bias[a]);
        axis.stride[5 + a] = p.grad_axis_bias[a].channel;
        error = launch_bias_gradient(axis, p.grad_axis_bias[a], stream);
    }
    if (error) return error;

    BiasGradientArguments<T> table = start(p.grad_rel_pos_bias);
    table.relative = true;
    table.stride[0] = 0;
    for (int a = 0; a < 3; ++a) {
        table.stride[1 + a] = 0;
        table.stride[5 + a] = p.grad_rel_pos_bias.axis[a];
        table.extent[5 + a] = 2 * x[a].kernel - 1;
    }
    return launch_bias_gradient(table, p.grad_rel_pos_bias, stream);
}

template <class T>
const char *run_forward(const Problem &p, const ChosenRows &rows, void *stream) {
    const int64_t queries = count_of_queries(p);
    if (queries == 0) return nullptr;
    const GenericForwardArguments arguments{p, rows};
    return launch<generic_forward<T>>(rows.grid(queries), generic_threads, 0, stream, arguments);
}

template <class T>
const char *run_gradients(const BackwardArguments<T> &a, void *stream) {
    const Problem &p = a.problem;
    const int64_t queries = count_of_queries(p);
    const int64_t keys = p.batch * p.axis[0].keys * p.axis[1].keys * p.axis[2].keys * p.kv_heads;
    const char *error = nullptr;
    if (queries > 0 && p.grad_query.data)
        error = launch<generic_grad_query<T>>(a.rows.grid(queries), generic_threads, 0, stream, a);
    if (!error && keys > 0 && (p.grad_key.data || p.grad_value.data))
        error = launch<generic_grad_key_value<T>>(a.rows.grid(keys), generic_threads, 0, stream, a);
    return error;
}

template <class T>
const char *run_typed(const Problem &p, Pass pass, void *stream, void *workspace) {
    const int64_t queries = count_of_queries(p);
    if (pass == Pass::forward) return run_forward<T>(p, {nullptr}, stream);

    const BackwardArguments<T> arguments{p, {static_cast<Accumulator<T> *>(workspace), 1}, {nullptr}};
    const char *error = launch_warps<generic_delta<T>>(queries, stream, arguments);
    if (!error) error = run_gradients(arguments, stream);
    return error ? error : run_bias_gradients(arguments, stream);
}

const char *declines(const Problem &, Pass, const Device &) { return nullptr; }

size_t workspace(const Problem &p, Pass pass) {
    if (pass == Pass::forward) return 0;
    return size_t(count_of_queries(p)) * (p.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
}

const char *run(const Problem &p, Pass pass, void *stream, void *workspace) {
    return with_type(p.dtype, [&](auto element) { return run_typed<decltype(element)>(p, pass, stream, workspace); });
}

}  // namespace

const char *generic_spoilt_rows(const Problem &p, Pass pass, const ChosenRows &rows, const Deltas<float> &deltas,
                                void *stream) {
    const auto compute = [&](auto element) {
        using T = decltype(element);
        if (pass == Pass::forward) return run_forward<T>(p, rows, stream);
        return run_gradients(BackwardArguments<T>{p, deltas, rows}, stream);
    };
    return p.dtype == Dtype::float32 ? compute(float()) : with_16_bits(p.dtype, compute);
}

extern const Variant generic_variant;
const Variant generic_variant = {"cuda_generic",
                                 "every option, any NVIDIA GPU from compute capability 7.0",
                                 70,
                                 declines,
                                 workspace,
                                 run,
                                 &generic_window_product,
                                 &generic_linear_attention,
                                 &generic_routed_attention};

}  // namespace localattn::cuda
