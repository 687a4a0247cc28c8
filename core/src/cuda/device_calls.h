// Calls on CUDA tensors, as liblocalattn makes them: opens the library of kernels, chooses a variant, runs it. What
// fails is thrown (error.h), with a sentence that says what to install.
#pragma once
#include <functional>

#include "../dispatch.h"
#include "../problem.h"
#include "localattn/localattn.h"
#include "variant.h"

namespace localattn::cuda {

// The CUDA variants, best first; none if CUDA is not built in or its library is missing. The driver is not asked.
int32_t listed_variant_count();
const Variant &listed_variant(int32_t index);
// NULL, or why device 0 cannot run the variant. As it was when first asked; lives as long as the library.
const char *unavailable(const Variant &variant);

// As choose_variant for the CPU: the first that the context's device can run and that takes the problem; a forced one
// must.
using Declines = std::function<const char *(const Variant &, const Device &)>;
const Variant &choose_variant(const Declines &declines, const localattn_context &context, Report &report);

// Puts work on the context's stream, the context's device being current, with the context's workspace, which is device
// memory of at least `needed` bytes.
using Launch = std::function<const char *(void *stream, void *workspace)>;
void run(const Variant &variant, size_t needed, const localattn_context &context, const Launch &launch);

// Attention. Extents may be zero.
const Variant &choose_variant(const Problem &problem, Pass pass, const localattn_context &context, Report &report);
size_t workspace_size(const Problem &problem, Pass pass, const localattn_context &context);
void attention(const Problem &problem, Pass pass, const localattn_context &context);

}  // namespace localattn::cuda
