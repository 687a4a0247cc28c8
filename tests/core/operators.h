// Runs an operation other than attention with one variant, both passes, and compares what it wrote with sums over its
// definition.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "harness.h"

namespace test {

// A tensor that a call writes; what it should hold, and for each element the sum of the absolute values of what adds up
// to it, which says how large its rounding errors may be.
struct Written {
    const char *name;
    Memory *memory;
    Dense exact, terms;

    Written(const char *name, Memory &memory) : name(name), memory(&memory), exact(memory.shape), terms(memory.shape) {}
    void add(const Shape &at, double x, double magnitude = -1) {
        exact[at] += x;
        terms[at] += magnitude < 0 ? std::fabs(x) : magnitude;
    }
};

// Appends to `failures` where the memory differs from what it should hold. `roundings`: how many roundings of the terms
// to the type of accumulation there may be. Tensor cores round factors of the terms of 16-bit results to 16 bits, too.
inline void compare_written(const Written &w, Element element, double roundings, bool tensor_cores,
                            std::vector<std::string> &failures) {
    const Dense got = w.memory->dense();
    const double wide = unit_roundoff(element == Element::float64 ? Element::float64 : Element::float32);
    const double narrow = tensor_cores && w.memory->element == element ? unit_roundoff(element) : 0;
    // And where such a factor is below 2^-14, by an absolute amount.
    const double least = element == Element::float16   ? (narrow != 0 ? 0x1p-18 : 0x1p-24)
                         : element == Element::float64 ? 1e-300
                                                       : 1e-37;
    for (size_t i = 0; i < got.data.size(); ++i) {
        const double x = got.data[i], wanted = rounded(w.memory->element, w.exact.data[i]);
        const double tolerance = 2 * unit_roundoff(w.memory->element) * std::fabs(wanted) +
                                 (roundings * wide + narrow) * w.terms.data[i] + least;
        if (x == wanted || std::fabs(x - wanted) <= tolerance || (std::isnan(x) && std::isnan(wanted))) continue;
        failures.push_back(std::string(w.name) + " at element " + std::to_string(i) + " of " +
                           std::to_string(got.data.size()) + " is " + std::to_string(x) + ", not " +
                           std::to_string(wanted) + " within " + std::to_string(tolerance));
        break;
    }
    if (!w.memory->untouched()) failures.push_back(std::string(w.name) + ": memory beside its elements was written");
}

// A workspace of exactly the size asked for, holding NaN, with a pattern behind it.
class Workspace {
public:
    explicit Workspace(size_t size) : size_(size), bytes_(size + 128) {
        const size_t past = reinterpret_cast<uintptr_t>(bytes_.data()) % 64;
        start_ = bytes_.data() + (past ? 64 - past : 0);
        std::memset(start_, 0xff, size);
        std::memset(start_ + size, 0x5a, guard);
    }
    void give(localattn_context &context) {
        context.workspace = start_;
        context.workspace_size = size_;
    }
    bool guard_is_intact() const {
        return std::all_of(start_ + size_, start_ + size_ + guard, [](unsigned char x) { return x == 0x5a; });
    }

private:
    static constexpr size_t guard = 64;
    size_t size_;
    Bytes bytes_;
    unsigned char *start_;
};

// How often which variant declined what, and why.
inline std::map<std::string, int> declined;

// `Params` is a params struct; the functions are the operation's entry points.
template <class Params>
struct Operation {
    localattn_status (*forward)(const localattn_context *, const Params *);
    localattn_status (*backward)(const localattn_context *, const Params *);
    localattn_status (*workspace_size)(const localattn_context *, const Params *, localattn_pass, size_t *);
    localattn_status (*chosen)(const localattn_context *, const Params *, localattn_pass, const char **, char *,
                               size_t);

    void check(const Params &params, const std::string &variant, localattn_pass pass, std::vector<Written> &results,
               Element element, double roundings, uint64_t seed, std::vector<std::string> &failures) const {
        const auto call = pass == LOCALATTN_FORWARD ? forward : backward;
        const auto poison = [&] {
            for (Written &w : results) w.memory->poison();
        };
        const auto bytes = [&] {
            std::vector<unsigned char> all;
            for (Written &w : results) all.insert(all.end(), w.memory->bytes().begin(), w.memory->bytes().end());
            return all;
        };
        localattn_context context = LOCALATTN_INIT(localattn_context);
        context.variant = variant.c_str();
        context.num_threads = 1;
        context.device_type = device_of(variant);
        if (chosen(&context, &params, pass, nullptr, nullptr, 0) == LOCALATTN_UNSUPPORTED) {
            ++declined[localattn_last_error()];
            return;
        }
        const auto call_with_workspace = [&](const char *how) {
            size_t size = 0;
            if (workspace_size(&context, &params, pass, &size) != LOCALATTN_OK)
                return failures.push_back("workspace query: " + std::string(localattn_last_error()));
            Workspace workspace(size);
            workspace.give(context);
            poison();
            if (call(&context, &params) != LOCALATTN_OK) failures.push_back(how + std::string(localattn_last_error()));
            if (const char *wrong = finish_device()) failures.push_back(how + std::string(wrong));
            if (!workspace.guard_is_intact()) failures.push_back("memory behind the workspace was written");
        };
        if (context.device_type == LOCALATTN_CPU) {
            poison();
            if (call(&context, &params) != LOCALATTN_OK) return failures.push_back(localattn_last_error());
        } else {
            call_with_workspace("");
        }
        for (const Written &w : results) compare_written(w, element, roundings, variant == "cuda_sm80", failures);
        const std::vector<unsigned char> alone = bytes();

        Random random(seed);
        const BackwardsExecutor backwards(static_cast<int32_t>(pick(random, 2, 5)));
        context.executor = &backwards.executor;
        context.workspace = nullptr;
        context.workspace_size = 0;
        call_with_workspace("once more: ");
        if (bytes() != alone)
            failures.push_back("the bits differ the second time, with " +
                               std::to_string(backwards.executor.num_workers) + " workers");
    }
};

// Runs check(seed, variant, failures), which returns a description, for LOCALATTN_TEST_COUNT seeds (`count` unless
// told) from LOCALATTN_TEST_SEED on, or for the one named after --case, and every variant. The exit status.
template <class Check>
int run_random(const char *program, int argc, char **argv, uint64_t count, const Check &check) {
    require_device();
    const auto number = [](const char *text, uint64_t otherwise) {
        return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
    };
    count = number(std::getenv("LOCALATTN_TEST_COUNT"), count);
    uint64_t first = number(std::getenv("LOCALATTN_TEST_SEED"), 1) * 1000000;
    std::vector<std::string> variants = available_variants();
    for (int i = 1; i + 1 < argc; i += 2) {
        if (std::strcmp(argv[i], "--case") == 0) first = number(argv[i + 1], 0), count = 1;
        if (std::strcmp(argv[i], "--variant") == 0) variants = {argv[i + 1]};
    }
    int failed = 0, runs = 0;
    for (uint64_t seed = first; seed < first + count; ++seed) {
        for (const std::string &variant : variants) {
            std::vector<std::string> failures;
            const std::string description = check(seed, variant, failures);
            ++runs;
            if (failures.empty()) continue;
            if (++failed > 40) continue;
            std::printf("FAILED %s --case %llu --variant %s\n    %s\n", program, static_cast<unsigned long long>(seed),
                        variant.c_str(), description.c_str());
            for (const std::string &failure : failures) std::printf("    %s\n", failure.c_str());
            std::fflush(stdout);
        }
    }
    for (const auto &[reason, count] : declined) std::printf("%d times: %s\n", count, reason.c_str());
    std::printf("%s: from case %llu on, %llu configurations, %d runs, %d failures\n", program,
                static_cast<unsigned long long>(first), static_cast<unsigned long long>(count), runs, failed);
    return failed == 0 && runs > 0 ? 0 : 1;
}

}  // namespace test
