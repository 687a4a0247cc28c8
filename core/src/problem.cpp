#include "problem.h"

#include <cmath>

#include "validate.h"

namespace localattn {

Tensor taken(const localattn_tensor &from, int32_t rank, bool batch, bool head, bool channel) {
    Tensor to;
    to.data = from.data;
    if (batch) to.batch = from.batch_stride;
    for (int a = 0; a < rank; ++a) to.axis[3 - rank + a] = from.spatial_stride[a];
    if (head) to.head = from.head_stride;
    if (channel) to.channel = from.channel_stride;
    return to;
}

Problem make_problem(const localattn_attention_params &p) {
    Problem problem;
    problem.dtype = static_cast<Dtype>(p.dtype);
    problem.rank = p.rank;
    problem.batch = p.batch;
    problem.heads = p.heads;
    problem.kv_heads = p.kv_heads;
    problem.channels = p.channels;
    problem.value_channels = p.value_channels;
    problem.raster = p.raster_causal != 0;
    problem.scale = p.has_scale ? p.scale : 1 / std::sqrt(static_cast<double>(p.channels));
    for (int a = 0; a < p.rank; ++a) {
        Axis &axis = problem.axis[3 - p.rank + a];
        axis.queries = p.query_extent[a];
        axis.keys = p.key_extent[a];
        axis.kernel = p.kernel_size[a];
        axis.stride = p.stride[a];
        axis.dilation = p.dilation[a];
        axis.causal = p.is_causal[a] != 0;
        axis.border = static_cast<Border>(p.border);
    }

    const auto full = [&p](const localattn_tensor &t) { return taken(t, p.rank, true, true, true); };
    const auto rows = [&p](const localattn_tensor &t) { return taken(t, p.rank, true, true, false); };
    const auto table = [&p](const localattn_tensor &t) { return taken(t, p.rank, false, true, false); };
    problem.query = full(p.query);
    problem.key = full(p.key);
    problem.value = full(p.value);
    problem.bias = full(p.bias);
    problem.rel_pos_bias = table(p.rel_pos_bias);
    problem.key_mask = taken(p.key_mask, p.rank, true, false, false);
    problem.output = full(p.output);
    problem.lse = rows(p.lse);
    problem.grad_output = full(p.grad_output);
    problem.grad_lse = rows(p.grad_lse);
    problem.grad_query = full(p.grad_query);
    problem.grad_key = full(p.grad_key);
    problem.grad_value = full(p.grad_value);
    problem.grad_bias = full(p.grad_bias);
    problem.grad_rel_pos_bias = table(p.grad_rel_pos_bias);
    for (int a = 0; a < p.rank; ++a) {
        problem.axis_bias[3 - p.rank + a] = full(p.axis_bias[a]);
        problem.grad_axis_bias[3 - p.rank + a] = full(p.grad_axis_bias[a]);
    }
    return problem;
}

}  // namespace localattn
