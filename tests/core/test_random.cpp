// Random configurations over every option, each variant in turn, against the oracle.
//
//     test_random [--seed N] [--case SEED] [--variant NAME]
//
// A configuration is a function of its own seed; `--case` runs that one again. LOCALATTN_TEST_COUNT is how many to run
// (10000 unless told), LOCALATTN_TEST_SEED where to begin.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "harness.h"

int main(int argc, char **argv) {
    const auto number = [](const char *text, uint64_t otherwise) {
        return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
    };
    const uint64_t count = number(std::getenv("LOCALATTN_TEST_COUNT"), 10000);
    uint64_t seed = number(std::getenv("LOCALATTN_TEST_SEED"), 1), only = 0;
    bool one = false;
    std::vector<std::string> variants = test::available_variants();
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string option = argv[i];
        if (option == "--seed") seed = number(argv[i + 1], seed);
        if (option == "--case") only = number(argv[i + 1], 0), one = true;
        if (option == "--variant") variants = {argv[i + 1]};
    }
    const double work = 30e3;  // multiplications in a configuration's forward, at most
    test::Report report;
    if (one) {
        const test::Config config = test::random_config(only, work);
        std::printf("%s\n", test::describe(config).c_str());
        report.check(config, variants, "test_random --case " + std::to_string(only));
    } else {
        std::printf("seed %" PRIu64 ", %" PRIu64 " configurations\n", seed, count);
        for (uint64_t i = 0; i < count; ++i) {
            const uint64_t own = seed * 1000000 + i;
            report.check(test::random_config(own, work), variants, "test_random --case " + std::to_string(own));
        }
    }
    return report.finish("random") == 0 ? 0 : 1;
}
