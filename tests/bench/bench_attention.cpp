// Forward and backward of single attention problems, results preallocated, caches warm.
//
//     bench_attention --benchmark_filter='forward/float32/square' --benchmark_enable_random_interleaving=true
//         --benchmark_repetitions=9
//
// `peak` is the share of the multiply-add peak of as many threads as compute; work counts pairs inside the map only, so
// that options compare by it. Threads: OMP_NUM_THREADS. A variant: LOCALATTN_CPU_ISA.
#include <benchmark/benchmark.h>
#include <localattn/localattn.h>
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "cases.h"
#include "scalar.h"

extern "C" double localattn_bench_peak(long rounds);

namespace {

using bench::Case;
using bench::Extent;

void run_on_openmp(void *, int32_t tasks, void (*task)(void *, int32_t), void *argument) {
#pragma omp parallel for schedule(static, 1) num_threads(tasks)
    for (int32_t i = 0; i < tasks; ++i) task(argument, i);
}

double multiply_add_peak() {
    double best = 0;
    for (int attempt = 0; attempt < 20; ++attempt) {
        double sum = 0;
#pragma omp parallel reduction(+ : sum)
        sum += localattn_bench_peak(1000000);
        best = std::max(best, sum);
    }
    return best;
}

// Elements of a tensor, 64-byte aligned, with what the C API wants to know of them.
class Array {
public:
    Array(size_t count, size_t element) : size_((count * element + 63) / 64 * 64) {
        data_.reset(static_cast<unsigned char *>(std::aligned_alloc(64, size_)));
        std::memset(data_.get(), 0, size_);
    }
    void *data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(unsigned char *p) const { std::free(p); }
    };
    size_t size_;
    std::unique_ptr<unsigned char, Free> data_;
};

class Problem {
public:
    Problem(const Case &c, localattn_dtype dtype) : case_(c), dtype_(dtype) {
        params.struct_size = sizeof params;
        params.dtype = dtype;
        params.rank = c.rank;
        params.batch = c.batch;
        params.heads = c.heads;
        params.channels = c.channels;
        params.border = c.border;
        params.raster_causal = c.raster;
        for (size_t a = 0; a < static_cast<size_t>(c.rank); ++a) {
            params.query_extent[a] = c.queries[a];
            params.key_extent[a] = c.keys[a];
            params.kernel_size[a] = c.kernel[a];
            params.stride[a] = c.stride[a];
            params.dilation[a] = c.dilation[a];
            params.is_causal[a] = c.causal[a];
        }
        for (localattn_tensor *t : {&params.query, &params.output, &params.grad_output, &params.grad_query}) {
            *t = map(c.queries, c.channels, dtype);
        }
        for (localattn_tensor *t : {&params.key, &params.value, &params.grad_key, &params.grad_value}) {
            *t = map(c.keys, c.channels, dtype);
        }
        params.lse = map(c.queries, 1, LOCALATTN_FLOAT32);
        if (c.bias) {
            params.bias = map(c.queries, c.window(), dtype, false);
            params.grad_bias = map(c.queries, c.window(), LOCALATTN_FLOAT32, false);
        }
        for (size_t a = 0; c.axis_bias && a < static_cast<size_t>(c.rank); ++a) {
            params.axis_bias[a] = map(c.queries, c.kernel[a], dtype, false);
            params.grad_axis_bias[a] = map(c.queries, c.kernel[a], LOCALATTN_FLOAT32, false);
        }
        if (c.rel_pos_bias) {
            params.rel_pos_bias = table(dtype);
            params.grad_rel_pos_bias = table(LOCALATTN_FLOAT32);
        }
        if (c.key_mask) {
            params.key_mask = {array(static_cast<size_t>(c.batch * count(c.keys)), 1), count(c.keys), {}, 0, 1};
            strides(c.keys, 1, params.key_mask);
            std::memset(params.key_mask.data, 1, static_cast<size_t>(c.batch * count(c.keys)));
        }
        for (localattn_tensor *t : {&params.query, &params.key, &params.value, &params.grad_output}) randomise(*t);
    }

    localattn_attention_params params{};

private:
    int64_t count(const Extent &extent) const {
        int64_t n = 1;
        for (int a = 0; a < case_.rank; ++a) n *= extent[static_cast<size_t>(a)];
        return n;
    }
    void strides(const Extent &extent, int64_t pixel, localattn_tensor &t) const {
        for (int a = case_.rank - 1; a >= 0; --a) {
            t.spatial_stride[a] = pixel;
            pixel *= extent[static_cast<size_t>(a)];
        }
    }
    void *array(size_t n, size_t element) {
        arrays_.emplace_back(n, element);
        return arrays_.back().data();
    }
    localattn_tensor map(const Extent &extent, int64_t channels, localattn_dtype dtype, bool may_be_first = true) {
        const int64_t pixels = count(extent), depth = case_.heads * channels;
        localattn_tensor t{};
        t.data = array(static_cast<size_t>(case_.batch * pixels * depth), dtype == LOCALATTN_FLOAT32 ? 4 : 2);
        t.batch_stride = pixels * depth;
        const bool first = may_be_first && case_.channels_first && channels > 1;
        t.channel_stride = first ? pixels : 1;
        t.head_stride = case_.heads_first ? pixels * channels : channels * t.channel_stride;
        strides(extent, first ? 1 : case_.heads_first ? channels : depth, t);
        return t;
    }
    localattn_tensor table(localattn_dtype dtype) {
        localattn_tensor t{};
        int64_t entries = 1;
        for (int a = case_.rank - 1; a >= 0; --a) {
            t.spatial_stride[a] = entries;
            entries *= 2 * case_.kernel[static_cast<size_t>(a)] - 1;
        }
        t.head_stride = entries;
        t.data = array(static_cast<size_t>(case_.heads * entries), dtype == LOCALATTN_FLOAT32 ? 4 : 2);
        return t;
    }
    void randomise(const localattn_tensor &t) {
        const auto found =
            std::find_if(arrays_.begin(), arrays_.end(), [&](const Array &a) { return a.data() == t.data; });
        std::uniform_real_distribution<float> uniform(-1, 1);
        const size_t element = dtype_ == LOCALATTN_FLOAT32 ? 4 : 2;
        for (size_t i = 0; i < found->size() / element; ++i) {
            const float x = uniform(random_);
            if (dtype_ == LOCALATTN_FLOAT32) {
                static_cast<float *>(t.data)[i] = x;
            } else if (dtype_ == LOCALATTN_BFLOAT16) {
                localattn::narrow(x, static_cast<localattn::bfloat16 *>(t.data)[i]);
            } else {
                localattn::narrow(x, static_cast<localattn::float16 *>(t.data)[i]);
            }
        }
    }

    Case case_;
    localattn_dtype dtype_;
    std::vector<Array> arrays_;
    std::mt19937 random_{0};
};

void measure(benchmark::State &state, const Case &c, localattn_dtype dtype, localattn_pass pass, double peak) {
    const Problem problem(c, dtype);
    const localattn_executor executor{nullptr, omp_get_max_threads(), run_on_openmp};
    localattn_context context{};
    context.struct_size = sizeof context;
    context.executor = &executor;
    // The first forward also makes what the backward reads.
    localattn_status status = localattn_attention_forward(&context, &problem.params);
    for (auto _ : state) {
        if (status != LOCALATTN_OK) break;
        status = pass == LOCALATTN_FORWARD ? localattn_attention_forward(&context, &problem.params)
                                           : localattn_attention_backward(&context, &problem.params);
    }
    if (status != LOCALATTN_OK) return state.SkipWithError(localattn_last_error());
    using Counter = benchmark::Counter;
    const double flop = c.flop(pass) * static_cast<double>(state.iterations());
    state.counters["FLOP/s"] = Counter(flop, Counter::kIsRate);
    state.counters["peak"] = Counter(flop / peak, Counter::kIsRate);
}

}  // namespace

int main(int argc, char **argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    const double peak = multiply_add_peak();
    benchmark::AddCustomContext("multiply-add peak, GFLOP/s", std::to_string(peak / 1e9));
    benchmark::AddCustomContext("threads", std::to_string(omp_get_max_threads()));
    const std::pair<localattn_dtype, const char *> dtypes[] = {
        {LOCALATTN_FLOAT32, "float32"}, {LOCALATTN_BFLOAT16, "bfloat16"}, {LOCALATTN_FLOAT16, "float16"}};
    for (const auto pass : {LOCALATTN_FORWARD, LOCALATTN_BACKWARD}) {
        for (const auto &[dtype, dtype_name] : dtypes) {
            for (const Case &c : bench::cases()) {
                const std::string name =
                    std::string(pass == LOCALATTN_FORWARD ? "forward/" : "backward/") + dtype_name + "/" + c.name;
                benchmark::RegisterBenchmark(name.c_str(), measure, c, dtype, pass, peak)
                    ->Unit(benchmark::kMillisecond)
                    ->MeasureProcessCPUTime()
                    ->UseRealTime();
            }
        }
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
