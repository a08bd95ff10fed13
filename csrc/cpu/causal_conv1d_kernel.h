// Causal depthwise convolution on the CPU: channels in vector lanes, time in a loop.
//
//   y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})
//
// A task is one batch entry and one group of channels; per piece and block of W channels it stages the piece's rows of
// x and the width - 1 before them (from x, or from the initial state) in the L1 cache: one read of x per element.
// Backward computes the sum before the activation again, walks the pieces in reverse and keeps the first width - 1 rows
// of the later piece's gradient. Sums over time are in registers or the task's own memory, sums over the batch are the
// host side's: a fixed order.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

constexpr int kMaxWidth = 16;

// rows[r * pitch ..+ count): x at positions begin .. begin + count of one sequence, R vectors of channels from c;
// before the sequence's start, rows of the initial state.
template <class L, int R>
void load_with_history(typename L::V* rows, int64_t pitch, const ConvCall& call, const Piece& piece, int64_t batch,
                       int64_t sequence, int64_t begin, int64_t count, int64_t c, int64_t valid) {
  int64_t before = smaller(piece.sequence_begin - begin, count);
  if (before < 0) before = 0;
  const int64_t state_row = begin - piece.sequence_begin + call.width - 1;
  load_rows<L, R>(rows, pitch, call.initial_state, sequence, state_row, before, c, valid);
  load_rows<L, R>(rows + before, pitch, call.x, batch, begin + before, count - before, c, valid);
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
  constexpr int R = kStrip<L>;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1, rows = call.max_piece + history;
  const int64_t blocks = (call.group_channels + L::W - 1) / L::W;
  Carver carve{(char*)scratch(2 * carved<V>(R * rows) + carved<V>(blocks * width) + carved<V>(blocks))};
  V *strip_x = carve.take<V>(R * rows), *strip_y = carve.take<V>(R * rows);
  V *weight = carve.take<V>(blocks * width), *bias = carve.take<V>(blocks);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    for (int64_t c = group_begin, k = 0; c < group_end; c += L::W, ++k) {
      load_transposed<L>(weight + k * width, call.weight, 0, c, width, group_end - c);
      bias[k] = load_channels<L>(call.bias, c, group_end - c);
    }
    for (int64_t p = 0; p < call.piece_count; ++p) {
      const Piece& piece = call.pieces[p];
      const int64_t begin = piece.begin, count = piece.end - begin, sequence = call.packed ? piece.sequence : batch;
      for (int64_t strip = group_begin; strip < group_end; strip += R * L::W) {
        const int64_t valid = group_end - strip, first_block = (strip - group_begin) / L::W;
        load_with_history<L, R>(strip_x, rows, call, piece, batch, sequence, begin - history, history + count, strip,
                                valid);
        for (int r = 0; r < R && r * L::W < valid; ++r) {
          V *x = strip_x + r * rows, *y = strip_y + r * rows;
          conv_any_width<L>(x, weight + (first_block + r) * width, width, bias[first_block + r], count, y);
          if (call.silu) {
            for (int64_t t = 0; t < count; ++t) y[t] = silu<L>(y[t]);
          }
        }
        store_rows<L, R>(strip_y, rows, call.y, batch, begin, count, strip, valid);
        if (piece.last) store_rows<L, R>(strip_x + count, rows, call.final_state, sequence, 0, history, strip, valid);
      }
    }
  }
}

// One block of channels of one piece, backward. x: (history + count) rows; dpre: gradient of y in, of the sum before
// the activation out, followed by `later`, the first rows of the next piece's; dx: (count) rows out.
template <class L>
void conv_rows_backward(const ConvCall& call, const typename L::V* x, typename L::V* dpre, typename L::V* dx,
                        int64_t count, const typename L::V* weight, typename L::V bias, typename L::V* later,
                        typename L::V* dweight, typename L::V* dbias) {
  using V = typename L::V;
  const int64_t width = call.width, history = width - 1;
  if (call.silu) {
    conv_any_width<L>(x, weight, width, bias, count, dx);
    for (int64_t t = 0; t < count; ++t) {
      const V gate = sigmoid<L>(dx[t]);
      dpre[t] *= gate * (L::splat(1) + dx[t] * (L::splat(1) - gate));
    }
  }
  V total = {};
  for (int64_t t = 0; t < count; ++t) total += dpre[t];
  *dbias += total;
  for (int64_t k = 0; k < width; ++k) {
    total = V{};
    for (int64_t t = 0; t < count; ++t) total += dpre[t] * x[t + k];
    dweight[k] += total;
  }
  for (int64_t r = 0; r < history; ++r) dpre[count + r] = later[r];
  for (int64_t t = 0; t < count; ++t) {  // x_t reaches y_t .. y_{t + width - 1}
    V grad = {};
    for (int64_t k = 0; k < width; ++k) grad += dpre[t + k] * weight[history - k];
    dx[t] = grad;
  }
  for (int64_t r = 0; r < history; ++r) later[r] = dpre[r];
}

template <class L>
void conv_backward(const ConvCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int R = kStrip<L>;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1, blocks = (call.group_channels + L::W - 1) / L::W;
  const int64_t rows = call.max_piece + history;
  Carver carve{(char*)scratch(3 * carved<V>(R * rows) + 2 * carved<V>(history) + 2 * carved<V>(blocks * width) +
                              carved<V>(blocks * history) + 2 * carved<V>(blocks))};
  V *strip_x = carve.take<V>(R * rows), *strip_dpre = carve.take<V>(R * rows), *strip_dx = carve.take<V>(R * rows);
  V *from_state = carve.take<V>(history), *final_grad = carve.take<V>(history);
  V *weight = carve.take<V>(blocks * width), *dweight = carve.take<V>(blocks * width);
  V *carry = carve.take<V>(blocks * history), *bias = carve.take<V>(blocks), *dbias = carve.take<V>(blocks);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    for (int64_t c = group_begin, k = 0; c < group_end; c += L::W, ++k) {
      load_transposed<L>(weight + k * width, call.weight, 0, c, width, group_end - c);
      bias[k] = load_channels<L>(call.bias, c, group_end - c);
    }
    for (int64_t i = 0; i < blocks * width; ++i) dweight[i] = V{};
    for (int64_t i = 0; i < blocks; ++i) dbias[i] = V{};
    for (int64_t p = call.piece_count - 1; p >= 0; --p) {
      const Piece& piece = call.pieces[p];
      const int64_t begin = piece.begin, count = piece.end - begin, sequence = call.packed ? piece.sequence : batch;
      const int64_t length = piece.sequence_end - piece.sequence_begin;
      if (piece.last) {
        for (int64_t i = 0; i < blocks * history; ++i) carry[i] = V{};
      }
      for (int64_t strip = group_begin; strip < group_end; strip += R * L::W) {
        const int64_t valid = group_end - strip;
        load_with_history<L, R>(strip_x, rows, call, piece, batch, sequence, begin - history, history + count, strip,
                                valid);
        load_rows<L, R>(strip_dpre, rows, call.grad_y, batch, begin, count, strip, valid);
        for (int r = 0; r < R && r * L::W < valid; ++r) {
          const int64_t c = strip + r * L::W, k = (c - group_begin) / L::W;
          V *dpre = strip_dpre + r * rows, *dx = strip_dx + r * rows;
          const V* w = weight + k * width;
          conv_rows_backward<L>(call, strip_x + r * rows, dpre, dx, count, w, bias[k], carry + k * history,
                                dweight + k * width, dbias + k);
          // The final state holds the last inputs, or older rows of the initial state where the sequence is shorter.
          load_rows<L>(final_grad, history, call.grad_final_state, sequence, 0, history, c, group_end - c);
          const int64_t tail = piece.sequence_end - history;  // the position of its first row
          for (int64_t t = tail > begin ? tail : begin; t < piece.end; ++t) dx[t - begin] += final_grad[t - tail];
          if (piece.first && call.dinitial_state.data != nullptr) {
            for (int64_t row = 0; row < history; ++row) {  // position row - history: it reaches y_0 .. y_row
              V grad = row >= length ? final_grad[row - length] : V{};
              for (int64_t tap = history - row; tap < width; ++tap)
                grad += dpre[row - history + tap] * w[history - tap];
              from_state[row] = grad;
            }
            store_rows<L>(from_state, history, call.dinitial_state, sequence, 0, history, c, group_end - c);
          }
        }
        store_rows<L, R>(strip_dx, rows, call.dx, batch, begin, count, strip, valid);
      }
    }
    for (int64_t c = group_begin, k = 0; c < group_end; c += L::W, ++k) {
      for (int64_t lane = 0; lane < smaller(L::W, group_end - c); ++lane) {
        const int64_t channel = batch * call.channels + c + lane;
        for (int64_t tap = 0; tap < width; ++tap) {
          ((T*)call.dweight_partial)[channel * width + tap] = dweight[k * width + tap][lane];
        }
        ((T*)call.dbias_partial)[channel] = dbias[k][lane];
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
      load_rows<L>(rows, history, call.state, batch, 0, history, c, valid);
      load_rows<L>(rows + history, 1, call.x, 0, batch, 1, c, valid);
      V y = load_channels<L>(call.bias, c, valid);
      for (int64_t k = 0; k < width; ++k) y += weight[k] * rows[k];
      if (call.silu) y = silu<L>(y);
      store_rows<L>(rows + 1, history, call.state, batch, 0, history, c, valid);
      store_rows<L>(&y, 1, call.y, 0, batch, 1, c, valid);
    }
  }
}

}  // namespace JT_ISA
}  // namespace jambatalk
