// linear_attention: checks and entry points.
#include "linear_attention.h"

#include <algorithm>

#include "call.h"
#include "checks.h"

namespace localattn {

namespace {

Steps<LinearProblem> linear_attention(const localattn_linear_attention_params *given, Pass pass, Data data) {
    localattn_linear_attention_params p = copied(given, "params");
    check_dtype(p.dtype);
    check_range("rank", p.rank, 1, 3);
    check_range("batch", p.batch, 0, largest_extent);
    check_range("heads", p.heads, 1, largest_extent);
    check_range("channels", p.channels, 1, largest_extent);
    check_range("value_channels", p.value_channels, 0, largest_extent);
    if (p.value_channels == 0) p.value_channels = p.channels;
    for (int a = 0; a < p.rank; ++a) {
        check_range(indexed("query_extent", a).text, p.query_extent[a], 0, largest_extent);
        check_range(indexed("key_extent", a).text, p.key_extent[a], 0, largest_extent);
    }
    const bool backward = pass == Pass::backward, needs_keys = !backward || p.grad_key.data || p.grad_value.data;
    const TensorCheck check(p.rank, data);
    const int64_t size = element_size(p.dtype), wide = accumulated_size(p.dtype);
    const int64_t context_extent[3] = {p.channels, 1, 1}, none[3] = {1, 1, 1};
    const Role remembered = backward ? Role::input : Role::result;
    check("query", p.query, Role::input, true, size, p.batch, p.query_extent, p.heads, p.channels);
    check("key", p.key, Role::input, needs_keys, size, p.batch, p.key_extent, p.heads, p.channels);
    check("value", p.value, Role::input, needs_keys, size, p.batch, p.key_extent, p.heads, p.value_channels);
    check("key_mask", p.key_mask, Role::input, false, 1, p.batch, p.key_extent, 1, 1);
    check("context", p.context, remembered, backward, wide, p.batch, context_extent, p.heads, p.value_channels);
    check("key_lse", p.key_lse, remembered, backward, wide, p.batch, none, p.heads, p.channels);
    if (backward) {
        check("grad_output", p.grad_output, Role::input, true, size, p.batch, p.query_extent, p.heads,
              p.value_channels);
        check("grad_query", p.grad_query, Role::result, false, size, p.batch, p.query_extent, p.heads, p.channels);
        check("grad_key", p.grad_key, Role::result, false, size, p.batch, p.key_extent, p.heads, p.channels);
        check("grad_value", p.grad_value, Role::result, false, size, p.batch, p.key_extent, p.heads, p.value_channels);
    } else {
        check("output", p.output, Role::result, true, size, p.batch, p.query_extent, p.heads, p.value_channels);
    }

    LinearProblem l;
    l.pass = pass;
    l.dtype = static_cast<Dtype>(p.dtype);
    l.batch = p.batch;
    l.heads = p.heads;
    l.channels = p.channels;
    l.value_channels = p.value_channels;
    for (int a = 0; a < p.rank; ++a) {
        l.queries[3 - p.rank + a] = p.query_extent[a];
        l.keys[3 - p.rank + a] = p.key_extent[a];
    }
    const auto full = [&](const localattn_tensor &t) { return taken(t, p.rank, true, true, true); };
    l.query = full(p.query);
    l.key = full(p.key);
    l.value = full(p.value);
    l.key_mask = taken(p.key_mask, p.rank, true, false, false);
    l.output = full(p.output);
    l.context = taken(p.context, 1, true, true, true);
    l.key_lse = taken(p.key_lse, 0, true, true, true);
    l.grad_output = full(p.grad_output);
    l.grad_query = full(p.grad_query);
    l.grad_key = full(p.grad_key);
    l.grad_value = full(p.grad_value);
    const double pixels = double(l.query_count()) + double(l.key_count());
    return {&Variant::linear_attention,
            &cuda::Variant::linear_attention,
            {l},
            double(p.batch) * double(p.heads) * pixels * double(p.channels) * double(p.value_channels)};
}

}  // namespace

}  // namespace localattn

using namespace localattn;

localattn_status localattn_linear_attention_forward(const localattn_context *context,
                                                    const localattn_linear_attention_params *params) {
    return run_call(context, params, Pass::forward, linear_attention);
}
localattn_status localattn_linear_attention_backward(const localattn_context *context,
                                                     const localattn_linear_attention_params *params) {
    return run_call(context, params, Pass::backward, linear_attention);
}
localattn_status localattn_linear_attention_workspace_size(const localattn_context *context,
                                                           const localattn_linear_attention_params *params,
                                                           localattn_pass pass, size_t *size) {
    return workspace_call(context, params, pass, size, linear_attention);
}
localattn_status localattn_linear_attention_variant(const localattn_context *context,
                                                    const localattn_linear_attention_params *params,
                                                    localattn_pass pass, const char **name, char *report,
                                                    size_t report_size) {
    return variant_call(context, params, pass, name, report, report_size, linear_attention);
}
