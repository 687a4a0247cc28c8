// The window rule seen from a key: which queries have it in their window. Backward kernels gather over it, so that no
// two threads ever add to the same gradient.
#pragma once
#include "../window.h"
#include "gpu.h"

namespace localattn::cuda {

// The first query whose centre is at least `centre`.
GPU_FUNCTION int64_t first_query_at(const Axis &axis, int64_t centre) {
    const int64_t above = 2 * centre * axis.queries - axis.keys;  // centre_of(i) >= centre  <=>  2 i keys >= above
    return above <= 0 ? 0 : (above + 2 * axis.keys - 1) / (2 * axis.keys);
}

// Calls visit(query, window, entry) for every query that has `key` among its keys, in increasing order. A window never
// reaches kernel keys of its class away from its centre, whatever the border, stride or causality.
template <class Visit>
GPU_FUNCTION void for_each_query_of_key(const Axis &axis, int64_t key, Visit visit) {
    const int64_t reach = axis.kernel - 1 < key / axis.dilation ? axis.kernel - 1 : key / axis.dilation;
    const int64_t last = key + axis.dilation * (axis.kernel - 1);
    for (int64_t centre = key - axis.dilation * reach; centre <= last && centre < axis.keys; centre += axis.dilation) {
        int64_t end = first_query_at(axis, centre + 1);
        if (end > axis.queries) end = axis.queries;
        for (int64_t query = first_query_at(axis, centre); query < end; ++query) {
            const Window window = window_of(axis, query);
            const int64_t entry = key / axis.dilation - window.start;
            if (entry >= window.begin && entry < window.end) visit(query, window, entry);
        }
    }
}

}  // namespace localattn::cuda
