// The only machine a kernel sees: threads, barriers, warp collectives, shared memory, asynchronous copies, tensor-core
// products. nvcc compiles these calls to PTX (gpu_device.h); every other compiler gets the emulation of emulation/,
// which runs the same kernel sources on the host and checks what they do.
//
// Shared memory is addressed by a 32-bit SharedAddress, never by pointer, so that the emulation sees every access.
// Matrix fragments are those of PTX mma.m16n8k16 and ldmatrix.
#pragma once
#if defined(__CUDACC__)
#include "gpu_device.h"
#else
#include "emulation/gpu_host.h"
#endif

namespace localattn::gpu {

// The type that sums are accumulated in.
template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

GPU_FUNCTION int lane_index() { return thread_index() % warp_size; }

// A number of one or two words in shared memory.
template <class Real>
GPU_FUNCTION void store_shared_number(SharedAddress to, Real value) {
    uint32_t words[sizeof(Real) / 4];
    memcpy(words, &value, sizeof value);
    GPU_UNROLL_FOR (SharedAddress i = 0; i < sizeof(Real) / 4; ++i) store_shared(to + 4 * i, words[i]);
}
template <class Real>
GPU_FUNCTION Real load_shared_number(SharedAddress from) {
    uint32_t words[sizeof(Real) / 4];
    GPU_UNROLL_FOR (SharedAddress i = 0; i < sizeof(Real) / 4; ++i) words[i] = load_shared(from + 4 * i);
    Real value;
    memcpy(&value, words, sizeof value);
    return value;
}

}  // namespace localattn::gpu
