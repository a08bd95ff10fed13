// The native CPU ops, as registration.cpp binds them. Shapes as in the Python functions of the same names; a gradient
// of an argument that was not given is an empty tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace jambatalk {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& order,
                                   const Tensor& offsets, const Tensor& w_in, const Tensor& w_out,
                                   const std::string& activation, bool save);

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(const Tensor& grad_y, const Tensor& x,
                                                            const Tensor& weights, const Tensor& experts,
                                                            const Tensor& order, const Tensor& offsets,
                                                            const Tensor& w_in, const Tensor& w_out,
                                                            const Tensor& preactivation, const std::string& activation);

// cache_k, cache_v and position: all or none; not changed here.
std::tuple<Tensor, Tensor> rope_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                                          const Tensor& sin, bool causal, std::optional<int64_t> window, double scale,
                                          bool interleaved, const OptionalTensor& cu_seqlens,
                                          const OptionalTensor& cache_k, const OptionalTensor& cache_v,
                                          const OptionalTensor& position, bool save);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& grad_y, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& y, const Tensor& logsumexp, bool causal, std::optional<int64_t> window, double scale,
    bool interleaved, const OptionalTensor& cu_seqlens, const OptionalTensor& cache_k, const OptionalTensor& cache_v,
    const OptionalTensor& position);

// Neither this nor a step changes the positions.
void rope_attention_append(const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                           const Tensor& cache_k, const Tensor& cache_v, const Tensor& position, bool interleaved);

Tensor rope_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                           const Tensor& cache_k, const Tensor& cache_v, const Tensor& position,
                           std::optional<int64_t> window, double scale, bool interleaved);

// Frames [begin, end) of every sequence that is that long: writes hidden and advances the state in place. plan and
// storage: a program as packing.py makes it. group: sequences that run together; workers: threads that share the
// products of a group; with 1, groups are shared out among the threads.
void rollout(const Tensor& plan, const Tensor& storage, const Tensor& inputs, const Tensor& lengths,
             const Tensor& hidden, std::vector<Tensor> state, int64_t begin, int64_t end, double eps, int64_t group,
             int64_t workers);

// 0 <= p < 1. What is dropped is a function of the seed and the place.
Tensor dropout(const Tensor& x, double p, int64_t seed);

// x (rows, channels) of a layout with channels side by side; shift: added to every row of it.
Tensor layer_norm_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& shift,
                       double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_gelu_backward(const Tensor& grad_y, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& bias,
                                                                    const OptionalTensor& shift, double eps);

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, double eps);

// Does nothing and returns nothing: what a call costs before any work.
void empty_op(const Tensor& x);

}  // namespace jambatalk
