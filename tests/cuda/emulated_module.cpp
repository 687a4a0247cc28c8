// liblocalattn_cuda.so without a GPU: the emulated kernels behind the C API, as a device like an H100 or H200.
#include "cuda/module.h"

namespace localattn::cuda {

namespace {

const char *open_device(int32_t index, Device *device) {
    if (index != 0) return "there is one emulated device, number 0";
    *device = {90, 227 << 10};
    return nullptr;
}

const char *make_current(int32_t, int32_t *previous) {
    *previous = 0;
    return nullptr;
}

}  // namespace

}  // namespace localattn::cuda

extern "C" __attribute__((visibility("default"))) const localattn::cuda::Module *localattn_cuda_module() {
    using namespace localattn::cuda;
    static const Module module = {module_interface, "emulation", variants, variant_count, open_device, make_current};
    return &module;
}
