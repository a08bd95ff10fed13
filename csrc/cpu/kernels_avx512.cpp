// AVX-512 (F, DQ, BW, VL): 512-bit vectors. Compiled with its own flags (setup.py); nothing in it runs before isa.cpp
// has asked the processor. Empty where the architecture is another.
#if defined(__x86_64__)
#define JT_ISA avx512
#define JT_WIDTH 64
#include "cpu/kernel_set.h"

namespace jambatalk {
const IsaKernels kAvx512Kernels = {"avx512", avx512::kernel_set<float>(), avx512::kernel_set<double>()};
}  // namespace jambatalk
#endif
