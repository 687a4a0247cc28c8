#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "build.h"
#include "cpu_features.h"
#include "error.h"

namespace localattn {

// Each file of cpu/isa/ defines one record, NAME_variant; reference/ defines the last.
#define LOCALATTN_DECLARE(name) extern const Variant name##_variant;
LOCALATTN_CPU_VARIANTS(LOCALATTN_DECLARE)
LOCALATTN_DECLARE(reference)
#undef LOCALATTN_DECLARE

namespace {

#define LOCALATTN_LIST(name) &name##_variant,
const Variant *const variants[] = {LOCALATTN_CPU_VARIANTS(LOCALATTN_LIST) LOCALATTN_LIST(reference)};
#undef LOCALATTN_LIST

constexpr int32_t count = sizeof variants / sizeof *variants;

[[noreturn]] void fail_unknown(const char *source, const char *name) {
    char names[256] = "";
    size_t used = 0;
    for (const Variant *v : variants) {
        const int written = std::snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", v->name);
        used += static_cast<size_t>(written);
        if (used >= sizeof names) break;
    }
    fail(LOCALATTN_INVALID_ARGUMENT, "%s is \"%s\", but this library has %s", source, name, names);
}

const Variant &forced_variant(const Declines &declines, const char *source, const char *name) {
    for (const Variant *v : variants) {
        if (std::strcmp(v->name, name) != 0) continue;
        const char *reason = missing_cpu_feature(v->cpu_features);
        if (!reason) reason = declines(*v);
        if (reason) fail(LOCALATTN_UNSUPPORTED, "%s is \"%s\", but that variant declines: %s", source, name, reason);
        return *v;
    }
    fail_unknown(source, name);
}

}  // namespace

int32_t variant_count() { return count; }

const Variant &variant_at(int32_t index) { return *variants[index]; }

void Report::add(const char *name, const char *reason) {
    if (!text || size == 0) return;
    const int written = std::snprintf(text, size, "%s: %s\n", name, reason);
    const size_t advance = static_cast<size_t>(written) < size ? static_cast<size_t>(written) : size - 1;
    text += advance;
    size -= advance;
}

const Variant &choose_variant(const Declines &declines, const char *forced, Report &report) {
    if (report.text && report.size) *report.text = '\0';
    if (forced && *forced) return forced_variant(declines, "context.variant", forced);
    const char *isa = std::getenv("LOCALATTN_CPU_ISA");
    if (isa && *isa) return forced_variant(declines, "LOCALATTN_CPU_ISA", isa);
    for (const Variant *v : variants) {
        const char *reason = missing_cpu_feature(v->cpu_features);
        if (!reason) reason = declines(*v);
        if (!reason) return *v;
        report.add(v->name, reason);
    }
    fail(LOCALATTN_UNSUPPORTED, "no variant built into this library takes the problem");
}

const Variant &choose_variant(const Problem &problem, Pass pass, const char *forced, Report &report) {
    return choose_variant([&](const Variant &v) { return v.declines(problem, pass); }, forced, report);
}

}  // namespace localattn
