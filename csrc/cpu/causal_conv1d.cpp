// The native causal_conv1d ops: tensors to arrays, threads. Schemas in schemas.h; the kernels in
// causal_conv1d_kernel.h.
#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

constexpr int64_t kForwardChunk = 32;   // positions of one task: few, so that the threads end together
constexpr int64_t kBackwardChunk = 64;  // positions staged at a time
constexpr int64_t kChannelGroup = 128;  // channels of one task, backward; kStagedChannels of the kernel

ConvCall describe(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu,
                  const Pieces& pieces) {
  ConvCall call{};
  call.batch = x.size(0), call.length = x.size(1), call.channels = x.size(2), call.width = weight.size(1);
  call.packed = cu_seqlens.has_value();
  call.pieces = pieces.list.data(), call.piece_count = int64_t(pieces.list.size()), call.max_piece = pieces.longest;
  call.silu = silu;
  call.x = as_array("x", x, {call.batch, call.length, call.channels});
  call.weight = as_array("weight", weight, {call.channels, call.width});
  call.bias = as_array("bias", bias, {call.channels});
  call.initial_state =
      as_array("initial_state", initial_state, {sequences_of(cu_seqlens, call.batch), call.width - 1, call.channels});
  return call;
}

void check_dimensions(const Tensor& x, const Tensor& weight, int64_t x_dimensions) {
  STD_TORCH_CHECK(x.dim() == x_dimensions && weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= 16,
                  "causal_conv1d: expected x ([batch, length,] channels) and weight (channels, width), width 1 to 16");
}

}  // namespace

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         bool silu) {
  check_dimensions(x, weight, 3);
  const int64_t sequences = sequences_of(cu_seqlens, x.size(0));
  const Pieces pieces(cu_seqlens, x.size(0), x.size(1), kForwardChunk);
  ConvCall call = describe(x, weight, bias, initial_state, cu_seqlens, silu, pieces);
  Tensor y = new_tensor(x.scalar_type(), {call.batch, call.length, call.channels});
  if (call.packed) fill_zero(y);  // positions outside of every sequence
  Tensor final_state = new_tensor(compute_type(x), {sequences, call.width - 1, call.channels});
  call.y = as_array("y", y, {call.batch, call.length, call.channels});
  call.final_state = as_array("final_state", final_state, {sequences, call.width - 1, call.channels});
  call.groups = call.piece_count;
  run_tasks(kernels_for(compute_type(x)).conv_forward, call,
            (call.max_piece + 1) * (call.channels + 1) * (call.width + 16) / 16);
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu) {
  check_dimensions(x, weight, 3);
  const int64_t sequences = sequences_of(cu_seqlens, x.size(0));
  const Pieces pieces(cu_seqlens, x.size(0), x.size(1), kBackwardChunk);
  ConvCall call = describe(x, weight, bias, initial_state, cu_seqlens, silu, pieces);
  const int64_t b = call.batch, l = call.length, c = call.channels, width = call.width;
  const ScalarType type = compute_type(x);
  call.grad_y = as_array("grad_y", grad_y, {b, l, c});
  call.grad_final_state = as_array("grad_final_state", grad_final_state, {sequences, width - 1, c});
  Tensor dx = new_tensor(x.scalar_type(), {b, l, c});
  if (call.packed) fill_zero(dx);
  Tensor dinitial_state = new_gradient(initial_state, x.scalar_type(), {sequences, width - 1, c});
  call.dx = as_array("dx", dx, {b, l, c});
  if (initial_state.has_value()) {
    call.dinitial_state = as_array("dinitial_state", dinitial_state, {sequences, width - 1, c});
  }
  Tensor dweight_partial = new_tensor(type, {b, c, width}), dbias_partial = new_tensor(type, {b, c});
  call.dweight_partial = dweight_partial.mutable_data_ptr();
  call.dbias_partial = dbias_partial.mutable_data_ptr();
  call.group_channels = kChannelGroup, call.groups = group_count(c, kChannelGroup);
  run_tasks(kernels_for(type).conv_backward, call, l * kChannelGroup * (3 * width + 24) / 16);
  Tensor dweight = new_tensor(weight.scalar_type(), {c, width}), dbias = new_gradient(bias, x.scalar_type(), {c});
  sum_over_batch(dweight_partial, dweight);
  if (bias.has_value()) sum_over_batch(dbias_partial, dbias);
  return {dx, dweight, dbias, dinitial_state};
}

Tensor causal_conv1d_step(const Tensor& state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          bool silu) {
  check_dimensions(x, weight, 2);
  ConvStepCall call{};
  const int64_t b = call.batch = x.size(0), c = call.channels = x.size(1);
  call.width = weight.size(1), call.silu = silu;
  call.state = as_array("state", state, {b, call.width - 1, c});
  call.x = as_array("x", x, {b, c});
  call.weight = as_array("weight", weight, {c, call.width});
  call.bias = as_array("bias", bias, {c});
  Tensor y = new_tensor(x.scalar_type(), {b, c});
  call.y = as_array("y", y, {b, c});
  call.group_channels = group_size(c, std::max<int64_t>(1, c / 256));
  call.groups = group_count(c, call.group_channels);
  run_tasks(kernels_for(compute_type(x)).conv_step, call, call.group_channels * (call.width + 8) / 4);
  return y;
}

}  // namespace jambatalk
