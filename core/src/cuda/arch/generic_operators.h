// What the generic variant has besides attention, each in a file of its own.
#pragma once
#include "../variant.h"

namespace localattn::cuda {

extern const Kernel<WindowProduct> generic_window_product;
extern const Kernel<LinearProblem> generic_linear_attention;
extern const Kernel<RoutedProblem> generic_routed_attention;

}  // namespace localattn::cuda
