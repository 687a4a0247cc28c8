// linear_attention, forward and backward.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "tensors.h"

namespace {

using namespace localattn_torch;

constexpr Operation<localattn_linear_attention_params> operation = {
    localattn_linear_attention_forward, localattn_linear_attention_backward, localattn_linear_attention_workspace_size};

localattn_tensor full(const Tensor &tensor) { return described(tensor, Axes::batch_spatial_head_channel); }

// The arguments that both passes take, and the params they become.
struct Linear {
    localattn_linear_attention_params params{};
    Tensor key_mask;

    Linear(const Tensor &query, const Tensor &key, const Tensor &value, const OptionalTensor &mask) {
        const int64_t rank = query.dim() - 3;
        TORCH_CHECK_VALUE(rank >= 1 && rank <= 3,
                          "query must be (batch, one to three spatial axes, heads, channels), got shape ",
                          query.sizes());
        TORCH_CHECK_VALUE(key.dim() == query.dim(), "key must have as many dimensions as query, ", query.dim(),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(key.size(0) == query.size(0), "key must have the batch of query, ", query.size(0),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(key.size(-2) == query.size(-2), "key must have the heads of query, ", query.size(-2),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(key.size(-1) == query.size(-1), "key must have the width of query, ", query.size(-1),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(query.size(-2) > 0, "query must have at least 1 head, got shape ", query.sizes());
        TORCH_CHECK_VALUE(query.size(-1) > 0, "query must have at least 1 channel, got shape ", query.sizes());
        check_value(value, key);
        check_kind("key", key, query);
        check_kind("value", value, query);
        params.struct_size = sizeof params;
        params.dtype = dtype_of(query);
        params.rank = static_cast<int32_t>(rank);
        params.batch = query.size(0);
        params.heads = query.size(-2);
        params.channels = query.size(-1);
        params.value_channels = value.size(-1);
        for (int64_t a = 0; a < rank; ++a) {
            params.query_extent[a] = query.size(a + 1);
            params.key_extent[a] = key.size(a + 1);
        }
        params.query = full(query);
        params.key = full(key);
        params.value = full(value);
        if (mask) {
            check_kind("key_mask", *mask, query, at::kBool);
            key_mask = broadcast("key_mask", *mask, Shape(key.sizes().begin(), key.sizes().end() - 2));
            params.key_mask = described(key_mask, Axes::batch_spatial);
        }
    }

    // context is (batch, heads, channels, value channels), key_lse (batch, heads, channels).
    void set_remembered(const Tensor &context, const Tensor &key_lse) {
        params.context.data = const_cast<void *>(context.const_data_ptr());
        params.context.batch_stride = context.stride(0);
        params.context.head_stride = context.stride(1);
        params.context.spatial_stride[0] = context.stride(2);
        params.context.channel_stride = context.stride(3);
        params.key_lse.data = const_cast<void *>(key_lse.const_data_ptr());
        params.key_lse.batch_stride = key_lse.stride(0);
        params.key_lse.head_stride = key_lse.stride(1);
        params.key_lse.channel_stride = key_lse.stride(2);
    }
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor &query, const Tensor &key, const Tensor &value,
                                                    const OptionalTensor &key_mask) {
    Linear problem(query, key, value, key_mask);
    const auto wide = query.options().dtype(accumulation_dtype(query));
    const Tensor output = empty_ordered_as(query, value.size(-1));
    const Tensor context = at::empty({query.size(0), query.size(-2), query.size(-1), value.size(-1)}, wide);
    const Tensor key_lse = at::empty({query.size(0), query.size(-2), query.size(-1)}, wide);
    problem.params.output = full(output);
    problem.set_remembered(context, key_lse);
    run(operation, LOCALATTN_FORWARD, problem.params, query);
    return {output, context, key_lse};
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_backward(const Tensor &grad_output, const Tensor &query,
                                                             const Tensor &key, const Tensor &value,
                                                             const Tensor &context, const Tensor &key_lse,
                                                             const OptionalTensor &key_mask,
                                                             std::array<bool, 3> needs_gradient) {
    Linear problem(query, key, value, key_mask);
    Shape output_shape = query.sizes().vec();
    output_shape.back() = value.size(-1);
    check_shape("grad_output", grad_output, output_shape);
    check_kind("grad_output", grad_output, query);
    check_shape("context", context, {query.size(0), query.size(-2), query.size(-1), value.size(-1)});
    check_kind("context", context, query, accumulation_dtype(query));
    check_shape("key_lse", key_lse, {query.size(0), query.size(-2), query.size(-1)});
    check_kind("key_lse", key_lse, query, accumulation_dtype(query));
    problem.params.grad_output = full(grad_output);
    problem.set_remembered(context, key_lse);
    std::array<Tensor, 3> gradients;
    const Tensor *inputs[] = {&query, &key, &value};
    localattn_tensor *slots[] = {&problem.params.grad_query, &problem.params.grad_key, &problem.params.grad_value};
    for (size_t i = 0; i < 3; ++i) {
        gradients[i] =
            needs_gradient[i] ? empty_ordered_as(*inputs[i], inputs[i]->size(-1)) : at::empty({0}, query.options());
        if (needs_gradient[i]) *slots[i] = full(gradients[i]);
    }
    run(operation, LOCALATTN_BACKWARD, problem.params, query);
    return std::tuple_cat(gradients);
}

TORCH_LIBRARY_FRAGMENT(localattn, library) {
    // context and key_lse are what the backward needs of the keys as a whole.
    library.def(
        "linear_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask) -> (Tensor output, Tensor context, "
        "Tensor key_lse)");
    library.def(
        "linear_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor context, "
        "Tensor key_lse, Tensor? key_mask, bool[3] needs_gradient) -> (Tensor grad_query, Tensor grad_key, "
        "Tensor grad_value)");
}

void implement(torch::Library &library) {
    library.impl("linear_attention", &linear_attention);
    library.impl("linear_attention_backward", &linear_attention_backward);
}
TORCH_LIBRARY_IMPL(localattn, CPU, library) { implement(library); }
TORCH_LIBRARY_IMPL(localattn, CUDA, library) { implement(library); }

}  // namespace
