// gpu.h for nvcc: each call is one PTX instruction or one CUDA intrinsic.
#pragma once
#include "gpu_types.h"

#define GPU_KERNEL [[maybe_unused]] static __global__
#define GPU_FUNCTION static __device__ __forceinline__
#define GPU_METHOD __device__ __forceinline__
#define GPU_ARGUMENT const __grid_constant__
#define GPU_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define GPU_UNROLL_FOR _Pragma("unroll") for
#define GPU_TABLE __device__ const

// The device's, which assert.h declares only where assertions are on.
extern "C" __host__ __device__ void __assert_fail(const char *, const char *, unsigned, const char *) noexcept;

namespace localattn::gpu {

GPU_FUNCTION int thread_index() { return int(threadIdx.x); }
GPU_FUNCTION Extent3 block_index() { return {int32_t(blockIdx.x), int32_t(blockIdx.y), int32_t(blockIdx.z)}; }
GPU_FUNCTION Extent3 grid_extent() { return {int32_t(gridDim.x), int32_t(gridDim.y), int32_t(gridDim.z)}; }
GPU_FUNCTION int block_threads() { return int(blockDim.x); }
GPU_FUNCTION void synchronize() { __syncthreads(); }

GPU_FUNCTION bool any_in_warp(bool condition) { return __any_sync(~0u, condition); }
// Bit l: lane l's condition.
GPU_FUNCTION uint32_t ballot(bool condition) { return __ballot_sync(~0u, condition); }
GPU_FUNCTION int count_bits(uint32_t bits) { return __popc(bits); }
GPU_FUNCTION float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
// A value that is the same in all lanes, so that the compiler knows it, too: branches on it need no convergence.
GPU_FUNCTION int uniform(int value) { return __shfl_sync(~0u, value, 0); }
// The same value, of which the compiler knows nothing: what follows from it is not computed ahead.
GPU_FUNCTION int64_t opaque(int64_t value) {
    asm volatile("" : "+l"(value));
    return value;
}
GPU_FUNCTION int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
// A butterfly over groups of so many neighbouring lanes: the same bits in every lane of a group.
template <int group = warp_size, class Real>
GPU_FUNCTION Real warp_sum(Real value) {
    GPU_UNROLL_FOR (int lanes = group / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}
template <class Real>
GPU_FUNCTION Real warp_max(Real value) {
    GPU_UNROLL_FOR (int lanes = warp_size / 2; lanes > 0; lanes /= 2) {
        const Real other = __shfl_xor_sync(~0u, value, lanes);
        value = other > value ? other : value;
    }
    return value;
}

extern __shared__ __align__(1024) char dynamic_shared_memory[];
GPU_FUNCTION SharedAddress shared_memory() { return SharedAddress(__cvta_generic_to_shared(dynamic_shared_memory)); }
GPU_FUNCTION uint32_t load_shared(SharedAddress from) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}
GPU_FUNCTION void load_shared(float (&values)[4], SharedAddress from) {  // 16 bytes, aligned to 16
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(from)
                 : "memory");
}
GPU_FUNCTION void store_shared(SharedAddress to, const float (&values)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]),
                 "f"(values[3])
                 : "memory");
}
GPU_FUNCTION void store_shared(SharedAddress to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

GPU_FUNCTION void load_matrix(uint32_t (&registers)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
}
GPU_FUNCTION void load_matrix_transposed(uint32_t (&registers)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
}

#define LOCALATTN_MULTIPLY_ADD(Type, NAME)                                                                  \
    GPU_FUNCTION void multiply_add(Type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                 \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                           \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                       \
    }
LOCALATTN_MULTIPLY_ADD(bfloat16, "bf16")
LOCALATTN_MULTIPLY_ADD(float16, "f16")
#undef LOCALATTN_MULTIPLY_ADD

// 16 bytes, or zeros when !inside (the source is then not read). Before compute capability 8.0 the thread waits for
// them.
GPU_FUNCTION void copy_async(SharedAddress to, const void *from, bool inside) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(inside ? 16 : 0)
                 : "memory");
#else
    const uint4 value = inside ? __ldg(static_cast<const uint4 *>(from)) : uint4{0, 0, 0, 0};
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
#endif
}
GPU_FUNCTION void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's newest groups are in flight.
template <int pending>
GPU_FUNCTION void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

GPU_FUNCTION uint32_t load_pair(const void *from) { return __ldg(static_cast<const uint32_t *>(from)); }
GPU_FUNCTION void store_pair(void *to, uint32_t pair) { *static_cast<uint32_t *>(to) = pair; }

// The first in the lower half.
GPU_FUNCTION uint32_t pack(bfloat16, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
GPU_FUNCTION uint32_t pack(float16, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// For what only the device can check. A failure ends the kernel and all that follows it on the device; the next
// synchronisation reports a device-side assertion, which the CUDA runtime has printed with the text.
GPU_FUNCTION void require(bool condition, const char *text) {
    if (!condition) __assert_fail(text, "localattn", 0, "");
}

GPU_FUNCTION float exponential(float x) { return expf(x); }
GPU_FUNCTION double exponential(double x) { return ::exp(x); }
GPU_FUNCTION float logarithm(float x) { return logf(x); }
GPU_FUNCTION double logarithm(double x) { return ::log(x); }
// Fast and approximate, to about 2 units in the last place; denormals are taken for zero.
GPU_FUNCTION float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
GPU_FUNCTION float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
GPU_FUNCTION float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Runs `kernel` on a grid of blocks, on the current device. Returns NULL, or what the CUDA runtime says went wrong.
template <auto kernel, class Argument>
const char *launch(Extent3 grid, int threads, size_t shared_bytes, void *stream, const Argument &argument) {
    constexpr size_t without_asking = 48 << 10;
    if (shared_bytes > without_asking) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
    kernel<<<blocks, unsigned(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(argument);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace localattn::gpu
