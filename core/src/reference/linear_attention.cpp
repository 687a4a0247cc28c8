// Linear attention by its definition, accumulated in double. In memory: the context of every head, and for the backward
// its gradient.
#include <cmath>
#include <limits>

#include "operators.h"
#include "walk.h"

namespace localattn::reference {

namespace {

template <class T, class Wide>
class Linear {
public:
    Linear(const LinearProblem &p, double *memory) : p_(p), context_(memory), grad_context_(memory + size(p)) {}

    static int64_t size(const LinearProblem &p) { return p.batch * p.heads * p.channels * p.value_channels; }

    void forward(const Workers &workers) const {
        each(workers, p_.batch * p_.heads * p_.channels, [&](int64_t number, int32_t) {
            int64_t rest = number;
            const int64_t c = digit(rest, p_.channels), h = digit(rest, p_.heads), b = rest;
            double largest = -infinity, total = 0;
            each_key(b, [&](const Position &n) { largest = larger(key(b, n, h, c), largest); });
            const double shift = largest == -infinity ? 0 : largest;
            each_key(b, [&](const Position &n) { total += std::exp(key(b, n, h, c) - shift); });
            const double lse = largest == -infinity ? -infinity : std::log(total) + shift;
            for (int64_t e = 0; e < p_.value_channels; ++e) {
                double sum = 0;
                if (lse != -infinity) {
                    each_key(b, [&](const Position &n) {
                        sum += std::exp(key(b, n, h, c) - shift) / total * value(b, n, h, e);
                    });
                }
                context_[number * p_.value_channels + e] = sum;
                if (p_.context.data) store<Wide>(p_.context, context_offset(b, h, c, e), sum);
            }
            if (p_.key_lse.data)
                store<Wide>(p_.key_lse, b * p_.key_lse.batch + h * p_.key_lse.head + c * p_.key_lse.channel, lse);
        });
        each_query_row(workers, [&](int64_t b, const Position &n, int64_t h) {
            const Softmax softmax(*this, b, n, h);
            for (int64_t e = 0; e < p_.value_channels; ++e) {
                double sum = 0;
                for (int64_t c = 0; c < p_.channels; ++c)
                    sum += softmax(c) * context_[((b * p_.heads + h) * p_.channels + c) * p_.value_channels + e];
                store<T>(p_.output, at(p_.output, b, n, h) + e * p_.output.channel, sum);
            }
        });
    }

    void backward(const Workers &workers) const {
        if (p_.grad_query.data) {
            each_query_row(workers, [&](int64_t b, const Position &n, int64_t h) {
                const Softmax softmax(*this, b, n, h);
                double mean = 0;
                for (int64_t c = 0; c < p_.channels; ++c) mean += softmax(c) * grad_softmax(b, n, h, c);
                for (int64_t c = 0; c < p_.channels; ++c)
                    store<T>(p_.grad_query, at(p_.grad_query, b, n, h) + c * p_.grad_query.channel,
                             softmax(c) * (grad_softmax(b, n, h, c) - mean));
            });
        }
        if (!p_.grad_key.data && !p_.grad_value.data) return;
        each(workers, p_.batch * p_.heads * p_.channels, [&](int64_t number, int32_t) {
            int64_t rest = number;
            const int64_t c = digit(rest, p_.channels), h = digit(rest, p_.heads), b = rest;
            for (int64_t e = 0; e < p_.value_channels; ++e) {
                double sum = 0;
                each_position(p_.queries,
                              [&](const Position &n) { sum += Softmax(*this, b, n, h)(c) * grad_output(b, n, h, e); });
                grad_context_[number * p_.value_channels + e] = sum;
            }
        });
        each(workers, p_.batch * p_.key_count() * p_.heads, [&](int64_t number, int32_t) {
            const int64_t h = digit(number, p_.heads);
            Position n;
            for (int a = 2; a >= 0; --a) n.axis[a] = digit(number, p_.keys[a]);
            write_key(number, n, h);
        });
    }

private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();

    // NaN stays NaN.
    static double larger(double x, double y) { return x > y || std::isnan(x) ? x : y; }

    // The softmax of one query over its channels.
    class Softmax {
    public:
        Softmax(const Linear &l, int64_t b, const Position &n, int64_t h)
            : l_(l), offset_(at(l.p_.query, b, n, h)), largest_(-infinity), total_(0) {
            for (int64_t c = 0; c < l.p_.channels; ++c) largest_ = larger(query(c), largest_);
            if (largest_ == -infinity) largest_ = 0;
            for (int64_t c = 0; c < l.p_.channels; ++c) total_ += std::exp(query(c) - largest_);
        }
        double operator()(int64_t c) const { return std::exp(query(c) - largest_) / total_; }

    private:
        double query(int64_t c) const { return load<T>(l_.p_.query, offset_ + c * l_.p_.query.channel); }
        const Linear &l_;
        int64_t offset_;
        double largest_, total_;
    };

    template <class Visit>
    static void each_position(const int64_t (&extent)[3], const Visit &visit) {
        Position n;
        for (n.axis[0] = 0; n.axis[0] < extent[0]; ++n.axis[0])
            for (n.axis[1] = 0; n.axis[1] < extent[1]; ++n.axis[1])
                for (n.axis[2] = 0; n.axis[2] < extent[2]; ++n.axis[2]) visit(n);
    }
    bool attends(int64_t b, const Position &n) const {
        return !p_.key_mask.data || static_cast<const uint8_t *>(p_.key_mask.data)[at(p_.key_mask, b, n, 0)];
    }
    template <class Visit>
    void each_key(int64_t b, const Visit &visit) const {
        each_position(p_.keys, [&](const Position &n) {
            if (attends(b, n)) visit(n);
        });
    }
    template <class Visit>
    void each_query_row(const Workers &workers, const Visit &visit) const {
        each(workers, p_.batch * p_.query_count() * p_.heads, [&](int64_t number, int32_t) {
            const int64_t h = digit(number, p_.heads);
            Position n;
            for (int a = 2; a >= 0; --a) n.axis[a] = digit(number, p_.queries[a]);
            visit(number, n, h);
        });
    }

    void write_key(int64_t b, const Position &n, int64_t h) const {
        const bool counts = attends(b, n);
        const auto softmax = [&](int64_t c) {
            const double lse =
                load<Wide>(p_.key_lse, b * p_.key_lse.batch + h * p_.key_lse.head + c * p_.key_lse.channel);
            return lse == -infinity ? 0 : std::exp(key(b, n, h, c) - lse);
        };
        const auto grad_context = [&](int64_t c, int64_t e) {
            return grad_context_[((b * p_.heads + h) * p_.channels + c) * p_.value_channels + e];
        };
        for (int64_t e = 0; p_.grad_value.data && e < p_.value_channels; ++e) {
            double sum = 0;
            for (int64_t c = 0; counts && c < p_.channels; ++c) sum += softmax(c) * grad_context(c, e);
            store<T>(p_.grad_value, at(p_.grad_value, b, n, h) + e * p_.grad_value.channel, sum);
        }
        for (int64_t c = 0; p_.grad_key.data && c < p_.channels; ++c) {
            double sum = 0;
            for (int64_t e = 0; counts && e < p_.value_channels; ++e)
                sum += grad_context(c, e) * (value(b, n, h, e) - load<Wide>(p_.context, context_offset(b, h, c, e)));
            store<T>(p_.grad_key, at(p_.grad_key, b, n, h) + c * p_.grad_key.channel, counts ? softmax(c) * sum : 0);
        }
    }

    int64_t context_offset(int64_t b, int64_t h, int64_t c, int64_t e) const {
        const Tensor &t = p_.context;
        return b * t.batch + h * t.head + c * t.axis[2] + e * t.channel;
    }
    double grad_softmax(int64_t b, const Position &n, int64_t h, int64_t c) const {
        double sum = 0;
        for (int64_t e = 0; e < p_.value_channels; ++e)
            sum += grad_output(b, n, h, e) * load<Wide>(p_.context, context_offset(b, h, c, e));
        return sum;
    }
    double element(const Tensor &t, int64_t b, const Position &n, int64_t h, int64_t c) const {
        return load<T>(t, at(t, b, n, h) + c * t.channel);
    }
    double key(int64_t b, const Position &n, int64_t h, int64_t c) const { return element(p_.key, b, n, h, c); }
    double value(int64_t b, const Position &n, int64_t h, int64_t e) const { return element(p_.value, b, n, h, e); }
    double grad_output(int64_t b, const Position &n, int64_t h, int64_t e) const {
        return element(p_.grad_output, b, n, h, e);
    }

    const LinearProblem &p_;
    double *context_, *grad_context_;
};

template <class T, class Wide>
void run_as(const LinearProblem &p, const Workers &workers, void *workspace) {
    const Linear<T, Wide> linear(p, static_cast<double *>(workspace));
    p.pass == Pass::forward ? linear.forward(workers) : linear.backward(workers);
}

}  // namespace

size_t linear_attention_workspace(const LinearProblem &p, int32_t) {
    return 2 * static_cast<size_t>(Linear<float, float>::size(p)) * sizeof(double);
}

void run_linear_attention(const LinearProblem &p, const Workers &workers, void *workspace) {
    switch (p.dtype) {
        case Dtype::float32:
            return run_as<float, float>(p, workers, workspace);
        case Dtype::float64:
            return run_as<double, double>(p, workers, workspace);
        case Dtype::float16:
            return run_as<float16, float>(p, workers, workspace);
        case Dtype::bfloat16:
            return run_as<bfloat16, float>(p, workers, workspace);
    }
}

}  // namespace localattn::reference
