// AVX2 and FMA: 256-bit vectors. Compiled with its own flags (setup.py); nothing in it runs before isa.cpp has
// asked the processor. Empty where the architecture is another.
#if defined(__x86_64__)
#define JT_ISA avx2
#define JT_WIDTH 32
#include "cpu/kernel_set.h"

namespace jambatalk {
const IsaKernels kAvx2Kernels = {"avx2", avx2::kernel_set<float>(), avx2::kernel_set<double>()};
}  // namespace jambatalk
#endif
