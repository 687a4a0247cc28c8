// From a dtype to its type.
#pragma once
#include "../problem.h"
#include "../scalar.h"

namespace localattn::cuda {

// Calls visit(a value of the dtype's type).
template <class Visit>
auto with_type(Dtype dtype, Visit visit) {
    switch (dtype) {
        case Dtype::float64:
            return visit(double());
        case Dtype::float16:
            return visit(float16());
        case Dtype::bfloat16:
            return visit(bfloat16());
        default:
            return visit(float());
    }
}

// The same, for the dtypes of tensor cores.
template <class Visit>
auto with_16_bits(Dtype dtype, Visit visit) {
    return dtype == Dtype::float16 ? visit(float16()) : visit(bfloat16());
}

}  // namespace localattn::cuda
