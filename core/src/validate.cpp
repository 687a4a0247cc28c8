#include "validate.h"

#include <cinttypes>

#include "checks.h"
#include "error.h"

namespace localattn {

namespace {

void check_size_fields(localattn_attention_params &p) {
    check_range("rank", p.rank, 1, 3);
    check_range("batch", p.batch, 0, largest_extent);
    check_range("heads", p.heads, 1, largest_extent);
    check_range("kv_heads", p.kv_heads, 0, largest_extent);
    if (p.kv_heads == 0) p.kv_heads = p.heads;
    if (p.heads % p.kv_heads != 0) {
        fail(LOCALATTN_INVALID_ARGUMENT, "kv_heads is %" PRId64 ", but must divide heads, which is %" PRId64,
             p.kv_heads, p.heads);
    }
    check_range("channels", p.channels, 1, largest_extent);
    check_range("value_channels", p.value_channels, 0, largest_extent);
    if (p.value_channels == 0) p.value_channels = p.channels;
}

void check_window(localattn_attention_params &p) {
    check_range("border", p.border, LOCALATTN_BORDER_MASK, LOCALATTN_BORDER_SHIFT);
    check_flag("raster_causal", p.raster_causal);
    check_flag("has_scale", p.has_scale);
    int64_t entries = 1;
    for (int a = 0; a < p.rank; ++a) {
        check_range(indexed("query_extent", a).text, p.query_extent[a], 0, largest_extent);
        check_range(indexed("key_extent", a).text, p.key_extent[a], 0, largest_extent);
        check_range(indexed("kernel_size", a).text, p.kernel_size[a], 1, largest_extent);
        if (p.stride[a] == 0) p.stride[a] = 1;
        check_range(indexed("stride", a).text, p.stride[a], 1, largest_extent);
        if (p.stride[a] > p.kernel_size[a]) {
            fail(LOCALATTN_INVALID_ARGUMENT,
                 "stride[%d] is %" PRId64 ", but must be at most kernel_size[%d], which is %" PRId64, a, p.stride[a], a,
                 p.kernel_size[a]);
        }
        if (p.dilation[a] == 0) p.dilation[a] = 1;
        check_range(indexed("dilation", a).text, p.dilation[a], 1, largest_extent);
        check_flag(indexed("is_causal", a).text, p.is_causal[a]);
        if (__builtin_mul_overflow(entries, p.kernel_size[a], &entries)) {
            fail(LOCALATTN_INVALID_ARGUMENT,
                 "kernel_size[%d] is %" PRId64 ", but the window's entries must not exceed 2^63-1", a,
                 p.kernel_size[a]);
        }
    }
    if (!p.raster_causal) return;
    if (p.border == LOCALATTN_BORDER_SHIFT) {
        fail(LOCALATTN_INVALID_ARGUMENT, "border is %d (shift), but must be mask or zero where causality is by raster",
             p.border);
    }
    for (int a = 0; a < p.rank; ++a) {
        if (p.kernel_size[a] % 2 == 0) {
            fail(LOCALATTN_INVALID_ARGUMENT,
                 "kernel_size[%d] is %" PRId64 ", but must be odd where causality is by raster", a, p.kernel_size[a]);
        }
        if (p.stride[a] != 1) {
            fail(LOCALATTN_INVALID_ARGUMENT, "stride[%d] is %" PRId64 ", but must be 1 where causality is by raster", a,
                 p.stride[a]);
        }
        if (p.is_causal[a]) {
            fail(LOCALATTN_INVALID_ARGUMENT, "is_causal[%d] is 1, but must be 0 where causality is by raster", a);
        }
    }
}

void check_tensors(const localattn_attention_params &p, Pass pass, Data data) {
    const TensorCheck check(p.rank, data);
    const bool backward = pass == Pass::backward;
    const int64_t size = element_size(p.dtype), wide_size = accumulated_size(p.dtype);

    int64_t entries = 1, table[3] = {1, 1, 1};
    for (int a = 0; a < p.rank; ++a) {
        entries *= p.kernel_size[a];
        table[a] = 2 * p.kernel_size[a] - 1;
    }
    const int64_t *queries = p.query_extent, *keys = p.key_extent;

    check("query", p.query, Role::input, true, size, p.batch, queries, p.heads, p.channels);
    check("key", p.key, Role::input, true, size, p.batch, keys, p.kv_heads, p.channels);
    check("value", p.value, Role::input, true, size, p.batch, keys, p.kv_heads, p.value_channels);
    check("bias", p.bias, Role::input, false, size, p.batch, queries, p.heads, entries);
    check("rel_pos_bias", p.rel_pos_bias, Role::input, false, size, 1, table, p.heads, 1);
    for (int a = 0; a < 3; ++a) {
        const FieldName name = indexed("axis_bias", a), gradient = indexed("grad_axis_bias", a);
        if (a >= p.rank) {
            if (p.axis_bias[a].data || (backward && p.grad_axis_bias[a].data)) {
                fail(LOCALATTN_INVALID_ARGUMENT, "%s is given, but rank is %d, so axes are 0 to %d",
                     p.axis_bias[a].data ? name.text : gradient.text, p.rank, p.rank - 1);
            }
            continue;
        }
        check(name.text, p.axis_bias[a], Role::input, false, size, p.batch, queries, p.heads, p.kernel_size[a]);
    }
    check("key_mask", p.key_mask, Role::input, false, 1, p.batch, keys, 1, 1);
    check("output", p.output, backward ? Role::input : Role::result, true, size, p.batch, queries, p.heads,
          p.value_channels);
    check("lse", p.lse, backward ? Role::input : Role::result, backward, wide_size, p.batch, queries, p.heads, 1);
    if (!backward) return;

    check("grad_output", p.grad_output, Role::input, true, size, p.batch, queries, p.heads, p.value_channels);
    check("grad_lse", p.grad_lse, Role::input, false, wide_size, p.batch, queries, p.heads, 1);
    check("grad_query", p.grad_query, Role::result, false, size, p.batch, queries, p.heads, p.channels);
    check("grad_key", p.grad_key, Role::result, false, size, p.batch, keys, p.kv_heads, p.channels);
    check("grad_value", p.grad_value, Role::result, false, size, p.batch, keys, p.kv_heads, p.value_channels);

    // A tensor without elements may be NULL although it is there.
    bool no_queries = p.batch == 0;
    for (int a = 0; a < p.rank; ++a) no_queries = no_queries || queries[a] == 0;
    const auto needs = [](const char *gradient, const localattn_tensor &g, const char *name,
                          const localattn_tensor &t) {
        if (g.data && !t.data) fail(LOCALATTN_INVALID_ARGUMENT, "%s is given, but %s.data is NULL", gradient, name);
    };
    if (!no_queries) needs("grad_bias", p.grad_bias, "bias", p.bias);
    needs("grad_rel_pos_bias", p.grad_rel_pos_bias, "rel_pos_bias", p.rel_pos_bias);
    check("grad_bias", p.grad_bias, Role::summed_result, false, wide_size, p.batch, queries, p.heads, entries);
    check("grad_rel_pos_bias", p.grad_rel_pos_bias, Role::summed_result, false, wide_size, 1, table, p.heads, 1);
    for (int a = 0; a < p.rank; ++a) {
        const FieldName name = indexed("axis_bias", a), gradient = indexed("grad_axis_bias", a);
        if (!no_queries) needs(gradient.text, p.grad_axis_bias[a], name.text, p.axis_bias[a]);
        check(gradient.text, p.grad_axis_bias[a], Role::summed_result, false, wide_size, p.batch, queries, p.heads,
              p.kernel_size[a]);
    }
}

}  // namespace

localattn_context checked_context(const localattn_context *given) {
    if (!given) return {};
    const localattn_context context = copied(given, "context");
    check_range("context.device_type", context.device_type, LOCALATTN_CPU, LOCALATTN_CUDA);
    if (const localattn_executor *executor = context.executor) {
        check_range("context.executor->num_workers", executor->num_workers, 1, INT32_MAX);
        if (!executor->run) fail(LOCALATTN_INVALID_ARGUMENT, "context.executor->run is NULL, but must be a function");
    }
    check_range("context.num_threads", context.num_threads, 0, INT32_MAX);
    check_range("context.reserved", context.reserved, 0, 0);
    if (!context.workspace && context.workspace_size) {
        fail(LOCALATTN_INVALID_ARGUMENT,
             "context.workspace is NULL, but context.workspace_size is %zu; without a workspace it must be 0",
             context.workspace_size);
    }
    if (reinterpret_cast<uintptr_t>(context.workspace) % 64 != 0) {
        fail(LOCALATTN_INVALID_ARGUMENT, "context.workspace is %p, but must be aligned to 64 bytes", context.workspace);
    }
    return context;
}

void check_window_fields(localattn_attention_params &p) {
    check_dtype(p.dtype);
    check_size_fields(p);
    check_window(p);
}

localattn_attention_params checked_params(const localattn_attention_params *given, Pass pass, Data data) {
    localattn_attention_params p = copied(given, "params");
    check_window_fields(p);
    check_tensors(p, pass, data);
    return p;
}

void check_workspace(const localattn_context &context, size_t needed) {
    if (context.workspace && context.workspace_size < needed) {
        fail(LOCALATTN_WORKSPACE_TOO_SMALL, "context.workspace_size is %zu, but must be at least %zu",
             context.workspace_size, needed);
    }
}

}  // namespace localattn
