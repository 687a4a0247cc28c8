// Types that both sides of gpu.h share.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../scalar.h"  // float16, bfloat16: as bits, so that no CUDA header is needed

namespace localattn::gpu {

using SharedAddress = uint32_t;  // of a byte of the block's shared memory
constexpr int warp_size = 32;

struct Extent3 {
    int32_t x = 1, y = 1, z = 1;
};

}  // namespace localattn::gpu
