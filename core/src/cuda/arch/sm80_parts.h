// The parts of the sm80 variant, each in a file of its own.
#pragma once
#include "../variant.h"

namespace localattn::cuda {

struct Workspace;  // tiled_backward.h
namespace sm80 {
const char *forward(const Problem &, const Workspace &, void *stream);
const char *backward(const Problem &, const Workspace &, void *stream);
}  // namespace sm80
extern const Kernel<RoutedProblem> sm80_routed_attention;

}  // namespace localattn::cuda
