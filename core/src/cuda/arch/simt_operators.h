// What the simt variant has besides attention, in a file of its own.
#pragma once
#include "../variant.h"

namespace localattn::cuda {

extern const Kernel<WindowProduct> simt_window_products;

}  // namespace localattn::cuda
