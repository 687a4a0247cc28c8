#include "avx512.h"

#include "../kernels.h"

namespace localattn {

extern const Variant avx512_variant;
const Variant avx512_variant = {
    "avx512",
    "fused, 16 queries a register",
    cpu_avx512 | cpu_avx2 | cpu_fma | cpu_f16c,
    cpu::declines_nothing,
    cpu::workspace<Avx512>,
    cpu::run<Avx512>,
    cpu::Records<Avx512>::window_product,
    cpu::Records<Avx512>::linear_attention,
    cpu::Records<Avx512>::routed_attention,
};

}  // namespace localattn
