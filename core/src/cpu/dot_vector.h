// A vector whose multiply-add takes two bfloat16 a lane, the sums in float: for attention of bfloat16 tensors where the
// instruction set has such a product.
//
//   sum[lane] += x[lane].low * y[lane].low + x[lane].high * y[lane].high
//
// Products of two bfloat16 are exact in float, so scores are as exact as in float; weights, and what the backward makes
// of them, are rounded to bfloat16 before they are multiplied. Numbers below 1.2e-38 count as 0.
//
// A word is two neighbours along what a contraction sums over: channels in scores, entries of the window in sums over
// keys (microkernels.h). An odd number of them ends with a word whose high half counts for nothing, whatever it holds.
#pragma once
#include "vector.h"

namespace localattn::cpu {

template <class IsaType>
struct DotVector : Vector<IsaType, float> {
    using Base = Vector<IsaType, float>;
    using Base::lanes;
    using typename Base::Isa;
    using typename Base::Mask;
    using typename Base::mask;
    using typename Base::reg;
    using typename Base::T;
    using typename Base::whole;
    static constexpr int word = 2;
    static constexpr int64_t words(int64_t numbers) { return (numbers + word - 1) / word; }

    static inline __attribute__((always_inline)) reg multiply_add(reg sum, reg x, reg y) { return Isa::dot(sum, x, y); }
    // A word of two numbers, rounded to the nearest.
    static inline __attribute__((always_inline)) reg round(reg low, reg high) { return Isa::round(low, high); }
    // The same of numbers that are bfloat16 already.
    static inline __attribute__((always_inline)) reg join(reg low, reg high) {
        return reinterpret_cast<reg>(reinterpret_cast<whole>(low) >> 16 | reinterpret_cast<whole>(high));
    }
    // From words of the channels (c, c + 1) at positions x and x + 1: words of the two positions, of either channel.
    static inline __attribute__((always_inline)) reg low_halves(reg at_x, reg after) {
        return reinterpret_cast<reg>((reinterpret_cast<whole>(at_x) & 0xffffu) | reinterpret_cast<whole>(after) << 16);
    }
    static inline __attribute__((always_inline)) reg high_halves(reg at_x, reg after) {
        return reinterpret_cast<reg>(reinterpret_cast<whole>(at_x) >> 16 |
                                     (reinterpret_cast<whole>(after) & 0xffff0000u));
    }
    static inline __attribute__((always_inline)) mask word_mask(const Mask *m, int first, int entries) {
        const whole low = (m ? reinterpret_cast<whole>(Base::load_mask(m + first * lanes)) : ~whole{}) & 0xffffu;
        if (first + 1 >= entries) return reinterpret_cast<mask>(low);
        const whole high = reinterpret_cast<whole>(Base::load_mask(m + (first + 1) * lanes)) & 0xffff0000u;
        return reinterpret_cast<mask>(low | high);
    }
};

}  // namespace localattn::cpu
