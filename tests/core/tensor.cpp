#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace test {

namespace {

constexpr unsigned char guard_byte = 0xa5;

struct Format {
    int precision, least_exponent;  // bits of the significand; exponent of the least normal number
    double largest;
};

Format format_of(Element element) {
    switch (element) {
        case Element::float16:
            return {11, -14, 65504};
        case Element::bfloat16:
            return {8, -126, std::ldexp(255.0, 120)};
        case Element::float32:
            return {24, -126, std::numeric_limits<float>::max()};
        default:
            return {53, -1022, std::numeric_limits<double>::max()};
    }
}

double decode16(Element element, uint16_t bits) {
    const int mantissa_bits = format_of(element).precision - 1;
    const int mantissa = bits & ((1 << mantissa_bits) - 1), exponent_bits = 15 - mantissa_bits;
    const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) {
        return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

uint16_t encode16(Element element, double x) {
    const int mantissa_bits = format_of(element).precision - 1, exponent_bits = 15 - mantissa_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
    x = std::fabs(rounded(element, x));
    if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
    if (x < std::ldexp(1, 1 - bias)) return static_cast<uint16_t>(sign | int(std::ldexp(x, bias - 1 + mantissa_bits)));
    int exponent;
    const double fraction = std::frexp(x, &exponent);  // 0.5 to 1
    const int mantissa = static_cast<int>(std::ldexp(fraction, mantissa_bits + 1)) - (1 << mantissa_bits);
    return static_cast<uint16_t>(sign | (exponent - 1 + bias) << mantissa_bits | mantissa);
}

}  // namespace

int64_t size_of(Element element) {
    switch (element) {
        case Element::float32:
            return 4;
        case Element::float64:
            return 8;
        case Element::uint8:
            return 1;
        default:
            return 2;
    }
}

double rounded(Element element, double x) {
    if (element == Element::float64 || element == Element::uint8 || x == 0 || !std::isfinite(x)) return x;
    const Format format = format_of(element);
    const int exponent = std::max(std::ilogb(x), format.least_exponent);
    const double unit = std::ldexp(1, exponent - format.precision + 1);
    const double y = std::nearbyint(x / unit) * unit;
    return std::fabs(y) > format.largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
}

double unit_roundoff(Element element) { return std::ldexp(1, -format_of(element).precision); }

Memory::Memory(Random &random, Element element, const Shape &shape, unsigned broadcast, bool plain, bool result)
    : element(element), shape(shape) {
    std::array<int, 6> order = {0, 1, 2, 3, 4, 5};  // slowest first
    if (!plain) {
        const int64_t kind = pick(random, 0, 9);
        if (kind < 3) {
            order = {0, 4, 5, 1, 2, 3};  // channels first
        } else if (kind < 5) {
            order = {0, 4, 1, 2, 3, 5};  // heads first
        } else if (kind < 8) {
            std::shuffle(order.begin(), order.end(), random);
        }
    }
    int64_t step = 1, low = 0, high = 0;
    const bool gaps = !plain && chance(random, 40), flips = !plain && chance(random, 20);
    const bool overlaps = !plain && !result && chance(random, 8);
    for (int i = 5; i >= 0; --i) {
        const int a = order[static_cast<size_t>(i)];
        // A broadcast axis has one element, however often it is read.
        int64_t &extent = this->shape[static_cast<size_t>(a)];
        if (broadcast >> a & 1) extent = 1;
        int64_t &stride = strides[static_cast<size_t>(a)];
        if (gaps && chance(random, 40)) step += pick(random, 1, 5);
        stride = step;
        if (broadcast >> a & 1) {
            stride = 0;
        } else if (extent <= 1) {
            // Nobody may look at this stride.
            if (!plain) stride = pick(random, 1, 1000000);
        } else if (overlaps && chance(random, 50)) {
            stride = pick(random, 0, step);
        } else {
            if (flips && chance(random, 40)) stride = -stride;
            step *= std::max<int64_t>(extent, 1);
        }
        if (extent > 0) (stride < 0 ? low : high) += stride * (extent - 1);
    }
    // Inputs lie alone in their memory, so that AddressSanitizer sees any access outside; results lie between guards.
    const int64_t guard = result ? 64 : 0, shift = plain ? 0 : pick(random, 0, 20);
    const int64_t size = size_of(element), count = Dense::count(this->shape) == 0 ? 0 : high - low + 1;
    const int64_t line = 64;
    bytes_.resize(static_cast<size_t>((guard + shift + count + guard) * size + (result ? line : 0)));
    base_ = (guard + shift - low) * size;
    // Most results begin a cache line.
    if (result && (plain || chance(random, 70))) base_ = (base_ + line - 1) / line * line;
    covered_.resize(bytes_.size());
    each([&](int64_t byte) { std::fill_n(covered_.begin() + byte, size, true); });
}

int64_t Memory::offset(const Shape &at) const {
    int64_t elements = 0;
    for (size_t a = 0; a < 6; ++a) elements += at[a] * strides[a];
    return base_ + elements * size_of(element);
}

template <class Visit>
void Memory::each(const Visit &visit) const {
    Shape at;
    for (at[0] = 0; at[0] < shape[0]; ++at[0])
        for (at[1] = 0; at[1] < shape[1]; ++at[1])
            for (at[2] = 0; at[2] < shape[2]; ++at[2])
                for (at[3] = 0; at[3] < shape[3]; ++at[3])
                    for (at[4] = 0; at[4] < shape[4]; ++at[4])
                        for (at[5] = 0; at[5] < shape[5]; ++at[5]) visit(offset(at));
}

double Memory::read(int64_t byte) const {
    const unsigned char *from = bytes_.data() + byte;
    if (element == Element::uint8) return *from;
    if (element == Element::float32) {
        float x;
        std::memcpy(&x, from, sizeof x);
        return x;
    }
    if (element == Element::float64) {
        double x;
        std::memcpy(&x, from, sizeof x);
        return x;
    }
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return decode16(element, bits);
}

void Memory::write(int64_t byte, double x) {
    unsigned char *to = bytes_.data() + byte;
    if (element == Element::uint8) {
        *to = static_cast<unsigned char>(x);
    } else if (element == Element::float32) {
        const float y = static_cast<float>(x);
        std::memcpy(to, &y, sizeof y);
    } else if (element == Element::float64) {
        std::memcpy(to, &x, sizeof x);
    } else {
        const uint16_t bits = encode16(element, x);
        std::memcpy(to, &bits, sizeof bits);
    }
}

double Memory::get(const Shape &at) const { return read(offset(at)); }
void Memory::set(const Shape &at, double x) { write(offset(at), x); }

Dense Memory::dense() const {
    Shape own = shape;
    for (size_t a = 0; a < 6; ++a) {
        if (strides[a] == 0 && shape[a] > 0) own[a] = 1;
    }
    Dense dense(own);
    Shape at;
    size_t i = 0;
    for (at[0] = 0; at[0] < own[0]; ++at[0])
        for (at[1] = 0; at[1] < own[1]; ++at[1])
            for (at[2] = 0; at[2] < own[2]; ++at[2])
                for (at[3] = 0; at[3] < own[3]; ++at[3])
                    for (at[4] = 0; at[4] < own[4]; ++at[4])
                        for (at[5] = 0; at[5] < own[5]; ++at[5]) dense.data[i++] = get(at);
    return dense;
}

void Memory::fill_random(Random &random, double magnitude) {
    std::fill(bytes_.begin(), bytes_.end(), 0xff);  // a NaN in every format
    each([&](int64_t byte) {
        write(byte, magnitude * static_cast<double>(static_cast<int64_t>(random() % 4001) - 2000) / 2000);
    });
}

void Memory::fill_mask(Random &random) {
    std::fill(bytes_.begin(), bytes_.end(), 0xff);
    each([&](int64_t byte) { write(byte, chance(random, 70) ? static_cast<double>(pick(random, 1, 255)) : 0); });
}

void Memory::poison() {
    std::fill(bytes_.begin(), bytes_.end(), guard_byte);
    each([&](int64_t byte) { write(byte, std::numeric_limits<double>::quiet_NaN()); });
}

bool Memory::untouched() const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
        if (!covered_[i] && bytes_[i] != guard_byte) return false;
    }
    return true;
}

localattn_tensor Memory::view(int rank) {
    localattn_tensor t{};
    t.data = bytes_.data() + base_;
    t.batch_stride = strides[0];
    for (int a = 0; a < rank; ++a) t.spatial_stride[a] = strides[static_cast<size_t>(1 + a)];
    t.head_stride = strides[4];
    t.channel_stride = strides[5];
    return t;
}

}  // namespace test
