// Element types as scalars: the 16-bit formats as plain bits, and the one place where they are converted. Conversions
// to them round to nearest, ties to even; NaN stays NaN. Internal linkage, for the reason given in window.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "window.h"

namespace localattn {

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

LOCALATTN_HOST_DEVICE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
LOCALATTN_HOST_DEVICE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

LOCALATTN_HOST_DEVICE float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
LOCALATTN_HOST_DEVICE float widen(float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
    // Shifting into place and multiplying by 2^112 mends the exponent bias, subnormals included.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 5.192296858534828e33f));
}
LOCALATTN_HOST_DEVICE float widen(float x) { return x; }
LOCALATTN_HOST_DEVICE double widen(double x) { return x; }

LOCALATTN_HOST_DEVICE void narrow(float x, bfloat16 &to) {
    const uint32_t u = bits_of(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    to.bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
LOCALATTN_HOST_DEVICE void narrow(float x, float16 &to) {
    const uint32_t u = bits_of(x);
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 2^16 and up
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 makes the adder round at the subnormal's last bit
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}
LOCALATTN_HOST_DEVICE void narrow(float x, float &to) { to = x; }
LOCALATTN_HOST_DEVICE void narrow(double x, double &to) { to = x; }
// Through float: a double rounding whose error is far below half a unit of either 16-bit format except at exact ties.
LOCALATTN_HOST_DEVICE void narrow(double x, float &to) { to = static_cast<float>(x); }
LOCALATTN_HOST_DEVICE void narrow(double x, bfloat16 &to) { narrow(static_cast<float>(x), to); }
LOCALATTN_HOST_DEVICE void narrow(double x, float16 &to) { narrow(static_cast<float>(x), to); }

template <class To, class From>
LOCALATTN_HOST_DEVICE To load_as(const From *from) {
    return static_cast<To>(widen(*from));
}
template <class From, class To>
LOCALATTN_HOST_DEVICE void store_from(From x, To *to) {
    narrow(x, *to);
}

}  // namespace localattn
