// How the joint backward walks a problem: blocks of key rows, each with the query rows that pair with it.
#pragma once
#include "plan.h"

namespace localattn::cpu {

// The plan of tiles of keys over queries (A = key), with that of tiles of queries over the same strip's keys.
//
// A job owns the key rows [segment, next segment), the query rows centred on them, and the lanes of its strip on either
// side. Pairs of which it owns one side only are computed by two jobs, each for the side it owns: rows of the
// neighbouring segments, and tiles of the halo.
struct JointPlan : Plan {
    Plan by_query;
    // Weights lie in planes, one for each phase of the queries and each offset from key lane to query lane, over the
    // key lanes of the strip and of one tile on either side, all phases.
    int64_t planes = 0;
    int64_t offsets = 0, lowest = 0;  // planes of a phase, and the offset of the first in steps
    int64_t plane_phase = 0;          // columns per phase
    int64_t plane_columns = 0;        // from plane to plane
    bool sees_all_keys = false;       // each key is in some query's window
};

// Whether keys belong to one head of queries, and a job's memory stays small.
bool joint_takes(const Problem &, const PlanOptions &);
// `a` is set here.
JointPlan make_joint_plan(const Problem &, PlanOptions, Arena &);

}  // namespace localattn::cpu
