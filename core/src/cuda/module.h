// What liblocalattn and liblocalattn_cuda.so say to each other. The kernels are a library of their own, with the CUDA
// runtime inside, that the first CUDA call opens: liblocalattn needs neither driver nor CUDA to be loaded.
#pragma once
#include <cstdint>

#include "variant.h"

namespace localattn::cuda {

// Raise it with every change of Module, Variant, Device or a problem: both libraries must come from one build.
constexpr int32_t module_interface = 2;

struct Module {
    int32_t interface;
    const char *build;  // toolkit and architectures
    const Variant *const *variants;
    int32_t variant_count;
    // These return NULL or a sentence that says what is wrong and what to do; it lives until the thread's next call.
    const char *(*open_device)(int32_t index, Device *device);
    // Makes a device current for the calling thread and tells which was.
    const char *(*make_current)(int32_t index, int32_t *previous);
};

constexpr const char *module_file = "liblocalattn_cuda.so";
constexpr const char *module_symbol = "localattn_cuda_module";

}  // namespace localattn::cuda
