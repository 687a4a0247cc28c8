// What a CUDA variant is: a constant record, as for the CPU. A new architecture is one file in arch/ that defines one,
// and one line in module.cpp's list.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../linear_attention.h"
#include "../problem.h"
#include "../routed_attention.h"
#include "../window_product.h"

namespace localattn::cuda {

// What a variant may depend on. Read from the driver once per call, never assumed.
struct Device {
    int32_t capability = 0;    // 90 is compute capability 9.0
    int64_t shared_bytes = 0;  // of shared memory that one block may ask for
};

// A variant's code for an operation other than attention, as below: the pass is part of the problem.
template <class OneProblem>
struct Kernel {
    const char *(*declines)(const OneProblem &, const Device &);
    size_t (*workspace)(const OneProblem &);
    const char *(*run)(const OneProblem &, void *stream, void *workspace);
};

struct Variant {
    const char *name;
    const char *description;
    int32_t capability;  // the least it runs on
    // NULL if the variant takes the problem on a device of that capability, else why not (a string constant).
    const char *(*declines)(const Problem &, Pass, const Device &);
    // Bytes of device memory, 64-byte aligned.
    size_t (*workspace)(const Problem &, Pass);
    // Puts every result's computation on the stream, on the current device. Returns NULL, or what the CUDA runtime says
    // went wrong. Extents may be zero.
    const char *(*run)(const Problem &, Pass, void *stream, void *workspace);
    // NULL: the variant does not have the operation.
    const Kernel<WindowProduct> *window_product = nullptr;
    const Kernel<LinearProblem> *linear_attention = nullptr;
    const Kernel<RoutedProblem> *routed_attention = nullptr;
};

// So many gradients of scores does the workspace of a tiled backward with gradients of biases hold, or those of one
// head of one batch: as much as stays in the cache of a large device. Tests lower it.
extern int64_t cached_score_gradients;

// Best first; `generic`, which declines nothing, last.
extern const Variant *const variants[];
extern const int32_t variant_count;

}  // namespace localattn::cuda
