// What this machine's CPU can run. Compiled for the baseline, so that asking is safe everywhere.
#pragma once
#include <cstdint>

namespace localattn {

// Of the features in `required` (CpuFeature bits), the first that the CPU or the operating system lacks, as a sentence
// that lives as long as the library; NULL if it has them all.
const char *missing_cpu_feature(uint32_t required);

}  // namespace localattn
