// The parts of the simt variant, each in a file of its own.
#pragma once
#include "../variant.h"

namespace localattn::cuda {

struct Workspace;  // tiled_backward.h
namespace simt {
const char *forward(const Problem &, const Workspace &, void *stream);
const char *backward(const Problem &, const Workspace &, void *stream);
}  // namespace simt
extern const Kernel<WindowProduct> simt_window_products;

}  // namespace localattn::cuda
