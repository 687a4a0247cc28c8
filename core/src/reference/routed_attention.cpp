// Routed attention by its definition: every result element is one sum over pairs, accumulated in double.
#include <cmath>
#include <limits>

#include "operators.h"
#include "walk.h"

namespace localattn::reference {

namespace {

template <class T, class Wide>
class Routed {
public:
    explicit Routed(const RoutedProblem &p) : p_(p) {}

    void forward(const Workers &workers) const {
        each_pixel(workers, p_.query_region, [&](int64_t b, const Position &q, int64_t h) {
            double largest = -infinity, total = 0;
            each_key(b, q, [&](int64_t choice, const Position &k) {
                const double s = score(b, h, q, k) * weight(b, region_of(q, p_.query_region), choice);
                if (s > largest || std::isnan(s)) largest = s;
            });
            const double shift = largest == -infinity ? 0 : largest;
            const auto exponential = [&](int64_t choice, const Position &k) {
                return std::exp(score(b, h, q, k) * weight(b, region_of(q, p_.query_region), choice) - shift);
            };
            each_key(b, q, [&](int64_t choice, const Position &k) { total += exponential(choice, k); });
            for (int64_t e = 0; e < p_.value_channels; ++e) {
                double sum = 0;
                each_key(b, q, [&](int64_t choice, const Position &k) {
                    sum += exponential(choice, k) * weight(b, region_of(q, p_.query_region), choice) *
                           element(p_.value, b, k, h, e);
                });
                store<T>(p_.output, at(p_.output, b, q, h) + e * p_.output.channel, total == 0 ? 0 : sum / total);
            }
            if (!p_.lse.data) return;
            const double lse = largest == infinity ? infinity : total == 0 ? -infinity : std::log(total) + shift;
            store<Wide>(p_.lse, at(p_.lse, b, q, h), lse);
        });
    }

    void backward(const Workers &workers) const {
        if (p_.grad_query.data) {
            each_pixel(workers, p_.query_region, [&](int64_t b, const Position &q, int64_t h) {
                for (int64_t c = 0; c < p_.channels; ++c) {
                    double sum = 0;
                    each_key(b, q, [&](int64_t choice, const Position &k) {
                        const Pair pair(*this, b, h, q, k, choice);
                        sum += pair.grad_score * pair.weight * element(p_.key, b, k, h, c);
                    });
                    write(p_.grad_query, b, q, h, c, sum * p_.scale);
                }
            });
        }
        if (p_.grad_key.data || p_.grad_value.data) {
            each_pixel(workers, p_.key_region, [&](int64_t b, const Position &k, int64_t h) {
                const int64_t channels = std::max(p_.channels, p_.value_channels);
                for (int64_t c = 0; c < channels; ++c) {
                    double key = 0, value = 0;
                    each_query(b, k, [&](int64_t choice, const Position &q) {
                        const Pair pair(*this, b, h, q, k, choice);
                        if (c < p_.channels) key += pair.grad_score * pair.weight * element(p_.query, b, q, h, c);
                        if (c < p_.value_channels)
                            value += pair.probability * pair.weight * element(p_.grad_output, b, q, h, c);
                    });
                    if (p_.grad_key.data && c < p_.channels) write(p_.grad_key, b, k, h, c, key * p_.scale);
                    if (p_.grad_value.data && c < p_.value_channels) write(p_.grad_value, b, k, h, c, value);
                }
            });
        }
        if (!p_.grad_region_weight.data) return;
        each(workers, p_.batch * p_.regions() * p_.topk, [&](int64_t number, int32_t) {
            const int64_t choice = digit(number, p_.topk), region = digit(number, p_.regions()), b = number;
            double sum = 0;
            for (int64_t h = 0; h < p_.heads; ++h) {
                each_of(region, p_.query_region, [&](const Position &q) {
                    each_of(p_.index(b, region, choice), p_.key_region, [&](const Position &k) {
                        const Pair pair(*this, b, h, q, k, choice);
                        sum += pair.grad_score * score(b, h, q, k) + pair.probability * pair.grad_probability;
                    });
                });
            }
            store<Wide>(p_.grad_region_weight, p_.choice_offset(p_.grad_region_weight, b, region, choice), sum);
        });
    }

private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();

    struct Pair {
        double weight, probability, grad_probability, grad_score;  // grad_probability without the weight

        Pair(const Routed &r, int64_t b, int64_t h, const Position &q, const Position &k, int64_t choice) {
            const RoutedProblem &p = r.p_;
            weight = r.weight(b, region_of(p, q, p.query_region), choice);
            const double lse = load<Wide>(p.lse, at(p.lse, b, q, h));
            // An infinite score makes the whole softmax NaN.
            probability = lse == -infinity  ? 0
                          : lse == infinity ? std::numeric_limits<double>::quiet_NaN()
                                            : std::exp(r.score(b, h, q, k) * weight - lse);
            grad_probability = 0;
            double delta = 0;
            for (int64_t e = 0; e < p.value_channels; ++e) {
                const double g = element(p.grad_output, b, q, h, e);
                grad_probability += g * element(p.value, b, k, h, e);
                delta += g * element(p.output, b, q, h, e);
            }
            if (p.grad_lse.data) delta -= load<Wide>(p.grad_lse, at(p.grad_lse, b, q, h));
            grad_score = lse == -infinity ? 0 : probability * (grad_probability * weight - delta);
        }
    };

    static int64_t region_of(const RoutedProblem &p, const Position &x, const int64_t (&size)[2]) {
        return x.axis[1] / size[0] * p.grid[1] + x.axis[2] / size[1];
    }
    int64_t region_of(const Position &x, const int64_t (&size)[2]) const { return region_of(p_, x, size); }

    template <class Visit>
    void each_of(int64_t region, const int64_t (&size)[2], const Visit &visit) const {
        for (int64_t i = 0; i < size[0] * size[1]; ++i)
            visit(Position{
                {0, region / p_.grid[1] * size[0] + i / size[1], region % p_.grid[1] * size[1] + i % size[1]}});
    }
    template <class Visit>
    void each_key(int64_t b, const Position &q, const Visit &visit) const {
        const int64_t region = region_of(q, p_.query_region);
        for (int64_t choice = 0; choice < p_.topk; ++choice)
            each_of(p_.index(b, region, choice), p_.key_region, [&](const Position &k) { visit(choice, k); });
    }
    template <class Visit>
    void each_query(int64_t b, const Position &k, const Visit &visit) const {
        const int64_t own = region_of(k, p_.key_region);
        for (int64_t region = 0; region < p_.regions(); ++region)
            for (int64_t choice = 0; choice < p_.topk; ++choice)
                if (p_.index(b, region, choice) == own)
                    each_of(region, p_.query_region, [&](const Position &q) { visit(choice, q); });
    }
    template <class Visit>
    void each_pixel(const Workers &workers, const int64_t (&size)[2], const Visit &visit) const {
        const int64_t height = p_.grid[0] * size[0], width = p_.grid[1] * size[1];
        each(workers, p_.batch * height * width * p_.heads, [&](int64_t number, int32_t) {
            const int64_t h = digit(number, p_.heads);
            Position x{};
            x.axis[2] = digit(number, width);
            x.axis[1] = digit(number, height);
            visit(number, x, h);
        });
    }

    double score(int64_t b, int64_t h, const Position &q, const Position &k) const {
        double sum = 0;
        for (int64_t c = 0; c < p_.channels; ++c) sum += element(p_.query, b, q, h, c) * element(p_.key, b, k, h, c);
        return sum * p_.scale;
    }
    double weight(int64_t b, int64_t region, int64_t choice) const {
        if (!p_.region_weight.data) return 1;
        return load<T>(p_.region_weight, p_.choice_offset(p_.region_weight, b, region, choice));
    }
    static double element(const Tensor &t, int64_t b, const Position &x, int64_t h, int64_t c) {
        return load<T>(t, at(t, b, x, h) + c * t.channel);
    }
    static void write(const Tensor &t, int64_t b, const Position &x, int64_t h, int64_t c, double sum) {
        store<T>(t, at(t, b, x, h) + c * t.channel, sum);
    }

    const RoutedProblem &p_;
};

template <class T, class Wide>
void run_as(const RoutedProblem &p, const Workers &workers) {
    const Routed<T, Wide> routed(p);
    p.pass == Pass::forward ? routed.forward(workers) : routed.backward(workers);
}

}  // namespace

size_t routed_attention_workspace(const RoutedProblem &, int32_t) { return 0; }

void run_routed_attention(const RoutedProblem &p, const Workers &workers, void *) {
    switch (p.dtype) {
        case Dtype::float32:
            return run_as<float, float>(p, workers);
        case Dtype::float64:
            return run_as<double, double>(p, workers);
        case Dtype::float16:
            return run_as<float16, float>(p, workers);
        case Dtype::bfloat16:
            return run_as<bfloat16, float>(p, workers);
    }
}

}  // namespace localattn::reference
