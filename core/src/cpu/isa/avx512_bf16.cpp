// AVX-512 with products of bfloat16, for attention of bfloat16 tensors; all else is avx512.cpp's.
#include "../kernels.h"
#include "avx512.h"

namespace localattn {

extern const Variant avx512_variant;

namespace {

struct Avx512Bf16 : Avx512 {
    using Avx512::load_some;
    using Avx512::store_some;
    // `count` elements as words of two, the rest zero.
    static inline __attribute__((always_inline)) __m512 load_some(const bfloat16 *p, int count) {
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first(count), p));
    }
    static inline __attribute__((always_inline)) void store_some(bfloat16 *p, __m512 words, int count) {
        _mm512_mask_storeu_epi16(p, first(count), _mm512_castps_si512(words));
    }
    static inline __attribute__((always_inline)) __mmask32 first(int count) {
        return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    }
    static inline __attribute__((always_inline)) __m512 dot(__m512 sum, __m512 x, __m512 y) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
    }
    static inline __attribute__((always_inline)) __m512 round(__m512 low, __m512 high) {
        constexpr auto both = [](int lane) { return lane | (lane + 16) << 16; };
        const __m512i order =
            _mm512_setr_epi32(both(0), both(1), both(2), both(3), both(4), both(5), both(6), both(7), both(8), both(9),
                              both(10), both(11), both(12), both(13), both(14), both(15));
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
};

using V = cpu::DotVector<Avx512Bf16>;

// Queries that share a window are multiplied in blocks, by another kernel.
bool takes(const Problem &problem, Pass pass) {
    return problem.dtype == Dtype::bfloat16 && !cpu::Blocked<V>::takes(problem, pass);
}
size_t run_bfloat16(const Problem &problem, Pass pass, const Workers &workers, void *memory) {
    const auto codec = cpu::codec_for(cpu::make_word_codec<V>(), cpu::elements_of(problem, pass));
    return cpu::run_windows<V>(problem, pass, codec, workers, memory);
}
size_t workspace(const Problem &problem, Pass pass, int32_t count) {
    if (!takes(problem, pass)) return avx512_variant.workspace(problem, pass, count);
    Workers workers;
    workers.count = count;
    return run_bfloat16(problem, pass, workers, nullptr);
}
void run(const Problem &problem, Pass pass, const Workers &workers, void *memory) {
    if (takes(problem, pass))
        run_bfloat16(problem, pass, workers, memory);
    else
        avx512_variant.run(problem, pass, workers, memory);
}

// The other operations, asked for at run time: a copy of that record would be made by code that runs before main.
template <class OneProblem, Kernel<OneProblem> Variant::*kernel>
struct OfAvx512 {
    static size_t workspace(const OneProblem &problem, int32_t workers) {
        return (avx512_variant.*kernel).workspace(problem, workers);
    }
    static void run(const OneProblem &problem, const Workers &workers, void *memory) {
        (avx512_variant.*kernel).run(problem, workers, memory);
    }
    static constexpr Kernel<OneProblem> record{workspace, run};
};

}  // namespace

extern const Variant avx512_bf16_variant;
const Variant avx512_bf16_variant = {
    "avx512_bf16",
    "as avx512, attention of bfloat16 two numbers a lane",
    cpu_avx512_bf16 | cpu_avx512 | cpu_avx2 | cpu_fma | cpu_f16c,
    cpu::declines_nothing,
    workspace,
    run,
    OfAvx512<WindowProduct, &Variant::window_product>::record,
    OfAvx512<LinearProblem, &Variant::linear_attention>::record,
    OfAvx512<RoutedProblem, &Variant::routed_attention>::record,
};

}  // namespace localattn
