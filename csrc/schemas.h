// The schema of every native op, on one page.
#pragma once

#include <torch/csrc/stable/library.h>

namespace jambatalk {

template <class Library>
void define_ops(Library& m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool save_states) "
      "-> (Tensor y, Tensor final_state, Tensor chunk_states)");
  m.def(
      "selective_scan_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor chunk_states, bool delta_softplus) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, "
      "Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_step(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, bool delta_softplus) -> Tensor");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def("causal_conv1d_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  m.def(
      "moe_route(Tensor logits, int top_k, bool renormalize) "
      "-> (Tensor weights, Tensor experts, Tensor probabilities, Tensor order, Tensor offsets, "
      "Tensor probability_sums)");
  m.def(
      "moe_route_backward(Tensor? grad_weights, Tensor? grad_probabilities, Tensor? grad_probability_sums, "
      "Tensor logits, Tensor weights, Tensor experts, Tensor probabilities, bool renormalize) -> Tensor");
  m.def(
      "moe_mlp(Tensor x, Tensor weights, Tensor experts, Tensor order, Tensor offsets, Tensor w_in, Tensor w_out, "
      "str activation, bool save) -> (Tensor y, Tensor preactivation)");
  m.def(
      "moe_mlp_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor experts, Tensor order, Tensor offsets, "
      "Tensor w_in, Tensor w_out, Tensor preactivation, str activation) "
      "-> (Tensor dx, Tensor dweights, Tensor dw_in, Tensor dw_out)");
  m.def(
      "rope_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool causal, int? window, float scale, "
      "bool interleaved, Tensor? cu_seqlens, Tensor? cache_k, Tensor? cache_v, Tensor? position, bool save) "
      "-> (Tensor y, Tensor logsumexp)");
  m.def(
      "rope_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor y, "
      "Tensor logsumexp, bool causal, int? window, float scale, bool interleaved, Tensor? cu_seqlens, "
      "Tensor? cache_k, Tensor? cache_v, Tensor? position) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dcos, Tensor dsin)");
  m.def(
      "rope_attention_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, "
      "Tensor position, bool interleaved) -> ()");
  m.def(
      "rope_attention_step(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, "
      "Tensor(b!) cache_v, Tensor position, int? window, float scale, bool interleaved) -> Tensor");
  m.def(
      "rollout(Tensor plan, Tensor storage, Tensor inputs, Tensor lengths, Tensor(a!) hidden, Tensor(b!)[] state, "
      "int begin, int end, float eps, int group, int workers) -> ()");
  m.def("dropout(Tensor x, float p, int seed) -> Tensor");
  m.def("layer_norm_gelu(Tensor x, Tensor weight, Tensor bias, Tensor? shift, float eps) -> Tensor");
  m.def(
      "layer_norm_gelu_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor? shift, float eps) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dshift)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor dx, Tensor dweight)");
  m.def("empty_op(Tensor x) -> ()");
}

}  // namespace jambatalk
