// What the generic variant has besides attention, each in a file of its own; and what it does for the tiled ones.
#pragma once
#include "../pair.h"
#include "../spoilt_rows.h"
#include "../variant.h"

namespace localattn::cuda {

extern const Kernel<WindowProduct> generic_window_product;
extern const Kernel<LinearProblem> generic_linear_attention;
extern const Kernel<RoutedProblem> generic_routed_attention;

// The spoilt rows of a pass that a tiled variant has computed; of the backward's gradients of query, key and value.
const char *generic_spoilt_rows(const Problem &, Pass, const ChosenRows &, const Deltas<float> &, void *stream);

}  // namespace localattn::cuda
