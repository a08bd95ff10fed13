// What stands between torch and the CUDA kernels: plain structs, and one launch function per kernel. No torch, no CUDA
// headers: binding.cpp (compiled by the host's compiler) and the .cu files (compiled by nvcc, or as plain C++ by
// tests/cuda_on_cpu) both include this page.
//
// Rules of a launch function:
//   - It checks nothing about shapes: binding.cpp has. It reads no device memory on the host and never synchronises.
//   - Outputs and workspaces come uninitialised; it writes every element of every output (also where `length`,
//     `sequences` or an axis is such that nothing is computed: zeros) on `stream`, in a fixed order of operations.
//   - Sizes may be zero: no launch with an empty grid.
//   - It returns nullptr, or what went wrong, as text that lives forever (cudaGetErrorString).
// A `*_workspace` function says how many bytes its launch function wants in `workspace` (16-byte aligned; 0: none).
#pragma once

#include <cstdint>

namespace jambatalk::cuda {

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A strided array of up to three dimensions in device memory; absent where data is null. Strides are in elements, of
// any sign and value, and right-aligned: stride[2] is the last dimension's, whatever their number. The dtype of each
// array is its own; computation is in float32, in float64 when the first input (u, x) is.
struct Array {
  void* data;
  Dtype dtype;
  int64_t stride[3];
};

// Where it runs. Heuristics may use these two and the sizes of a call, nothing else: same card, same bytes.
struct Device {
  int32_t multiprocessors;
  int32_t capability;  // 80, 86, 89, 90, 100, 120
  void* stream;        // cudaStream_t
};

// Packed calls (batch is 1) have bounds: `sequences + 1` int32 on the device, contiguous, already clamped into
// 0 .. length and rising, so that sequence s is [bounds[s], bounds[s + 1]). Null otherwise: sequence s is batch entry
// s. This makes them, from what the caller gave: bounds_i = max over j <= i of clamp(cu_seqlens_j, 0, length).
struct BoundsCall {
  const int32_t* cu_seqlens;
  int64_t stride, sequences, length;
  int32_t* bounds;
  Device device;
};
const char* launch_bounds(const BoundsCall& call);

// ---------------------------------------------------------------------------------------------------------------------
// selective_scan.cu. u, delta, z, y and their gradients (batch, length, channels); B, C (batch, length, states);
// A (channels, states); D, delta_bias (channels,); states (sequences, channels, states). y and every gradient are
// contiguous. Absent: D, z, delta_bias, initial_state, and the gradients of those.

struct ScanCall {  // what forward and backward share
  int64_t batch, length, channels, states, sequences;
  int64_t chunk, padded_channels;  // of chunk_states: (batch, (length - 1) / chunk, states, padded_channels)
  bool softplus;
  Array u, delta, A, B, C, D, z, delta_bias, initial_state;
  const int32_t* bounds;
  void* chunk_states;  // the state at the start of every chunk but the first, in the compute type; null where nobody
                       // wants it
  void* workspace;
  Device device;
};

struct ScanForward : ScanCall {
  Array y, final_state;
};
int64_t scan_forward_workspace(const ScanForward& call);
const char* launch_scan_forward(const ScanForward& call);

struct ScanBackward : ScanCall {
  Array grad_y, grad_final_state;  // either may be absent
  Array du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state;
};
int64_t scan_backward_workspace(const ScanBackward& call);
const char* launch_scan_backward(const ScanBackward& call);

struct ScanStep {  // as above without length; `state` is changed in place, in its own dtype
  int64_t batch, channels, states;
  bool softplus;
  Array state, u, delta, A, B, C, D, z, delta_bias, y;
  Device device;
};
const char* launch_scan_step(const ScanStep& call);

// ---------------------------------------------------------------------------------------------------------------------
// causal_conv1d.cu. x, y and their gradients (batch, length, channels); weight (channels, width), width 1 to 16;
// bias (channels,); states (sequences, width - 1, channels).

struct ConvCall {
  int64_t batch, length, channels, width, sequences;
  bool silu;
  Array x, weight, bias, initial_state;
  const int32_t* bounds;
  Device device;
};

struct ConvForward : ConvCall {
  Array y, final_state;
};
const char* launch_conv_forward(const ConvForward& call);

struct ConvBackward : ConvCall {
  Array grad_y, grad_final_state;  // either may be absent
  Array dx, dweight, dbias, dinitial_state;
  void* workspace;
};
int64_t conv_backward_workspace(const ConvBackward& call);
const char* launch_conv_backward(const ConvBackward& call);

struct ConvStep {
  int64_t batch, channels, width;
  bool silu;
  Array state, x, weight, bias, y;  // state is changed in place, in its own dtype
  Device device;
};
const char* launch_conv_step(const ConvStep& call);

// ---------------------------------------------------------------------------------------------------------------------
// moe_route.cu. logits and their gradient (tokens, experts), 1 to 256 experts; top_k 1 to 16 and no more than experts;
// tokens * top_k < 2^31. Contiguous, of the compute type: weights (tokens, top_k), probabilities (tokens, experts),
// probability_sums (experts,); of int32: chosen (tokens, top_k), order (tokens * top_k,), offsets (experts + 1,).

struct RouteCall {
  int64_t tokens, experts, top_k;
  bool renormalize;
  Array logits;  // backward: its dtype only
  void *weights, *probabilities;
  int32_t* chosen;
  Device device;
};

struct RouteForward : RouteCall {
  int32_t *order, *offsets;
  void *probability_sums, *workspace;
};
int64_t route_forward_workspace(const RouteForward& call);
const char* launch_route_forward(const RouteForward& call);

struct RouteBackward : RouteCall {
  Array grad_weights, grad_probabilities, grad_probability_sums;  // each may be absent
  Array grad_logits;                                              // contiguous
};
const char* launch_route_backward(const RouteBackward& call);

// ---------------------------------------------------------------------------------------------------------------------
// rollout.cu. The whole autoregressive loop in float32: the packed program (jambatalk_kernels/rollout/packing.py, what
// it calls "cuda"), as offsets into one block of memory in units of 64 bytes. A matrix (out, in) lies as
// [out / 32][in / v][32][v], 16 bytes of neighbours of `in` together (v = 4, or 8 in bfloat16); `in` is padded to 8,
// `out` to 32.

constexpr int kRolloutLayers = 16;  // what fits into a kernel's parameters
constexpr int kRolloutThreads = 512;
constexpr int kRolloutHeadDim = 128;
constexpr int kRolloutExperts = 256, kRolloutSlots = 16;

struct RolloutLayer {
  uint32_t norm, in, out, mlp_norm, router, w_in, w_out;
  uint32_t x_proj, dt_proj, taps, A, D, dt_bias, dt_norm, b_norm, c_norm;  // Mamba
  uint32_t frequency;                                                      // attention: float64, radians per position
  int32_t attention, has_router, experts, top_k, hidden;
  int32_t inner, width, rank, states;                   // Mamba
  int32_t heads, kv_heads, head_dim, window, capacity;  // attention; window 0: none
  float *conv, *scan;                                   // (batch, width - 1, inner), (batch, inner, states)
  float *keys, *values;                                 // (batch, capacity, kv_heads, head_dim)
  int64_t* position;                                    // (batch,)
};

// Where a sequence's vectors are, in floats from the start of its block's memory. Multiples of 8, to which products
// read.
struct RolloutPlaces {
  int32_t x, normed, feedback, first, gate, projected, low, mixed, activated, parts, scratch, end;
};

struct RolloutCall {
  int32_t width, layer_count, has_feedback, bfloat16;
  uint32_t final_norm, feedback, feedback_bias;
  int32_t team;  // blocks per sequence
  float eps;
  int64_t batch, begin, end;  // frames of this call
  const unsigned char* storage;
  Array inputs, hidden;    // (batch, frames, width); hidden is written where a sequence has a frame
  const int64_t* lengths;  // (batch,)
  float* feedback_state;   // (batch, width)
  int64_t* position;       // (batch,)
  int32_t* error;          // becomes 1 where the blocks of a team did not meet; the states are then worth nothing
  void* workspace;
  RolloutPlaces at;
  Device device;
  RolloutLayer layers[kRolloutLayers];
};
void place_rollout(RolloutCall& call);  // fills `at`
int64_t rollout_workspace(const RolloutCall& call);
const char* launch_rollout(const RolloutCall& call);

}  // namespace jambatalk::cuda
