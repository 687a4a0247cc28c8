// The library's conversions of 16-bit types against ones written another way: every bit pattern, and what lies between.
#include <cmath>
#include <cstring>
#include <random>

#include "../../core/src/scalar.h"
#include "check.h"
#include "tensor.h"

namespace {

using localattn::load_as;
using localattn::store_from;

template <class T>
void check_every_pattern(test::Element element) {
    test::Random random(1);
    test::Memory memory(random, element, {1, 1, 1, 1, 1, 1}, 0, true, false);
    int wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const T x{static_cast<uint16_t>(bits)};
        std::memcpy(memory.view(1).data, &x, sizeof x);
        const double wanted = memory.get({}), got = load_as<double>(&x);
        T back;
        store_from(load_as<float>(&x), &back);
        const bool nan = std::isnan(wanted) && std::isnan(got) && std::isnan(load_as<float>(&back));
        wrong += !nan && (got != wanted || std::signbit(got) != std::signbit(wanted) || back.bits != x.bits);
    }
    CHECK(wrong == 0) << wrong << " patterns";
}

template <class T>
void check_rounding(test::Element element) {
    std::mt19937_64 random(7);
    int wrong = 0;
    for (int i = 0; i < 300000; ++i) {
        // A float near a representable value, near a tie, or anywhere.
        T near{static_cast<uint16_t>(random())};
        T next{static_cast<uint16_t>(near.bits + 1)};
        const double a = load_as<double>(&near), b = load_as<double>(&next);
        const int kind = static_cast<int>(random() % 3);
        uint32_t any = static_cast<uint32_t>(random());
        float x;
        std::memcpy(&x, &any, sizeof x);
        if (kind < 2) x = static_cast<float>((a + b) / 2);
        if (kind == 1) x = std::nextafter(x, random() % 2 ? INFINITY : -INFINITY);
        if (std::isnan(x)) continue;
        T got;
        store_from(x, &got);
        wrong += load_as<double>(&got) != test::rounded(element, x);
    }
    CHECK(wrong == 0) << wrong << " values";
}

}  // namespace

TEST(float16_patterns) { check_every_pattern<localattn::float16>(test::Element::float16); }
TEST(bfloat16_patterns) { check_every_pattern<localattn::bfloat16>(test::Element::bfloat16); }
TEST(float16_rounding) { check_rounding<localattn::float16>(test::Element::float16); }
TEST(bfloat16_rounding) { check_rounding<localattn::bfloat16>(test::Element::bfloat16); }

int main(int argc, char **argv) { return check::run(argc, argv); }
