// The softmax of scores that come a block of keys at a time, by lanes of queries, and its derivative.
#pragma once
#include "vector.h"

namespace localattn::cpu {

template <class V>
struct StreamedSoftmax {
    using T = typename V::T;
    using reg = typename V::reg;

    T *reference, *total;  // [lanes]: a score, in units of log 2; the sum of weights relative to 2^reference

    LOCALATTN_INLINE void begin(const StreamedSoftmax &x, int64_t wide) {
        for (int64_t i = 0; i < wide; i += V::lanes) {
            V::store(x.reference + i, V::all(-T(__builtin_inf())));
            V::store(x.total + i, reg{});
        }
    }
    // Turns n rows of scores into weights relative to the reference, and where that changes scales the sums so far,
    // sum[channel][lane], to it. A lane's reference is its first block's maximum while no weight exceeds 2^8.
    LOCALATTN_INLINE void add(const StreamedSoftmax &x, T *s, ptrdiff_t row, int64_t n, int64_t wide, T *sum,
                              int64_t channels) {
        const reg lowest = V::all(-T(__builtin_inf()));
        for (int64_t i = 0; i < wide; i += V::lanes) {
            reg m0 = lowest, m1 = lowest;
            int64_t k = 0;
            for (; k + 2 <= n; k += 2) {
                m0 = V::max(V::load(s + k * row + i), m0);
                m1 = V::max(V::load(s + (k + 1) * row + i), m1);
            }
            if (k < n) m0 = V::max(V::load(s + k * row + i), m0);
            m0 = V::max(m0, m1);
            const reg before = V::load(x.reference + i);
            const typename V::mask risen = m0 > before + T(8);
            reg reference = before, t0 = V::load(x.total + i), t1{};
            if (V::any(risen)) {
                reference = V::choose(risen, m0, before);
                const reg decay = V::exp2(before - V::shift_of(reference));
                V::store(x.reference + i, reference);
                t0 *= decay;
                for (int64_t e = 0; e < channels; ++e) V::store(sum + e * row + i, decay * V::load(sum + e * row + i));
            }
            const reg shift = V::shift_of(reference);
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
        }
    }
    // Divides the sums by the total; log-sum-exps, natural, to lse. Without any weight: zeros and -infinity.
    LOCALATTN_INLINE void finish(const StreamedSoftmax &x, ptrdiff_t row, int64_t wide, T *sum, int64_t channels,
                                 T *lse) {
        for (int64_t i = 0; i < wide; i += V::lanes) {
            const reg total = V::load(x.total + i);
            const reg inverse = V::inverse_of(total);
            for (int64_t e = 0; e < channels; ++e) V::store(sum + e * row + i, inverse * V::load(sum + e * row + i));
            V::store(lse + i, (V::load(x.reference + i) + V::log2(total)) * T(0.693147180559945309417));
        }
    }
};

}  // namespace localattn::cpu
