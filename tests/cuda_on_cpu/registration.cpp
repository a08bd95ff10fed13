// The CUDA ops for CPU tensors: torch.ops.jambatalk_cuda_on_cpu.*, with the schemas of the real ones.
#include "cuda/ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(jambatalk_cuda_on_cpu, m) { jambatalk::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(jambatalk_cuda_on_cpu, CPU, m) { jambatalk::cuda::implement_ops(m); }
