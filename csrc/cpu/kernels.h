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

// Tasks are `task_rows` rows.
struct NormCall {
  int64_t batch, groups;  // 1, tasks
  int64_t rows, channels, task_rows;
  double eps;
  Array x;                    // (rows, channels)
  Array weight, bias, shift;  // (channels); an RMS norm has weight alone
  Array y;
  Array grad_y, dx;           // of x's dtype
  void* dweight_partial;      // (tasks, channels), compute type
  void* dbias_partial;
  void* dshift_partial;
};

// Tasks are `task_size` neighbouring numbers, a multiple of every vector's width.
struct DropoutCall {
  int64_t batch, groups;  // 1, tasks
  int64_t count, task_size;
  uint64_t seed;
  uint32_t threshold;
  double scale;
  Dtype dtype;
  const void* x;
  void* y;
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
  Array grad_weights;           // (tokens, top_k) of the compute type
  Array grad_probabilities;     // (tokens, experts)
  Array grad_probability_sums;  // (experts,)
  Array grad_logits;            // (tokens, experts)
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
  int64_t panel;  // the panels of product_rows rows before it
};

// One factor of a product: a matrix (lanes, depth) per expert. The result's rows are the left one's lanes, its columns
// the right one's. An axis of segments' rows starts at segment.begin.
enum class RowsOn : int32_t { kNeither, kLanes, kDepth };
struct Factor {
  Array array;  // (experts, lanes, depth)
  RowsOn rows_on = RowsOn::kNeither;
  const int32_t* source = nullptr;  // row -> row of the array; null: the same
  int64_t half = 0;                 // lanes to those that go with the first `half` ones: swiglu's gates and ups
  void* packed = nullptr;           // T, all panels, made before; otherwise each task lays out its own
  bool shared = false;              // all segments have the same packed panels
};

struct PackTask {
  int64_t segment, panel;
};
struct PackCall {
  int64_t batch, groups;  // 1, tasks
  const Segment* segments;
  const PackTask* tasks;
  Factor factor;
  int64_t lanes, depth;  // those that are no segment's rows
  bool pairs;            // bfloat16 in pairs of two steps; the panels keep the room of their widened form
};

// Panels [line, line_end) of the left factor times panels [column, column_end) of the right one.
struct ProductTask {
  int64_t segment, line, line_end, column, column_end;
};
struct ProductCall {
  const Segment* segments;
  const ProductTask* tasks;
  Factor left, right;
  int64_t lines, columns, depth;  // of the result, and of the sum; lines or depth may be the segment's rows instead
  bool pairs;                     // of bfloat16 in both factors
  Dtype dtype;                    // of what follows
  void* out;                      // contiguous (rows or experts * lines, columns)
  // activation and its gradient; contiguous, of `dtype`
  Activation activation;
  int64_t hidden;
  void* preactivation;  // (rows, hidden), or (rows, 2 * hidden) for swiglu, the gate first; forward: may be null
  void* activated;      // (rows, hidden)
  void* dpreactivation;
  int64_t rows;
  const int32_t* assignment;  // row -> assignment
  const void* weights;        // T (assignments)
  void* dots;                 // T (panels, assignments)
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

// A (batch, position, head, feature) tensor, by strides in elements. Absent when data is null.
struct HeadArray {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Attention's tiles: rows are (position, query head of a group), columns are keys. Keys of one batch entry are counted
// from the oldest that is cached; features are padded to kFeaturePadding.
constexpr int64_t kTileRows = 64, kTileKeys = 64, kFeaturePadding = 16;
constexpr int kRowStrip = 4;  // rows of a product in registers
constexpr int64_t kStepHeads = 4;  // query heads of a step that read a key while it is in the first cache

// Consecutive tiles of rows of one batch entry, and the panels (kTileKeys keys) that they see.
struct AttentionChunk {
  int64_t first_tile = 0, end_tile = 0;
  int64_t first_panel = 0, end_panel = 0;
  int64_t offset = 0;  // of the first panel in the partial sums
};

// T* below is of the compute type. `size` is head_dim, `pitch` is that padded.
struct AttentionCall {
  int64_t batch, groups;  // tasks: batch * groups
  int64_t entries, length, heads, kv_heads, group, size, pitch;
  int64_t tiles, panels;  // of one batch entry and key-value head
  bool causal, interleaved;
  int64_t window;  // 0: none
  double scale;
  const int64_t *starts, *stops;   // (length,): the bounds of each position's sequence; null: one sequence
  const int64_t *past, *position;  // (entries,): cached keys that are seen, and positions so far; null: no cache
  HeadArray q, k, v, cos, sin;     // cos and sin with the head axis of k
  HeadArray cache_k, cache_v;      // (entries, capacity, kv_heads, size)
  int64_t capacity;
  // Packed keys and values: T (entries, kv_heads, panels, ...). Turned: [pitch][kTileKeys]; in rows:
  // [kTileKeys][pitch].
  void *turned_keys, *key_rows, *turned_values, *value_rows;
  // forward
  HeadArray y;
  void* logsumexp;  // T (entries, heads, length), or null
  // backward
  HeadArray grad_y;
  const AttentionChunk* chunks;  // (entries, chunk_count)
  int64_t chunk_count;
  int64_t partial_panels;               // of all chunks of a batch entry at most
  void *partial_keys, *partial_values;  // T (entries, kv_heads, partial_panels, kTileKeys, pitch)
  void* rotated_grad;                   // T (entries, length, heads, size): dq before it is turned back
  HeadArray dq, dk, dv, dcos, dsin;
  bool tables_by_entry, tables_by_head;  // otherwise one row of cos and sin serves all
  // step: one position (length 1), the new key already cached
  int64_t parts, splits;  // tasks of one key-value head: some of its query heads, a stretch of the cache
  void* partial;          // T (entries, kv_heads, parts, splits, kStepHeads, pitch + 2): sums, total, maximum
};

// Keys [low, high) that the queries at a position see. Both ends grow with the position.
struct Visible {
  int64_t low, high;
};
static inline Visible visible_keys(const AttentionCall& call, int64_t entry, int64_t position) {
  const int64_t past = call.past != nullptr ? call.past[entry] : 0, index = past + position;
  Visible seen{0, past + call.length};
  if (call.starts != nullptr) seen = {call.starts[position], call.stops[position]};
  if (call.causal && index + 1 < seen.high) seen.high = index + 1;
  if (call.window > 0 && index - call.window + 1 > seen.low) seen.low = index - call.window + 1;
  return seen;
}

// The rollout. A matrix (out, in) is packed for products with vectors: panels of kPanel outputs, as
// [out / kPanel][in][kPanel], in bfloat16 [out / kPanel][in / 2][kPanel][2]; `in` is padded to kInputPadding; whatever
// is padding is zero. Several matrices of one shape (experts) lie one after another.
constexpr int64_t kPanel = 32, kInputPadding = 4;
struct PackedMatrix {
  const void* data = nullptr;
  int64_t in = 0, panels = 0;
};

// T* below is of the compute type; vectors over channels are padded to kPanel.
struct RolloutLayer {
  bool attention;
  const void* norm;
  PackedMatrix in;   // Mamba: rows of u, then of z, each padded to kPanel; attention: q, k, v
  PackedMatrix out;  // of the mixer
  // Mamba
  int64_t width, rank, states, inner;
  PackedMatrix x_proj, dt_proj;
  const void* taps;  // (panels, width + 1, kPanel): weights, then the bias
  const void* A;     // (panels, states, kPanel), times log2(e)
  const void *D, *dt_bias, *dt_norm, *b_norm, *c_norm;
  Array conv_state, scan_state;      // (batch, width - 1, inner), (batch, inner, states)
  int64_t conv_offset, scan_offset;  // of their copies in a sequence's memory
  // attention
  int64_t heads, kv_heads, head_dim, window;  // window 0: none
  const double* frequency;                    // (head_dim / 2,): angle per position
  void *keys, *values;                        // (batch, capacity, kv_heads, head_dim)
  int64_t capacity;
  int64_t* position;  // (batch,)
  // This call's copy of the cache, in panels of kTileKeys slots as attention's tiles read them: (kv_heads, panels, 2,
  // kTileKeys * pitch), turned keys and then rows of values. Query heads of a key-value head come in `strips`.
  int64_t panels, pitch, strips, cache_offset;  // the offset: in a sequence's caches
  // MLP; a dense one is one expert without a router
  const void* mlp_norm;
  const void* router;  // (experts, padded d), or null
  int64_t experts, top_k, hidden;
  PackedMatrix w_in, w_out;  // w_in: panels of kPanel / 2 gates, then their kPanel / 2 ups
};

struct RolloutSequence {
  int64_t row;     // of inputs, hidden and the states
  int64_t frames;  // of this call
};

struct RolloutCall {
  bool bfloat16;  // the packed matrices; otherwise they are of the compute type
  int64_t width;  // d
  const RolloutLayer* layers;
  int64_t layer_count;
  const void* final_norm;
  PackedMatrix feedback;  // no data: nothing is fed back
  const void* feedback_bias;
  double eps;
  int64_t begin;         // the first frame of this call
  Array inputs, hidden;  // (batch, frames, d)
  void* feedback_state;  // T (batch, d)
  int64_t* position;     // (batch,)
  // Where the vectors of a sequence are in its memory, `pitch` elements of T in all.
  int64_t x, normed, first, projected, low, mixed, queries, sums, activated, feedback_vector, probabilities, pitch;
  int64_t cache_pitch;  // elements of T of a sequence's caches
  int64_t most_slots;   // experts of one token at most
  int64_t list_offset;  // in the routes
};

// Sequences that share every read of the weights, and the threads that work on them.
struct RolloutMachine {
  const RolloutSequence* sequences;  // the longest first
  int64_t count;
  int64_t workers;  // how many threads may come; 1: no other than the caller
  void* memory;     // T (count, pitch), zero
  void* caches;     // T (count, cache_pitch)
  int32_t* routes;  // see rollout_kernel.h
  void (*give_way)();
  alignas(64) uint64_t ticket = 0;  // phase << 32 | tasks of it that are taken
  alignas(64) uint64_t done = 0;    // tasks of the phase that are finished
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
  void (*dropout)(const DropoutCall&, int64_t begin, int64_t end);
  void (*norm_gelu_forward)(const NormCall&, int64_t begin, int64_t end);
  void (*norm_gelu_backward)(const NormCall&, int64_t begin, int64_t end);
  void (*rms_norm_forward)(const NormCall&, int64_t begin, int64_t end);
  void (*rms_norm_backward)(const NormCall&, int64_t begin, int64_t end);
  void (*route_forward)(const RouteCall&, int64_t begin, int64_t end);
  void (*route_backward)(const RouteCall&, int64_t begin, int64_t end);
  int64_t product_rows, product_columns;  // of the experts' products: rows and columns of a panel
  void (*pack_panels)(const PackCall&, int64_t begin, int64_t end);
  void (*multiply_experts)(const ProductCall&, int64_t begin, int64_t end);
  void (*multiply_activate)(const ProductCall&, int64_t begin, int64_t end);
  void (*multiply_activate_backward)(const ProductCall&, int64_t begin, int64_t end);
  void (*combine_slots)(const CombineCall&, int64_t begin, int64_t end);
  void (*expert_matvec)(const MatvecCall&, int64_t begin, int64_t end);
  void (*attention_append)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_pack)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_forward)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_backward)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_finish)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_step)(const AttentionCall&, int64_t begin, int64_t end);
  void (*attention_step_combine)(const AttentionCall&, int64_t begin, int64_t end);
  void (*rollout)(const RolloutCall&, RolloutMachine&);  // one thread on one machine
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
