// Two devices of type "cuda" for a torch that has none, so that the binding's CUDA side runs without a GPU: their
// tensors lie in plain memory, torch's own operators work on them as on the CPU's, streams are numbers, autograd does
// not run. Built with the name libc10_cuda.so, under which the binding looks for what torch's CUDA build has.
#include <ATen/ATen.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <utility>
#include <vector>

namespace {

constexpr c10::DeviceIndex devices = 2;
thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, devices> current_stream{};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device exchangeDevice(c10::Device device) const override {
        return {type(), std::exchange(current_device, device.index())};
    }
    c10::Device getDevice() const override { return {type(), current_device}; }
    void setDevice(c10::Device device) const override { current_device = device.index(); }
    void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
    c10::Stream getStream(c10::Device device) const noexcept override {
        return c10::Stream(c10::Stream::UNSAFE, device, current_stream[static_cast<size_t>(device.index())]);
    }
    c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
        c10::StreamId &current = current_stream[static_cast<size_t>(stream.device_index())];
        return c10::Stream(c10::Stream::UNSAFE, stream.device(), std::exchange(current, stream.id()));
    }
    c10::DeviceIndex deviceCount() const noexcept override { return devices; }
    void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void *, const c10::Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    void destroyEvent(void *, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// The same memory, said to be on another device.
at::Tensor seen_on(const at::Tensor &tensor, c10::Device device) {
    return at::for_blob(const_cast<void *>(tensor.const_data_ptr()), tensor.sizes())
        .strides(tensor.strides())
        .context(new at::Tensor(tensor), [](void *owner) { delete static_cast<at::Tensor *>(owner); })
        .options(tensor.options().device(device))
        .target_device(device)
        .make_tensor();
}

template <class OnTensor>
void replace_tensors(c10::IValue &value, OnTensor on_tensor) {
    if (value.isTensor() && value.toTensor().defined()) {
        value = on_tensor(value.toTensor());
    } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor &tensor : value.toTensorVector()) list.push_back(on_tensor(tensor));
        value = list;
    }
}

// What torch's operators do here: the same on the CPU, in the same memory.
void on_the_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    c10::Device device(c10::DeviceType::CUDA, current_device);
    bool moves_to_cpu = false;
    std::vector<std::pair<at::Tensor, at::Tensor>> both;  // as given, as on the CPU
    for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
        c10::IValue &argument = (*stack)[i];
        if (argument.isDevice()) {
            const c10::Device asked = argument.toDevice();
            moves_to_cpu = asked.is_cpu();
            if (asked.is_cuda() && asked.has_index()) device = asked;
            argument = c10::Device(c10::kCPU);
        }
        replace_tensors(argument, [&](const at::Tensor &tensor) {
            if (!tensor.is_cuda()) return tensor;
            device = tensor.device();
            both.emplace_back(tensor, seen_on(tensor, c10::kCPU));
            return both.back().second;
        });
    }
    op.callBoxed(stack);
    if (moves_to_cpu) return;
    for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
        replace_tensors((*stack)[i], [&](const at::Tensor &tensor) {
            for (const auto &[given, on_cpu] : both)
                if (tensor.is_same(on_cpu)) return given;  // written in place
            return seen_on(tensor, device);
        });
}

}  // namespace

namespace c10::cuda {

class CUDAStream {
public:
    __attribute__((visibility("default"))) void *stream() const;

private:
    c10::Stream stream_;
};

// What cudaStream_t is elsewhere: device and number, told apart from NULL.
void *CUDAStream::stream() const {
    return reinterpret_cast<void *>(0x1000 * (1 + stream_.device_index()) + stream_.id());
}

}  // namespace c10::cuda

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
// Its kernel for every device looks for code by device.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY(emulated_cuda, library) {
    library.def("place(Tensor tensor, int device) -> Tensor", [](const at::Tensor &tensor, int64_t device) {
        return seen_on(tensor.clone(), {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)});
    });
    library.def("set_stream(int device, int stream) -> ()",
                [](int64_t device, int64_t stream) { current_stream[static_cast<size_t>(device)] = stream; });
    library.def("current_device() -> int", [] { return int64_t{current_device}; });
}
