// How the joint backward walks a problem: blocks of key rows, each with the query rows that pair with it.
#pragma once
#include "plan.h"

namespace localattn::cpu {

// The plan of tiles of keys over queries (A = key), with that of tiles of queries over the same strip's keys.
//
// A job owns the rows [segment, next segment) and the lanes of its strip, of queries and of keys alike. Pairs of which
// it owns one side only are computed by two jobs, each for the side it owns: rows of the neighbouring segments, and
// tiles of the halo.
struct JointPlan : Plan {
    Plan by_query;
    // Weights lie in planes, one for each offset from query lane to key lane, over the key lanes of the strip and of
    // one tile on either side, all phases.
    int64_t planes = 0;
    int64_t plane_phase = 0;    // columns per phase
    int64_t plane_columns = 0;  // from plane to plane
};

// Whether queries and keys share one map, so that jobs can own the same part of both, and a job's memory stays small.
bool joint_takes(const Problem &, PlanOptions);
// `a` is set here.
JointPlan make_joint_plan(const Problem &, PlanOptions, Arena &);

}  // namespace localattn::cpu
