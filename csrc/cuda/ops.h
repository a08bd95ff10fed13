// The native CUDA ops, as registration.cpp binds them: the same functions as cpu/ops.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

namespace jambatalk::cuda {

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                  bool delta_softplus, bool save_states);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const Tensor& chunk_states, bool delta_softplus);

Tensor selective_scan_step(const Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                           const OptionalTensor& delta_bias, bool delta_softplus);

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         bool silu);

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, bool silu);

Tensor causal_conv1d_step(const Tensor& state, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          bool silu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, int64_t top_k,
                                                                     bool renormalize);

Tensor moe_route_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_probabilities,
                          const OptionalTensor& grad_probability_sums, const Tensor& logits, const Tensor& weights,
                          const Tensor& experts, const Tensor& probabilities, bool renormalize);

void rollout(const Tensor& plan, const Tensor& storage, const Tensor& inputs, const Tensor& lengths,
             const Tensor& hidden, std::vector<Tensor> state, int64_t begin, int64_t end, double eps, int64_t group,
             int64_t workers);

void empty_op(const Tensor& x);

template <class Library>
void implement_ops(Library& m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step));
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("rollout", TORCH_BOX(&rollout));
  m.impl("empty_op", TORCH_BOX(&empty_op));
}

}  // namespace jambatalk::cuda
