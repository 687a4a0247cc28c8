// Which devices a build serves, against what NVIDIA says of binary and PTX compatibility.
#include "cuda/capability.h"

#include <cstdio>

using localattn::cuda::runs_on;

int main() {
    constexpr int all[] = {75, 80, 86, 89, 90}, some[] = {75, 86};
    const struct {
        const int *built;
        int count, device;
        bool expected;
    } cases[] = {
        {all, 5, 70, false},                                            // older than everything
        {all, 5, 75, true},   {all, 5, 80, true},  {all, 5, 87, true},  // 8.6's machine code
        {all, 5, 90, true},   {all, 5, 100, true},                      // PTX
        {some, 2, 80, false},  // neither 7.5's machine code nor 8.6's, and its PTX is newer
        {some, 2, 89, true},  {some, 2, 90, true},
    };
    int failures = 0;
    for (const auto &c : cases) {
        if (runs_on(c.built, c.count, c.device) == c.expected) continue;
        failures++;
        std::printf("FAIL a build for %d to %d, device %d\n", c.built[0], c.built[c.count - 1], c.device);
    }
    return failures;
}
