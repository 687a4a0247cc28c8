// A register of numbers, for kernels that are written once and compiled for each instruction set.
//
// An instruction set is a traits type `Isa` (see isa/): how many bytes a register has, how many registers there are,
// and a few operations that the compiler does not find by itself. Everything else is the compiler's own vector type, so
// multiply-add, compare and blend become whatever instructions the file's flags allow. Isa types live in anonymous
// namespaces, which gives every instantiation internal linkage: no file compiled for one instruction set exports code
// that the linker could pick for another.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../scalar.h"

namespace localattn::cpu {

#define LOCALATTN_INLINE static inline __attribute__((always_inline))
#define LOCALATTN_UNROLL _Pragma("GCC unroll 32")

// Integers that go with a lane. All depend on T, as gcc forgets that a type is a vector if only its size is dependent.
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = int32_t;
    using half = uint16_t;
    using whole = uint32_t;
};
template <>
struct IntegerOf<double> {
    using type = int64_t;
    using half = uint16_t;
    using whole = uint32_t;
};

template <class IsaType, class Scalar>
struct Vector {
    using Isa = IsaType;
    using T = Scalar;
    using Mask = typename IntegerOf<T>::type;  // one lane of a mask: all ones or zero
    static constexpr int lanes = Isa::register_bytes / sizeof(T);
    static constexpr int registers = Isa::registers;
    // How many numbers a lane of multiply_add's operands holds: words of several are another type, dot_vector.h.
    static constexpr int word = 1;
    static constexpr int64_t words(int64_t numbers) { return (numbers + word - 1) / word; }

    typedef T reg __attribute__((vector_size(Isa::register_bytes)));
    typedef Mask mask __attribute__((vector_size(Isa::register_bytes)));
    typedef T unaligned_reg __attribute__((vector_size(Isa::register_bytes), aligned(sizeof(T)), may_alias));
    typedef Mask unaligned_mask __attribute__((vector_size(Isa::register_bytes), aligned(sizeof(T)), may_alias));

    // Registers of 16-bit patterns, and of the same widened.
    typedef typename IntegerOf<T>::half half __attribute__((vector_size(lanes * 2)));
    typedef typename IntegerOf<T>::half unaligned_half __attribute__((vector_size(lanes * 2), aligned(2), may_alias));
    typedef typename IntegerOf<T>::whole whole __attribute__((vector_size(lanes * 4)));

    static inline __attribute__((always_inline)) reg load(const T *p) {
        return *reinterpret_cast<const unaligned_reg *>(p);
    }
    static inline __attribute__((always_inline)) void store(T *p, reg x) { *reinterpret_cast<unaligned_reg *>(p) = x; }
    static inline __attribute__((always_inline)) mask load_mask(const Mask *p) {
        return *reinterpret_cast<const unaligned_mask *>(p);
    }
    static inline __attribute__((always_inline)) reg multiply_add(reg sum, reg x, reg y) { return sum + x * y; }
    static inline __attribute__((always_inline)) reg all(T x) { return x - reg{}; }
    static inline __attribute__((always_inline)) reg max(reg a, reg b) { return a > b ? a : b; }
    // The mask of the word of entries that begins with `first` of `entries`; m[entry * lanes] is an entry's, all ones
    // if m is NULL.
    static inline __attribute__((always_inline)) mask word_mask(const Mask *m, int first, int) {
        return m ? load_mask(m + first * lanes) : ~mask{};
    }
    // Where the mask is zero: exactly 0, whatever x holds there.
    static inline __attribute__((always_inline)) reg keep(mask m, reg x) {
        return reinterpret_cast<reg>(reinterpret_cast<mask>(x) & m);
    }
    static inline __attribute__((always_inline)) bool any(mask m) {
        Mask found = 0;
        for (int l = 0; l < lanes; ++l) found |= m[l];
        return found;
    }
    static inline __attribute__((always_inline)) reg choose(mask m, reg x, reg otherwise) { return m ? x : otherwise; }

    // 2^f for f in [-1/2, 1/2], float: a near-minimax fit, relative error 9.2e-8.
    static inline __attribute__((always_inline)) reg exp2_near_zero(reg f) {
        reg p = all(1.326472707e-03f);
        p = p * f + 9.671512649e-03f;
        p = p * f + 5.550733744e-02f;
        p = p * f + 2.402224209e-01f;
        p = p * f + 6.931469776e-01f;
        return p * f + 1.0f;
    }

    // 2^x, for x up to the exponent's range; 0 for very negative x, exactly 0 for -infinity; NaN stays NaN.
    static inline __attribute__((always_inline)) reg exp2(reg x) {
        constexpr bool single = sizeof(T) == 4;
        if constexpr (single && Isa::scales) {
            const reg fraction = Isa::fraction(x);
            return keep(x < T(-126) ? mask{} : ~mask{}, Isa::scale(exp2_near_zero(fraction), x - fraction));
        }
        constexpr T lowest = single ? T(-127) : T(-1023), highest = single ? T(128) : T(1024);
        x = x < lowest ? all(lowest) : x;
        x = x > highest ? all(highest) : x;
        // Adding 1.5 * 2^(mantissa bits) rounds to the nearest integer and leaves it in the low bits.
        const T magic = single ? T(12582912) : T(6755399441055744);
        const reg shifted = x + magic;
        const reg f = x - (shifted - magic);
        reg p;
        if constexpr (single) {
            p = exp2_near_zero(f);
        } else {
            // Taylor series of exp(f log 2): the remainder is below 1e-17.
            const reg g = f * 0.693147180559945309417;
            constexpr double reciprocal[] = {1.0 / 13, 1.0 / 12, 1.0 / 11, 1.0 / 10, 1.0 / 9, 1.0 / 8, 1.0 / 7,
                                             1.0 / 6,  1.0 / 5,  1.0 / 4,  1.0 / 3,  1.0 / 2, 1.0};
            p = all(1);
            LOCALATTN_UNROLL
            for (int i = 0; i < 13; ++i) p = p * (g * reciprocal[i]) + T(1);
        }
        constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
        const mask exponent = (reinterpret_cast<mask>(shifted) - reinterpret_cast<mask>(all(magic)) + Mask(bias))
                              << mantissa;
        return p * reinterpret_cast<reg>(exponent);
    }

    // What softmax subtracts from scores whose maximum is `m`. Without any score above -infinity, something finite
    // gives weights of zero; so it does where the maximum is +infinity, whose weight and sum then are +infinity, as is
    // the log-sum-exp, and the output NaN.
    static inline __attribute__((always_inline)) reg shift_of(reg m) {
        const reg highest = all(sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__));
        m = m > highest ? highest : m;
        return m < -highest ? reg{} : m;
    }

    // What the weights' sum divides by: 0 for a query that saw nothing, NaN if one of its scores is +infinity.
    static inline __attribute__((always_inline)) reg inverse_of(reg total) {
        return total == reg{} ? reg{} : (T(1) + (total - total)) / total;
    }

    // log2 of a number >= 0; -infinity for 0. float: relative error of the fit 2.7e-8.
    static inline __attribute__((always_inline)) reg log2(reg x) {
        if constexpr (sizeof(T) == 8) {
            for (int l = 0; l < lanes; ++l) x[l] = __builtin_log2(x[l]);
            return x;
        } else {
            // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
            const mask bits = reinterpret_cast<mask>(x) - 0x3f3504f3;
            const mask e = bits >> 23;
            const reg f = reinterpret_cast<reg>((bits & 0x7fffff) + 0x3f3504f3) - T(1);
            reg p = all(1.258370129e-01f);
            p = p * f - 2.072697432e-01f;
            p = p * f + 2.157156069e-01f;
            p = p * f - 2.389448218e-01f;
            p = p * f + 2.879162481e-01f;
            p = p * f - 3.607036828e-01f;
            p = p * f + 4.809106429e-01f;
            p = p * f - 7.213473468e-01f;
            p = p * f + 1.442695004e+00f;
            p = p * f + __builtin_convertvector(e, reg);
            p = x > T(3.4e38) ? x : p;
            p = x != x ? x : p;
            return x < T(1.2e-38) ? all(-__builtin_inff()) : p;
        }
    }

    // Keeps gcc from folding a load into every multiply-add that uses it, which costs a load port each time.
    static inline __attribute__((always_inline)) void hold(reg &x) { Isa::hold(x); }

    // `lanes` contiguous elements of any type.
    static inline __attribute__((always_inline)) reg load_as(const T *p) { return load(p); }
    static inline __attribute__((always_inline)) reg load_as(const float16 *p) {
        static_assert(sizeof(T) == 4);
        return Isa::widen(p);
    }
    static inline __attribute__((always_inline)) reg load_as(const bfloat16 *p) {
        static_assert(sizeof(T) == 4);
        const whole bits = __builtin_convertvector(*reinterpret_cast<const unaligned_half *>(p), whole) << 16;
        return reinterpret_cast<reg>(bits);
    }
    static inline __attribute__((always_inline)) void store_as(T *p, reg x) { store(p, x); }
    static inline __attribute__((always_inline)) void store_as(float16 *p, reg x) { Isa::narrow(x, p); }
    static inline __attribute__((always_inline)) void store_as(bfloat16 *p, reg x) {
        const whole u = reinterpret_cast<whole>(x);
        const whole rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        const whole nan = u >> 16 | 0x40u;
        const whole chosen = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
        *reinterpret_cast<unaligned_half *>(p) = __builtin_convertvector(chosen, half);
    }
};

}  // namespace localattn::cpu
