#include "empty.h"

#include <limits>

#include "scalar.h"

namespace localattn {

namespace {

// A stride of 0 is an axis that the caller's tensor does not have (a bias that is broadcast), so it holds one element
// there even where the problem's extent is 0.
int64_t elements(int64_t extent, int64_t stride) { return stride == 0 ? 1 : extent; }

template <class T>
void fill_typed(const Tensor &t, float value, int64_t batch, const int64_t (&axis)[3], int64_t heads,
                int64_t channels) {
    T *data = static_cast<T *>(t.data);
    for (int64_t b = 0; b < elements(batch, t.batch); ++b)
        for (int64_t i = 0; i < elements(axis[0], t.axis[0]); ++i)
            for (int64_t j = 0; j < elements(axis[1], t.axis[1]); ++j)
                for (int64_t k = 0; k < elements(axis[2], t.axis[2]); ++k)
                    for (int64_t h = 0; h < elements(heads, t.head); ++h)
                        for (int64_t c = 0; c < elements(channels, t.channel); ++c)
                            store_from(value, data + b * t.batch + i * t.axis[0] + j * t.axis[1] + k * t.axis[2] +
                                                  h * t.head + c * t.channel);
}

}  // namespace

void fill(const Tensor &t, Dtype dtype, float value, const Extents &e) {
    if (!t.data) return;
    switch (dtype) {
        case Dtype::float32:
            return fill_typed<float>(t, value, e.batch, e.axis, e.heads, e.channels);
        case Dtype::float64:
            return fill_typed<double>(t, value, e.batch, e.axis, e.heads, e.channels);
        case Dtype::float16:
            return fill_typed<float16>(t, value, e.batch, e.axis, e.heads, e.channels);
        case Dtype::bfloat16:
            return fill_typed<bfloat16>(t, value, e.batch, e.axis, e.heads, e.channels);
    }
}

bool is_empty(const Problem &p) {
    bool empty = p.batch == 0;
    for (const Axis &a : p.axis) empty = empty || a.queries == 0 || a.keys == 0;
    return empty;
}

void answer_empty(const Problem &p, Pass pass) {
    const Dtype wide = p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    const Axis *x = p.axis;
    const auto at_queries = [&](int64_t heads, int64_t channels) {
        return Extents{p.batch, {x[0].queries, x[1].queries, x[2].queries}, heads, channels};
    };
    const auto at_keys = [&](int64_t channels) {
        return Extents{p.batch, {x[0].keys, x[1].keys, x[2].keys}, p.kv_heads, channels};
    };
    if (pass == Pass::forward) {
        fill(p.output, p.dtype, 0, at_queries(p.heads, p.value_channels));
        fill(p.lse, wide, -std::numeric_limits<float>::infinity(), at_queries(p.heads, 1));
        return;
    }
    fill(p.grad_query, p.dtype, 0, at_queries(p.heads, p.channels));
    fill(p.grad_key, p.dtype, 0, at_keys(p.channels));
    fill(p.grad_value, p.dtype, 0, at_keys(p.value_channels));
    fill(p.grad_bias, wide, 0, at_queries(p.heads, x[0].kernel * x[1].kernel * x[2].kernel));
    fill(p.grad_rel_pos_bias, wide, 0,
         {1, {2 * x[0].kernel - 1, 2 * x[1].kernel - 1, 2 * x[2].kernel - 1}, p.heads, 1});
    for (int a = 0; a < 3; ++a) fill(p.grad_axis_bias[a], wide, 0, at_queries(p.heads, x[a].kernel));
}

}  // namespace localattn
