// Calls on CUDA tensors, as liblocalattn makes them: opens the library of kernels, chooses a variant, runs it. What fails
// is thrown (error.h), with a sentence that says what to install.
#pragma once
#include "../dispatch.h"
#include "../problem.h"
#include "localattn/localattn.h"
#include "variant.h"

namespace localattn::cuda {

// NULL, or why no CUDA call can work here: not built in, library missing. The driver is not asked.
const char *unavailable();

// The CUDA variants, best first; none if unavailable.
int32_t listed_variant_count();
const Variant &listed_variant(int32_t index);

// As choose_variant for the CPU: the first that the device can run and that takes the problem; `forced` must.
const Variant &choose_variant(const Problem &problem, Pass pass, int32_t device_index, const char *forced, Report &report);

// On the context's device and stream. The workspace is device memory of at least variant.workspace(problem, pass) bytes.
void run(const Variant &variant, const Problem &problem, Pass pass, const localattn_context &context);

}  // namespace localattn::cuda
