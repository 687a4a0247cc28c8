// x86-64 with AVX-512 F, BW, DQ and VL: 32 registers of 64 bytes.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says it of its own intrinsics' undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "../../scalar.h"
#include "../vector.h"

namespace localattn {
namespace {

struct Avx512 {
    static constexpr int register_bytes = 64, registers = 32;
    static constexpr bool scales = true, masks = true;
    static constexpr bool writes_lines = true;  // has store_line

    template <class Reg>
    static inline __attribute__((always_inline)) void hold(Reg &x) {
        asm("" : "+v"(x));
    }
    static inline __attribute__((always_inline)) __m512 load_some(const float *p, int from, int to) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << to) - (1u << from)), p);
    }
    static inline __attribute__((always_inline)) __m512d load_some(const double *p, int from, int to) {
        return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << to) - (1u << from)), p);
    }
    static inline __attribute__((always_inline)) void store_some(float *p, __m512 x, int count) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
    }
    static inline __attribute__((always_inline)) void store_some(double *p, __m512d x, int count) {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), x);
    }
    // To memory past the caches, which neither reads the line first nor keeps it; p begins one.
    static inline __attribute__((always_inline)) void store_line(void *p, __m512 x) {
        _mm512_stream_ps(static_cast<float *>(p), x);
    }
    static inline __attribute__((always_inline)) void store_line(void *p, __m512d x) {
        _mm512_stream_pd(static_cast<double *>(p), x);
    }
    // x less the nearest integer; 0 for infinity.
    static inline __attribute__((always_inline)) __m512 fraction(__m512 x) {
        return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    // p * 2^n
    static inline __attribute__((always_inline)) __m512 scale(__m512 p, __m512 n) { return _mm512_scalef_ps(p, n); }
    static inline __attribute__((always_inline)) __m512 widen(const float16 *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static inline __attribute__((always_inline)) void narrow(__m512 x, float16 *p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    template <class Reg>
    static inline __attribute__((always_inline)) void transpose(Reg (&r)[16]) {
        __m512 t[16];
        LOCALATTN_UNROLL
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
            const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
            r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
            r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 8; ++i) {
            r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        }
    }
    template <class Reg>
    static inline __attribute__((always_inline)) void transpose(Reg (&r)[8]) {
        __m512d t[8];
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
            r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
            r[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
            r[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
            r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
        }
        LOCALATTN_UNROLL
        for (int i = 0; i < 8; ++i) r[i] = t[i];
    }
};

}  // namespace

}  // namespace localattn
