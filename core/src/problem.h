// One attention problem as every variant sees it: validated, rank 3, defaults filled in. Made by problem.cpp from the
// public params; 1D and 2D problems have leading axes of extent 1, so axis[2] is always the fastest spatial axis.
#pragma once
#include <cstddef>
#include <cstdint>

#include "window.h"

namespace localattn {

enum class Dtype : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

struct Tensor {
    void *data = nullptr;
    int64_t batch = 0;  // element strides
    int64_t axis[3] = {0, 0, 0};
    int64_t head = 0;
    int64_t channel = 0;  // or window entry
};

enum class Pass : int32_t { forward = 0, backward = 1 };

struct Problem {
    Dtype dtype = Dtype::float32;
    int32_t rank = 2;  // as the caller gave it: the last `rank` axes are real
    int64_t batch = 0;
    int64_t heads = 0;
    int64_t kv_heads = 0;
    int64_t channels = 0;
    int64_t value_channels = 0;
    Axis axis[3];
    bool raster = false;
    double scale = 1;

    Tensor query, key, value, bias, rel_pos_bias, axis_bias[3], key_mask, output, lse;
    Tensor grad_output, grad_lse, grad_query, grad_key, grad_value;
    Tensor grad_bias, grad_rel_pos_bias, grad_axis_bias[3];

    bool has_bias() const {
        return bias.data || rel_pos_bias.data || axis_bias[0].data || axis_bias[1].data || axis_bias[2].data;
    }
    bool wants_bias_gradient() const {
        return grad_bias.data || grad_rel_pos_bias.data || grad_axis_bias[0].data || grad_axis_bias[1].data ||
               grad_axis_bias[2].data;
    }
};

}  // namespace localattn
