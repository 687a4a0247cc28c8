// One routed attention problem as every variant sees it: validated, indices in range.
#pragma once
#include "problem.h"

namespace localattn {

struct RoutedProblem {
    Pass pass = Pass::forward;
    Dtype dtype = Dtype::float32;
    int64_t batch = 0, heads = 0, channels = 0, value_channels = 0;
    int64_t grid[2] = {0, 0};          // regions per axis, of both maps
    int64_t query_region[2] = {0, 0};  // pixels per axis
    int64_t key_region[2] = {0, 0};
    int64_t topk = 0;
    double scale = 1;

    // Maps: axis[1] and axis[2] are rows and columns.
    Tensor query, key, value, output, lse, grad_output, grad_lse, grad_query, grad_key, grad_value;
    Tensor region_index, region_weight, grad_region_weight;  // axis[1] is the query's region, channel the choice

    LOCALATTN_HOST_DEVICE_METHOD int64_t regions() const { return grid[0] * grid[1]; }
    LOCALATTN_HOST_DEVICE_METHOD int64_t queries() const { return query_region[0] * query_region[1]; }  // of a region
    LOCALATTN_HOST_DEVICE_METHOD int64_t keys() const { return key_region[0] * key_region[1]; }
    LOCALATTN_HOST_DEVICE_METHOD int64_t index(int64_t b, int64_t region, int64_t choice) const {
        return static_cast<const int64_t *>(region_index.data)[choice_offset(region_index, b, region, choice)];
    }
    LOCALATTN_HOST_DEVICE_METHOD static int64_t choice_offset(const Tensor &t, int64_t b, int64_t region,
                                                              int64_t choice) {
        return b * t.batch + region * t.axis[1] + choice * t.channel;
    }
    // Of the first pixel of a region of `size` pixels.
    LOCALATTN_HOST_DEVICE_METHOD int64_t region_offset(const Tensor &t, int64_t b, int64_t head, int64_t region,
                                                       const int64_t (&size)[2]) const {
        return b * t.batch + head * t.head + region / grid[1] * size[0] * t.axis[1] +
               region % grid[1] * size[1] * t.axis[2];
    }
};

// Without a query region no result has an element: the grid is that of the keys too.
inline bool is_empty(const RoutedProblem &p) { return p.batch == 0 || p.regions() == 0; }
inline void answer_empty(const RoutedProblem &) {}
// The only check that reads a tensor: an index out of range would be an address out of range. On a device the kernels
// check it.
void check_data(const RoutedProblem &);

}  // namespace localattn
