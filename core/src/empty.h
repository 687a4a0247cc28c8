// The problems without a query or without a key, whose results need no kernel. They are answered here, once, so that a
// variant's workspace() and run() never see an extent of zero.
#pragma once
#include "problem.h"

namespace localattn {

struct Extents {
    int64_t batch, axis[3], heads, channels;
};
// 0 and -infinity are all that is ever written, and a result's data is NULL only if nobody asked for it or it is empty.
void fill(const Tensor &, Dtype, float value, const Extents &);

bool is_empty(const Problem &problem);

// Writes every result that exists: zeros, and a log-sum-exp of -infinity.
void answer_empty(const Problem &problem, Pass pass);

}  // namespace localattn
