// Runs an operation other than attention with one variant, both passes, and compares what it wrote with sums over its
// definition.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
// to the type of accumulation there may be.
inline void compare_written(const Written &w, Element element, double roundings, std::vector<std::string> &failures) {
    const Dense got = w.memory->dense();
    const double wide = unit_roundoff(element == Element::float64 ? Element::float64 : Element::float32);
    const double least = element == Element::float16 ? 0x1p-24 : element == Element::float64 ? 1e-300 : 1e-37;
    for (size_t i = 0; i < got.data.size(); ++i) {
        const double x = got.data[i], wanted = rounded(w.memory->element, w.exact.data[i]);
        const double tolerance =
            2 * unit_roundoff(w.memory->element) * std::fabs(wanted) + roundings * wide * w.terms.data[i] + least;
        if (x == wanted || std::fabs(x - wanted) <= tolerance) continue;
        failures.push_back(std::string(w.name) + " at element " + std::to_string(i) + " of " +
                           std::to_string(got.data.size()) + " is " + std::to_string(x) + ", not " +
                           std::to_string(wanted) + " within " + std::to_string(tolerance));
        break;
    }
    if (!w.memory->untouched()) failures.push_back(std::string(w.name) + ": memory beside its elements was written");
}

// `Params` is a params struct; the functions are the operation's entry points.
template <class Params>
struct Operation {
    localattn_status (*forward)(const localattn_context *, const Params *);
    localattn_status (*backward)(const localattn_context *, const Params *);
    localattn_status (*workspace_size)(const localattn_context *, const Params *, localattn_pass, size_t *);

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
        poison();
        if (call(&context, &params) != LOCALATTN_OK) return failures.push_back(localattn_last_error());
        for (const Written &w : results) compare_written(w, element, roundings, failures);
        const std::vector<unsigned char> alone = bytes();

        Random random(seed);
        const BackwardsExecutor backwards(static_cast<int32_t>(pick(random, 2, 5)));
        context.executor = &backwards.executor;
        size_t size = 0;
        if (workspace_size(&context, &params, pass, &size) != LOCALATTN_OK)
            return failures.push_back("workspace query: " + std::string(localattn_last_error()));
        // Exactly as much as was asked for, then a pattern.
        const size_t whole = (size + 128) / 64 * 64;
        auto *workspace = static_cast<unsigned char *>(std::aligned_alloc(64, whole));
        std::memset(workspace, 0xff, size);
        std::memset(workspace + size, 0x5a, whole - size);
        context.workspace = workspace;
        context.workspace_size = size;
        poison();
        if (call(&context, &params) != LOCALATTN_OK)
            failures.push_back("with an executor: " + std::string(localattn_last_error()));
        else if (bytes() != alone)
            failures.push_back("the bits differ between one worker and " +
                               std::to_string(backwards.executor.num_workers));
        for (size_t i = size; i < whole; ++i) {
            if (workspace[i] == 0x5a) continue;
            failures.push_back("memory behind the workspace was written");
            break;
        }
        std::free(workspace);
    }
};

// Runs check(seed, variant, failures), which returns a description, for LOCALATTN_TEST_COUNT seeds (`count` unless
// told) from LOCALATTN_TEST_SEED on, or for the one named after --case, and every variant. The exit status.
template <class Check>
int run_random(const char *program, int argc, char **argv, uint64_t count, const Check &check) {
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
    std::printf("%s: from case %llu on, %llu configurations, %d runs, %d failures\n", program,
                static_cast<unsigned long long>(first), static_cast<unsigned long long>(count), runs, failed);
    return failed == 0 && runs > 0 ? 0 : 1;
}

}  // namespace test
