// Times every CUDA variant on the shapes that the predictions of core/src/cuda/README.md are for. CUDA events, medians;
// three sets of tensors take turns, so that nothing is found in the second-level cache that would not be there in use.
//
//     gpu_bench [repetitions]
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/variant.h"
#include "device_memory.h"
#include "scalar.h"

using namespace localattn;

namespace {

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
}

struct Shape {
    Dtype dtype;
    int batch, heads, channels, side, kernel;
};

constexpr Shape shapes[] = {
    {Dtype::bfloat16, 4, 8, 64, 128, 7},    {Dtype::bfloat16, 4, 8, 64, 128, 13}, {Dtype::bfloat16, 4, 8, 64, 128, 21},
    {Dtype::float16, 4, 8, 64, 128, 13},    {Dtype::bfloat16, 4, 8, 32, 128, 13}, {Dtype::bfloat16, 4, 8, 128, 128, 13},
    {Dtype::bfloat16, 1, 24, 128, 256, 80}, {Dtype::float32, 1, 1, 64, 128, 5},   {Dtype::float32, 8, 1, 64, 128, 11},
    {Dtype::float32, 1, 1, 64, 128, 21},
};

size_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

Tensor dense(const Shape &s, void *data) {
    Tensor t;
    t.data = data;
    t.channel = 1;
    t.head = s.channels;
    t.axis[2] = int64_t(s.heads) * s.channels;
    t.axis[1] = t.axis[2] * s.side;
    t.batch = t.axis[1] * s.side;
    return t;
}

// Query, key, value, output, their gradients, and lse; the inputs filled with numbers of about unit size.
struct Set {
    Problem problem;
    std::vector<void *> memory;

    explicit Set(const Shape &s) {
        problem.dtype = s.dtype;
        problem.batch = s.batch;
        problem.heads = problem.kv_heads = s.heads;
        problem.channels = problem.value_channels = s.channels;
        for (int a = 1; a < 3; ++a) {
            problem.axis[a].queries = problem.axis[a].keys = s.side;
            problem.axis[a].kernel = s.kernel;
        }
        problem.scale = 1 / std::sqrt(double(s.channels));
        const size_t places = size_t(s.batch) * size_t(s.heads) * size_t(s.side) * size_t(s.side);
        for (Tensor *t : {&problem.query, &problem.key, &problem.value, &problem.grad_output, &problem.output,
                          &problem.grad_query, &problem.grad_key, &problem.grad_value})
            *t = dense(s, take(places * size_t(s.channels) * bytes_of(s.dtype)));
        problem.lse = dense(s, take(places * sizeof(float)));
        problem.lse.head = 1;
        problem.lse.axis[2] = s.heads;
        problem.lse.axis[1] = int64_t(s.heads) * s.side;
        problem.lse.batch = problem.lse.axis[1] * s.side;
        fill(s, places * size_t(s.channels));
    }
    void *take(size_t bytes) {
        void *at = nullptr;
        check(cudaMalloc(&at, bytes));
        memory.push_back(at);
        return at;
    }
    void fill(const Shape &s, size_t count) {
        std::vector<unsigned char> host(count * bytes_of(s.dtype));
        uint32_t state = 12345;
        for (const Tensor *t : {&problem.query, &problem.key, &problem.value, &problem.grad_output}) {
            for (size_t i = 0; i < count; ++i) {
                state = state * 1664525u + 1013904223u;
                const float value = float(int32_t(state)) * 0x1p-30f;
                if (s.dtype == Dtype::float32)
                    reinterpret_cast<float *>(host.data())[i] = value;
                else if (s.dtype == Dtype::float16)
                    narrow(value, reinterpret_cast<float16 *>(host.data())[i]);
                else
                    narrow(value, reinterpret_cast<bfloat16 *>(host.data())[i]);
            }
            check(cudaMemcpy(t->data, host.data(), host.size(), cudaMemcpyHostToDevice));
        }
    }
    ~Set() {
        for (void *at : memory) cudaFree(at);
    }
    Set(Set &&) = default;
};

template <class Run>
double median_ms(int repetitions, Run run) {
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start));
    check(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < repetitions + 3; ++i) {  // the first three warm up
        check(cudaEventRecord(start));
        run(i);
        check(cudaEventRecord(stop));
        check(cudaEventSynchronize(stop));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 3) times.push_back(ms);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    std::nth_element(times.begin(), times.begin() + long(times.size() / 2), times.end());
    return times[times.size() / 2];
}

// Pairs that the window rule leaves inside the map, for one head of one image.
double pairs_of(const Shape &s) {
    double along = 0;
    for (int i = 0; i < s.side; ++i)
        along += std::min(s.side, i - s.kernel / 2 + s.kernel) - std::max(0, i - s.kernel / 2);
    return along * along;
}

}  // namespace

int main(int argc, char **argv) {
    const int repetitions = argc > 1 ? std::atoi(argv[1]) : 20;
    const cuda::Device device = cuda::test_device();
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    const size_t copied = size_t(1) << 30;
    void *from = nullptr, *to = nullptr;
    check(cudaMalloc(&from, copied));
    check(cudaMalloc(&to, copied));
    const double copy_ms =
        median_ms(repetitions, [&](int) { check(cudaMemcpyAsync(to, from, copied, cudaMemcpyDeviceToDevice)); });
    cudaFree(from);
    cudaFree(to);
    const double bandwidth = 2 * double(copied) / copy_ms / 1e6;  // GB/s
    std::printf("%s, %d multiprocessors, copy %.0f GB/s\n", properties.name, properties.multiProcessorCount, bandwidth);
    std::printf(
        "| dtype | batch x heads x channels | map | k | variant | forward ms | TFLOP/s | x copy time | backward ms | "
        "TFLOP/s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (const Shape &s : shapes) {
        std::vector<Set> sets;
        for (int i = 0; i < 3; ++i) sets.emplace_back(s);
        const double pairs = pairs_of(s) * s.batch * s.heads;
        const double elements = double(s.batch) * s.heads * s.side * s.side * s.channels;
        const double floor_ms = 4 * elements * double(bytes_of(s.dtype)) / bandwidth / 1e6;
        for (int32_t v = 0; v < cuda::variant_count; ++v) {
            const cuda::Variant &variant = *cuda::variants[v];
            const Problem &problem = sets[0].problem;
            if (device.capability < variant.capability) continue;
            if (variant.declines(problem, Pass::forward, device) || variant.declines(problem, Pass::backward, device))
                continue;
            if (s.kernel > 40 && std::string(variant.name) == "cuda_generic") continue;  // a minute a call
            void *workspace = nullptr;
            check(cudaMalloc(&workspace, std::max(variant.workspace(problem, Pass::backward), size_t(8))));
            double ms[2];
            for (const Pass pass : {Pass::forward, Pass::backward})
                ms[int(pass)] = median_ms(repetitions, [&](int i) {
                    if (const char *error = variant.run(sets[size_t(i) % 3].problem, pass, nullptr, workspace)) {
                        std::fprintf(stderr, "%s: %s\n", variant.name, error);
                        std::exit(1);
                    }
                });
            cudaFree(workspace);
            const double flop = 4 * pairs * s.channels;
            std::printf("| %s | %dx%dx%d | %dx%d | %d | %s | %.3f | %.1f | %.2f | %.3f | %.1f |\n",
                        s.dtype == Dtype::float32   ? "float32"
                        : s.dtype == Dtype::float16 ? "float16"
                                                    : "bfloat16",
                        s.batch, s.heads, s.channels, s.side, s.side, s.kernel, variant.name, ms[0], flop / ms[0] / 1e9,
                        ms[0] / floor_ms, ms[1], 2.5 * flop / ms[1] / 1e9);
            std::fflush(stdout);
        }
    }
    return 0;
}
