// The reference variant's kernels of the operations other than attention.
#pragma once
#include "../variant.h"

namespace localattn::reference {

size_t window_product_workspace(const WindowProduct &, int32_t workers);
void run_window_product(const WindowProduct &, const Workers &, void *workspace);

}  // namespace localattn::reference
