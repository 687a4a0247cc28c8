// liblocalattn_cuda.so without a GPU: the emulated kernels behind the C API, as two devices like an H100 or H200.
#include "cuda/gpu.h"
#include "cuda/module.h"

namespace localattn::cuda {

namespace {

const char *open_device(int32_t index, Device *device) {
    if (index != 0 && index != 1) return "there are two emulated devices, number 0 and 1";
    *device = {90, 227 << 10};
    return nullptr;
}

const char *make_current(int32_t index, int32_t *previous) {
    *previous = gpu::emulation::current_device;
    gpu::emulation::current_device = index;
    return nullptr;
}

}  // namespace

}  // namespace localattn::cuda

extern "C" __attribute__((visibility("default"))) const localattn::cuda::Module *localattn_cuda_module() {
    using namespace localattn::cuda;
    static const Module module = {module_interface, "emulation", variants, variant_count, open_device, make_current};
    return &module;
}

// Where the last kernel was launched, for tests.
extern "C" __attribute__((visibility("default"))) void *localattn_emulated_stream() {
    return localattn::gpu::emulation::last_launch.stream;
}
extern "C" __attribute__((visibility("default"))) int32_t localattn_emulated_device() {
    return localattn::gpu::emulation::last_launch.device;
}
