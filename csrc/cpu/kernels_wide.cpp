// The 512-bit code path lowered by the compiler to what every machine has. Slow; it lets the logic of the AVX-512 path
// (16 lanes, its tails and paddings) be tested where no AVX-512 is.
#define JT_ISA wide
#define JT_WIDTH 64
#include "cpu/kernel_set.h"

namespace jambatalk {
const IsaKernels kWideKernels = {"wide", wide::kernel_set<float>(), wide::kernel_set<double>()};
}  // namespace jambatalk
