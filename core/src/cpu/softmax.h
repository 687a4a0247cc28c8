// The softmax of scores that come a block of keys at a time, by lanes of queries, and its derivative.
#pragma once
#include "vector.h"

namespace localattn::cpu {

template <class V>
struct StreamedSoftmax {
    using T = typename V::T;
    using reg = typename V::reg;

    T *maximum, *total;  // [lanes]: so far, in units of log 2; the sum of weights relative to 2^maximum

    LOCALATTN_INLINE void begin(const StreamedSoftmax &x, int64_t wide) {
        for (int64_t i = 0; i < wide; i += V::lanes) {
            V::store(x.maximum + i, V::all(-T(__builtin_inf())));
            V::store(x.total + i, reg{});
        }
    }
    // Turns n rows of scores into weights relative to the new maximum, and scales the sums so far,
    // sum[channel][lane], to it.
    LOCALATTN_INLINE void add(const StreamedSoftmax &x, T *s, ptrdiff_t row, int64_t n, int64_t wide, T *sum,
                              int64_t channels) {
        const reg lowest = V::all(-T(__builtin_inf()));
        for (int64_t i = 0; i < wide; i += V::lanes) {
            const reg before = V::load(x.maximum + i);
            reg m0 = before, m1 = lowest;
            int64_t k = 0;
            for (; k + 2 <= n; k += 2) {
                m0 = V::max(V::load(s + k * row + i), m0);
                m1 = V::max(V::load(s + (k + 1) * row + i), m1);
            }
            if (k < n) m0 = V::max(V::load(s + k * row + i), m0);
            m0 = V::max(m0, m1);
            V::store(x.maximum + i, m0);
            const reg shift = V::shift_of(m0);
            const reg decay = V::exp2(before - shift);
            reg t0 = decay * V::load(x.total + i), t1{};
            for (k = 0; k + 2 <= n; k += 2) {
                const reg p0 = V::exp2(V::load(s + k * row + i) - shift);
                const reg p1 = V::exp2(V::load(s + (k + 1) * row + i) - shift);
                V::store(s + k * row + i, p0);
                V::store(s + (k + 1) * row + i, p1);
                t0 += p0;
                t1 += p1;
            }
            if (k < n) {
                const reg p0 = V::exp2(V::load(s + k * row + i) - shift);
                V::store(s + k * row + i, p0);
                t0 += p0;
            }
            V::store(x.total + i, t0 + t1);
            for (int64_t e = 0; e < channels; ++e) V::store(sum + e * row + i, decay * V::load(sum + e * row + i));
        }
    }
    // Divides the sums by the total; log-sum-exps, natural, to lse. Without any weight: zeros and -infinity.
    LOCALATTN_INLINE void finish(const StreamedSoftmax &x, ptrdiff_t row, int64_t wide, T *sum, int64_t channels,
                                 T *lse) {
        for (int64_t i = 0; i < wide; i += V::lanes) {
            const reg total = V::load(x.total + i);
            const reg inverse = V::inverse_of(total);
            for (int64_t e = 0; e < channels; ++e) V::store(sum + e * row + i, inverse * V::load(sum + e * row + i));
            V::store(lse + i, (V::load(x.maximum + i) + V::log2(total)) * T(0.693147180559945309417));
        }
    }
};

}  // namespace localattn::cpu
