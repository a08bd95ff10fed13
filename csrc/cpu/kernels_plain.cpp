// What every x86-64 and every ARMv8 has (SSE2, NEON): 128-bit vectors.
#define JT_ISA plain
#define JT_WIDTH 16
#include "cpu/kernel_set.h"

namespace jambatalk {
const IsaKernels kPlainKernels = {"plain", plain::kernel_set<float>(), plain::kernel_set<double>()};
}  // namespace jambatalk
