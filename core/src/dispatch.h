// Which variant serves a problem: the first in the list, best first, that this CPU can run and that accepts.
#pragma once
#include <functional>

#include "localattn/localattn.h"
#include "problem.h"
#include "variant.h"

namespace localattn {

// The variants built in, best first, the reference last.
int32_t variant_count();
const Variant &variant_at(int32_t index);

// One line per better variant that declined, cut to fit the caller's buffer, which may be NULL.
struct Report {
    char *text = nullptr;
    size_t size = 0;

    void add(const char *name, const char *reason);
};

// Why a variant does not take the problem at hand; NULL if it does.
using Declines = std::function<const char *(const Variant &)>;

// `forced` is context.variant; where that is NULL or "", LOCALATTN_CPU_ISA is asked. A forced variant that is unknown,
// that this CPU cannot run or that declines is a failure: falling back would not be what was asked for.
const Variant &choose_variant(const Declines &declines, const char *forced, Report &report);
const Variant &choose_variant(const Problem &problem, Pass pass, const char *forced, Report &report);

}  // namespace localattn
