// What the sm80 variant has besides attention, each in a file of its own.
#pragma once
#include "../variant.h"

namespace localattn::cuda {

extern const Kernel<RoutedProblem> sm80_routed_attention;

}  // namespace localattn::cuda
