// How infinite scores pass a softmax. A score of +infinity makes the sum and the log-sum-exp +infinity and the output
// NaN; in the backward all weights of such a query are NaN. A score of -infinity has weight 0.
#pragma once
#include "gpu.h"

namespace localattn::cuda {

using namespace gpu;

constexpr float log2_of_e = 1.44269504f;

// The generic kernels take scores relative to the largest finite number at most.
GPU_FUNCTION float finite_score(float score) { return score > 3.402823466e38f ? 3.402823466e38f : score; }
GPU_FUNCTION double finite_score(double score) {
    return score > 1.7976931348623157e308 ? 1.7976931348623157e308 : score;
}

// The tiled kernels do so in base 2; `top` is -infinity before the first score.
GPU_FUNCTION float softmax_base(float top) { return fmaxf(fminf(top, 3.402823466e38f), -3.402823466e38f); }

template <class Real>
GPU_FUNCTION Real finite_lse(Real lse) {
    return lse == Real(INFINITY) ? Real(NAN) : lse;
}

}  // namespace localattn::cuda
