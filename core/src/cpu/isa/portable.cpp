// Any machine: registers of 16 bytes, which every x86-64 (SSE2) and aarch64 (NEON) compiler has.
#include "../kernels.h"

namespace localattn {
namespace {

struct Portable {
    static constexpr int register_bytes = 16;
    static constexpr bool scales = false;  // has fraction and scale
    static constexpr bool masks = false;   // has load_some and store_some
    static constexpr bool writes_lines = false;
#if defined(__aarch64__)
    static constexpr int registers = 32;
#else
    static constexpr int registers = 15;  // of 16: one for products, as nothing multiplies and adds at once
#endif

    template <class Reg>
    static inline __attribute__((always_inline)) void hold(Reg &x) {
#if defined(__x86_64__)
        asm("" : "+x"(x));
#elif defined(__aarch64__)
        asm("" : "+w"(x));
#else
        (void)x;
#endif
    }
    typedef float Reg4 __attribute__((vector_size(16)));
    static inline __attribute__((always_inline)) Reg4 widen(const float16 *p) {
        return Reg4{localattn::widen(p[0]), localattn::widen(p[1]), localattn::widen(p[2]), localattn::widen(p[3])};
    }
    static inline __attribute__((always_inline)) void narrow(Reg4 x, float16 *p) {
        for (int i = 0; i < 4; ++i) localattn::narrow(x[i], p[i]);
    }
    template <class Reg, int Lanes>
    static inline __attribute__((always_inline)) void transpose(Reg (&r)[Lanes]) {
        for (int i = 0; i < Lanes; ++i) {
            for (int j = 0; j < i; ++j) {
                const auto x = r[i][j];
                r[i][j] = r[j][i];
                r[j][i] = x;
            }
        }
    }
};

}  // namespace

extern const Variant portable_variant;
const Variant portable_variant = {
    "portable",
    "fused, 4 queries a register, any machine",
    0,
    cpu::declines_nothing,
    cpu::workspace<Portable>,
    cpu::run<Portable>,
    cpu::Records<Portable>::window_product,
    cpu::Records<Portable>::linear_attention,
    cpu::Records<Portable>::routed_attention,
};

}  // namespace localattn
