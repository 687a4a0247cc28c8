// Compute capabilities, as 10 * major + minor, and what was built for them.
#pragma once

namespace localattn::cuda {

// Does a library that holds machine code for the `count` capabilities `built`, and PTX of the last of them, run on a
// device? Machine code serves the later devices of its own major version, PTX all later ones.
constexpr bool runs_on(const int *built, int count, int device) {
    for (int i = 0; i < count; ++i)
        if (built[i] / 10 == device / 10 && built[i] <= device) return true;
    return device >= built[count - 1];
}

}  // namespace localattn::cuda
