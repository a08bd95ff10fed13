// The native selective_scan ops: tensors to arrays, threads, and the sums that the kernels leave to a fixed order.
// Schemas in schemas.h; the kernels in selective_scan_kernel.h.
#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace jambatalk {
namespace {

// As in jambatalk_kernels/selective_scan/op.py (_native_chunk_states). Growing with `states` keeps the saved states
// within half of the size of u; short, so that what backward adds up in a chunk, 2 * chunk * states vectors, and what
// it remembers of it stay near the core (64 took a tenth longer).
int64_t chunk_length(int64_t states) { return std::max<int64_t>(32, 2 * states); }

// What the op and its gradient have in common.
ScanCall describe(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                  const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool softplus,
                  const Pieces& pieces) {
  ScanCall call{};
  call.batch = u.size(0), call.length = u.size(1), call.channels = u.size(2), call.states = A.size(1);
  call.chunk = chunk_length(call.states), call.padded_channels = padded_channels(call.channels);
  call.packed = cu_seqlens.has_value();
  call.pieces = pieces.list.data(), call.piece_count = int64_t(pieces.list.size());
  call.softplus = softplus;
  const int64_t b = call.batch, l = call.length, c = call.channels, n = call.states;
  call.u = as_array("u", u, {b, l, c});
  call.delta = as_array("delta", delta, {b, l, c});
  call.A = as_array("A", A, {c, n});
  call.B = as_array("B", B, {b, l, n});
  call.C = as_array("C", C, {b, l, n});
  call.D = as_array("D", D, {c});
  call.z = as_array("z", z, {b, l, c});
  call.delta_bias = as_array("delta_bias", delta_bias, {c});
  call.initial_state = as_array("initial_state", initial_state, {sequences_of(cu_seqlens, b), c, n});
  return call;
}

void check_dimensions(const Tensor& u, const Tensor& A) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && A.size(1) >= 1,
                  "selective_scan: expected u (batch, length, channels) and A (channels, states)");
}

// (batch, groups, length, 2 * states), columns `offset` to `offset + states` -> (batch, length, states)
Tensor sum_groups(const Tensor& partial, int64_t offset, int64_t states, ScalarType dtype) {
  const int64_t batch = partial.size(0), groups = partial.size(1), length = partial.size(2);
  Tensor total = new_tensor(dtype, {batch, length, states});
  SumCall call{};
  call.batch = batch, call.groups = length, call.terms = groups, call.columns = states;
  call.partial = static_cast<const char*>(partial.const_data_ptr()) + offset * int64_t(partial.element_size());
  call.row_stride = 2 * states, call.term_stride = length * 2 * states,
  call.outer_stride = groups * length * 2 * states;
  call.target = as_array("sum", total, {batch, length, states});
  run_tasks(kernels_for(partial.scalar_type()).sum_terms, call, groups);
  return total;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                  bool delta_softplus, bool save_states) {
  check_dimensions(u, A);
  const int64_t sequences = sequences_of(cu_seqlens, u.size(0));
  const Pieces pieces(cu_seqlens, u.size(0), u.size(1), chunk_length(A.size(1)));
  ScanCall call = describe(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, pieces);
  const ScalarType type = compute_type(u);
  Tensor y = new_tensor(u.scalar_type(), {call.batch, call.length, call.channels});
  if (call.packed) fill_zero(y);  // positions outside of every sequence
  Tensor final_state = new_tensor(type, {sequences, call.channels, call.states});
  call.y = as_array("y", y, {call.batch, call.length, call.channels});
  call.final_state = as_array("final_state", final_state, {sequences, call.channels, call.states});
  Tensor chunk_states =
      save_states ? new_tensor(type, {call.batch, saved_chunks(call), call.states, padded_channels(call.channels)})
                  : new_tensor(type, {0});
  if (save_states) {
    // The saved states of chunks that no sequence continues into are never read; zero keeps the bytes reproducible.
    fill_zero(chunk_states);
    call.chunk_states = chunk_states.mutable_data_ptr();
  }
  call.group_channels = group_size(call.channels, std::max<int64_t>(1, call.channels / 64));
  call.groups = group_count(call.channels, call.group_channels);
  run_tasks(kernels_for(type).scan_forward, call, call.length * call.group_channels * call.states / 4);
  return {y, final_state, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const Tensor& chunk_states, bool delta_softplus) {
  check_dimensions(u, A);
  const int64_t sequences = sequences_of(cu_seqlens, u.size(0));
  const Pieces pieces(cu_seqlens, u.size(0), u.size(1), chunk_length(A.size(1)));
  ScanCall call = describe(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, pieces);
  const int64_t b = call.batch, l = call.length, c = call.channels, n = call.states;
  const ScalarType type = compute_type(u);
  call.grad_y = as_array("grad_y", grad_y, {b, l, c});
  call.grad_final_state = as_array("grad_final_state", grad_final_state, {sequences, c, n});
  STD_TORCH_CHECK(chunk_states.scalar_type() == type && chunk_states.is_contiguous() &&
                      chunk_states.numel() == b * saved_chunks(call) * n * padded_channels(c),
                  "chunk_states: expected what forward saved");
  call.chunk_states = const_cast<void*>(chunk_states.const_data_ptr());

  Tensor du = new_tensor(u.scalar_type(), {b, l, c}), ddelta = new_tensor(delta.scalar_type(), {b, l, c});
  Tensor dz = new_gradient(z, u.scalar_type(), {b, l, c});
  Tensor dinitial_state = new_gradient(initial_state, u.scalar_type(), {sequences, c, n});
  call.du = as_array("du", du, {b, l, c});
  call.ddelta = as_array("ddelta", ddelta, {b, l, c});
  if (z.has_value()) call.dz = as_array("dz", dz, {b, l, c});
  if (initial_state.has_value()) call.dinitial_state = as_array("dinitial_state", dinitial_state, {sequences, c, n});

  // Groups are a matter of the shape alone, not of the number of threads: they decide the order of the sums over
  // channels. Of all batch entries together enough for sixteen threads, but no more than keep the partial sums of dB
  // and dC as small as u: what a group does once, it does for few channels otherwise.
  const int64_t wanted = (16 + b - 1) / std::max<int64_t>(b, 1);
  call.group_channels = group_size(c, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, c / (2 * n))));
  call.groups = group_count(c, call.group_channels);
  Tensor dA_partial = new_tensor(type, {b, c, n}), dD_partial = new_tensor(type, {b, c}),
         dbias_partial = new_tensor(type, {b, c});
  Tensor dBC_partial = new_tensor(type, {b, call.groups, l, 2 * n});
  call.dA_partial = dA_partial.mutable_data_ptr();
  call.dD_partial = dD_partial.mutable_data_ptr();
  call.dbias_partial = dbias_partial.mutable_data_ptr();
  call.dBC_partial = dBC_partial.mutable_data_ptr();
  if (call.packed) {
    for (Tensor* tensor : {&du, &ddelta, &dz, &dBC_partial}) fill_zero(*tensor);
  }
  run_tasks(kernels_for(type).scan_backward, call, l * call.group_channels * n);

  Tensor dA = new_tensor(A.scalar_type(), {c, n});
  sum_over_batch(dA_partial, dA);
  Tensor dD = new_gradient(D, u.scalar_type(), {c}), dbias = new_gradient(delta_bias, u.scalar_type(), {c});
  if (D.has_value()) sum_over_batch(dD_partial, dD);
  if (delta_bias.has_value()) sum_over_batch(dbias_partial, dbias);
  Tensor dB = sum_groups(dBC_partial, 0, n, B.scalar_type()), dC = sum_groups(dBC_partial, n, n, C.scalar_type());
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_state};
}

Tensor selective_scan_step(const Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                           const OptionalTensor& delta_bias, bool delta_softplus) {
  STD_TORCH_CHECK(u.dim() == 2 && A.dim() == 2 && A.size(1) >= 1,
                  "selective_scan_step: expected u (batch, channels) and A (channels, states)");
  ScanStepCall call{};
  const int64_t b = call.batch = u.size(0), c = call.channels = u.size(1), n = call.states = A.size(1);
  call.softplus = delta_softplus;
  call.state = as_array("state", state, {b, c, n});
  call.u = as_array("u", u, {b, c});
  call.delta = as_array("delta", delta, {b, c});
  call.A = as_array("A", A, {c, n});
  call.B = as_array("B", B, {b, n});
  call.C = as_array("C", C, {b, n});
  call.D = as_array("D", D, {c});
  call.z = as_array("z", z, {b, c});
  call.delta_bias = as_array("delta_bias", delta_bias, {c});
  Tensor y = new_tensor(u.scalar_type(), {b, c});
  call.y = as_array("y", y, {b, c});
  call.group_channels = group_size(c, std::max<int64_t>(1, c / 64));
  call.groups = group_count(c, call.group_channels);
  run_tasks(kernels_for(compute_type(u)).scan_step, call, call.group_channels * n / 4);
  return y;
}

}  // namespace jambatalk
