#include "cpu_features.h"

#include "variant.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define LOCALATTN_X86 1
#endif

namespace localattn {

namespace {

#ifdef LOCALATTN_X86
// Which register states the operating system saves on a context switch. Without that a feature that CPUID announces
// would still fault or lose its upper halves.
uint64_t enabled_states() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

uint32_t probe() {
    const auto bit = [](uint32_t word, int index) { return (word >> index & 1) != 0; };
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    const bool fma = bit(ecx, 12), osxsave = bit(ecx, 27), avx = bit(ecx, 28), f16c = bit(ecx, 29);
    if (!osxsave || !avx) return 0;

    constexpr uint64_t ymm = 0x6;         // XMM, upper halves of YMM
    constexpr uint64_t zmm = ymm | 0xe0;  // and mask registers, upper halves of ZMM0-15, ZMM16-31
    const uint64_t states = enabled_states();
    if ((states & ymm) != ymm) return 0;

    uint32_t features = 0;
    if (fma) features |= cpu_fma;
    if (f16c) features |= cpu_f16c;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
    const uint32_t leaves = eax;
    if (bit(ebx, 5)) features |= cpu_avx2;
    const bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // F, DQ, BW, VL
    if (!avx512 || (states & zmm) != zmm) return features;
    features |= cpu_avx512;
    if (leaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && bit(eax, 5)) features |= cpu_avx512_bf16;
    return features;
}
#else
uint32_t probe() { return 0; }
#endif

struct FeatureName {
    uint32_t feature;
    const char *missing;
};

constexpr FeatureName feature_names[] = {
    {cpu_avx2, "this CPU or its operating system lacks AVX2"},
    {cpu_fma, "this CPU or its operating system lacks FMA"},
    {cpu_f16c, "this CPU or its operating system lacks F16C"},
    {cpu_avx512, "this CPU or its operating system lacks AVX-512 F, BW, DQ or VL"},
    {cpu_avx512_bf16, "this CPU or its operating system lacks AVX-512 BF16"},
};

}  // namespace

const char *missing_cpu_feature(uint32_t required) {
    static const uint32_t present = probe();
    for (const FeatureName &name : feature_names) {
        if (required & ~present & name.feature) return name.missing;
    }
    return nullptr;
}

}  // namespace localattn
