// One linear attention problem as every variant sees it: validated, rank 3, as problem.h has it for windows.
#pragma once
#include "problem.h"

namespace localattn {

struct LinearProblem {
    Pass pass = Pass::forward;
    Dtype dtype = Dtype::float32;
    int64_t batch = 0, heads = 0, channels = 0, value_channels = 0;
    int64_t queries[3] = {1, 1, 1}, keys[3] = {1, 1, 1};  // extents of the two maps

    Tensor query, key, value, key_mask, output;
    Tensor context;  // axis[2] is the key's channel
    Tensor key_lse;
    Tensor grad_output, grad_query, grad_key, grad_value;

    int64_t query_count() const { return queries[0] * queries[1] * queries[2]; }
    int64_t key_count() const { return keys[0] * keys[1] * keys[2]; }
};

// Without a batch no result has an element. Maps of no pixels are the kernels' to deal with.
inline bool is_empty(const LinearProblem &p) { return p.batch == 0; }
inline void answer_empty(const LinearProblem &) {}
inline void check_data(const LinearProblem &) {}

}  // namespace localattn
