// Selective scan on the CPU: channels in vector lanes, states in registers, time in a loop.
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;   y_t = (C_t . h_t + D u_t) silu(z_t)
//
// A task is one batch entry and one group of channels. It walks the pieces of the sequence (chunks of `chunk`
// positions); for each it stages, strip of channels by strip, delta, u, z as rows of vectors in the L1 cache (any
// dtype, any stride), then runs the recurrence on kTile states at a time, so that their h and A stay in registers while
// time runs. B_t and C_t are the same for all channels: broadcasts.
//
// Cost per channel, position and state: the exponential (10 operations: clamp, split, polynomial, scale) and 4 more.
// Forward is bound by these; the memory traffic is 3 reads and 1 write per channel and position.
//
// Backward recomputes the states of one piece at a time from the state saved at its start, then walks it in reverse:
//   g_t = C_t dy_t + a_{t+1} g_{t+1}          (a_t = exp(delta_t A), g: gradient of h_t)
//   dC_t = sum over channels of dy_t h_t      dB_t = sum over channels of g_t delta_t u_t
//   dA = sum over t of g_t a_t h_{t-1} delta_t,   ddelta_t = sum over states of g_t a_t h_{t-1} A + (g_t . B_t) u_t
// The sums over channels are kept as vectors over the blocks of a group, then across lanes, then (by the host side)
// across groups, each in a fixed order that depends on the shape alone: the same bytes with any number of threads.
//
// Algorithm: Gu and Dao, arXiv 2312.00752. Channels in lanes, not states: no horizontal sum, any number of states.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

constexpr int kTile = 4;  // states in registers at a time

// S states over `count` positions; h in and out, y accumulated.
template <class L, int S>
__attribute__((noinline)) void scan_tile(const typename L::V* delta, const typename L::V* drive, const typename L::T* B,
                                         const typename L::T* C, int64_t states, int64_t count, const typename L::V* A,
                                         typename L::V* h, typename L::V* y) {
  using V = typename L::V;
  V state[S], decay[S];
  for (int s = 0; s < S; ++s) state[s] = h[s], decay[s] = A[s];
  for (int64_t t = 0; t < count; ++t, B += states, C += states) {
    const V d = delta[t], x = drive[t];
    V sum = y[t];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      state[s] = exp2<L>(d * decay[s]) * state[s] + x * B[s];
      sum += state[s] * C[s];
    }
    y[t] = sum;
  }
  for (int s = 0; s < S; ++s) h[s] = state[s];
}

// f.template operator()<S>(n) for tiles of S states starting at n, covering all states.
template <class F>
JT_INLINE void for_tiles(int64_t states, F f) {
  int64_t n = 0;
  for (; n + kTile <= states; n += kTile) f.template operator()<kTile>(n);
  switch (states - n) {
    case 3:
      return f.template operator()<3>(n);
    case 2:
      return f.template operator()<2>(n);
    case 1:
      return f.template operator()<1>(n);
  }
}

// A and the per-channel vectors of one group of channels, in lanes: A[k * states + n] is scaled by log2(e), for exp2.
template <class L>
void load_parameters(const ScanCall& call, int64_t group_begin, int64_t group_end, typename L::V* A, typename L::V* D,
                     typename L::V* bias) {
  for (int64_t c = group_begin, k = 0; c < group_end; c += L::W, ++k) {
    load_transposed<L>(A + k * call.states, call.A, 0, c, call.states, group_end - c);
    for (int64_t n = 0; n < call.states; ++n) A[k * call.states + n] *= L::splat(MathConstants<typename L::T>::kLog2e);
    D[k] = load_channels<L>(call.D, c, group_end - c);
    bias[k] = load_channels<L>(call.delta_bias, c, group_end - c);
  }
}

// Where the state of channel c at the start of the piece's chunk is saved: rows of padded_channels, one per state.
template <class L>
typename L::T* saved_state(const ScanCall& call, int64_t batch, const Piece& piece, int64_t c) {
  return (typename L::T*)call.chunk_states +
         (batch * saved_chunks(call) + piece.begin / call.chunk - 1) * call.states * call.padded_channels + c;
}

// A strip of channels of one piece of one batch entry.
struct Block {
  int64_t batch, begin, channel;
  NextStrip of(const Array& array) const { return {array, batch, begin, channel}; }
};

// The block after the one of `task` and `piece` whose strip ends at `channel`: strips first, then pieces, then tasks.
template <int Step>
Block next_block(const ScanCall& call, int64_t task, int64_t piece, int64_t channel) {
  const int64_t last = Step > 0 ? call.piece_count - 1 : 0;
  if (channel < smaller((task % call.groups + 1) * call.group_channels, call.channels)) {
    return {task / call.groups, call.pieces[piece].begin, channel};
  }
  task += piece == last, piece = piece == last ? call.piece_count - 1 - last : piece + Step;
  return {task / call.groups, call.pieces[piece].begin, task % call.groups * call.group_channels};
}

template <class L>
void scan_forward(const ScanCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int R = kStrip<L>;
  const FlushSubnormals flush;
  const int64_t N = call.states, rows = smaller(call.chunk, call.length);
  const int64_t blocks = (call.group_channels + L::W - 1) / L::W;
  Carver carve{(char*)scratch(2 * carved<V>(blocks * N) + 2 * carved<V>(blocks) + 2 * carved<T>(rows * N) +
                              4 * carved<V>(R * rows))};
  V *A = carve.take<V>(blocks * N), *h = carve.take<V>(blocks * N);
  V *D = carve.take<V>(blocks), *bias = carve.take<V>(blocks);
  T *B = carve.take<T>(rows * N), *C = carve.take<T>(rows * N);
  V *strip_delta = carve.take<V>(R * rows), *strip_u = carve.take<V>(R * rows);
  V *strip_z = carve.take<V>(R * rows), *strip_y = carve.take<V>(R * rows);

  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    load_parameters<L>(call, group_begin, group_end, A, D, bias);
    for (int64_t p = 0; p < call.piece_count; ++p) {
      const Piece& piece = call.pieces[p];
      const int64_t begin = piece.begin, count = piece.end - begin, sequence = call.packed ? piece.sequence : batch;
      load_matrix<T>(B, call.B, batch, begin, count, N);
      load_matrix<T>(C, call.C, batch, begin, count, N);
      for (int64_t strip = group_begin; strip < group_end; strip += R * L::W) {
        const Block next = next_block<1>(call, task, p, strip + R * L::W);
        const NextStrip next_delta = next.of(call.delta), next_u = next.of(call.u), next_z = next.of(call.z),
                        next_y = next.of(call.y);
        load_rows<L, R>(strip_delta, rows, call.delta, batch, begin, count, strip, group_end - strip);
        load_rows<L, R>(strip_u, rows, call.u, batch, begin, count, strip, group_end - strip);
        if (call.z.data != nullptr) {
          load_rows<L, R>(strip_z, rows, call.z, batch, begin, count, strip, group_end - strip);
        }
        for (int r = 0; r < R; ++r) {
          const int64_t c = strip + r * L::W, k = (c - group_begin) / L::W;
          if (c >= group_end) break;
          V *state = h + k * N, *delta = strip_delta + r * rows, *u = strip_u + r * rows;
          V *z = strip_z + r * rows, *y = strip_y + r * rows;
          if (piece.first) load_transposed<L>(state, call.initial_state, sequence, c, N, group_end - c);
          if (call.chunk_states != nullptr && !piece.first) {
            T* saved = saved_state<L>(call, batch, piece, c);
            for (int64_t n = 0; n < N; ++n) L::store(saved + n * call.padded_channels, state[n]);
          }
          for (int64_t t = 0; t < count; ++t) {
            if (r == 0) next_delta.fetch(t), next_u.fetch(t), next_z.fetch(t), next_y.fetch(t);
            V d = delta[t] + bias[k];
            if (call.softplus) d = softplus<L>(d);
            delta[t] = d;
            y[t] = D[k] * u[t];
            u[t] *= d;
          }
          for_tiles(N, [&]<int S>(int64_t n) {
            scan_tile<L, S>(delta, u, B + n, C + n, N, count, A + k * N + n, state + n, y);
          });
          if (call.z.data != nullptr) {
            for (int64_t t = 0; t < count; ++t) y[t] *= silu<L>(z[t]);
          }
          if (piece.last) store_transposed<L>(state, call.final_state, sequence, c, N, group_end - c);
        }
        store_rows<L, R>(strip_y, rows, call.y, batch, begin, count, strip, group_end - strip);
      }
    }
  }
}

// The piece's states again, then their gradients in reverse, for S states of one block of channels.
//   h: in, at the piece's start. carry: gradient of the piece's last state from the future; out, of the state before
//   it. d_drive += g . B, d_log_decay += g a h A (in units of log2), dA += g a h delta. sum_B, sum_C: (count, states)
//   vectors, which are from_B and from_C, rows of from_states, and this block's share. decays, history: scratch, S *
//   count and S * (count + 1) vectors.
template <class L, int S>
__attribute__((noinline)) void scan_tile_backward(
    const typename L::V* delta, const typename L::V* drive, const typename L::V* dy, const typename L::T* B,
    const typename L::T* C, int64_t states, int64_t count, const typename L::V* A, const typename L::V* h,
    typename L::V* carry, typename L::V* y, typename L::V* d_drive, typename L::V* d_log_decay, typename L::V* dA,
    const typename L::V* from_B, const typename L::V* from_C, int64_t from_states, typename L::V* sum_B,
    typename L::V* sum_C, typename L::V* decays, typename L::V* history) {
  using V = typename L::V;
  V rate[S];
  {
    V state[S];
    for (int s = 0; s < S; ++s) history[s] = state[s] = h[s], rate[s] = A[s];
    for (int64_t t = 0; t < count; ++t) {
      const V d = delta[t], x = drive[t];
      V sum = y[t];
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const V decay = exp2<L>(d * rate[s]);
        state[s] = decay * state[s] + x * B[t * states + s];
        sum += state[s] * C[t * states + s];
        decays[t * S + s] = decay;
        history[(t + 1) * S + s] = state[s];
      }
      y[t] = sum;
    }
  }
  V future[S], d_rate[S];
  for (int s = 0; s < S; ++s) future[s] = carry[s], d_rate[s] = V{};
  for (int64_t t = count - 1; t >= 0; --t) {
    const V d = delta[t], x = drive[t], grad_y = dy[t];
    V to_drive = d_drive[t], to_decay = d_log_decay[t];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const V g = grad_y * C[t * states + s] + future[s];
      sum_C[t * states + s] = from_C[t * from_states + s] + grad_y * history[(t + 1) * S + s];
      sum_B[t * states + s] = from_B[t * from_states + s] + g * x;
      to_drive += g * B[t * states + s];
      future[s] = g * decays[t * S + s];
      const V through_decay = future[s] * history[t * S + s];
      to_decay += through_decay * rate[s];
      d_rate[s] += through_decay * d;
    }
    d_drive[t] = to_drive;
    d_log_decay[t] = to_decay;
  }
  for (int s = 0; s < S; ++s) carry[s] = future[s], dA[s] += d_rate[s];
}

template <class L>
void scan_backward(const ScanCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int R = kStrip<L>;
  const FlushSubnormals flush;
  const bool gated = call.z.data != nullptr;
  const int64_t N = call.states, rows = smaller(call.chunk, call.length);
  const int64_t blocks = (call.group_channels + L::W - 1) / L::W;
  Carver carve{(char*)scratch(3 * carved<V>(blocks * N) + 4 * carved<V>(blocks) + carved<V>(N) +
                              2 * carved<T>(rows * N) + 2 * carved<V>(rows * N) + carved<V>(N) +
                              4 * carved<V>(R * rows) + 8 * carved<V>(rows) + carved<V>(rows * kTile) +
                              carved<V>((rows + 1) * kTile))};
  V *A = carve.take<V>(blocks * N), *dA = carve.take<V>(blocks * N), *carry = carve.take<V>(blocks * N);
  V *D = carve.take<V>(blocks), *bias = carve.take<V>(blocks), *dD = carve.take<V>(blocks),
    *dbias = carve.take<V>(blocks);
  V* h = carve.take<V>(N);
  T *B = carve.take<T>(rows * N), *C = carve.take<T>(rows * N);
  V *sum_B = carve.take<V>(rows * N), *sum_C = carve.take<V>(rows * N), *zeros = carve.take<V>(N);
  V *strip_delta = carve.take<V>(R * rows), *strip_u = carve.take<V>(R * rows);
  V *strip_z = carve.take<V>(R * rows), *strip_grad = carve.take<V>(R * rows);
  V *delta = carve.take<V>(rows), *drive = carve.take<V>(rows), *y = carve.take<V>(rows), *dy = carve.take<V>(rows);
  V *d_drive = carve.take<V>(rows), *d_log_decay = carve.take<V>(rows);
  V *slope = carve.take<V>(rows), *gate = carve.take<V>(rows);
  for (int64_t n = 0; n < N; ++n) zeros[n] = V{};
  V *decays = carve.take<V>(rows * kTile), *history = carve.take<V>((rows + 1) * kTile);

  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group = task % call.groups, group_begin = group * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    load_parameters<L>(call, group_begin, group_end, A, D, bias);
    for (int64_t i = 0; i < blocks * N; ++i) dA[i] = V{};
    for (int64_t i = 0; i < blocks; ++i) dD[i] = dbias[i] = V{};
    for (int64_t p = call.piece_count - 1; p >= 0; --p) {
      const Piece& piece = call.pieces[p];
      const int64_t begin = piece.begin, count = piece.end - begin, sequence = call.packed ? piece.sequence : batch;
      load_matrix<T>(B, call.B, batch, begin, count, N);
      load_matrix<T>(C, call.C, batch, begin, count, N);
      for (int64_t strip = group_begin; strip < group_end; strip += R * L::W) {
        const Block next = next_block<-1>(call, task, p, strip + R * L::W);
        const NextStrip next_delta = next.of(call.delta), next_u = next.of(call.u), next_z = next.of(call.z),
                        next_grad = next.of(call.grad_y), next_ddelta = next.of(call.ddelta),
                        next_du = next.of(call.du), next_dz = next.of(call.dz);
        load_rows<L, R>(strip_delta, rows, call.delta, batch, begin, count, strip, group_end - strip);
        load_rows<L, R>(strip_u, rows, call.u, batch, begin, count, strip, group_end - strip);
        load_rows<L, R>(strip_grad, rows, call.grad_y, batch, begin, count, strip, group_end - strip);
        if (gated) load_rows<L, R>(strip_z, rows, call.z, batch, begin, count, strip, group_end - strip);
        for (int r = 0; r < R; ++r) {
          const int64_t c = strip + r * L::W, k = (c - group_begin) / L::W;
          if (c >= group_end) break;
          // What is staged here is replaced by its gradient.
          V *raw = strip_delta + r * rows, *u = strip_u + r * rows, *z = strip_z + r * rows,
            *grad = strip_grad + r * rows;
          if (piece.first) {
            load_transposed<L>(h, call.initial_state, sequence, c, N, group_end - c);
          } else {
            const T* saved = saved_state<L>(call, batch, piece, c);
            for (int64_t n = 0; n < N; ++n) h[n] = L::load(saved + n * call.padded_channels);
          }
          if (piece.last) load_transposed<L>(carry + k * N, call.grad_final_state, sequence, c, N, group_end - c);
          for (int64_t t = 0; t < count; ++t) {
            if (r == 0) next_delta.fetch(t), next_u.fetch(t), next_z.fetch(t), next_grad.fetch(t);
            const V x = raw[t] + bias[k];
            delta[t] = x, dy[t] = grad[t];
            if (call.softplus) delta[t] = softplus<L>(x), slope[t] = softplus_slope<L>(x);
            if (gated) {
              const V passed = silu_argument<L>(z[t]);
              gate[t] = sigmoid<L>(passed);
              dy[t] *= passed * gate[t];
            }
            drive[t] = delta[t] * u[t];
            y[t] = D[k] * u[t];
            d_drive[t] = d_log_decay[t] = V{};
          }
          const bool start = c == group_begin;  // of the sums over the group's channels
          for_tiles(N, [&]<int S>(int64_t n) {
            scan_tile_backward<L, S>(delta, drive, dy, B + n, C + n, N, count, A + k * N + n, h + n, carry + k * N + n,
                                     y, d_drive, d_log_decay, dA + k * N + n, start ? zeros : sum_B + n,
                                     start ? zeros : sum_C + n, start ? 0 : N, sum_B + n, sum_C + n, decays, history);
          });
          V piece_bias = {}, piece_D = {};  // summed by piece first: less rounding than one long sum
          for (int64_t t = 0; t < count; ++t) {
            if (r == 0) next_ddelta.fetch(t), next_du.fetch(t), next_dz.fetch(t);
            const V ddelta = d_drive[t] * u[t] + d_log_decay[t] * L::splat(MathConstants<T>::kLn2);
            raw[t] = call.softplus ? ddelta * slope[t] : ddelta;
            piece_bias += raw[t];
            piece_D += dy[t] * u[t];
            if (gated) {
              z[t] = grad[t] * y[t] * gate[t] * (L::splat(1) + z[t] * (L::splat(1) - gate[t]));
            }
            u[t] = d_drive[t] * delta[t] + D[k] * dy[t];
          }
          dbias[k] += piece_bias;
          dD[k] += piece_D;
          if (piece.first) store_transposed<L>(carry + k * N, call.dinitial_state, sequence, c, N, group_end - c);
        }
        store_rows<L, R>(strip_u, rows, call.du, batch, begin, count, strip, group_end - strip);
        store_rows<L, R>(strip_delta, rows, call.ddelta, batch, begin, count, strip, group_end - strip);
        if (gated) store_rows<L, R>(strip_z, rows, call.dz, batch, begin, count, strip, group_end - strip);
      }
      // (batch, groups, length, 2 * states): lanes summed here, groups by the host side.
      T* partial = (T*)call.dBC_partial + (((batch * call.groups + group) * call.length + begin) * 2) * N;
      for (int64_t t = 0; t < count; ++t, partial += 2 * N) {
        sum_lanes_of<L>(sum_B + t * N, N, partial);
        sum_lanes_of<L>(sum_C + t * N, N, partial + N);
      }
    }
    for (int64_t c = group_begin, k = 0; c < group_end; c += L::W, ++k) {
      for (int64_t lane = 0; lane < smaller(L::W, group_end - c); ++lane) {
        const int64_t channel = batch * call.channels + c + lane;
        for (int64_t n = 0; n < N; ++n) ((T*)call.dA_partial)[channel * N + n] = dA[k * N + n][lane];
        ((T*)call.dD_partial)[channel] = dD[k][lane];
        ((T*)call.dbias_partial)[channel] = dbias[k][lane];
      }
    }
  }
}

// One position. Here states are in lanes: a state is stored with its N numbers side by side, and one step reads and
// writes all of it, so the layout in memory decides.
template <class L>
void scan_step(const ScanStepCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t N = call.states, vectors = (N + L::W - 1) / L::W;
  Carver carve{(char*)scratch(4 * carved<V>(vectors))};
  V *A = carve.take<V>(vectors), *h = carve.take<V>(vectors), *B = carve.take<V>(vectors), *C = carve.take<V>(vectors);
  // One row of N numbers as vectors, the last one padded with zeros.
  const auto load_states = [&](V* to, const Array& array, int64_t i, int64_t j) {
    for (int64_t v = 0; v < vectors; ++v) {
      load_rows<L>(to + v, 1, array, i, j, 1, v * L::W, N - v * L::W);
    }
  };
  // Where memory already holds such vectors, they are used in place.
  const bool direct = kSame<T, float> == (call.state.dtype == Dtype::kFloat32) && call.state.dtype == call.A.dtype &&
                      (call.state.dtype == Dtype::kFloat32 || call.state.dtype == Dtype::kFloat64) &&
                      call.state.stride[2] == 1 && call.A.stride[2] == 1 && N % L::W == 0;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, group_begin = task % call.groups * call.group_channels;
    const int64_t group_end = smaller(group_begin + call.group_channels, call.channels);
    load_states(B, call.B, 0, batch);
    load_states(C, call.C, 0, batch);
    for (int64_t c = group_begin; c < group_end; c += L::W) {
      const int valid = int(smaller(L::W, group_end - c));
      const auto load_channel_row = [&](const Array& array) {
        V value;
        load_rows<L>(&value, 1, array, 0, batch, 1, c, valid);
        return value;
      };
      const V u = load_channel_row(call.u);
      V delta = load_channel_row(call.delta) + load_channels<L>(call.delta_bias, c, valid);
      if (call.softplus) delta = softplus<L>(delta);
      const V drive = delta * u;
      V y = load_channels<L>(call.D, c, valid) * u;
      V sums[L::W] = {};
      for (int lane = 0; lane < valid; ++lane) {
        const V log_rate = L::splat(delta[lane] * MathConstants<T>::kLog2e), x = L::splat(drive[lane]);
        V sum = {};
        if (direct) {
          T* state = (T*)call.state.data + batch * call.state.stride[0] + (c + lane) * call.state.stride[1];
          const T* rate = (const T*)call.A.data + (c + lane) * call.A.stride[1];
          for (int64_t v = 0; v < vectors; ++v) {
            const V next = exp2<L>(log_rate * L::load(rate + v * L::W)) * L::load(state + v * L::W) + x * B[v];
            sum += next * C[v];
            L::store(state + v * L::W, next);
          }
        } else {
          load_states(A, call.A, 0, c + lane);
          load_states(h, call.state, batch, c + lane);
          for (int64_t v = 0; v < vectors; ++v) {
            h[v] = exp2<L>(log_rate * A[v]) * h[v] + x * B[v];
            sum += h[v] * C[v];
            store_rows<L>(h + v, 1, call.state, batch, c + lane, 1, v * L::W, N - v * L::W);
          }
        }
        sums[lane] = sum;
      }
      y += sum_lanes<L>(sums);
      if (call.z.data != nullptr) y *= silu<L>(load_channel_row(call.z));
      store_rows<L>(&y, 1, call.y, 0, batch, 1, c, valid);
    }
  }
}

}  // namespace JT_ISA
}  // namespace jambatalk
