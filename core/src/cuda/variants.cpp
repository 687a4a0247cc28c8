// The CUDA variants, best first.
#include "variant.h"

namespace localattn::cuda {

extern const Variant generic_variant;

const Variant *const variants[] = {&generic_variant};
const int32_t variant_count = sizeof variants / sizeof *variants;

}  // namespace localattn::cuda
