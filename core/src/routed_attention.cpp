// routed_attention: checks and entry points.
#include "routed_attention.h"

#include <cmath>

#include "call.h"
#include "checks.h"

namespace localattn {

namespace {

// Regions per axis; region_size divides the extent.
void check_regions(const char *size_name, const char *extent_name, const int64_t (&size)[2], const int64_t (&extent)[2],
                   int64_t (&grid)[2]) {
    for (int a = 0; a < 2; ++a) {
        check_range(indexed(extent_name, a).text, extent[a], 0, largest_extent);
        check_range(indexed(size_name, a).text, size[a], 1, largest_extent);
        if (extent[a] % size[a] != 0) {
            fail(LOCALATTN_INVALID_ARGUMENT, "%s[%d] is %" PRId64 ", but must divide %s[%d], which is %" PRId64,
                 size_name, a, size[a], extent_name, a, extent[a]);
        }
        grid[a] = extent[a] / size[a];
    }
}

Steps<RoutedProblem> routed_attention(const localattn_routed_attention_params *given, Pass pass, Data data) {
    localattn_routed_attention_params p = copied(given, "params");
    check_dtype(p.dtype);
    check_range("reserved", p.reserved, 0, 0);
    check_flag("has_scale", p.has_scale);
    check_range("batch", p.batch, 0, largest_extent);
    check_range("heads", p.heads, 1, largest_extent);
    check_range("channels", p.channels, 1, largest_extent);
    check_range("value_channels", p.value_channels, 0, largest_extent);
    if (p.value_channels == 0) p.value_channels = p.channels;
    check_range("topk", p.topk, 0, largest_extent);
    for (int a = 0; a < 2; ++a) {
        if (p.kv_region_size[a] == 0) p.kv_region_size[a] = p.region_size[a];
    }
    RoutedProblem r;
    int64_t kv_grid[2];
    check_regions("region_size", "query_extent", p.region_size, p.query_extent, r.grid);
    check_regions("kv_region_size", "key_extent", p.kv_region_size, p.key_extent, kv_grid);
    for (int a = 0; a < 2; ++a) {
        if (kv_grid[a] != r.grid[a]) {
            fail(LOCALATTN_INVALID_ARGUMENT,
                 "kv_region_size[%d] is %" PRId64 ", which makes %" PRId64
                 " regions of the keys, but must make %" PRId64 ", as region_size makes of the queries",
                 a, p.kv_region_size[a], kv_grid[a], r.grid[a]);
        }
        r.query_region[a] = p.region_size[a];
        r.key_region[a] = p.kv_region_size[a];
    }

    const bool backward = pass == Pass::backward;
    const TensorCheck check(2, data);
    const int64_t size = element_size(p.dtype), wide = accumulated_size(p.dtype);
    const int64_t by_region[3] = {r.regions(), 1, 1};
    const Role result = backward ? Role::input : Role::result;
    check("query", p.query, Role::input, true, size, p.batch, p.query_extent, p.heads, p.channels);
    check("key", p.key, Role::input, true, size, p.batch, p.key_extent, p.heads, p.channels);
    check("value", p.value, Role::input, true, size, p.batch, p.key_extent, p.heads, p.value_channels);
    check("region_index", p.region_index, Role::input, true, 8, p.batch, by_region, 1, p.topk);
    check("region_weight", p.region_weight, Role::input, false, size, p.batch, by_region, 1, p.topk);
    check("output", p.output, result, true, size, p.batch, p.query_extent, p.heads, p.value_channels);
    check("lse", p.lse, result, backward, wide, p.batch, p.query_extent, p.heads, 1);
    if (backward) {
        check("grad_output", p.grad_output, Role::input, true, size, p.batch, p.query_extent, p.heads,
              p.value_channels);
        check("grad_lse", p.grad_lse, Role::input, false, wide, p.batch, p.query_extent, p.heads, 1);
        check("grad_query", p.grad_query, Role::result, false, size, p.batch, p.query_extent, p.heads, p.channels);
        check("grad_key", p.grad_key, Role::result, false, size, p.batch, p.key_extent, p.heads, p.channels);
        check("grad_value", p.grad_value, Role::result, false, size, p.batch, p.key_extent, p.heads, p.value_channels);
        check("grad_region_weight", p.grad_region_weight, Role::result, false, wide, p.batch, by_region, 1, p.topk);
        if (p.grad_region_weight.data && !p.region_weight.data && p.batch > 0 && r.regions() > 0 && p.topk > 0)
            fail(LOCALATTN_INVALID_ARGUMENT, "grad_region_weight is given, but region_weight.data is NULL");
    }

    r.pass = pass;
    r.dtype = static_cast<Dtype>(p.dtype);
    r.batch = p.batch;
    r.heads = p.heads;
    r.channels = p.channels;
    r.value_channels = p.value_channels;
    r.topk = p.topk;
    r.scale = p.has_scale ? p.scale : 1 / std::sqrt(static_cast<double>(p.channels));
    const auto full = [](const localattn_tensor &t) { return taken(t, 2, true, true, true); };
    const auto rows = [](const localattn_tensor &t) { return taken(t, 2, true, true, false); };
    const auto choices = [](localattn_tensor t) {
        t.spatial_stride[1] = 0;
        return taken(t, 2, true, false, true);
    };
    r.query = full(p.query);
    r.key = full(p.key);
    r.value = full(p.value);
    r.output = full(p.output);
    r.lse = rows(p.lse);
    r.grad_output = full(p.grad_output);
    r.grad_lse = rows(p.grad_lse);
    r.grad_query = full(p.grad_query);
    r.grad_key = full(p.grad_key);
    r.grad_value = full(p.grad_value);
    r.region_index = choices(p.region_index);
    r.region_weight = choices(p.region_weight);
    r.grad_region_weight = choices(p.grad_region_weight);
    return {&Variant::routed_attention,
            &cuda::Variant::routed_attention,
            {r},
            double(p.batch) * double(p.heads) * double(p.query_extent[0]) * double(p.query_extent[1]) *
                double(r.keys()) * double(p.topk) * double(p.channels + p.value_channels)};
}

}  // namespace

void check_data(const RoutedProblem &r) {
    for (int64_t b = 0; b < r.batch; ++b)
        for (int64_t region = 0; region < r.regions(); ++region)
            for (int64_t choice = 0; choice < r.topk; ++choice) {
                const int64_t index = r.index(b, region, choice);
                if (index >= 0 && index < r.regions()) continue;
                fail(LOCALATTN_INVALID_ARGUMENT,
                     "region_index at batch %" PRId64 ", region %" PRId64 ", choice %" PRId64 " is %" PRId64
                     ", but must be from 0 to %" PRId64,
                     b, region, choice, index, r.regions() - 1);
            }
}

}  // namespace localattn

using namespace localattn;

localattn_status localattn_routed_attention_forward(const localattn_context *context,
                                                    const localattn_routed_attention_params *params) {
    return run_call(context, params, Pass::forward, routed_attention);
}
localattn_status localattn_routed_attention_backward(const localattn_context *context,
                                                     const localattn_routed_attention_params *params) {
    return run_call(context, params, Pass::backward, routed_attention);
}
localattn_status localattn_routed_attention_workspace_size(const localattn_context *context,
                                                           const localattn_routed_attention_params *params,
                                                           localattn_pass pass, size_t *size) {
    return workspace_call(context, params, pass, size, routed_attention);
}
localattn_status localattn_routed_attention_variant(const localattn_context *context,
                                                    const localattn_routed_attention_params *params,
                                                    localattn_pass pass, const char **name, char *report,
                                                    size_t report_size) {
    return variant_call(context, params, pass, name, report, report_size, routed_attention);
}
