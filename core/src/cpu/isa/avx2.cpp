// x86-64 with AVX2, FMA and F16C: 16 registers of 32 bytes.
#include <immintrin.h>

#include "../kernels.h"

namespace localattn {
namespace {

struct Avx2 {
    static constexpr int register_bytes = 32, registers = 16;
    static constexpr bool scales = false;  // has fraction and scale
    static constexpr bool masks = true;
    static constexpr bool writes_lines = false;  // a register is half a line

    template <class Reg>
    static inline __attribute__((always_inline)) void hold(Reg &x) {
        asm("" : "+x"(x));
    }
    static inline __attribute__((always_inline)) __m256i lanes32(int from, int to) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
    }
    static inline __attribute__((always_inline)) __m256i lanes64(int from, int to) {
        const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
        return _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(from), lane),
                                   _mm256_cmpgt_epi64(_mm256_set1_epi64x(to), lane));
    }
    static inline __attribute__((always_inline)) __m256 load_some(const float *p, int from, int to) {
        return _mm256_maskload_ps(p, lanes32(from, to));
    }
    static inline __attribute__((always_inline)) __m256d load_some(const double *p, int from, int to) {
        return _mm256_maskload_pd(p, lanes64(from, to));
    }
    static inline __attribute__((always_inline)) void store_some(float *p, __m256 x, int count) {
        _mm256_maskstore_ps(p, lanes32(0, count), x);
    }
    static inline __attribute__((always_inline)) void store_some(double *p, __m256d x, int count) {
        _mm256_maskstore_pd(p, lanes64(0, count), x);
    }
    static inline __attribute__((always_inline)) __m256 widen(const float16 *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static inline __attribute__((always_inline)) void narrow(__m256 x, float16 *p) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    template <class Reg>
    static inline __attribute__((always_inline)) void transpose(Reg (&r)[8]) {
        __m256 t[8];
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m256d a = _mm256_castps_pd(t[4 * i]), b = _mm256_castps_pd(t[4 * i + 2]);
            const __m256d c = _mm256_castps_pd(t[4 * i + 1]), d = _mm256_castps_pd(t[4 * i + 3]);
            r[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            r[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            r[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
            r[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 8; ++i) r[i] = t[i];
    }
    template <class Reg>
    static inline __attribute__((always_inline)) void transpose(Reg (&r)[4]) {
        const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
        const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
        r[0] = _mm256_permute2f128_pd(a, c, 0x20);
        r[1] = _mm256_permute2f128_pd(b, d, 0x20);
        r[2] = _mm256_permute2f128_pd(a, c, 0x31);
        r[3] = _mm256_permute2f128_pd(b, d, 0x31);
    }
};

}  // namespace

extern const Variant avx2_variant;
const Variant avx2_variant = {
    "avx2",
    "fused, 8 queries a register",
    cpu_avx2 | cpu_fma | cpu_f16c,
    cpu::declines_nothing,
    cpu::workspace<Avx2>,
    cpu::run<Avx2>,
    cpu::Records<Avx2>::window_product,
    cpu::Records<Avx2>::linear_attention,
    cpu::Records<Avx2>::routed_attention,
};

}  // namespace localattn
