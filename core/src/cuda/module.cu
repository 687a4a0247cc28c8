// The one symbol of liblocalattn_cuda.so.
#include "module.h"

#include <cuda_runtime_api.h>

#include <cstdio>

#include "capability.h"
#include "cuda/build.h"

namespace localattn::cuda {

namespace {

constexpr int built[] = {LOCALATTN_CUDA_CAPABILITIES};
thread_local char sentence[512];

const char *explain(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return nullptr;
        case cudaErrorInsufficientDriver: {
            int driver = 0;
            cudaDriverGetVersion(&driver);
            if (driver == 0) return "no NVIDIA driver was found; install one, or use CPU tensors";
            std::snprintf(
                sentence, sizeof sentence,
                "the NVIDIA driver supports CUDA %d.%d and this build needs %d.%d; install a newer driver, or a "
                "build of localattn for an older CUDA",
                driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
            return sentence;
        }
        case cudaErrorNoDevice:
            return "the NVIDIA driver shows no GPU to this process (is CUDA_VISIBLE_DEVICES set?)";
        default:
            std::snprintf(sentence, sizeof sentence, "the CUDA runtime says: %s", cudaGetErrorString(error));
            return sentence;
    }
}

const char *open_device(int32_t index, Device *device) {
    int count = 0;
    if (const char *problem = explain(cudaGetDeviceCount(&count))) return problem;
    if (index < 0 || index >= count) {
        std::snprintf(sentence, sizeof sentence, "device %d was asked for and there are %d", int(index), count);
        return sentence;
    }
    int major = 0, minor = 0, shared = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error) return explain(error);
    if (!runs_on(built, sizeof built / sizeof *built, 10 * major + minor)) {
        std::snprintf(
            sentence, sizeof sentence,
            "device %d has compute capability %d.%d, for which this build (%s) holds no code; install a "
            "localattn package for another CUDA (those for CUDA 12 serve 7.0 and later, those for CUDA 13 7.5 "
            "and later), or build with -DLOCALATTN_CUDA_ARCHITECTURES=%d",
            int(index), major, minor, LOCALATTN_CUDA_BUILD, 10 * major + minor);
        return sentence;
    }
    *device = {10 * major + minor, shared};
    return nullptr;
}

const char *make_current(int32_t index, int32_t *previous) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (!error && current != index) error = cudaSetDevice(index);
    *previous = current;
    return explain(error);
}

}  // namespace

}  // namespace localattn::cuda

extern "C" __attribute__((visibility("default"))) const localattn::cuda::Module *localattn_cuda_module() {
    using namespace localattn::cuda;
    static const Module module = {module_interface, LOCALATTN_CUDA_BUILD, variants,
                                  variant_count,    open_device,          make_current};
    return &module;
}
