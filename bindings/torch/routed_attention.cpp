// routed_attention, forward and backward.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "tensors.h"

namespace {

using namespace localattn_torch;

constexpr Operation<localattn_routed_attention_params> operation = {
    localattn_routed_attention_forward, localattn_routed_attention_backward, localattn_routed_attention_workspace_size};

localattn_tensor full(const Tensor &tensor) { return described(tensor, Axes::batch_spatial_head_channel); }

// (batch, regions, topk)
localattn_tensor choices(const Tensor &tensor) {
    static int64_t empty;  // what an empty tensor points to: NULL would say that it is absent
    localattn_tensor result{};
    result.data = tensor.numel() ? const_cast<void *>(tensor.const_data_ptr()) : &empty;
    result.batch_stride = tensor.stride(0);
    result.spatial_stride[0] = tensor.stride(1);
    result.channel_stride = tensor.stride(2);
    return result;
}

// The arguments that both passes take, and the params they become.
struct Routed {
    localattn_routed_attention_params params{};
    Shape lse_shape, output_shape;

    Routed(const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &region_index,
           at::IntArrayRef region_size, at::IntArrayRef kv_region_size, const OptionalTensor &region_weight,
           std::optional<double> scale) {
        TORCH_CHECK_VALUE(query.dim() == 5, "query must be (batch, height, width, heads, channels), got shape ",
                          query.sizes());
        TORCH_CHECK_VALUE(key.dim() == 5, "key must be (batch, height, width, heads, channels), got shape ",
                          key.sizes());
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
        TORCH_CHECK_VALUE(region_size.size() == 2, "region_size must have 2 entries, got ", region_size.size());
        TORCH_CHECK_VALUE(kv_region_size.size() == 2, "kv_region_size must have 2 entries, got ",
                          kv_region_size.size());
        check_kind("region_index", region_index, query, at::kLong);
        TORCH_CHECK_VALUE(region_index.dim() == 3, "region_index must be (batch, regions, topk), got shape ",
                          region_index.sizes());
        params.struct_size = sizeof params;
        params.dtype = dtype_of(query);
        params.has_scale = scale.has_value();
        params.scale = scale.value_or(0);
        params.batch = query.size(0);
        params.heads = query.size(-2);
        params.channels = query.size(-1);
        params.value_channels = value.size(-1);
        int64_t regions = 1;
        bool divides = true;
        for (int64_t a = 0; a < 2; ++a) {
            params.query_extent[a] = query.size(a + 1);
            params.key_extent[a] = key.size(a + 1);
            params.region_size[a] = region_size[a];
            params.kv_region_size[a] = kv_region_size[a];
            // The C API takes a zero of these for a default.
            TORCH_CHECK_VALUE(region_size[a] > 0, "region_size must be at least 1, got ", region_size);
            TORCH_CHECK_VALUE(kv_region_size[a] > 0, "kv_region_size must be at least 1, got ", kv_region_size);
            regions *= query.size(a + 1) / region_size[a];
            divides = divides && query.size(a + 1) % region_size[a] == 0;
        }
        params.topk = region_index.size(2);
        // Where not, the core says so before it looks at an index.
        if (divides) check_shape("region_index", region_index, {query.size(0), regions, params.topk});
        params.query = full(query);
        params.key = full(key);
        params.value = full(value);
        params.region_index = choices(region_index);
        if (region_weight) {
            check_shape("region_weight", *region_weight, region_index.sizes());
            check_kind("region_weight", *region_weight, query);
            params.region_weight = choices(*region_weight);
        }
        lse_shape = Shape(query.sizes().begin(), query.sizes().end() - 1);
        output_shape = lse_shape;
        output_shape.push_back(value.size(-1));
    }
};

std::tuple<Tensor, Tensor> routed_attention(const Tensor &query, const Tensor &key, const Tensor &value,
                                            const Tensor &region_index, at::IntArrayRef region_size,
                                            at::IntArrayRef kv_region_size, const OptionalTensor &region_weight,
                                            std::optional<double> scale) {
    Routed problem(query, key, value, region_index, region_size, kv_region_size, region_weight, scale);
    const Tensor output = empty_ordered_as(query, value.size(-1));
    const Tensor lse = at::empty(problem.lse_shape, query.options().dtype(accumulation_dtype(query)));
    problem.params.output = full(output);
    problem.params.lse = described(lse, Axes::batch_spatial_head);
    run(operation, LOCALATTN_FORWARD, problem.params, query);
    return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_attention_backward(
    const Tensor &grad_output, const OptionalTensor &grad_lse, const Tensor &query, const Tensor &key,
    const Tensor &value, const Tensor &output, const Tensor &lse, const Tensor &region_index,
    at::IntArrayRef region_size, at::IntArrayRef kv_region_size, const OptionalTensor &region_weight,
    std::optional<double> scale, std::array<bool, 4> needs_gradient) {
    Routed problem(query, key, value, region_index, region_size, kv_region_size, region_weight, scale);
    const at::ScalarType wide = accumulation_dtype(query);
    check_shape("grad_output", grad_output, problem.output_shape);
    check_kind("grad_output", grad_output, query);
    check_shape("output", output, problem.output_shape);
    check_kind("output", output, query);
    check_shape("lse", lse, problem.lse_shape);
    check_kind("lse", lse, query, wide);
    problem.params.grad_output = full(grad_output);
    problem.params.output = full(output);
    problem.params.lse = described(lse, Axes::batch_spatial_head);
    if (grad_lse) {
        check_shape("grad_lse", *grad_lse, problem.lse_shape);
        check_kind("grad_lse", *grad_lse, query, wide);
        problem.params.grad_lse = described(*grad_lse, Axes::batch_spatial_head);
    }
    std::array<Tensor, 4> gradients;
    for (Tensor &unneeded : gradients) unneeded = at::empty({0}, query.options());
    const Tensor *inputs[] = {&query, &key, &value};
    localattn_tensor *slots[] = {&problem.params.grad_query, &problem.params.grad_key, &problem.params.grad_value};
    for (size_t i = 0; i < 3; ++i) {
        if (!needs_gradient[i]) continue;
        gradients[i] = empty_ordered_as(*inputs[i], inputs[i]->size(-1));
        *slots[i] = full(gradients[i]);
    }
    if (needs_gradient[3] && region_weight) {
        gradients[3] = at::empty(region_weight->sizes(), query.options().dtype(wide));
        problem.params.grad_region_weight = choices(gradients[3]);
    }
    run(operation, LOCALATTN_BACKWARD, problem.params, query);
    gradients[3] = gradients[3].to(query.scalar_type());
    return std::tuple_cat(gradients);
}

#define ROUTED_SCHEMA \
    "Tensor region_index, int[] region_size, int[] kv_region_size, Tensor? region_weight, float? scale"

TORCH_LIBRARY_FRAGMENT(localattn, library) {
    library.def("routed_attention(Tensor query, Tensor key, Tensor value, " ROUTED_SCHEMA
                ") -> (Tensor output, Tensor lse)");
    // A gradient that is not needed comes back as an empty tensor.
    library.def(
        "routed_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "Tensor output, Tensor lse, " ROUTED_SCHEMA
        ", bool[4] needs_gradient) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
        "Tensor grad_region_weight)");
}

void implement(torch::Library &library) {
    library.impl("routed_attention", &routed_attention);
    library.impl("routed_attention_backward", &routed_attention_backward);
}
TORCH_LIBRARY_IMPL(localattn, CPU, library) { implement(library); }
TORCH_LIBRARY_IMPL(localattn, CUDA, library) { implement(library); }

}  // namespace
