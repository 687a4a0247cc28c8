// The checks on what a caller hands over, all of them, in one place: past these, code may rely on every field. Nothing
// here reads a tensor.
#pragma once
#include "localattn/localattn.h"
#include "problem.h"

namespace localattn {

// Whether the call will read and write the tensors, or only asks about a call that would.
enum class Data { used, described };

// Copies a struct of the caller's, whichever version of it: what it lacks is zero, what is unknown here must be. Then
// fills in defaults. Fails naming the first field that is not allowed.
localattn_context checked_context(const localattn_context *context);
localattn_attention_params checked_params(const localattn_attention_params *params, Pass pass, Data data);

void check_workspace(const localattn_context &context, size_t needed);

// In problem.cpp: what the kernels read instead of checked params.
Problem make_problem(const localattn_attention_params &params);

}  // namespace localattn
