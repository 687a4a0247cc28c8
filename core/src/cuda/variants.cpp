// The CUDA variants, best first. LOCALATTN_CUDA_SM80 is 0 where the build has no architecture for that one.
#include "variant.h"

namespace localattn::cuda {

extern const Variant generic_variant;
extern const Variant sm80_variant;
extern const Variant simt_variant;

int64_t cached_score_gradients = int64_t(8) << 20;

const Variant *const variants[] = {
#if LOCALATTN_CUDA_SM80
    &sm80_variant,
#endif
    &simt_variant, &generic_variant};
const int32_t variant_count = sizeof variants / sizeof *variants;

}  // namespace localattn::cuda
