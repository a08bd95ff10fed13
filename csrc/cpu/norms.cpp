// The native norms: tensors to arrays, threads. Schemas in schemas.h; the kernels in norm_kernel.h.
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

constexpr int64_t kForwardRows = 64;    // of one task
constexpr int64_t kBackwardRows = 512;  // more: a task's sums over its rows are read once more

NormCall describe(const Tensor& x, const Tensor& weight, double eps, int64_t task_rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1 && (x.stride(1) == 1 || x.size(1) == 1),
                  "norm: expected x (rows, channels), channels side by side");
  NormCall call{};
  call.batch = 1, call.rows = x.size(0), call.channels = x.size(1), call.eps = eps;
  call.task_rows = task_rows, call.groups = (call.rows + task_rows - 1) / task_rows;
  call.x = as_array("x", x, {call.rows, call.channels});
  call.weight = as_array("weight", weight, {call.channels});
  return call;
}

// The gradient of a vector of channels, from what the tasks leave of it.
struct ChannelSums {
  Tensor partial, total;
  ChannelSums(const NormCall& call, ScalarType compute, ScalarType wanted)
      : partial(new_tensor(compute, {call.groups, call.channels})), total(new_tensor(wanted, {call.channels})) {}
  const Tensor& finish() {
    sum_over_batch(partial, total);
    return total;
  }
};

Tensor give_gradients(NormCall& call, const Tensor& grad_y, const Tensor& x) {
  STD_TORCH_CHECK(
      grad_y.scalar_type() == x.scalar_type() && grad_y.dim() == 2 && (grad_y.stride(1) == 1 || x.size(1) == 1),
      "norm: expected grad_y like x");
  call.grad_y = as_array("grad_y", grad_y, {call.rows, call.channels});
  Tensor dx = new_tensor(x.scalar_type(), {call.rows, call.channels});
  call.dx = as_array("dx", dx, {call.rows, call.channels});
  return dx;
}

}  // namespace

Tensor layer_norm_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& shift,
                       double eps) {
  NormCall call = describe(x, weight, eps, kForwardRows);
  call.bias = as_array("bias", bias, {call.channels}), call.shift = as_array("shift", shift, {call.channels});
  Tensor y = new_tensor(x.scalar_type(), {call.rows, call.channels});
  call.y = as_array("y", y, {call.rows, call.channels});
  run_tasks(kernels_for(compute_type(x)).norm_gelu_forward, call, kForwardRows * (call.channels + 16) * 3);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_gelu_backward(const Tensor& grad_y, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& bias,
                                                                    const OptionalTensor& shift, double eps) {
  NormCall call = describe(x, weight, eps, kBackwardRows);
  call.bias = as_array("bias", bias, {call.channels}), call.shift = as_array("shift", shift, {call.channels});
  Tensor dx = give_gradients(call, grad_y, x);
  const ScalarType type = compute_type(x);
  ChannelSums dweight(call, type, weight.scalar_type()), dbias(call, type, bias.scalar_type());
  ChannelSums dshift(call, type, shift.has_value() ? shift->scalar_type() : type);
  call.dweight_partial = dweight.partial.mutable_data_ptr(), call.dbias_partial = dbias.partial.mutable_data_ptr();
  call.dshift_partial = dshift.partial.mutable_data_ptr();
  run_tasks(kernels_for(type).norm_gelu_backward, call, kBackwardRows * (call.channels + 16) * 5);
  return {dx, dweight.finish(), dbias.finish(), shift.has_value() ? dshift.finish() : new_tensor(type, {0})};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  NormCall call = describe(x, weight, eps, kForwardRows);
  Tensor y = new_tensor(x.scalar_type(), {call.rows, call.channels});
  call.y = as_array("y", y, {call.rows, call.channels});
  run_tasks(kernels_for(compute_type(x)).rms_norm_forward, call, kForwardRows * (call.channels + 16) / 4);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, double eps) {
  NormCall call = describe(x, weight, eps, kBackwardRows);
  Tensor dx = give_gradients(call, grad_y, x);
  const ScalarType type = compute_type(x);
  ChannelSums dweight(call, type, weight.scalar_type());
  call.dweight_partial = dweight.partial.mutable_data_ptr();
  run_tasks(kernels_for(type).rms_norm_backward, call, kBackwardRows * (call.channels + 16) / 2);
  return {dx, dweight.finish()};
}

}  // namespace jambatalk
