// Bias gradients that several jobs add to: jobs run in groups, each group alone in its own copy of the gradients, and
// the copies are added up in order. Which jobs form a group depends on the problem only, so that any number of workers
// gives the same bits. Plain baseline code.
#pragma once
#include "plan.h"

namespace localattn::cpu {

struct BiasGradients {
    Tensor bias, table, axis[3];
    bool bias_is_own = false;  // no two pairs share a number of the bias
    bool any() const { return bias.data || table.data || axis[0].data || axis[1].data || axis[2].data; }
};

struct BiasGroups {
    const Problem *problem = nullptr;
    int element = 0;
    int64_t groups = 1;  // 0: no two jobs meet, every job is its own group
    int64_t copy_elements = 0;
    void *copies = nullptr;  // [groups][copy_elements]; NULL where groups <= 1
};
BiasGroups make_bias_groups(const Problem &, int element, Arena &);
// Zeros in the results and in the copies. Once, before any group runs.
void clear(const BiasGroups &);
// Where a group adds.
BiasGradients gradients_of(const BiasGroups &, int64_t group);
// Adds the copies to the results, in group order.
void reduce(const BiasGroups &);

}  // namespace localattn::cpu
