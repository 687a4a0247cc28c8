// What the operators' files share: tensors as the C API sees them, and checks.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <localattn/localattn.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "context.h"

namespace localattn_torch {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline localattn_dtype dtype_of(const Tensor &tensor, const char *name = "query") {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return LOCALATTN_FLOAT32;
        case at::kDouble:
            return LOCALATTN_FLOAT64;
        case at::kHalf:
            return LOCALATTN_FLOAT16;
        case at::kBFloat16:
            return LOCALATTN_BFLOAT16;
        default:
            TORCH_CHECK_TYPE(false, name, " must be float32, float64, float16 or bfloat16, got ", tensor.scalar_type());
    }
}

inline at::ScalarType accumulation_dtype(const Tensor &query) {
    return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// `tensor` has query's dtype, or the one told, and lies where query does.
inline void check_kind(const char *name, const Tensor &tensor, const Tensor &query,
                       std::optional<at::ScalarType> dtype = {}) {
    const at::ScalarType expected = dtype.value_or(query.scalar_type());
    TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, " must have dtype ", expected, ", got ",
                     tensor.scalar_type());
    TORCH_CHECK(tensor.device() == query.device(), name, " must be on ", query.device(),
                " like the other tensors, got ", tensor.device());
}

inline void check_shape(const char *name, const Tensor &tensor, at::IntArrayRef expected) {
    TORCH_CHECK_VALUE(tensor.sizes() == expected, name, " must have shape ", expected, ", got ", tensor.sizes());
}

inline void check_value(const Tensor &value, const Tensor &key) {
    Shape shape = key.sizes().vec();
    shape.back() = value.dim() ? value.size(-1) : 0;
    TORCH_CHECK_VALUE(value.sizes() == shape, "value must have the batch, extents and heads of key, ",
                      key.sizes().slice(0, key.dim() - 1), ", got shape ", value.sizes());
    TORCH_CHECK_VALUE(value.size(-1) > 0, "value must have at least 1 channel, got shape ", value.sizes());
}

// `tensor` seen in `shape`, with stride 0 along broadcast axes.
inline Tensor broadcast(const char *name, const Tensor &tensor, const Shape &shape) {
    bool fits = tensor.dim() <= static_cast<int64_t>(shape.size());
    for (int64_t i = 1; fits && i <= tensor.dim(); ++i) {
        fits = tensor.size(-i) == 1 || tensor.size(-i) == shape[shape.size() - i];
    }
    TORCH_CHECK_VALUE(fits, name, " must be broadcastable to shape ", at::IntArrayRef(shape), ", got ", tensor.sizes());
    return tensor.expand(shape);
}

// What the roles of a tensor's axes are; the spatial axes lie where the others leave room.
enum class Axes { batch_spatial_head_channel, batch_spatial_head, batch_spatial, head_spatial };

inline localattn_tensor described(const Tensor &tensor, Axes axes) {
    static char empty;  // what an empty tensor points to: NULL would say that it is absent
    const bool has_batch = axes != Axes::head_spatial;
    const int64_t after = axes == Axes::batch_spatial_head_channel ? 2 : axes == Axes::batch_spatial_head ? 1 : 0;
    localattn_tensor result{};
    result.data = tensor.numel() ? const_cast<void *>(tensor.const_data_ptr()) : &empty;
    for (int64_t i = 1; i < tensor.dim() - after; ++i) result.spatial_stride[i - 1] = tensor.stride(i);
    (has_batch ? result.batch_stride : result.head_stride) = tensor.stride(0);
    if (after >= 1) result.head_stride = tensor.stride(-after);
    if (after == 2) result.channel_stride = tensor.stride(-1);
    return result;
}

// An output for `channels` channels at `extents` (those of `like` unless told) in the memory order of `like` (batch,
// *spatial, heads, channels): channels-first where that is, otherwise contiguous. localattn/_fake.py says the same.
inline Tensor empty_ordered_as(const Tensor &like, int64_t channels, at::IntArrayRef extents = {}) {
    const int64_t rank = like.dim() - 3;
    if (extents.empty()) extents = like.sizes().slice(1, rank);
    const bool channels_first =
        like.size(-1) > 1 && like.size(rank) > 1 && like.stride(-1) != 1 && like.stride(rank) == 1;
    if (!channels_first) {
        Shape shape = like.sizes().vec();
        std::copy(extents.begin(), extents.end(), shape.begin() + 1);
        shape.back() = channels;
        return empty_result(shape, like.options());
    }
    Shape shape{like.size(0), like.size(-2), channels};
    Shape order{0};
    for (int64_t i = 1; i <= rank; ++i) {
        shape.push_back(extents[i - 1]);
        order.push_back(i + 2);
    }
    order.insert(order.end(), {1, 2});
    return empty_result(shape, like.options()).permute(order);
}

inline localattn_border border_named(const std::string &name) {
    if (name == "mask") return LOCALATTN_BORDER_MASK;
    if (name == "zero") return LOCALATTN_BORDER_ZERO;
    if (name == "shift") return LOCALATTN_BORDER_SHIFT;
    TORCH_CHECK_VALUE(false, "border must be 'mask', 'zero' or 'shift', got '", name, "'");
}

// The window's fields, of any of the params that have them.
template <class Params>
void set_window_params(Params &params, at::IntArrayRef query_extent, at::IntArrayRef key_extent,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,
                       const c10::List<bool> &is_causal) {
    const int64_t rank = static_cast<int64_t>(query_extent.size());
    const auto check_length = [&](const char *name, size_t length) {
        TORCH_CHECK_VALUE(static_cast<int64_t>(length) == rank, name, " must have one entry for each of the ", rank,
                          " spatial axes, got ", length);
    };
    check_length("kernel_size", kernel_size.size());
    check_length("stride", stride.size());
    check_length("dilation", dilation.size());
    check_length("is_causal", is_causal.size());
    for (int64_t a = 0; a < rank; ++a) {
        // The C API takes a zero of these for a default.
        TORCH_CHECK_VALUE(stride[a] != 0, "stride must be at least 1, got ", stride);
        TORCH_CHECK_VALUE(dilation[a] != 0, "dilation must be at least 1, got ", dilation);
        params.query_extent[a] = query_extent[a];
        params.key_extent[a] = key_extent[a];
        params.kernel_size[a] = kernel_size[a];
        params.stride[a] = stride[a];
        params.dilation[a] = dilation[a];
        params.is_causal[a] = is_causal[a];
    }
}

}  // namespace localattn_torch
