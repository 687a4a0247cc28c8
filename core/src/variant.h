// What a variant is: a constant record. Adding an instruction set is one file that defines such a record, one line in
// dispatch.cpp's list and one in CMakeLists.txt.
#pragma once
#include <cstddef>
#include <cstdint>

#include "linear_attention.h"
#include "problem.h"
#include "routed_attention.h"
#include "window_product.h"

namespace localattn {

// The CPU features that variants may require; cpu_features.cpp probes them, in baseline code.
enum CpuFeature : uint32_t {
    cpu_avx2 = 1u << 0,
    cpu_fma = 1u << 1,
    cpu_f16c = 1u << 2,
    cpu_avx512 = 1u << 3,  // F, BW, DQ and VL
    cpu_avx512_bf16 = 1u << 4,
};

// Runs body(argument, i) for i in [0, tasks) on the call's workers; see parallel.h for who provides them.
struct Workers {
    int32_t count = 1;
    void (*run)(const Workers &self, int32_t tasks, void (*body)(void *argument, int32_t index), void *argument);
    const void *implementation = nullptr;
};

// A variant's code for an operation other than attention: the pass is part of the problem.
template <class OneProblem>
struct Kernel {
    size_t (*workspace)(const OneProblem &, int32_t workers) = nullptr;
    void (*run)(const OneProblem &, const Workers &, void *workspace) = nullptr;  // NULL: the variant does not have it
};

struct Variant {
    const char *name;
    const char *description;
    uint32_t cpu_features;
    // NULL if the variant takes the problem, else why not (a string constant).
    const char *(*declines)(const Problem &, Pass);
    size_t (*workspace)(const Problem &, Pass, int32_t workers);
    // Writes every result. `workspace` has the size asked for and is 64-byte aligned. Cannot fail: what could is
    // declined.
    void (*run)(const Problem &, Pass, const Workers &, void *workspace);
    Kernel<WindowProduct> window_product{};
    Kernel<LinearProblem> linear_attention{};
    Kernel<RoutedProblem> routed_attention{};
};

}  // namespace localattn
