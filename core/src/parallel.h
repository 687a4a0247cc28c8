// Who does a call's work: the caller's executor, or threads started for the call.
//
// There is no pool of our own. A thread that outlives its call is a thread that a forked child (a DataLoader worker)
// does not have: GNU OpenMP's parallel regions hang in a child whose parent has used them, for just that reason.
// Threads started when work is there and joined before the call returns leave nothing behind to break, and cost some 10
// us each, which callers to whom that matters avoid by handing over an executor.
#pragma once
#include "localattn/localattn.h"
#include "problem.h"
#include "variant.h"

namespace localattn {

// `context` is already checked. `executor` and the result must not outlive the call.
Workers workers_for(const localattn_context &context, double multiplications);
Workers workers_for(const localattn_context &context, const Problem &problem);

}  // namespace localattn
