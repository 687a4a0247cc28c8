// Where a test's tensors live: plain memory under the emulation, memory that host and device share on a GPU.
#pragma once
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "cuda/variant.h"

#if LOCALATTN_ON_GPU
#include <cuda_runtime_api.h>
#endif

namespace localattn::cuda {

#if LOCALATTN_ON_GPU
constexpr bool on_gpu = true;
#else
constexpr bool on_gpu = false;
#endif

template <class T>
struct DeviceAllocator {
    using value_type = T;
    DeviceAllocator() = default;
    template <class Other>
    DeviceAllocator(const DeviceAllocator<Other> &) {}
    T *allocate(size_t count) {
        void *memory = nullptr;
#if LOCALATTN_ON_GPU
        if (cudaMallocManaged(&memory, count * sizeof(T) + 1) != cudaSuccess) memory = nullptr;
#else
        memory = std::aligned_alloc(256, (count * sizeof(T) + 256) / 256 * 256);
#endif
        if (!memory) throw std::bad_alloc();
        return static_cast<T *>(memory);
    }
    void deallocate(T *memory, size_t) {
#if LOCALATTN_ON_GPU
        cudaFree(memory);
#else
        std::free(memory);
#endif
    }
    bool operator==(const DeviceAllocator &) const { return true; }
    bool operator!=(const DeviceAllocator &) const { return false; }
};

template <class T>
using DeviceVector = std::vector<T, DeviceAllocator<T>>;

// Waits for what was launched. NULL, or what went wrong.
inline const char *finish() {
#if LOCALATTN_ON_GPU
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
    return nullptr;
}

constexpr int no_device_exit_code = 77;  // CTest takes it for a skipped test

// The device that the tests run on; ends the program, saying why, if there is none.
inline Device test_device() {
#if LOCALATTN_ON_GPU
    int count = 0, major = 0, minor = 0, shared = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        std::printf("skipped: no usable GPU (%s)\n", cudaGetErrorString(error));
        std::exit(no_device_exit_code);
    }
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    return {10 * major + minor, shared};
#else
    return {90, 227 << 10};  // as an H100 or H200
#endif
}

}  // namespace localattn::cuda
