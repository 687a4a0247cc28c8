// The problems without a query or without a key, whose results need no kernel. They are answered here, once, so that a
// variant's workspace() and run() never see an extent of zero.
#pragma once
#include "problem.h"

namespace localattn {

bool is_empty(const Problem &problem);

// Writes every result that exists: zeros, and a log-sum-exp of -infinity.
void answer_empty(const Problem &problem, Pass pass);

}  // namespace localattn
