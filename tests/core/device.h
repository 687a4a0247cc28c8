// Where the tested variants run. The operators' tests are also compiled for CUDA: against the emulation (tests/cuda),
// whose memory is plain, and for a GPU (tests/gpu), where tensors lie in memory that host and device share.
#pragma once
#include <string>
#include <vector>

#include "localattn/localattn.h"
#if LOCALATTN_ON_GPU
#include "device_memory.h"
#endif

namespace test {

#if LOCALATTN_TEST_CUDA
constexpr int32_t tested_device = LOCALATTN_CUDA;
#else
constexpr int32_t tested_device = LOCALATTN_CPU;
#endif

inline int32_t device_of(const std::string &variant) {
    return variant.rfind("cuda_", 0) == 0 ? LOCALATTN_CUDA : LOCALATTN_CPU;
}

#if LOCALATTN_ON_GPU
constexpr bool on_gpu = true;
template <class T>
using Vector = localattn::cuda::DeviceVector<T>;
inline const char *finish_device() { return localattn::cuda::finish(); }
inline void require_device() { localattn::cuda::test_device(); }  // ends a program that is to be skipped
#else
constexpr bool on_gpu = false;
template <class T>
using Vector = std::vector<T>;
inline const char *finish_device() { return nullptr; }
inline void require_device() {}
#endif
using Bytes = Vector<unsigned char>;

}  // namespace test
