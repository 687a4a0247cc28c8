// similarity, weighting, and the transpose of the latter: three operators that are each other's derivatives, of any
// order.
#include <torch/library.h>

#include <tuple>

#include "tensors.h"

namespace {

using namespace localattn_torch;

constexpr Operation<localattn_similarity_params> similarity_operation = {
    localattn_similarity_forward, localattn_similarity_backward, localattn_similarity_workspace_size};
constexpr Operation<localattn_weighting_params> weighting_operation = {
    localattn_weighting_forward, localattn_weighting_backward, localattn_weighting_workspace_size};

void check_map(const char *name, const Tensor &tensor, const char *last) {
    TORCH_CHECK_VALUE(tensor.dim() >= 4 && tensor.dim() <= 6, name,
                      " must be (batch, one to three spatial axes, heads, ", last, "), got shape ", tensor.sizes());
}

// `tensor` belongs to `of`: as many axes, the same batch, heads and dtype.
void check_pair(const char *name, const Tensor &tensor, const char *of, const Tensor &other) {
    TORCH_CHECK_VALUE(tensor.dim() == other.dim(), name, " must have as many dimensions as ", of, ", ", other.dim(),
                      ", got shape ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.size(0) == other.size(0), name, " must have the batch of ", of, ", ", other.size(0),
                      ", got shape ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.size(-2) == other.size(-2), name, " must have the heads of ", of, ", ", other.size(-2),
                      ", got shape ", tensor.sizes());
    check_kind(name, tensor, other);
}

void check_filled(const char *name, const Tensor &tensor) {
    TORCH_CHECK_VALUE(tensor.size(-2) > 0, name, " must have at least 1 head, got shape ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.size(-1) > 0, name, " must have at least 1 channel, got shape ", tensor.sizes());
}

int64_t window_of(at::IntArrayRef kernel_size, bool raster_causal) {
    int64_t entries = 1;
    // Bounded only so that nothing overflows; the core rejects such sizes with their limits.
    for (const int64_t kernel : kernel_size) entries *= std::min(std::max<int64_t>(kernel, 0), int64_t{1} << 20);
    return raster_causal ? entries / 2 + 1 : entries;
}

void check_window_entries(const char *name, const Tensor &tensor, int64_t entries) {
    TORCH_CHECK_VALUE(tensor.size(-1) == entries, name, " must have ", entries, " window entries, got ",
                      tensor.size(-1));
}

localattn_tensor full(const Tensor &tensor) { return described(tensor, Axes::batch_spatial_head_channel); }

// Params of either operation, all but its tensors.
template <class Params>
Params params_of(const Tensor &of_channels, const char *name, at::IntArrayRef query_extent, at::IntArrayRef key_extent,
                 at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,
                 const c10::List<bool> &is_causal, bool raster_causal, const std::string &border) {
    Params params{};
    params.struct_size = sizeof params;
    params.dtype = dtype_of(of_channels, name);
    params.rank = static_cast<int32_t>(query_extent.size());
    params.batch = of_channels.size(0);
    params.heads = of_channels.size(-2);
    params.channels = of_channels.size(-1);
    set_window_params(params, query_extent, key_extent, kernel_size, stride, dilation, is_causal);
    params.raster_causal = raster_causal;
    params.border = border_named(border);
    return params;
}

at::IntArrayRef extents(const Tensor &tensor) { return tensor.sizes().slice(1, tensor.dim() - 3); }

Tensor similarity(const Tensor &query, const Tensor &key, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef dilation, const c10::List<bool> &is_causal, bool raster_causal,
                  const std::string &border, std::optional<double> fill, bool as_gradient) {
    check_map("query", query, "channels");
    check_filled("query", query);
    check_pair("key", key, "query", query);
    TORCH_CHECK_VALUE(key.size(-1) == query.size(-1), "key must have the width of query, ", query.size(-1),
                      ", got shape ", key.sizes());
    Shape shape = query.sizes().vec();
    shape.back() = window_of(kernel_size, raster_causal);
    if (as_gradient) {
        auto params = params_of<localattn_weighting_params>(query, "query", extents(query), extents(key), kernel_size,
                                                            stride, dilation, is_causal, raster_causal, border);
        const Tensor weights = empty_result(shape, query.options());
        params.grad_output = full(query);
        params.value = full(key);
        params.grad_weights = full(weights);
        run(weighting_operation, LOCALATTN_BACKWARD, params, query);
        return weights;
    }
    auto params = params_of<localattn_similarity_params>(query, "query", extents(query), extents(key), kernel_size,
                                                         stride, dilation, is_causal, raster_causal, border);
    params.has_fill = fill.has_value();
    params.fill = fill.value_or(0);
    const Tensor scores = empty_result(shape, query.options());
    params.query = full(query);
    params.key = full(key);
    params.scores = full(scores);
    run(similarity_operation, LOCALATTN_FORWARD, params, query);
    return scores;
}

Tensor weighting(const Tensor &weights, const Tensor &value, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                 at::IntArrayRef dilation, const c10::List<bool> &is_causal, bool raster_causal,
                 const std::string &border) {
    check_map("weights", weights, "window");
    check_pair("value", value, "weights", weights);
    check_filled("value", value);
    check_window_entries("weights", weights, window_of(kernel_size, raster_causal));
    auto params = params_of<localattn_weighting_params>(value, "value", extents(weights), extents(value), kernel_size,
                                                        stride, dilation, is_causal, raster_causal, border);
    const Tensor output = empty_ordered_as(value, value.size(-1), extents(weights));
    params.weights = full(weights);
    params.value = full(value);
    params.output = full(output);
    run(weighting_operation, LOCALATTN_FORWARD, params, value);
    return output;
}

Tensor weighting_transpose(const Tensor &weights, const Tensor &query, at::IntArrayRef key_extent,
                           at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,
                           const c10::List<bool> &is_causal, bool raster_causal, const std::string &border) {
    check_map("query", query, "channels");
    check_filled("query", query);
    check_pair("weights", weights, "query", query);
    TORCH_CHECK_VALUE(extents(weights) == extents(query), "weights must have the extents of query, ", extents(query),
                      ", got shape ", weights.sizes());
    TORCH_CHECK_VALUE(key_extent.size() == extents(query).size(), "key_extent must have one entry for each of the ",
                      extents(query).size(), " spatial axes, got ", key_extent.size());
    check_window_entries("weights", weights, window_of(kernel_size, raster_causal));
    auto params = params_of<localattn_weighting_params>(query, "query", extents(query), key_extent, kernel_size, stride,
                                                        dilation, is_causal, raster_causal, border);
    const Tensor value = empty_ordered_as(query, query.size(-1), key_extent);
    params.weights = full(weights);
    params.grad_output = full(query);
    params.grad_value = full(value);
    run(weighting_operation, LOCALATTN_BACKWARD, params, query);
    return value;
}

#define WINDOW_SCHEMA \
    "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, bool raster_causal, str border"

TORCH_LIBRARY_FRAGMENT(localattn, library) {
    // With as_gradient, entries that are no key hold 0, as a gradient with respect to them does.
    library.def("similarity(Tensor query, Tensor key, " WINDOW_SCHEMA
                ", float? fill, bool as_gradient=False) -> Tensor");
    library.def("weighting(Tensor weights, Tensor value, " WINDOW_SCHEMA ") -> Tensor");
    library.def("weighting_transpose(Tensor weights, Tensor query, SymInt[] key_extent, " WINDOW_SCHEMA ") -> Tensor");
}

void implement(torch::Library &library) {
    library.impl("similarity", &similarity);
    library.impl("weighting", &weighting);
    library.impl("weighting_transpose", &weighting_transpose);
}
TORCH_LIBRARY_IMPL(localattn, CPU, library) { implement(library); }
TORCH_LIBRARY_IMPL(localattn, CUDA, library) { implement(library); }

}  // namespace
