// The native dropout op: tensors to arrays, threads. Schema in schemas.h; the kernel in dropout_kernel.h.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {

Tensor dropout(const Tensor& x, double p, int64_t seed) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "dropout: expected a contiguous CPU tensor");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout: expected a probability of at least 0 and less than 1");
  constexpr double kAll = 4294967296.0;  // 2^32
  DropoutCall call{};
  call.dtype = memory_type("x", x), call.count = x.numel(), call.task_size = 4096;
  call.batch = 1, call.groups = (call.count + call.task_size - 1) / call.task_size;
  call.seed = uint64_t(seed), call.threshold = uint32_t(std::min(std::round(p * kAll), kAll - 1));
  call.scale = kAll / (kAll - call.threshold);
  Tensor y = torch::stable::empty_like(x);
  call.x = x.const_data_ptr(), call.y = y.mutable_data_ptr();
  run_tasks(kernels_for(compute_type(x)).dropout, call, call.task_size);
  return y;
}

}  // namespace jambatalk
