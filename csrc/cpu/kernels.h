// What the host side (tensors in, threads) and the kernels (plain memory, one instruction set each) agree on.
// No torch and no standard library here: this header is compiled for AVX-512 too, and an inline function of the
// standard library compiled there could be the copy that the linker keeps for every file.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace jambatalk {

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A tensor of up to three dimensions, by strides in elements; with fewer dimensions, those are the last ones and the
// strides before them are 0. Absent when data is null.
struct Array {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride[3] = {0, 0, 0};
};

// Part of one sequence: a chunk of it, cut where a chunk or a sequence begins. An empty sequence is one empty piece.
struct Piece {
  int64_t begin, end;                    // positions
  int64_t sequence;                      // which row of the states
  int64_t sequence_begin, sequence_end;  // positions of the whole sequence
  bool first, last;                      // of its sequence
};

// Channels are padded to this in saved chunk states, and groups of channels start at multiples of it.
constexpr int64_t kChannelPadding = 16;

struct ScanCall {
  int64_t batch, length, channels, states;
  int64_t chunk;  // positions between two saved states
  bool packed;    // one batch entry holds several sequences; otherwise sequence = batch entry
  const Piece* pieces;
  int64_t piece_count;
  int64_t group_channels, groups;  // one task is one batch entry and one group of channels
  int64_t padded_channels;         // of saved states
  bool softplus;
  Array u, delta, z, B, C;  // (batch, length, channels or states)
  Array A;                  // (channels, states)
  Array D, delta_bias;      // (channels)
  Array initial_state;      // (sequences, channels, states)
  // forward
  Array y, final_state;
  void* chunk_states = nullptr;  // (batch, saved_chunks, states, padded channels) of the compute type
  // backward: gradients that come in (absent: zero) ...
  Array grad_y, grad_final_state;
  // ... and that go out; the sums over batch and groups are finished by the host side, in a fixed order
  Array du, ddelta, dz, dinitial_state;
  void* dA_partial;     // (batch, channels, states), compute type
  void* dD_partial;     // (batch, channels)
  void* dbias_partial;  // (batch, channels)
  void* dBC_partial;    // (batch, groups, length, 2 * states): dB, then dC
};

// The chunks whose first state is saved: all but the first, which starts from initial_state.
static inline int64_t saved_chunks(const ScanCall& call) {
  return call.length > 0 ? (call.length - 1) / call.chunk : 0;
}

struct ScanStepCall {
  int64_t batch, channels, states;
  int64_t group_channels, groups;
  bool softplus;
  Array state;           // (batch, channels, states), changed in place
  Array u, delta, z, y;  // (batch, channels)
  Array A, D, delta_bias;
  Array B, C;  // (batch, states)
};

struct ConvCall {
  int64_t batch, length, channels, width;
  bool packed;
  const Piece* pieces;
  int64_t piece_count;
  int64_t max_piece;       // positions of the longest piece
  int64_t groups;          // tasks of one batch entry: pieces forward, groups of channels backward
  int64_t group_channels;  // backward
  bool silu;
  Array x;              // (batch, length, channels)
  Array weight, bias;   // (channels, width), (channels)
  Array initial_state;  // (sequences, width - 1, channels)
  Array y, final_state;
  Array grad_y, grad_final_state;
  Array dx, dinitial_state;
  void* dweight_partial;  // (batch, channels, width), compute type
  void* dbias_partial;    // (batch, channels)
};

struct ConvStepCall {
  int64_t batch, channels, width;
  int64_t group_channels, groups;
  bool silu;
  Array state;  // (batch, width - 1, channels), changed in place
  Array x, y;   // (batch, channels)
  Array weight, bias;
};

// target[outer, row, column] = sum over terms of partial[outer][term][row][offset + column], in the order of the terms.
struct SumCall {
  int64_t batch, groups;  // outer and rows: one task is one row
  int64_t terms, columns;
  const void* partial;  // compute type, already offset
  int64_t outer_stride, term_stride, row_stride;
  Array target;
};

enum class Activation : int32_t { kSwiglu, kGelu, kRelu };

// Routing of tokens to experts; tasks are tokens. Whatever is T* below is of the compute type and contiguous.
struct RouteCall {
  int64_t batch, groups;  // 1, tokens
  int64_t experts, top_k;
  bool renormalize;
  Array logits;         // (tokens, experts)
  void* probabilities;  // T (tokens, experts)
  void* weights;        // T (tokens, top_k)
  int32_t* chosen;      // (tokens, top_k)
  // backward; absent gradients are zero
  Array grad_weights;        // (tokens, top_k) of the compute type
  Array grad_probabilities;  // (tokens, experts)
  Array grad_logits;         // (tokens, experts)
};

// The activation between the two products of the experts; tasks are rows. Everything contiguous, of `dtype`.
struct ActivateCall {
  int64_t batch, groups;  // 1, rows
  int64_t hidden;
  Activation activation;
  Dtype dtype;
  const void* preactivation;  // (rows, hidden), or (rows, 2 * hidden) for swiglu, the gate first
  void* activated;            // (rows, hidden)
  // backward
  void* dpreactivation;
  const int32_t* order;  // row -> assignment
  const void* weights;   // T (assignments)
  void* dweights;        // T (assignments)
};

struct CombineCall {
  int64_t batch, groups;  // 1, tokens
  int64_t top_k, columns;
  Dtype dtype;
  const void* rows;         // (assignments, columns)
  const int32_t* position;  // (tokens, top_k): the row of each assignment
  const void* weights;      // T (tokens, top_k), or null
  void* y;                  // (tokens, columns)
};

// A stretch of rows that one expert works on.
struct Segment {
  int64_t expert, begin, end;
};

struct MatvecCall {
  int64_t batch, groups;  // segments, blocks of outputs
  const Segment* segments;
  int64_t block;  // outputs of one task
  int64_t inner, outputs;
  bool activate;  // out is act of outputs j and, for swiglu, outputs + j
  Activation activation;
  Array w;        // (experts, outputs or 2 * outputs, inner)
  const void* x;  // T (rows, inner)
  void* out;      // T (rows, outputs)
};

// The kernels of one instruction set and one compute type. Each runs the tasks [begin, end) of batch * groups.
struct KernelSet {
  void (*scan_forward)(const ScanCall&, int64_t begin, int64_t end);
  void (*scan_backward)(const ScanCall&, int64_t begin, int64_t end);
  void (*scan_step)(const ScanStepCall&, int64_t begin, int64_t end);
  void (*conv_forward)(const ConvCall&, int64_t begin, int64_t end);
  void (*conv_backward)(const ConvCall&, int64_t begin, int64_t end);
  void (*conv_step)(const ConvStepCall&, int64_t begin, int64_t end);
  void (*sum_terms)(const SumCall&, int64_t begin, int64_t end);
  void (*route_forward)(const RouteCall&, int64_t begin, int64_t end);
  void (*route_backward)(const RouteCall&, int64_t begin, int64_t end);
  void (*expert_activate)(const ActivateCall&, int64_t begin, int64_t end);
  void (*expert_activate_backward)(const ActivateCall&, int64_t begin, int64_t end);
  void (*combine_slots)(const CombineCall&, int64_t begin, int64_t end);
  void (*expert_matvec)(const MatvecCall&, int64_t begin, int64_t end);
};

struct IsaKernels {
  const char* name;
  KernelSet float32, float64;
};

extern const IsaKernels kPlainKernels;  // 128-bit vectors, what every x86-64 and ARMv8 has
extern const IsaKernels kWideKernels;   // the AVX-512 code path (512-bit vectors) lowered to the same; for tests
#if defined(__x86_64__)
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
#endif

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until its next call. Not cleared.
void* scratch(size_t bytes);

}  // namespace jambatalk
