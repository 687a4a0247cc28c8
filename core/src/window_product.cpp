// similarity and weighting: checks, and the window products that their passes are.
#include "window_product.h"

#include <limits>

#include "call.h"
#include "checks.h"
#include "empty.h"

namespace localattn {

namespace {

// What both params hold of the window, as attention's, whose checks and meaning it shares.
template <class Params>
localattn_attention_params window_fields(const Params &p) {
    localattn_attention_params w{};
    w.dtype = p.dtype;
    w.rank = p.rank;
    w.batch = p.batch;
    w.heads = p.heads;
    w.channels = p.channels;
    for (int a = 0; a < 3; ++a) {
        w.query_extent[a] = p.query_extent[a];
        w.key_extent[a] = p.key_extent[a];
        w.kernel_size[a] = p.kernel_size[a];
        w.stride[a] = p.stride[a];
        w.dilation[a] = p.dilation[a];
        w.is_causal[a] = p.is_causal[a];
    }
    w.raster_causal = p.raster_causal;
    w.border = p.border;
    check_window_fields(w);
    return w;
}

// The checks of the two operations' tensors, by what axes they have.
class Checks {
public:
    Checks(const localattn_attention_params &p, Data data)
        : p_(p), check_(p.rank, data), size_(element_size(p.dtype)), entries_(1) {
        for (int a = 0; a < p.rank; ++a) entries_ *= p.kernel_size[a];
        if (p.raster_causal) entries_ = entries_ / 2 + 1;
    }
    void at_queries(const char *name, const localattn_tensor &t, Role role, bool required) const {
        check_(name, t, role, required, size_, p_.batch, p_.query_extent, p_.heads, p_.channels);
    }
    void at_keys(const char *name, const localattn_tensor &t, Role role, bool required) const {
        check_(name, t, role, required, size_, p_.batch, p_.key_extent, p_.heads, p_.channels);
    }
    void entries(const char *name, const localattn_tensor &t, Role role, bool required) const {
        check_(name, t, role, required, size_, p_.batch, p_.query_extent, p_.heads, entries_);
    }

private:
    const localattn_attention_params &p_;
    TensorCheck check_;
    int64_t size_, entries_;
};

WindowProduct product_of(const localattn_attention_params &w, Product product, const localattn_tensor &at_queries,
                         const localattn_tensor &at_keys, const localattn_tensor &entries) {
    WindowProduct p;
    static_cast<Problem &>(p) = make_problem(w);
    p.value_channels = 0;
    p.product = product;
    p.query = taken(at_queries, w.rank, true, true, true);
    p.key = taken(at_keys, w.rank, true, true, true);
    p.entries = taken(entries, w.rank, true, true, true);
    return p;
}

Steps<WindowProduct> steps_of(std::vector<WindowProduct> products) {
    Steps<WindowProduct> steps{&Variant::window_product, &cuda::Variant::window_product, std::move(products), 0};
    for (const WindowProduct &p : steps.problems) {
        double work = double(p.batch) * double(p.heads) * double(p.channels);
        for (const Axis &a : p.axis) work *= double(a.queries) * double(std::min(a.kernel, a.keys));
        steps.multiplications = std::max(steps.multiplications, work);
    }
    return steps;
}

Steps<WindowProduct> similarity(const localattn_similarity_params *given, Pass pass, Data data) {
    const localattn_similarity_params p = copied(given, "params");
    const localattn_attention_params w = window_fields(p);
    check_flag("has_fill", p.has_fill);
    const Checks check(w, data);
    const bool forward = pass == Pass::forward;
    check.at_queries("query", p.query, Role::input, forward || p.grad_key.data);
    check.at_keys("key", p.key, Role::input, forward || p.grad_query.data);
    std::vector<WindowProduct> products;
    if (forward) {
        check.entries("scores", p.scores, Role::result, true);
        const double lowest = -std::numeric_limits<double>::infinity();
        products.push_back(product_of(w, Product::score, p.query, p.key, p.scores));
        products[0].outside = p.has_fill ? p.fill : w.border == LOCALATTN_BORDER_ZERO ? 0 : lowest;
        products[0].absent = lowest;
        return steps_of(std::move(products));
    }
    check.entries("grad_scores", p.grad_scores, Role::input, true);
    check.at_queries("grad_query", p.grad_query, Role::result, false);
    check.at_keys("grad_key", p.grad_key, Role::result, false);
    if (p.grad_query.data) products.push_back(product_of(w, Product::weigh, p.grad_query, p.key, p.grad_scores));
    if (p.grad_key.data) products.push_back(product_of(w, Product::transposed, p.query, p.grad_key, p.grad_scores));
    return steps_of(std::move(products));
}

Steps<WindowProduct> weighting(const localattn_weighting_params *given, Pass pass, Data data) {
    const localattn_weighting_params p = copied(given, "params");
    const localattn_attention_params w = window_fields(p);
    check_range("reserved", p.reserved, 0, 0);
    const Checks check(w, data);
    const bool forward = pass == Pass::forward;
    check.entries("weights", p.weights, Role::input, forward || p.grad_value.data);
    check.at_keys("value", p.value, Role::input, forward || p.grad_weights.data);
    std::vector<WindowProduct> products;
    if (forward) {
        check.at_queries("output", p.output, Role::result, true);
        products.push_back(product_of(w, Product::weigh, p.output, p.value, p.weights));
        return steps_of(std::move(products));
    }
    check.at_queries("grad_output", p.grad_output, Role::input, true);
    check.entries("grad_weights", p.grad_weights, Role::result, false);
    check.at_keys("grad_value", p.grad_value, Role::result, false);
    if (p.grad_weights.data) products.push_back(product_of(w, Product::score, p.grad_output, p.value, p.grad_weights));
    if (p.grad_value.data)
        products.push_back(product_of(w, Product::transposed, p.grad_output, p.grad_value, p.weights));
    return steps_of(std::move(products));
}

}  // namespace

bool is_empty(const WindowProduct &p) { return is_empty(static_cast<const Problem &>(p)); }

void answer_empty(const WindowProduct &p) {
    const auto at_queries = [&](int64_t channels) {
        return Extents{p.batch, {p.axis[0].queries, p.axis[1].queries, p.axis[2].queries}, p.heads, channels};
    };
    switch (p.product) {
        case Product::score:  // an empty map has no outside: every entry is absent
            return fill(p.entries, p.dtype, static_cast<float>(p.absent), at_queries(p.entry_count()));
        case Product::weigh:
            return fill(p.query, p.dtype, 0, at_queries(p.channels));
        case Product::transposed:
            return fill(p.key, p.dtype, 0,
                        {p.batch, {p.axis[0].keys, p.axis[1].keys, p.axis[2].keys}, p.heads, p.channels});
    }
}

}  // namespace localattn

using namespace localattn;

localattn_status localattn_similarity_forward(const localattn_context *context,
                                              const localattn_similarity_params *params) {
    return run_call(context, params, Pass::forward, similarity);
}
localattn_status localattn_similarity_backward(const localattn_context *context,
                                               const localattn_similarity_params *params) {
    return run_call(context, params, Pass::backward, similarity);
}
localattn_status localattn_similarity_workspace_size(const localattn_context *context,
                                                     const localattn_similarity_params *params, localattn_pass pass,
                                                     size_t *size) {
    return workspace_call(context, params, pass, size, similarity);
}
localattn_status localattn_similarity_variant(const localattn_context *context,
                                              const localattn_similarity_params *params, localattn_pass pass,
                                              const char **name, char *report, size_t report_size) {
    return variant_call(context, params, pass, name, report, report_size, similarity);
}

localattn_status localattn_weighting_forward(const localattn_context *context,
                                             const localattn_weighting_params *params) {
    return run_call(context, params, Pass::forward, weighting);
}
localattn_status localattn_weighting_backward(const localattn_context *context,
                                              const localattn_weighting_params *params) {
    return run_call(context, params, Pass::backward, weighting);
}
localattn_status localattn_weighting_workspace_size(const localattn_context *context,
                                                    const localattn_weighting_params *params, localattn_pass pass,
                                                    size_t *size) {
    return workspace_call(context, params, pass, size, weighting);
}
localattn_status localattn_weighting_variant(const localattn_context *context, const localattn_weighting_params *params,
                                             localattn_pass pass, const char **name, char *report, size_t report_size) {
    return variant_call(context, params, pass, name, report, report_size, weighting);
}
