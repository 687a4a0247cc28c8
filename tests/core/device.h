// Where the tested variants run. The operators' tests are also compiled for CUDA: against the emulation (tests/cuda),
// whose memory is plain, and for a GPU (tests/gpu), where tensors lie in memory that host and device share.
#pragma once
#include <cstddef>
#include <new>
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
// As an allocator of tensors does: what it returns begins a cache line.
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U> &) {}
    T *allocate(size_t n) { return static_cast<T *>(::operator new(n * sizeof(T), std::align_val_t{64})); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t{64}); }
    bool operator==(const LineAllocator &) const { return true; }
    bool operator!=(const LineAllocator &) const { return false; }
};
template <class T>
using Vector = std::vector<T, LineAllocator<T>>;
inline const char *finish_device() { return nullptr; }
inline void require_device() {}
#endif
using Bytes = Vector<unsigned char>;

}  // namespace test
