// The native layer_norm_gelu ops: tensors to arrays, threads. Schemas in schemas.h; the kernels in
// layer_norm_gelu_kernel.h.
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

constexpr int64_t kForwardRows = 64;    // of one task
constexpr int64_t kBackwardRows = 512;  // more: a task's sums over its rows are read once more

NormCall describe(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& shift, double eps,
                  int64_t task_rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1 && x.stride(1) == 1,
                  "layer_norm_gelu: expected x (rows, channels), channels side by side");
  NormCall call{};
  call.batch = 1, call.rows = x.size(0), call.channels = x.size(1), call.eps = eps;
  call.task_rows = task_rows, call.groups = (call.rows + task_rows - 1) / task_rows;
  call.x = as_array("x", x, {call.rows, call.channels});
  call.weight = as_array("weight", weight, {call.channels});
  call.bias = as_array("bias", bias, {call.channels});
  call.shift = as_array("shift", shift, {call.channels});
  return call;
}

}  // namespace

Tensor layer_norm_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& shift,
                       double eps) {
  NormCall call = describe(x, weight, bias, shift, eps, kForwardRows);
  Tensor y = new_tensor(x.scalar_type(), {call.rows, call.channels});
  call.y = as_array("y", y, {call.rows, call.channels});
  run_tasks(kernels_for(compute_type(x)).norm_gelu_forward, call, kForwardRows * (call.channels + 16) * 3);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_gelu_backward(const Tensor& grad_y, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& bias,
                                                                    const OptionalTensor& shift, double eps) {
  NormCall call = describe(x, weight, bias, shift, eps, kBackwardRows);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.dim() == 2 && grad_y.stride(1) == 1,
                  "layer_norm_gelu: expected grad_y like x");
  call.grad_y = as_array("grad_y", grad_y, {call.rows, call.channels});
  Tensor dx = new_tensor(x.scalar_type(), {call.rows, call.channels});
  call.dx = as_array("dx", dx, {call.rows, call.channels});
  const ScalarType type = compute_type(x);
  Tensor dweight_partial = new_tensor(type, {call.groups, call.channels});
  Tensor dbias_partial = new_tensor(type, {call.groups, call.channels});
  Tensor dshift_partial = new_tensor(type, {call.groups, call.channels});
  call.dweight_partial = dweight_partial.mutable_data_ptr(), call.dbias_partial = dbias_partial.mutable_data_ptr();
  call.dshift_partial = dshift_partial.mutable_data_ptr();
  run_tasks(kernels_for(type).norm_gelu_backward, call, kBackwardRows * (call.channels + 16) * 5);
  Tensor dweight = new_tensor(weight.scalar_type(), {call.channels});
  Tensor dbias = new_tensor(bias.scalar_type(), {call.channels});
  sum_over_batch(dweight_partial, dweight);
  sum_over_batch(dbias_partial, dbias);
  Tensor dshift = new_gradient(shift, x.scalar_type(), {call.channels});
  if (shift.has_value()) sum_over_batch(dshift_partial, dshift);
  return {dx, dweight, dbias, dshift};
}

}  // namespace jambatalk
