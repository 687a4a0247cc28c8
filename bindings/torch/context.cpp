#include "context.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <sys/mman.h>

namespace localattn_torch {

namespace {

// Runs the core's tasks on torch's own threads, as many as torch.set_num_threads allows.
void run_on_torch_threads(void *, int32_t num_tasks, void (*task)(void *, int32_t), void *argument) {
    at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(argument, static_cast<int32_t>(i));
    });
}

// The cudaStream_t of torch's current stream. Torch's device-independent part knows the stream by a number; what that
// number means is known to its CUDA library. It is looked up where torch has loaded it and not linked, so that one
// binding serves torch with and without CUDA.
void *current_cuda_stream(c10::Device device) {
    using Handle = void *(*)(const c10::Stream *);  // as a function: c10::cuda::CUDAStream, around a Stream, ::stream()
    static const Handle handle = [] {
        void *library = dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Handle>(dlsym(library, "_ZNK3c104cuda10CUDAStream6streamEv")) : nullptr;
    }();
    TORCH_CHECK(handle, "query is on ", device,
                ", but torch's libc10_cuda.so, which tells the current stream, is not loaded or of an unknown kind; "
                "localattn runs on NVIDIA GPUs, with a torch built for CUDA");
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    return handle(&stream);
}

}  // namespace

void check(localattn_status status) {
    switch (status) {
        case LOCALATTN_OK:
            return;
        case LOCALATTN_INVALID_ARGUMENT:
            TORCH_CHECK_VALUE(false, localattn_last_error());
        case LOCALATTN_UNSUPPORTED_DTYPE:
            TORCH_CHECK_TYPE(false, localattn_last_error());
        case LOCALATTN_UNSUPPORTED:
            TORCH_CHECK_NOT_IMPLEMENTED(false, localattn_last_error());
        default:
            TORCH_CHECK(false, localattn_status_name(status), ": ", localattn_last_error());
    }
}

Context::Context(c10::Device device) : device_(device) {
    context_.struct_size = sizeof context_;
    if (device.is_cuda()) {
        guard_.reset_device(device);
        context_.device_type = LOCALATTN_CUDA;
        context_.device_index = device.index();
        context_.stream = current_cuda_stream(device);
    } else {
        executor_ = {nullptr, at::in_parallel_region() ? 1 : at::get_num_threads(), run_on_torch_threads};
        context_.device_type = LOCALATTN_CPU;
        context_.executor = &executor_;
    }
}

void Context::lend_workspace(size_t bytes) {
    workspace_ = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device_));
    context_.workspace = workspace_.mutable_data_ptr();
    context_.workspace_size = bytes;
}

at::Tensor empty_result(at::IntArrayRef shape, const at::TensorOptions &options) {
    at::Tensor result = at::empty(shape, options);
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = uintptr_t{2} << 20, worthwhile = 2 * page;
    if (result.device().is_cpu() && result.nbytes() >= worthwhile) {
        const auto data = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
        const uintptr_t begin = (data + page - 1) / page * page, end = (data + result.nbytes()) / page * page;
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be declined
    }
#endif
    return result;
}

}  // namespace localattn_torch
