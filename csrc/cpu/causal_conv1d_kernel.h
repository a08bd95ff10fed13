// Causal depthwise convolution on the CPU: channels in vector lanes, time in a loop.
//
//   y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})
//
// A task is one batch entry and one group of channels; per piece and block of W channels it stages the piece's rows of x
// and the width - 1 before them (from x, or from the initial state) in the L1 cache: one read of x per element.
// Backward computes the sum before the activation again, walks the pieces in reverse and keeps the first width - 1 rows of
// the later piece's gradient. Sums over time are in registers or the task's own memory, sums over the batch are the host
// side's: a fixed order.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

constexpr int kMaxWidth = 16;

// rows[0 .. count): x at positions begin .. begin + count of one sequence; before its start, rows of the initial state.
template <class L>
void load_with_history(typename L::V* rows, const ConvCall& call, const Piece& piece, int64_t batch, int64_t sequence,
                       int64_t begin, int64_t count, int64_t c, int valid) {
  int64_t before = smaller(piece.sequence_begin - begin, count);
  if (before < 0) before = 0;
  const int64_t state_row = begin - piece.sequence_begin + call.width - 1;
  load_rows<L>(rows, call.initial_state, sequence, state_row, before, c, valid);
  load_rows<L>(rows + before, call.x, batch, begin + before, count - before, c, valid);
}

// y[t] = bias + sum_k weight[k] rows[t + k]
template <class L, int Width>
void conv_rows(const typename L::V* rows, const typename L::V* weight, int64_t width, typename L::V bias, int64_t count,
               typename L::V* y) {
  using V = typename L::V;
  if constexpr (Width > 0) {
    V w[Width];
    for (int k = 0; k < Width; ++k) w[k] = weight[k];
    for (int64_t t = 0; t < count; ++t) {
      V sum = bias;
      for (int k = 0; k < Width; ++k) sum += w[k] * rows[t + k];
      y[t] = sum;
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      V sum = bias;
      for (int64_t k = 0; k < width; ++k) sum += weight[k] * rows[t + k];
      y[t] = sum;
    }
  }
}

template <class L>
void conv_any_width(const typename L::V* rows, const typename L::V* weight, int64_t width, typename L::V bias,
                    int64_t count, typename L::V* y) {
  switch (width) {
    case 2:
      return conv_rows<L, 2>(rows, weight, width, bias, count, y);
    case 3:
      return conv_rows<L, 3>(rows, weight, width, bias, count, y);
    case 4:
      return conv_rows<L, 4>(rows, weight, width, bias, count, y);
    default:
      return conv_rows<L, 0>(rows, weight, width, bias, count, y);
  }
}

template <class L>
void conv_forward(const ConvCall& call, int64_t task_begin, int64_t task_end) {
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1;
  Carver carve{(char*)scratch(carved<V>(call.max_piece + history) + carved<V>(call.max_piece) + carved<V>(width))};
  V *x = carve.take<V>(call.max_piece + history), *y = carve.take<V>(call.max_piece), *weight = carve.take<V>(width);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    for (int64_t p = 0; p < call.piece_count; ++p) {
      const Piece& piece = call.pieces[p];
      const int64_t count = piece.end - piece.begin, sequence = call.packed ? piece.sequence : batch;
      for (int64_t c = group_begin; c < group_end; c += L::W) {
        const int valid = int(smaller(L::W, group_end - c));
        load_transposed<L>(weight, call.weight, 0, c, width, valid);
        load_with_history<L>(x, call, piece, batch, sequence, piece.begin - history, history + count, c, valid);
        conv_any_width<L>(x, weight, width, load_channels<L>(call.bias, c, valid), count, y);
        if (call.silu) {
          for (int64_t t = 0; t < count; ++t) y[t] = silu<L>(y[t]);
        }
        store_rows<L>(y, call.y, batch, piece.begin, count, c, valid);
        if (piece.last) store_rows<L>(x + count, call.final_state, sequence, 0, history, c, valid);
      }
    }
  }
}

template <class L>
void conv_backward(const ConvCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1, blocks = (call.group_channels + L::W - 1) / L::W;
  const int64_t rows = call.max_piece + history;
  Carver carve{(char*)scratch(3 * carved<V>(rows) + carved<V>(history) + 2 * carved<V>(blocks * width) +
                              carved<V>(blocks * history) + 2 * carved<V>(blocks))};
  V *x = carve.take<V>(rows), *dpre = carve.take<V>(rows), *dx = carve.take<V>(rows), *from_state = carve.take<V>(history);
  V *weight = carve.take<V>(blocks * width), *dweight = carve.take<V>(blocks * width);
  V *carry = carve.take<V>(blocks * history);
  V *bias = carve.take<V>(blocks), *dbias = carve.take<V>(blocks);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    for (int64_t c = group_begin, b = 0; c < group_end; c += L::W, ++b) {
      const int valid = int(smaller(L::W, group_end - c));
      load_transposed<L>(weight + b * width, call.weight, 0, c, width, valid);
      for (int64_t k = 0; k < width; ++k) dweight[b * width + k] = V{};
      bias[b] = load_channels<L>(call.bias, c, valid);
      dbias[b] = V{};
    }
    for (int64_t p = call.piece_count - 1; p >= 0; --p) {
      const Piece& piece = call.pieces[p];
      const int64_t count = piece.end - piece.begin, sequence = call.packed ? piece.sequence : batch;
      for (int64_t c = group_begin, b = 0; c < group_end; c += L::W, ++b) {
        const int valid = int(smaller(L::W, group_end - c));
        const V* w = weight + b * width;
        V* later = carry + b * history;
        if (piece.last) {
          for (int64_t r = 0; r < history; ++r) later[r] = V{};
        }
        load_with_history<L>(x, call, piece, batch, sequence, piece.begin - history, history + count, c, valid);
        load_rows<L>(dpre, call.grad_y, batch, piece.begin, count, c, valid);
        if (call.silu) {
          conv_any_width<L>(x, w, width, bias[b], count, dx);
          for (int64_t t = 0; t < count; ++t) {
            const V gate = sigmoid<L>(dx[t]);
            dpre[t] *= gate * (L::splat(1) + dx[t] * (L::splat(1) - gate));
          }
        }
        V sum = {};
        for (int64_t t = 0; t < count; ++t) sum += dpre[t];
        dbias[b] += sum;
        for (int64_t k = 0; k < width; ++k) {
          V total = {};
          for (int64_t t = 0; t < count; ++t) total += dpre[t] * x[t + k];
          dweight[b * width + k] += total;
        }
        for (int64_t r = 0; r < history; ++r) dpre[count + r] = later[r];

        // x_t reaches y_t .. y_{t+width-1}, and the final state from position sequence_end - history on.
        for (int64_t t = 0; t < count; ++t) {
          V grad = {};
          for (int64_t k = 0; k < width; ++k) grad += dpre[t + k] * w[history - k];
          dx[t] = grad;
        }
        const int64_t tail = piece.sequence_end - history;  // position of the final state's first row
        int64_t begin = tail > piece.begin ? tail : piece.begin;
        if (begin < piece.end) {
          load_rows<L>(x, call.grad_final_state, sequence, begin - tail, piece.end - begin, c, valid);
          for (int64_t t = begin; t < piece.end; ++t) dx[t - piece.begin] += x[t - begin];
        }
        store_rows<L>(dx, call.dx, batch, piece.begin, count, c, valid);
        if (piece.first && call.dinitial_state.data != nullptr) {
          const int64_t length = piece.sequence_end - piece.sequence_begin;
          // Row r of the initial state is position r - history; it is in the final state too if the sequence is that short.
          load_rows<L>(x, call.grad_final_state, sequence, 0, history, c, valid);
          for (int64_t r = 0; r < history; ++r) {
            V grad = r >= length ? x[r - length] : V{};
            for (int64_t k = history - r; k < width; ++k) grad += dpre[r - history + k] * w[history - k];
            from_state[r] = grad;
          }
          store_rows<L>(from_state, call.dinitial_state, sequence, 0, history, c, valid);
        }
        for (int64_t r = 0; r < history; ++r) later[r] = dpre[r];
      }
    }
    for (int64_t c = group_begin, b = 0; c < group_end; c += L::W, ++b) {
      for (int lane = 0; lane < smaller(L::W, group_end - c); ++lane) {
        const int64_t channel = batch * call.channels + c + lane;
        for (int64_t k = 0; k < width; ++k) ((T*)call.dweight_partial)[channel * width + k] = dweight[b * width + k][lane];
        ((T*)call.dbias_partial)[channel] = dbias[b][lane];
      }
    }
  }
}

template <class L>
void conv_step(const ConvStepCall& call, int64_t task_begin, int64_t task_end) {
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1;
  V rows[kMaxWidth], weight[kMaxWidth];
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    for (int64_t c = group_begin; c < group_end; c += L::W) {
      const int valid = int(smaller(L::W, group_end - c));
      load_transposed<L>(weight, call.weight, 0, c, width, valid);
      load_rows<L>(rows, call.state, batch, 0, history, c, valid);
      load_rows<L>(rows + history, call.x, 0, batch, 1, c, valid);
      V y = load_channels<L>(call.bias, c, valid);
      for (int64_t k = 0; k < width; ++k) y += weight[k] * rows[k];
      if (call.silu) y = silu<L>(y);
      store_rows<L>(rows + 1, call.state, batch, 0, history, c, valid);
      store_rows<L>(&y, call.y, 0, batch, 1, c, valid);
    }
  }
}

}  // namespace JT_ISA
}  // namespace jambatalk
