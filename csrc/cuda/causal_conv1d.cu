// Causal depthwise convolution on a GPU: a thread walks a chunk of positions of V neighbouring channels and keeps the
// last width - 1 rows in registers, so that x is read once per element.
//
//   y_t = silu(bias + sum_j w_j x_{t - j}),   w_j = weight[:, width - 1 - j], j = 0 .. width - 1
//
// Lanes of a warp are neighbours along the channels (they share the rows' cache lines; V channels are one load of up
// to 16 bytes where the layout allows, else V is 1 and any strides and dtypes are taken). What bounds it is DRAM: x and
// y once, plus width - 1 rows per chunk from the L2 cache. Chunks are as long as fills the card (chunk_length below).
// Widths are compiled for 2, 3, 4, 8 and 16; the others run in the next larger, their missing taps skipped.
//
// Backward saves nothing: it computes the sum before the activation again, and from
//   g_t = grad_y_t silu'(..):   dx_p = sum_j w_j g_{p + j},   dw_j = sum_t g_t x_{t - j},   dbias = sum_t g_t,
// with a window of g beside that of x. The sums over time are a thread's own, written per chunk and added up in a fixed
// order by a second kernel: the same bytes every run. DRAM again: x and grad_y in, dx out, and (width + 1) / chunk
// sums.
#include "cuda/device.h"

namespace jambatalk::cuda {
namespace {

constexpr int kThreads = 128;

// How the positions are cut, and what a block of a grid does.
struct Plan {
  int64_t groups, chunk, chunks;  // groups of V channels
  int64_t walk_blocks;            // the first blocks walk; in forward, the rest copy final states
};

// Chunks for about `threads_wanted` threads, but not so short that their first rows, read again, matter.
int64_t chunk_length(int64_t batch, int64_t length, int64_t groups, int64_t threads_wanted, int64_t shortest) {
  const int64_t others = batch * groups > 0 ? batch * groups : 1;
  const int64_t wanted = (threads_wanted + others - 1) / others;
  const int64_t even = (length + wanted - 1) / wanted;
  return min(max((even + 7) / 8 * 8, shortest), int64_t(512));
}

Plan make_plan(const ConvCall& call, int vector, int64_t shortest) {
  Plan plan{};
  plan.groups = call.channels / vector;
  plan.chunk =
      chunk_length(call.batch, call.length, plan.groups, call.device.multiprocessors * int64_t(1024), shortest);
  plan.chunks = (call.length + plan.chunk - 1) / plan.chunk;
  plan.walk_blocks = (call.batch * plan.chunks * plan.groups + kThreads - 1) / kThreads;
  return plan;
}

// Taps that a width of this class may lack.
template <int W>
constexpr bool may_lack(int tap) {
  return tap >= (W == 2 ? 1 : W == 8 ? 5 : W == 16 ? 9 : W);
}

// V channels of compute type A.
template <class A, int V>
struct Row {
  A lane[V];
};

// As it lies in memory: loads are issued first and converted when their turn comes, which keeps registers few.
// T void: one channel of any dtype.
template <class T, class A, int V>
struct Raw {
  Vector<T, V> vector;
  JT_DEVICE Row<A, V> row() const {
    Row<A, V> row;
    JT_UNROLL
    for (int v = 0; v < V; ++v) row.lane[v] = convert<A>(vector.lane[v]);
    return row;
  }
};
template <class A>
struct Raw<void, A, 1> {
  A value;
  JT_DEVICE Row<A, 1> row() const { return {{value}}; }
};

template <class T, class A, int V>
JT_DEVICE Raw<T, A, V> load_raw(const Array& array, int64_t at) {
  if constexpr (std::is_void_v<T>)
    return {load_any<A>(array, at)};
  else
    return {load_vector<T, V>(static_cast<const T*>(array.data) + at)};
}
template <class T, class A, int V>
JT_DEVICE void store_row(const Array& array, int64_t at, const Row<A, V>& row) {
  if constexpr (std::is_void_v<T>) {
    store_any<A>(array, at, row.lane[0]);
  } else {
    Vector<T, V> vector;
    JT_UNROLL
    for (int v = 0; v < V; ++v) vector.lane[v] = convert<T>(row.lane[v]);
    store_vector<T, V>(static_cast<T*>(array.data) + at, vector);
  }
}

template <class T, class A>
JT_DEVICE A activate(A x) {
  if constexpr (std::is_void_v<T> || sizeof(std::conditional_t<std::is_void_v<T>, double, T>) > 2)
    return silu<A>(x);
  else
    return silu_16bit(x);
}
// The derivative of silu.
template <class T, class A>
JT_DEVICE A activate_slope(A x) {
  A s;
  if constexpr (std::is_void_v<T> || sizeof(std::conditional_t<std::is_void_v<T>, double, T>) > 2)
    s = sigmoid<A>(x);
  else
    s = sigmoid_16bit(x);
  return s * (A(1) + x * (A(1) - s));
}

// w[j]: the tap that reaches j positions back.
template <class A, int W, int V>
JT_DEVICE void load_weight(const ConvCall& call, int64_t channel, A (&w)[W][V], A (&bias)[V]) {
  JT_UNROLL
  for (int v = 0; v < V; ++v) {
    JT_UNROLL
    for (int j = 0; j < W; ++j) {
      w[j][v] =
          j < call.width ? load_any<A>(call.weight, offset(call.weight, 0, channel + v, call.width - 1 - j)) : A(0);
    }
    bias[v] = call.bias.data != nullptr ? load_any<A>(call.bias, (channel + v) * call.bias.stride[2]) : A(0);
  }
}

// A sequence and its positions begin .. end (in the whole of x).
struct Span {
  int64_t sequence, begin, end;
};

// The sequence that holds position `at`: the last whose begin is not beyond it. -1 before the first one.
JT_DEVICE int64_t find_sequence(const int32_t* bounds, int64_t sequences, int64_t at) {
  int64_t low = 0, high = sequences + 1;  // bounds[low - 1] <= at < bounds[high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] <= at)
      low = middle + 1;
    else
      high = middle;
  }
  return low - 1;
}

// Calls in_sequence(span, from, to) and between(from, to) for the pieces of begin .. end that lie in one sequence, or
// in none.
template <class InSequence, class Between>
JT_DEVICE void for_each_piece(const ConvCall& call, int64_t batch, int64_t begin, int64_t end,
                              const InSequence& in_sequence, const Between& between) {
  if (call.bounds == nullptr) {
    in_sequence(Span{batch, 0, call.length}, begin, end);
    return;
  }
  int64_t sequence = find_sequence(call.bounds, call.sequences, begin);
  for (int64_t at = begin; at < end;) {
    const bool inside = sequence >= 0 && sequence < call.sequences;
    const int64_t to = sequence < call.sequences ? min(end, int64_t(call.bounds[sequence + 1])) : end;
    if (inside)
      in_sequence(Span{sequence, call.bounds[sequence], call.bounds[sequence + 1]}, at, to);
    else
      between(at, to);
    at = to;
    do ++sequence;
    while (sequence < call.sequences && call.bounds[sequence + 1] <= at);
  }
}

// Row `position` of x as the sequence sees it: before its begin, the initial state.
template <class T, class A, int V>
JT_DEVICE Row<A, V> load_history(const ConvCall& call, const Span& span, int64_t batch, int64_t position,
                                 int64_t channel) {
  if (position >= span.begin) return load_raw<T, A, V>(call.x, offset(call.x, batch, position, channel)).row();
  Row<A, V> row;
  const int64_t state_row = position - span.begin + call.width - 1;
  JT_UNROLL
  for (int v = 0; v < V; ++v) {
    row.lane[v] =
        call.initial_state.data != nullptr && state_row >= 0
            ? load_any<A>(call.initial_state, offset(call.initial_state, span.sequence, state_row, channel + v))
            : A(0);
  }
  return row;
}

// bias + sum_j w_j rows[W - 1 - j], the last row the newest.
template <class A, int W, int V>
JT_DEVICE Row<A, V> weighted_sum(const Row<A, V>* rows, const A (&w)[W][V], const A (&bias)[V], int width) {
  Row<A, V> sum;
  JT_UNROLL
  for (int v = 0; v < V; ++v) sum.lane[v] = bias[v];
  JT_UNROLL
  for (int j = W - 1; j >= 0; --j) {
    if (may_lack<W>(j) && j >= width) continue;  // skipped, not multiplied by zero: the row may hold infinity
    JT_UNROLL
    for (int v = 0; v < V; ++v) sum.lane[v] += w[j][v] * rows[W - 1 - j].lane[v];
  }
  return sum;
}

// One position on: a matter of names when the loop around is unrolled.
template <class A, int W, int V>
JT_DEVICE void shift(Row<A, V> (&rows)[W]) {
  JT_UNROLL
  for (int i = 0; i < W - 1; ++i) rows[i] = rows[i + 1];
}

// One element of a final state: the row `width - 1 - r` positions before the end of its sequence.
template <class A>
JT_DEVICE void copy_final_state(const ConvForward& call, int64_t element) {
  const int64_t history = call.width - 1, channel = element % call.channels, row = element / call.channels % history;
  const int64_t sequence = element / call.channels / history;
  if (sequence >= call.sequences) return;
  const Span span = call.bounds == nullptr ? Span{sequence, 0, call.length}
                                           : Span{sequence, call.bounds[sequence], call.bounds[sequence + 1]};
  const int64_t batch = call.bounds == nullptr ? sequence : 0;
  const Row<A, 1> value = load_history<void, A, 1>(call, span, batch, span.end - history + row, channel);
  store_any<A>(call.final_state, offset(call.final_state, sequence, row, channel), value.lane[0]);
}

// budget: registers <= 128, spills 0, shared <= 0
template <class T, class A, int W, int V, int U>
__global__ void __launch_bounds__(kThreads, 4) conv_forward_kernel(const ConvForward call, const Plan plan) {
  if (blockIdx.x >= plan.walk_blocks) {
    if (call.width > 1) copy_final_state<A>(call, (blockIdx.x - plan.walk_blocks) * kThreads + threadIdx.x);
    return;
  }
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = thread % plan.groups * V, chunk = thread / plan.groups % plan.chunks;
  const int64_t batch = thread / plan.groups / plan.chunks, begin = chunk * plan.chunk;
  if (batch >= call.batch) return;
  const int width = int(call.width);
  A w[W][V], bias[V];
  load_weight<A, W, V>(call, channel, w, bias);
  const int64_t x_step = call.x.stride[1], y_step = call.y.stride[1];

  const auto in_sequence = [&](const Span& span, int64_t from, int64_t to) {
    Row<A, V> rows[W];  // positions t - (W - 1) .. t
    JT_UNROLL
    for (int i = 0; i < W - 1; ++i) {
      rows[i] = load_history<T, A, V>(call, span, batch, from - (W - 1) + i, channel);
    }
    int64_t x_at = offset(call.x, batch, from, channel), y_at = offset(call.y, batch, from, channel);
    const auto steps = [&](auto count) {
      constexpr int kSteps = decltype(count)::value;
      Raw<T, A, V> raw[kSteps];
      JT_UNROLL
      for (int i = 0; i < kSteps; ++i) raw[i] = load_raw<T, A, V>(call.x, x_at + i * x_step);
      JT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        rows[W - 1] = raw[i].row();
        Row<A, V> y = weighted_sum<A, W, V>(rows, w, bias, width);
        if (call.silu) {
          JT_UNROLL
          for (int v = 0; v < V; ++v) y.lane[v] = activate<T, A>(y.lane[v]);
        }
        store_row<T, A, V>(call.y, y_at + i * y_step, y);
        shift(rows);
      }
      x_at += kSteps * x_step, y_at += kSteps * y_step;
    };
    int64_t t = from;
    for (; t + U <= to; t += U) steps(std::integral_constant<int, U>{});
    for (; t < to; ++t) steps(std::integral_constant<int, 1>{});
  };
  const auto between = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) store_row<T, A, V>(call.y, offset(call.y, batch, t, channel), Row<A, V>{});
  };
  for_each_piece(call, batch, begin, min(begin + plan.chunk, call.length), in_sequence, between);
}

// The partial sums of dweight and dbias: (batch, chunks, width + 1, channels), the taps in the order of `weight`.
JT_DEVICE int64_t partial_at(const ConvCall& call, const Plan& plan, int64_t batch, int64_t chunk, int64_t tap) {
  return ((batch * plan.chunks + chunk) * (call.width + 1) + tap) * call.channels;
}

// budget: registers <= 192, spills 0, shared <= 0
template <class T, class A, int W, int V, int U>
__global__ void __launch_bounds__(kThreads, 2) conv_backward_kernel(const ConvBackward call, const Plan plan) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = thread % plan.groups * V, chunk = thread / plan.groups % plan.chunks;
  const int64_t batch = thread / plan.groups / plan.chunks, begin = chunk * plan.chunk;
  if (batch >= call.batch) return;
  const int width = int(call.width);
  const bool has_grad = call.grad_y.data != nullptr;
  A w[W][V], bias[V], dw[W][V], dbias[V];
  load_weight<A, W, V>(call, channel, w, bias);
  JT_UNROLL
  for (int v = 0; v < V; ++v) {
    dbias[v] = A(0);
    JT_UNROLL
    for (int j = 0; j < W; ++j) dw[j][v] = A(0);
  }

  const auto in_sequence = [&](const Span& span, int64_t from, int64_t to) {
    Row<A, V> rows[W], g[W];  // x and g at positions t - (W - 1) .. t
    JT_UNROLL
    for (int i = 0; i < W - 1; ++i) {
      rows[i] = load_history<T, A, V>(call, span, batch, from - (W - 1) + i, channel);
      g[i] = Row<A, V>{};
    }
    // Some positions from t: g there, dx of those W - 1 earlier. `inner`: all of them are this thread's own, and so are
    // those whose dx is due; otherwise g is zero beyond the sequence, and counts here before `to` only.
    const auto steps = [&](int64_t t, auto count, auto inner) {
      constexpr int kSteps = decltype(count)::value;
      constexpr bool kInner = decltype(inner)::value;
      Raw<T, A, V> raw_x[kSteps], raw_grad[kSteps];
      JT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if (!kInner && t + i >= span.end) continue;
        raw_x[i] = load_raw<T, A, V>(call.x, offset(call.x, batch, t + i, channel));
        if (has_grad) raw_grad[i] = load_raw<T, A, V>(call.grad_y, offset(call.grad_y, batch, t + i, channel));
      }
      JT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        Row<A, V> grad{};
        rows[W - 1] = Row<A, V>{};
        if (kInner || t + i < span.end) {
          rows[W - 1] = raw_x[i].row();
          if (has_grad) grad = raw_grad[i].row();
          if (has_grad && call.silu) {
            const Row<A, V> sum = weighted_sum<A, W, V>(rows, w, bias, width);
            JT_UNROLL
            for (int v = 0; v < V; ++v) grad.lane[v] *= activate_slope<T, A>(sum.lane[v]);
          }
          if (kInner || t + i < to) {
            JT_UNROLL
            for (int v = 0; v < V; ++v) {
              dbias[v] += grad.lane[v];
              JT_UNROLL
              for (int j = 0; j < W; ++j) dw[j][v] += grad.lane[v] * rows[W - 1 - j].lane[v];
            }
          }
        }
        g[W - 1] = grad;
        const int64_t p = t + i - (W - 1);  // its last g has come
        if (kInner || p >= from) {
          Row<A, V> dx{};
          JT_UNROLL
          for (int j = 0; j < W; ++j) {
            if (may_lack<W>(j) && j >= width) continue;
            JT_UNROLL
            for (int v = 0; v < V; ++v) dx.lane[v] += w[j][v] * g[j].lane[v];
          }
          const int64_t state_row = p - span.end + width - 1;  // of the final state, which x_p is a row of
          if (!kInner && state_row >= 0 && call.grad_final_state.data != nullptr) {
            JT_UNROLL
            for (int v = 0; v < V; ++v) {
              dx.lane[v] += load_any<A>(call.grad_final_state,
                                        offset(call.grad_final_state, span.sequence, state_row, channel + v));
            }
          }
          store_row<T, A, V>(call.dx, offset(call.dx, batch, p, channel), dx);
        }
        shift(rows);
        shift(g);
      }
    };
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, U> kMany;
    int64_t t = from;
    for (; t < min(from + W - 1, to); ++t) steps(t, kOne, std::false_type{});
    for (; t + U <= to; t += U) steps(t, kMany, std::true_type{});
    for (; t < to + W - 1; ++t) steps(t, kOne, std::false_type{});
  };
  const auto between = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) store_row<T, A, V>(call.dx, offset(call.dx, batch, t, channel), Row<A, V>{});
  };
  for_each_piece(call, batch, begin, min(begin + plan.chunk, call.length), in_sequence, between);

  A* partial = static_cast<A*>(call.workspace);
  JT_UNROLL
  for (int j = 0; j < W; ++j) {
    if (j >= width) continue;
    JT_UNROLL
    for (int v = 0; v < V; ++v) partial[partial_at(call, plan, batch, chunk, width - 1 - j) + channel + v] = dw[j][v];
  }
  JT_UNROLL
  for (int v = 0; v < V; ++v) partial[partial_at(call, plan, batch, chunk, width) + channel + v] = dbias[v];
}

constexpr int kColumns = 32, kSlices = 8;

// dweight and dbias from the partial sums: a warp per 32 columns and slice of the rows, then the slices in order.
// budget: registers <= 48, spills 0, shared <= 2112
template <class A>
__global__ void __launch_bounds__(kColumns* kSlices) conv_sum_kernel(const ConvBackward call, const Plan plan) {
  __shared__ A sums[kSlices][kColumns + 1];
  const int64_t columns = (call.width + 1) * call.channels, column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t rows = call.batch * plan.chunks;
  const A* partial = static_cast<const A*>(call.workspace);
  A sum = A(0);
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kSlices) sum += partial[row * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  sum = A(0);
  for (int i = 0; i < kSlices; ++i) sum += sums[i][threadIdx.x];
  const int64_t tap = column / call.channels, channel = column % call.channels;
  if (tap < call.width)
    store_any<A>(call.dweight, offset(call.dweight, 0, channel, tap), sum);
  else if (call.dbias.data != nullptr)
    store_any<A>(call.dbias, channel * call.dbias.stride[2], sum);
}

// The gradient of the initial state: row r is x_{begin - m}, m = width - 1 - r, which reaches the first width - m
// outputs; where the sequence is short, it is also a row of the final state. A thread per sequence and channel.
// budget: registers <= 128, spills 0, shared <= 0
template <class A, int W>
__global__ void __launch_bounds__(kThreads) conv_backward_state_kernel(const ConvBackward call) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = thread % call.channels, sequence = thread / call.channels;
  if (sequence >= call.sequences) return;
  const int width = int(call.width);
  const Span span = call.bounds == nullptr ? Span{sequence, 0, call.length}
                                           : Span{sequence, call.bounds[sequence], call.bounds[sequence + 1]};
  const int64_t batch = call.bounds == nullptr ? sequence : 0, length = span.end - span.begin;
  A w[W][1], bias[1];
  load_weight<A, W, 1>(call, channel, w, bias);
  Row<A, 1> rows[2 * W - 2];  // positions begin - (W - 1) .. begin + W - 2
  JT_UNROLL
  for (int i = 0; i < 2 * W - 2; ++i) {
    rows[i] = i - (W - 1) < length ? load_history<void, A, 1>(call, span, batch, span.begin - (W - 1) + i, channel)
                                   : Row<A, 1>{};
  }
  A g[W - 1];  // at begin + i
  JT_UNROLL
  for (int i = 0; i < W - 1; ++i) {
    g[i] = A(0);
    if (i >= length || call.grad_y.data == nullptr) continue;
    g[i] = load_any<A>(call.grad_y, offset(call.grad_y, batch, span.begin + i, channel));
    if (call.silu) {
      g[i] *= activate_slope<void, A>(weighted_sum<A, W, 1>(rows + i, w, bias, width).lane[0]);
    }
  }
  JT_UNROLL
  for (int m = 1; m < W; ++m) {
    if (m >= width) continue;
    A sum = A(0);
    JT_UNROLL
    for (int j = m; j < W; ++j) {
      if (may_lack<W>(j) && j >= width) continue;
      sum += w[j][0] * g[j - m];
    }
    const int64_t row = width - 1 - m, final_row = row - length;
    if (final_row >= 0 && call.grad_final_state.data != nullptr) {
      sum += load_any<A>(call.grad_final_state, offset(call.grad_final_state, sequence, final_row, channel));
    }
    store_any<A>(call.dinitial_state, offset(call.dinitial_state, sequence, row, channel), sum);
  }
}

// budget: registers <= 96, spills 0, shared <= 0
template <class A, int W>
__global__ void __launch_bounds__(kThreads) conv_step_kernel(const ConvStep call) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = thread % call.channels, batch = thread / call.channels;
  if (batch >= call.batch) return;
  const int width = int(call.width);
  A rows[W];  // rows[j]: j positions back
  rows[0] = load_any<A>(call.x, offset(call.x, 0, batch, channel));
  A y = call.bias.data != nullptr ? load_any<A>(call.bias, channel * call.bias.stride[2]) : A(0);
  JT_UNROLL
  for (int j = W - 1; j >= 0; --j) {
    if (j >= width) continue;
    if (j > 0) rows[j] = load_any<A>(call.state, offset(call.state, batch, width - 1 - j, channel));
    y += load_any<A>(call.weight, offset(call.weight, 0, channel, width - 1 - j)) * rows[j];
  }
  JT_UNROLL
  for (int j = 0; j < W - 1; ++j) {
    if (j < width - 1) store_any<A>(call.state, offset(call.state, batch, width - 2 - j, channel), rows[j]);
  }
  store_any<A>(call.y, offset(call.y, 0, batch, channel), call.silu ? silu<A>(y) : y);
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

// call(std::integral_constant<int, W>) with the class of the width.
template <class Call>
const char* with_width(int64_t width, const Call& call) {
  if (width <= 2) return call(std::integral_constant<int, 2>{});
  if (width == 3) return call(std::integral_constant<int, 3>{});
  if (width == 4) return call(std::integral_constant<int, 4>{});
  if (width <= 8) return call(std::integral_constant<int, 8>{});
  return call(std::integral_constant<int, 16>{});
}

// Channels per thread and positions loaded at once: four channels are 16 bytes of float32, 8 of the short dtypes, and
// leave registers for many warps and many loads in flight. Wide windows leave room for less.
template <class T, int W>
constexpr int vector_of() {
  return std::is_void_v<T> ? 1 : W <= 4 ? 4 : W == 8 ? 2 : 1;
}
template <class T, int W>
constexpr int forward_steps() {
  return std::is_void_v<T> ? 2 : W <= 4 ? 8 : 4;
}
template <class T, int W>
constexpr int backward_steps() {
  return std::is_void_v<T> || W > 8 ? 1 : W == 8 ? 2 : 4;
}

template <class T, class A, int W>
const char* run_forward(const ConvForward& call) {
  constexpr int kVector = vector_of<T, W>();
  Plan plan = make_plan(call, kVector, 8);
  const int64_t state_elements = call.sequences * (call.width - 1) * call.channels;
  const int64_t blocks = plan.walk_blocks + (state_elements + kThreads - 1) / kThreads;
  return launch(conv_forward_kernel<T, A, W, kVector, forward_steps<T, W>()>, unsigned(blocks), kThreads, 0,
                call.device, call, plan);
}

template <class T, int W>
bool takes(const ConvForward& call) {
  constexpr int kVector = vector_of<T, W>();
  return call.channels % kVector == 0 && vectors_fit<T, kVector>(call.x) && vectors_fit<T, kVector>(call.y);
}

template <class T, class A, int W>
const char* run_backward(const ConvBackward& call, const Plan& plan) {
  const char* error = launch(conv_backward_kernel<T, A, W, vector_of<T, W>(), backward_steps<T, W>()>,
                             unsigned(plan.walk_blocks), kThreads, 0, call.device, call, plan);
  if (error != nullptr) return error;
  const int64_t columns = (call.width + 1) * call.channels;
  error = launch(conv_sum_kernel<A>, unsigned((columns + kColumns - 1) / kColumns), dim3(kColumns, kSlices), 0,
                 call.device, call, plan);
  if (error != nullptr || call.dinitial_state.data == nullptr || call.width == 1) return error;
  return launch(conv_backward_state_kernel<A, W>, blocks_for(call.sequences * call.channels), kThreads, 0, call.device,
                call);
}

template <class T, int W>
bool takes(const ConvBackward& call) {
  constexpr int kVector = vector_of<T, W>();
  return call.channels % kVector == 0 && vectors_fit<T, kVector>(call.x) && vectors_fit<T, kVector>(call.dx) &&
         (call.grad_y.data == nullptr || vectors_fit<T, kVector>(call.grad_y));
}

// The vector kernels' dtypes, where the layout allows them; calls run(T*) with T void for the general kernel.
template <int W, class Conv, class Run>
const char* with_layout(const Conv& call, const Run& run) {
  if (takes<float, W>(call)) return run(static_cast<float*>(nullptr));
  if (takes<__nv_bfloat16, W>(call)) return run(static_cast<__nv_bfloat16*>(nullptr));
  if (takes<__half, W>(call)) return run(static_cast<__half*>(nullptr));
  return run(static_cast<void*>(nullptr));
}

// Backward's cut, which its workspace follows.
Plan backward_plan(const ConvBackward& call) {
  Plan plan{};
  with_width(call.width, [&](auto width) {
    return with_layout<width()>(call, [&](auto* dtype) -> const char* {
      plan = make_plan(call, vector_of<std::remove_pointer_t<decltype(dtype)>, width()>(), 16);
      return nullptr;
    });
  });
  return plan;
}

}  // namespace

const char* launch_conv_forward(const ConvForward& call) {
  return with_width(call.width, [&](auto width) {
    if (call.x.dtype == Dtype::kFloat64) return run_forward<void, double, width()>(call);
    return with_layout<width()>(
        call, [&](auto* dtype) { return run_forward<std::remove_pointer_t<decltype(dtype)>, float, width()>(call); });
  });
}

int64_t conv_backward_workspace(const ConvBackward& call) {
  const int64_t size = call.x.dtype == Dtype::kFloat64 ? 8 : 4;
  return call.batch * backward_plan(call).chunks * (call.width + 1) * call.channels * size;
}

const char* launch_conv_backward(const ConvBackward& call) {
  const Plan plan = backward_plan(call);
  return with_width(call.width, [&](auto width) {
    if (call.x.dtype == Dtype::kFloat64) return run_backward<void, double, width()>(call, plan);
    return with_layout<width()>(call, [&](auto* dtype) {
      return run_backward<std::remove_pointer_t<decltype(dtype)>, float, width()>(call, plan);
    });
  });
}

const char* launch_conv_step(const ConvStep& call) {
  return with_width(call.width, [&](auto width) {
    const auto kernel =
        call.x.dtype == Dtype::kFloat64 ? conv_step_kernel<double, width()> : conv_step_kernel<float, width()>;
    return launch(kernel, blocks_for(call.batch * call.channels), kThreads, 0, call.device, call);
  });
}

}  // namespace jambatalk::cuda
