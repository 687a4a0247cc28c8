// The reference variant's kernels of the operations other than attention.
#pragma once
#include "../variant.h"

namespace localattn::reference {

size_t window_product_workspace(const WindowProduct &, int32_t workers);
void run_window_product(const WindowProduct &, const Workers &, void *workspace);

size_t linear_attention_workspace(const LinearProblem &, int32_t workers);
void run_linear_attention(const LinearProblem &, const Workers &, void *workspace);

size_t routed_attention_workspace(const RoutedProblem &, int32_t workers);
void run_routed_attention(const RoutedProblem &, const Workers &, void *workspace);

}  // namespace localattn::reference
