// localattn's operators for PyTorch: each schema beside its registration, tensors turned into the C API's params; where
// a call runs is context.h's. Nothing is computed here. Checked here is what makes tensors into one problem
// (dimensions, sizes that must agree, dtypes); the ranges of all numbers are the core's to check.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "tensors.h"

namespace {

using namespace localattn_torch;

constexpr Operation<localattn_attention_params> operation = {localattn_attention_forward, localattn_attention_backward,
                                                             localattn_attention_workspace_size};

// The arguments that both passes take, and the params they become. Keeps the broadcast views alive.
struct Attention {
    Tensor query, key, value;
    std::array<OptionalTensor, 5> biases;  // bias, rel_pos_bias and one for each axis
    localattn_attention_params params{};
    Shape lse_shape;                   // (batch, *query_extent, heads)
    std::array<Shape, 5> bias_shapes;  // what each broadcasts to

    Attention(Tensor query_, Tensor key_, Tensor value_, at::IntArrayRef kernel_size, at::IntArrayRef stride,
              at::IntArrayRef dilation, const c10::List<bool> &is_causal, bool raster_causal, const std::string &border,
              std::optional<double> scale, std::array<OptionalTensor, 5> biases_, const OptionalTensor &key_mask)
        : query(std::move(query_)), key(std::move(key_)), value(std::move(value_)), biases(std::move(biases_)) {
        const int64_t rank = query.dim() - 3;
        check_tensors(rank);
        params.struct_size = sizeof params;
        params.dtype = dtype_of(query);
        params.rank = static_cast<int32_t>(rank);
        params.batch = query.size(0);
        params.heads = query.size(-2);
        params.kv_heads = key.size(-2);
        params.channels = query.size(-1);
        params.value_channels = value.size(-1);
        params.raster_causal = raster_causal;
        params.border = border_named(border);
        params.has_scale = scale.has_value();
        params.scale = scale.value_or(0);
        params.query = described(query, Axes::batch_spatial_head_channel);
        params.key = described(key, Axes::batch_spatial_head_channel);
        params.value = described(value, Axes::batch_spatial_head_channel);
        set_window_params(params, query.sizes().slice(1, rank), key.sizes().slice(1, rank), kernel_size, stride,
                          dilation, is_causal);
        set_biases(rank);
        if (key_mask) {
            check_kind("key_mask", *key_mask, query, at::kBool);
            key_mask_ = broadcast("key_mask", *key_mask, Shape(key.sizes().begin(), key.sizes().end() - 2));
            params.key_mask = described(key_mask_, Axes::batch_spatial);
        }
    }

private:
    Tensor key_mask_;
    std::array<Tensor, 5> broadcast_biases_;

    void check_tensors(int64_t rank) const {
        TORCH_CHECK_VALUE(rank >= 1 && rank <= 3,
                          "query must be (batch, one to three spatial axes, heads, channels), got shape ",
                          query.sizes());
        TORCH_CHECK_VALUE(key.dim() == query.dim(), "key must have as many dimensions as query, ", query.dim(),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(key.size(0) == query.size(0), "key must have the batch of query, ", query.size(0),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(key.size(-1) == query.size(-1), "key must have the width of query, ", query.size(-1),
                          ", got shape ", key.sizes());
        TORCH_CHECK_VALUE(query.size(-2) > 0, "query must have at least 1 head, got shape ", query.sizes());
        TORCH_CHECK_VALUE(query.size(-1) > 0, "query must have at least 1 channel, got shape ", query.sizes());
        TORCH_CHECK_VALUE(key.size(-2) > 0 && query.size(-2) % key.size(-2) == 0, "the heads of key must divide the ",
                          query.size(-2), " heads of query, got shape ", key.sizes());
        check_value(value, key);
        check_kind("key", key, query);
        check_kind("value", value, query);
    }

    void set_biases(int64_t rank) {
        lse_shape = Shape(query.sizes().begin(), query.sizes().end() - 1);
        int64_t window = 1;
        Shape table{params.heads};
        for (int64_t a = 0; a < rank; ++a) {
            // Only so that no shape below overflows; the core rejects such sizes with their limits.
            const int64_t kernel = std::min(std::max<int64_t>(params.kernel_size[a], 0), int64_t{1} << 20);
            window *= kernel;
            table.push_back(2 * kernel - 1);
            bias_shapes[2 + a] = lse_shape;
            bias_shapes[2 + a].push_back(kernel);
        }
        bias_shapes[0] = lse_shape;
        bias_shapes[0].push_back(window);
        bias_shapes[1] = table;
        static constexpr const char *names[] = {"bias", "rel_pos_bias", "axis_bias[0]", "axis_bias[1]", "axis_bias[2]"};
        for (int64_t i = 0; i < 5; ++i) {
            if (!biases[i]) continue;
            TORCH_CHECK_VALUE(i < 2 + rank, names[i], " must be None for ", rank, " spatial axes");
            check_kind(names[i], *biases[i], query);
            if (i == 1) check_shape(names[i], *biases[i], bias_shapes[i]);
            broadcast_biases_[i] = broadcast(names[i], *biases[i], bias_shapes[i]);
            bias_param(i) = described(broadcast_biases_[i], bias_axes(i));
        }
    }

    localattn_tensor &bias_param(int64_t i) {
        return i == 0 ? params.bias : i == 1 ? params.rel_pos_bias : params.axis_bias[i - 2];
    }

public:
    static Axes bias_axes(int64_t i) { return i == 1 ? Axes::head_spatial : Axes::batch_spatial_head_channel; }

    localattn_tensor &bias_gradient_param(int64_t i) {
        return i == 0 ? params.grad_bias : i == 1 ? params.grad_rel_pos_bias : params.grad_axis_bias[i - 2];
    }
};

#define ATTENTION_SCHEMA                                                                                          \
    "Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, " \
    "bool raster_causal, str border, float? scale, Tensor? bias, Tensor? rel_pos_bias, Tensor? axis_bias_0, "     \
    "Tensor? axis_bias_1, Tensor? axis_bias_2, Tensor? key_mask"

std::tuple<Tensor, Tensor> attention(const Tensor &query, const Tensor &key, const Tensor &value,
                                     at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,
                                     const c10::List<bool> &is_causal, bool raster_causal, const std::string &border,
                                     std::optional<double> scale, const OptionalTensor &bias,
                                     const OptionalTensor &rel_pos_bias, const OptionalTensor &axis_bias_0,
                                     const OptionalTensor &axis_bias_1, const OptionalTensor &axis_bias_2,
                                     const OptionalTensor &key_mask) {
    Attention problem(query, key, value, kernel_size, stride, dilation, is_causal, raster_causal, border, scale,
                      {bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2}, key_mask);
    Tensor output = empty_ordered_as(query, value.size(-1));
    Tensor lse = at::empty(problem.lse_shape, query.options().dtype(accumulation_dtype(query)));
    problem.params.output = described(output, Axes::batch_spatial_head_channel);
    problem.params.lse = described(lse, Axes::batch_spatial_head);
    run(operation, LOCALATTN_FORWARD, problem.params, query);
    return {output, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(const Tensor &grad_output, const OptionalTensor &grad_lse, const Tensor &query,
                             const Tensor &key, const Tensor &value, const Tensor &output, const Tensor &lse,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,
                             const c10::List<bool> &is_causal, bool raster_causal, const std::string &border,
                             std::optional<double> scale, const OptionalTensor &bias,
                             const OptionalTensor &rel_pos_bias, const OptionalTensor &axis_bias_0,
                             const OptionalTensor &axis_bias_1, const OptionalTensor &axis_bias_2,
                             const OptionalTensor &key_mask, std::array<bool, 8> needs_gradient) {
    Attention problem(query, key, value, kernel_size, stride, dilation, is_causal, raster_causal, border, scale,
                      {bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2}, key_mask);
    Shape output_shape = problem.lse_shape;
    output_shape.push_back(value.size(-1));
    const at::ScalarType accumulated = accumulation_dtype(query);
    check_shape("output", output, output_shape);
    check_kind("output", output, query);
    check_shape("grad_output", grad_output, output_shape);
    check_kind("grad_output", grad_output, query);
    check_shape("lse", lse, problem.lse_shape);
    check_kind("lse", lse, query, accumulated);
    problem.params.output = described(output, Axes::batch_spatial_head_channel);
    problem.params.lse = described(lse, Axes::batch_spatial_head);
    problem.params.grad_output = described(grad_output, Axes::batch_spatial_head_channel);
    if (grad_lse) {
        check_shape("grad_lse", *grad_lse, problem.lse_shape);
        check_kind("grad_lse", *grad_lse, query, accumulated);
        problem.params.grad_lse = described(*grad_lse, Axes::batch_spatial_head);
    }

    std::array<Tensor, 8> gradients;
    for (Tensor &unneeded : gradients) unneeded = at::empty({0}, query.options());
    const Tensor *inputs[] = {&query, &key, &value};
    localattn_tensor *slots[] = {&problem.params.grad_query, &problem.params.grad_key, &problem.params.grad_value};
    for (int64_t i = 0; i < 3; ++i) {
        if (!needs_gradient[i]) continue;
        gradients[i] = empty_ordered_as(*inputs[i], inputs[i]->size(-1));
        *slots[i] = described(gradients[i], Axes::batch_spatial_head_channel);
    }
    for (int64_t i = 0; i < 5; ++i) {
        if (!needs_gradient[3 + i] || !problem.biases[i]) continue;
        // In the bias's own shape: seen in the full one its broadcast axes have stride 0, over which the core sums.
        gradients[3 + i] = at::empty(problem.biases[i]->sizes(), query.options().dtype(accumulated));
        localattn_tensor &slot = problem.bias_gradient_param(i);
        slot = described(gradients[3 + i].expand(problem.bias_shapes[i]), Attention::bias_axes(i));
        if (gradients[3 + i].numel()) slot.data = gradients[3 + i].mutable_data_ptr();  // though seen as empty
    }
    run(operation, LOCALATTN_BACKWARD, problem.params, query);
    for (int64_t i = 3; i < 8; ++i) gradients[i] = gradients[i].to(query.scalar_type());
    return std::tuple_cat(gradients);
}

// The variant that would take the problem, and a line for each better one that declined.
std::tuple<std::string, std::string> attention_variant(
    const Tensor &query, const Tensor &key, const Tensor &value, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef dilation, const c10::List<bool> &is_causal, bool raster_causal, const std::string &border,
    std::optional<double> scale, const OptionalTensor &bias, const OptionalTensor &rel_pos_bias,
    const OptionalTensor &axis_bias_0, const OptionalTensor &axis_bias_1, const OptionalTensor &axis_bias_2,
    const OptionalTensor &key_mask, bool backward) {
    Attention problem(query, key, value, kernel_size, stride, dilation, is_causal, raster_causal, border, scale,
                      {bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2}, key_mask);
    // As the passes allocate them: variants may care for layouts.
    const std::array<Tensor, 4> results = {empty_ordered_as(query, value.size(-1)),
                                           empty_ordered_as(query, query.size(-1)), empty_ordered_as(key, key.size(-1)),
                                           empty_ordered_as(value, value.size(-1))};
    problem.params.output = problem.params.grad_output = described(results[0], Axes::batch_spatial_head_channel);
    if (backward) {
        problem.params.grad_query = described(results[1], Axes::batch_spatial_head_channel);
        problem.params.grad_key = described(results[2], Axes::batch_spatial_head_channel);
        problem.params.grad_value = described(results[3], Axes::batch_spatial_head_channel);
    }
    const Context context(query.device());
    const char *name = nullptr;
    char report[4096];
    check(localattn_attention_variant(context, &problem.params, backward ? LOCALATTN_BACKWARD : LOCALATTN_FORWARD,
                                      &name, report, sizeof report));
    return {name, report};
}

TORCH_LIBRARY(localattn, library) {
    library.def("attention(" ATTENTION_SCHEMA ") -> (Tensor output, Tensor lse)");
    // A gradient that is not needed comes back as an empty tensor.
    library.def(
        "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "Tensor output, Tensor lse, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "
        "bool raster_causal, str border, float? scale, Tensor? bias, Tensor? rel_pos_bias, Tensor? axis_bias_0, "
        "Tensor? axis_bias_1, Tensor? axis_bias_2, Tensor? key_mask, bool[8] needs_gradient) -> (Tensor grad_query, "
        "Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_rel_pos_bias, Tensor grad_axis_bias_0, "
        "Tensor grad_axis_bias_1, Tensor grad_axis_bias_2)");
    library.def("attention_variant(" ATTENTION_SCHEMA ", bool backward) -> (str name, str report)");
}

void implement(torch::Library &library) {
    library.impl("attention", &attention);
    library.impl("attention_backward", &attention_backward);
    library.impl("attention_variant", &attention_variant);
}
TORCH_LIBRARY_IMPL(localattn, CPU, library) { implement(library); }
TORCH_LIBRARY_IMPL(localattn, CUDA, library) { implement(library); }

}  // namespace
