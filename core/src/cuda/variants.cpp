// The CUDA variants, best first.
#include "variant.h"

namespace localattn::cuda {

extern const Variant generic_variant;
extern const Variant sm80_variant;
extern const Variant simt_variant;

const Variant *const variants[] = {&sm80_variant, &simt_variant, &generic_variant};
const int32_t variant_count = sizeof variants / sizeof *variants;

}  // namespace localattn::cuda
