// Element offsets beyond 2^31, on every axis, with either sign. The memory is reserved but never filled: only the pages
// that hold an element exist.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "harness.h"

namespace {

constexpr int64_t far = (int64_t{1} << 31) + 5;

// A tensor of up to 2 elements on the axis that is far, and few on the others.
class Sparse {
public:
    Sparse(const test::Dense &values, int far_axis, bool negative) : shape_(values.shape) {
        int64_t step = 1;
        for (int a = 5; a >= 0; --a) {
            strides_[a] = a == far_axis ? (negative ? -far : far) : step;
            if (a != far_axis) step *= shape_[size_t(a)];
        }
        const int64_t reach = far * (shape_[size_t(far_axis)] - 1);
        bytes_ = size_t(reach + step) * sizeof(float);
        void *memory =
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return;
        memory_ = static_cast<float *>(memory);
        first_ = memory_ + (negative ? reach : 0);
        size_t i = 0;
        each([&](float &element) { element = static_cast<float>(values.data[i++]); });
    }
    Sparse(const Sparse &) = delete;
    Sparse &operator=(const Sparse &) = delete;
    ~Sparse() {
        if (memory_) munmap(memory_, bytes_);
    }

    bool there() const { return memory_ != nullptr; }

    localattn_tensor view() const {
        localattn_tensor t{};
        t.data = first_;
        t.batch_stride = strides_[0];
        for (int a = 0; a < 3; ++a) t.spatial_stride[a] = strides_[1 + a];
        t.head_stride = strides_[4];
        t.channel_stride = strides_[5];
        return t;
    }

    std::vector<double> values() const {
        std::vector<double> all;
        each([&](float &element) { all.push_back(element); });
        return all;
    }

private:
    template <class Visit>
    void each(const Visit &visit) const {
        const test::Shape &s = shape_;
        for (int64_t b = 0; b < s[0]; ++b)
            for (int64_t i = 0; i < s[1]; ++i)
                for (int64_t j = 0; j < s[2]; ++j)
                    for (int64_t k = 0; k < s[3]; ++k)
                        for (int64_t h = 0; h < s[4]; ++h)
                            for (int64_t c = 0; c < s[5]; ++c)
                                visit(first_[b * strides_[0] + i * strides_[1] + j * strides_[2] + k * strides_[3] +
                                             h * strides_[4] + c * strides_[5]]);
    }

    test::Shape shape_;
    int64_t strides_[6];
    size_t bytes_ = 0;
    float *memory_ = nullptr, *first_ = nullptr;
};

void check_far(const std::string &variant, int far_axis, bool negative) {
    test::Config c;
    c.rank = 3;
    c.seed = 11;
    c.batch = c.heads = c.kv_heads = 2;
    c.channels = c.value_channels = 3;
    for (int a = 0; a < 3; ++a) {
        c.query_extent[a] = c.key_extent[a] = a + 1 == far_axis ? 2 : 3;
        c.kernel_size[a] = 3;
    }
    c.query_extent[2] = c.key_extent[2] = far_axis == 3 ? 3 : 18;
    c.has_rel_pos_bias = c.has_bias = true;
    c.plain_layout = true;
    test::Tensors tensors(c);
    localattn_attention_params p = tensors.params();
    localattn_context context = LOCALATTN_INIT(localattn_context);
    context.variant = variant.c_str();
    context.num_threads = 1;
    for (const localattn_pass pass : {LOCALATTN_FORWARD, LOCALATTN_BACKWARD}) {
        const auto call = pass == LOCALATTN_FORWARD ? localattn_attention_forward : localattn_attention_backward;
        const localattn_status status = call(&context, &p);
        if (status == LOCALATTN_UNSUPPORTED) {
            std::printf("variant %s declines: %s\n", variant.c_str(), localattn_last_error());
            return;
        }
        CHECK(status == LOCALATTN_OK) << localattn_last_error();
    }

    struct Part {
        test::Memory &memory;
        localattn_tensor localattn_attention_params::*field;
    };
    using P = localattn_attention_params;
    const Part inputs[] = {{tensors.query, &P::query},
                           {tensors.key, &P::key},
                           {tensors.value, &P::value},
                           {tensors.bias, &P::bias},
                           {tensors.grad_output, &P::grad_output}};
    const Part results[] = {{tensors.output, &P::output},         {tensors.lse, &P::lse},
                            {tensors.grad_query, &P::grad_query}, {tensors.grad_key, &P::grad_key},
                            {tensors.grad_value, &P::grad_value}, {tensors.grad_bias, &P::grad_bias}};
    const auto check_part = [&](const Part &part, bool result) {
        if (part.memory.shape[size_t(far_axis)] == 1) return;
        localattn_attention_params q = p;
        test::Dense start = part.memory.dense();
        const std::vector<double> wanted = start.data;
        if (result) std::fill(start.data.begin(), start.data.end(), std::nan(""));
        const Sparse sparse(start, far_axis, negative);
        if (!sparse.there()) {
            std::printf("not run: this machine does not reserve that much address space\n");
            return;
        }
        q.*part.field = sparse.view();
        std::vector<std::vector<double>> before;
        for (const Part &r : results) before.push_back(r.memory.dense().data);
        CHECK(localattn_attention_forward(&context, &q) == LOCALATTN_OK) << localattn_last_error();
        CHECK(localattn_attention_backward(&context, &q) == LOCALATTN_OK) << localattn_last_error();
        const auto near = [](const std::vector<double> &x, const std::vector<double> &y) {
            for (size_t i = 0; i < x.size(); ++i) {
                if (!(std::fabs(x[i] - y[i]) <= 1e-5 * (1 + std::fabs(y[i])))) return false;
            }
            return true;
        };
        const std::string what = variant + ", axis " + std::to_string(far_axis) + (negative ? ", negative" : "");
        if (result) CHECK(near(sparse.values(), wanted)) << what << ", result " << (&part - results);
        for (size_t i = 0; i < before.size(); ++i) {
            if (result && &results[i] == &part) continue;
            CHECK(near(results[i].memory.dense().data, before[i])) << what << ", result " << i;
        }
    };
    for (const Part &part : inputs) check_part(part, false);
    for (const Part &part : results) check_part(part, true);
}

}  // namespace

TEST(offsets_beyond_32_bits) {
    for (const std::string &variant : test::available_variants()) {
        for (int axis = 0; axis < 6; ++axis) {
            check_far(variant, axis, false);
            check_far(variant, axis, true);
        }
    }
}

int main(int argc, char **argv) { return check::run(argc, argv); }
