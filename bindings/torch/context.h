// Calls of the C API, made where the tensors are: for CPU tensors on torch's threads; for CUDA tensors on their device
// and torch's current stream, with a workspace from torch's allocator.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <localattn/localattn.h>

namespace localattn_torch {

// The passes of one operation, and how much workspace they take.
template <class Params>
struct Operation {
    localattn_status (*forward)(const localattn_context *, const Params *);
    localattn_status (*backward)(const localattn_context *, const Params *);
    localattn_status (*workspace_size)(const localattn_context *, const Params *, localattn_pass, size_t *);
};

// Throws what torch's users expect for the status, with the library's own words.
void check(localattn_status status);

class Context {
public:
    explicit Context(c10::Device device);
    Context(const Context &) = delete;
    operator const localattn_context *() const { return &context_; }

    template <class Params>
    void run(const Operation<Params> &operation, localattn_pass pass, const Params &params) {
        if (context_.device_type == LOCALATTN_CUDA) {  // on the CPU the library takes what it needs
            size_t bytes = 0;
            check(operation.workspace_size(&context_, &params, pass, &bytes));
            lend_workspace(bytes);
        }
        check((pass == LOCALATTN_FORWARD ? operation.forward : operation.backward)(&context_, &params));
    }

private:
    void lend_workspace(size_t bytes);

    c10::Device device_;
    c10::OptionalDeviceGuard guard_;
    localattn_executor executor_{};
    localattn_context context_{};
    at::Tensor workspace_;  // its memory serves the stream's next calls when this goes
};

// One pass of an operation whose tensors lie where `query` does.
template <class Params>
void run(const Operation<Params> &operation, localattn_pass pass, const Params &params, const at::Tensor &query) {
    Context(query.device()).run(operation, pass, params);
}

// Memory for a result. What is large comes in large pages where the system has them to give: on fresh memory a fault
// for every 4 KiB takes as long as the arithmetic of a small window.
at::Tensor empty_result(at::IntArrayRef shape, const at::TensorOptions &options);

}  // namespace localattn_torch
