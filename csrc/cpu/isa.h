// Which instruction set the kernels use: the best that the processor has, or the one that JAMBATALK_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace jambatalk {

// The kernels in use. Throws std::runtime_error if JAMBATALK_CPU_ISA names a set that is unknown or not supported here.
const IsaKernels& kernels();

// Switches to the named set ("avx512", "avx2", "plain" or "wide") for all later calls; throws like kernels().
void use_isa(const std::string& name);

// The names that this processor can run, best first.
std::vector<std::string> supported_isas();

}  // namespace jambatalk
