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

// The fields of the window and of sizes alone, with defaults filled in.
void check_window_fields(localattn_attention_params &params);

void check_workspace(const localattn_context &context, size_t needed);

// In problem.cpp: what the kernels read instead of checked params.
Problem make_problem(const localattn_attention_params &params);
// Keeps the strides that the tensor's role has and drops the rest, which the caller need not have set.
Tensor taken(const localattn_tensor &from, int32_t rank, bool batch, bool head, bool channel);

}  // namespace localattn
