// Causal depthwise convolution on the CPU: channels in vector lanes, tiles of kTile positions in registers.
//
//   y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})
//
// A tile is kTile positions of one vector of channels: the kTile + width - 1 rows of x that it needs are read once, and
// neighbouring vectors follow one another, so that memory is read and written along its rows. x is read where it lies
// ("direct") if its channels are side by side and it has the output's dtype, converted in registers; otherwise, and
// where rows of the initial state come before it, a stage in the L1 cache is filled first, by squares turned in
// registers where time runs fastest in memory.
//
// Forward: a task is one piece (chunk) of one batch entry. Backward: a task is one batch entry and one group of
// channels, because dweight and dbias sum over time: its pieces are walked in reverse, with the gradient of the first
// width - 1 sums of the later tile kept. The sum before the activation is computed again. Sums over time are the
// task's own, sums over the batch are the host side's: a fixed order, which depends on the shape alone.
//
// Cost per element, width 4 with silu: 19 vector operations forward, 32 backward (AVX-512); bytes: x and y, forward; x,
// dy and dx, backward. On one core with AVX-512 forward takes 11 cycles for 16 elements that are in its caches (its
// multiply-adds alone: 7), and is bound by memory otherwise.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

constexpr int kMaxWidth = 16;
constexpr int kConvTile = 4;              // positions
constexpr int64_t kStagedChannels = 128;  // of a stage: its rows stay in the L1 cache

// Numbers that belong to channels, `rows` of them each, lie vector by vector: row k of channels c .. c + W at
// c * rows + k * W, so that one pointer reaches all rows. Here the weights and, last, the bias.
template <class L>
void load_taps(const ConvCall& call, int64_t c0, int64_t channels, typename L::T* taps) {
  using V = typename L::V;
  for (int64_t c = 0; c < channels; c += L::W, taps += (call.width + 1) * L::W) {
    load_transposed<L>((V*)taps, call.weight, 0, c0 + c, call.width, channels - c);
    L::store(taps + call.width * L::W, load_channels<L>(call.bias, c0 + c, channels - c));
  }
}

// Hides where a pointer came from: the rows of a tile are then addressed from one pointer by multiples of the pitch.
// The compiler would rather keep a pointer to each and runs out of registers.
template <class P>
JT_INLINE P* opaque(P* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// Rows [begin, begin + count) of one sequence, channels c0 .. c0 + channels, in compute type with a pitch of
// kStagedChannels; before the sequence's start, rows of the initial state.
template <class L>
void stage_rows(typename L::T* stage, const ConvCall& call, const Array& array, const Array& before, const Piece& piece,
                int64_t batch, int64_t begin, int64_t count, int64_t c0, int64_t channels) {
  using V = typename L::V;
  constexpr int64_t kStep = kStagedChannels / L::W;
  const int64_t sequence = call.packed ? piece.sequence : batch;
  int64_t early = smaller(piece.sequence_begin - begin, count);
  if (early < 0) early = 0;
  for (int64_t c = 0; c < channels; c += L::W) {
    V* to = (V*)(stage + c);
    load_rows<L>(to, 0, before, sequence, begin - piece.sequence_begin + call.width - 1, early, c0 + c, channels - c,
                 kStep);
    load_rows<L>(to + early * kStep, 0, array, batch, begin + early, count - early, c0 + c, channels - c, kStep);
  }
}

// Calls f with the width as a constant where it is the usual one, with 0 elsewhere: every constant is compiled for
// every dtype.
template <class L, class F>
JT_INLINE void with_width(int64_t width, F f) {
  if constexpr (sizeof(typename L::T) == 4) {
    if (width == 4) return f.template operator()<4>();
  }
  f.template operator()<0>();
}

// f(i) for i < count, unrolled where the count is a constant, N.
template <int N, class F>
JT_INLINE void repeat(int64_t count, F f) {
  if constexpr (N > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) f(i);
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

// Rows of x, y or a gradient, as the tiles see them: in memory or staged.
template <class M>
struct Rows {
  M* data;
  int64_t pitch;
  M* at(int64_t t) const { return data + t * pitch; }
};

// pre[r] = bias + sum_k weight_k x[r + k] for R positions of one vector of channels.
template <class L, int R, int Width>
JT_INLINE void tile_sums(const typename L::V* x, const typename L::T* taps, int64_t width, typename L::V* pre) {
  const typename L::V bias = L::load(taps + width * L::W);
  repeat<R>(R, [&](int64_t r) { pre[r] = bias; });
  repeat<Width>(width, [&](int64_t k) {
    const typename L::V w = L::load(taps + k * L::W);
    repeat<R>(R, [&](int64_t r) { pre[r] += w * x[r + k]; });
  });
}

// Fetches rows of memory ahead of their use, a stretch at each step, in the order in which they lie: asked for in
// columns, one line of every row at a time, the same lines take a fifth longer to come (measured).
template <class X>
struct Ahead {
  const X* row;
  int64_t pitch, length, at = 0;  // at: of the row's `length` numbers
  template <int Count>
  JT_INLINE void step() {
#pragma GCC unroll 8
    for (int i = 0; i < int(Count * sizeof(X)); i += 64) __builtin_prefetch((const char*)(row + at) + i);
    if ((at += Count) >= length) at = 0, row += pitch;
  }
};

// R positions of y, in whole vectors of channels, from the R + width - 1 rows of x that begin `width - 1` before them.
template <class L, int R, int Width, bool Silu, class X, class Y>
JT_INLINE void conv_tile(const X* x, int64_t x_pitch, Y* y, int64_t y_pitch, int64_t channels,
                         const typename L::T* taps, int64_t any_width) {
  using V = typename L::V;
  constexpr int kRows = Width > 0 ? R + Width - 1 : 0;
  const int64_t width = Width > 0 ? Width : any_width, rows = R + width - 1;
  Ahead<X> next{x + rows * x_pitch, x_pitch, channels};  // the next tile's rows
  for (int64_t c = 0; c < channels; c += L::W, taps += (width + 1) * L::W) {
    V row[R + (Width > 0 ? Width : kMaxWidth) - 1], pre[R];
    const X* from = opaque(x + c);
    repeat<kRows>(rows, [&](int64_t r) { row[r] = load_as<L>(from + r * x_pitch); });
    if constexpr (R > 1) next.template step<R * L::W>();
    tile_sums<L, R, Width>(row, taps, width, pre);
    Y* to = opaque(y + c);
    repeat<R>(R, [&](int64_t r) { store_as<L>(to + r * y_pitch, Silu ? silu<L>(pre[r]) : pre[r]); });
  }
}

template <class L, class X, class Y>
void conv_positions(Rows<X> x, Rows<Y> y, int64_t count, int64_t channels, const typename L::T* taps, int64_t width,
                    bool with_silu) {
  with_width<L>(width, [&]<int Width>() {
    const auto run = [&]<bool Silu>() {
      int64_t t = 0;
      for (; t + kConvTile <= count; t += kConvTile) {
        conv_tile<L, kConvTile, Width, Silu>(x.at(t), x.pitch, y.at(t), y.pitch, channels, taps, width);
      }
      for (; t < count; ++t) conv_tile<L, 1, 0, Silu>(x.at(t), x.pitch, y.at(t), y.pitch, channels, taps, width);
    };
    with_silu ? run.template operator()<true>() : run.template operator()<false>();
  });
}

// How many of the first `channels` of the array can be read where they lie: whole vectors, side by side, of type M.
template <class L>
int64_t direct_channels(const Array& array, Dtype dtype, int64_t channels) {
  return array.data != nullptr && array.stride[2] == 1 && array.dtype == dtype ? channels / L::W * L::W : 0;
}

template <class L>
void conv_forward(const ConvCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1, channels = call.channels;
  const int64_t blocks = (channels + L::W - 1) / L::W;
  Carver carve{(char*)scratch(carved<V>((width + 1) * blocks) +
                              carved<T>((call.max_piece + history) * kStagedChannels) + carved<V>(call.max_piece) +
                              carved<V>(history))};
  T* taps = (T*)carve.take<V>((width + 1) * blocks);
  T* stage = carve.take<T>((call.max_piece + history) * kStagedChannels);
  V *part = carve.take<V>(call.max_piece), *last = carve.take<V>(history);  // part: y of less than a vector of channels
  load_taps<L>(call, 0, channels, taps);
  const int64_t direct = direct_channels<L>(call.x, call.y.dtype, channels);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.piece_count;
    const Piece& piece = call.pieces[task % call.piece_count];
    const int64_t begin = piece.begin, count = piece.end - begin;
    // Positions that reach back before the sequence's start go by the stage.
    int64_t early = smaller(piece.sequence_begin + history - begin, count);
    if (early < 0) early = 0;
    if (count > 0)
      with_input_type<T>(call.y.dtype, [&](auto* type) {
        using M = Pointee<decltype(type)>;
        const Rows<M> y{(M*)call.y.data + batch * call.y.stride[0] + begin * call.y.stride[1], call.y.stride[1]};
        const auto by_stage = [&](int64_t from, int64_t to, int64_t positions) {
          for (int64_t c = from; c < to && positions > 0; c += kStagedChannels) {
            const int64_t some = smaller(kStagedChannels, to - c), whole = some / L::W * L::W;
            const Rows<T> staged{stage, kStagedChannels};
            stage_rows<L>(stage, call, call.x, call.initial_state, piece, batch, begin - history, history + positions,
                          c, some);
            conv_positions<L>(staged, Rows<M>{y.data + c, y.pitch}, positions, whole, taps + c * (width + 1), width,
                              call.silu);
            if (whole == some) continue;
            conv_positions<L>(Rows<T>{stage + whole, staged.pitch}, Rows<T>{(T*)part, L::W}, positions, L::W,
                              taps + (c + whole) * (width + 1), width, call.silu);
            store_rows<L>(part, 0, call.y, batch, begin, positions, c + whole, some - whole);
          }
        };
        by_stage(0, direct, early);
        if (direct > 0 && early < count) {
          const Rows<M> x{(M*)call.x.data + batch * call.x.stride[0] + begin * call.x.stride[1], call.x.stride[1]};
          conv_positions<L>(Rows<M>{x.at(early - history), x.pitch}, Rows<M>{y.at(early), y.pitch}, count - early,
                            direct, taps, width, call.silu);
        }
        by_stage(direct, channels, count);
      });
    if (!piece.last) continue;
    for (int64_t c = 0; c < channels; c += L::W) {  // the next call's initial state
      const int64_t sequence = call.packed ? piece.sequence : batch;
      int64_t kept = smaller(piece.sequence_begin + history - piece.end, history);  // rows of this call's initial state
      if (kept < 0) kept = 0;
      load_rows<L>(last, 0, call.initial_state, sequence, piece.end - piece.sequence_begin, kept, c, channels - c);
      load_rows<L>(last + kept, 0, call.x, batch, piece.end - history + kept, history - kept, c, channels - c);
      store_rows<L>(last, 0, call.final_state, sequence, 0, history, c, channels - c);
    }
  }
}

// What the tiles of one group of channels add to and hand on, in the order of load_taps.
template <class T>
struct ConvSums {
  T* taps;   // weights and bias
  T* dtaps;  // their gradients, (width + 1) rows
  T* later;  // gradient of the sums at the width - 1 positions after this tile
  int64_t width;
  ConvSums at(int64_t c) const {
    return {taps + c * (width + 1), dtaps + c * (width + 1), later + c * (width - 1), width};
  }
};

// R positions, backward. x as in conv_tile, g: gradient of y; more: what the final state adds to dx, or null.
template <class L, int R, int Width, bool Silu, class M, class Y>
JT_INLINE void conv_tile_backward(const M* x, int64_t x_pitch, const M* g, int64_t g_pitch, const typename L::T* more,
                                  Y* dx, int64_t dx_pitch, int64_t channels, ConvSums<typename L::T> sums) {
  using V = typename L::V;
  constexpr int kWidth = Width > 0 ? Width : kMaxWidth, kHistory = Width > 0 ? Width - 1 : 0,
                kRows = Width > 0 ? R + Width - 1 : 0;
  const int64_t width = Width > 0 ? Width : sums.width, history = width - 1;
  for (int64_t c = 0; c < channels; c += L::W) {
    V row[R + kWidth - 1], dpre[R + kWidth - 1], grad[R], total = {};
    const M *x_from = opaque(x + c), *g_from = opaque(g + c);
    repeat<kRows>(R + history, [&](int64_t r) { row[r] = load_as<L>(x_from + r * x_pitch); });
    if constexpr (R > 1) {  // the rows of the tile before this one
#pragma GCC unroll 8
      for (int r = 1; r <= R; ++r) __builtin_prefetch(x_from - r * x_pitch), __builtin_prefetch(g_from - r * g_pitch);
    }
    if constexpr (Silu) tile_sums<L, R, Width>(row, sums.taps, width, grad);
    repeat<R>(R, [&](int64_t r) {
      dpre[r] = load_as<L>(g_from + r * g_pitch);
      if constexpr (Silu) {
        const V gate = sigmoid<L>(grad[r]);
        dpre[r] *= gate * (L::splat(1) + grad[r] * (L::splat(1) - gate));
      }
      grad[r] = more == nullptr ? V{} : L::load(more + r * kStagedChannels + c);
      total += dpre[r];
    });
    repeat<kHistory>(history, [&](int64_t r) { dpre[R + r] = L::load(sums.later + r * L::W); });
    repeat<Width>(width, [&](int64_t k) {  // x_t reaches y_t .. y_{t + width - 1}
      const V w = L::load(sums.taps + k * L::W);
      V dw = {};
      repeat<R>(R, [&](int64_t r) { grad[r] += w * dpre[r + history - k], dw += dpre[r] * row[r + k]; });
      L::store(sums.dtaps + k * L::W, L::load(sums.dtaps + k * L::W) + dw);
    });
    L::store(sums.dtaps + width * L::W, L::load(sums.dtaps + width * L::W) + total);
    Y* to = opaque(dx + c);
    repeat<R>(R, [&](int64_t r) { store_as<L>(to + r * dx_pitch, grad[r]); });
    repeat<kHistory>(history, [&](int64_t r) { L::store(sums.later + r * L::W, dpre[r]); });
    sums.taps += (width + 1) * L::W, sums.dtaps += (width + 1) * L::W, sums.later += history * L::W;
  }
}

// Tiles from the last position to the first; the short ones come first, at the end.
template <class L, class M, class Y>
void conv_positions_backward(Rows<M> x, Rows<M> g, const typename L::T* more, Rows<Y> dx, int64_t count,
                             int64_t channels, const ConvSums<typename L::T>& sums, bool with_silu) {
  with_width<L>(sums.width, [&]<int Width>() {
    const auto run = [&]<bool Silu>() {
      const auto tile = [&]<int R>(int64_t t) {
        conv_tile_backward<L, R, R == 1 ? 0 : Width, Silu>(x.at(t), x.pitch, g.at(t), g.pitch,
                                                           more == nullptr ? nullptr : more + t * kStagedChannels,
                                                           dx.at(t), dx.pitch, channels, sums);
      };
      int64_t t = count;
      while (t % kConvTile != 0) tile.template operator()<1>(--t);
      while (t > 0) tile.template operator()<kConvTile>(t -= kConvTile);
    };
    with_silu ? run.template operator()<true>() : run.template operator()<false>();
  });
}

template <class L>
void conv_backward(const ConvCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int64_t kPitch = kStagedChannels;
  const FlushSubnormals flush;
  const int64_t width = call.width, history = width - 1, rows = call.max_piece;
  Carver carve{(char*)scratch(2 * carved<T>((width + 1) * kPitch) + carved<T>(history * kPitch) +
                              carved<T>((rows + history) * kPitch) + 2 * carved<T>(rows * kPitch) + carved<V>(rows) +
                              2 * carved<V>(history))};
  const ConvSums<T> sums{carve.take<T>((width + 1) * kPitch), carve.take<T>((width + 1) * kPitch),
                         carve.take<T>(history * kPitch), width};
  T *stage_x = carve.take<T>((rows + history) * kPitch), *stage_g = carve.take<T>(rows * kPitch);
  T* stage_more = carve.take<T>(rows * kPitch);
  V* part = carve.take<V>(rows);  // dx of less than a vector of channels
  V *final_grad = carve.take<V>(history), *initial_grad = carve.take<V>(history);
  const Array none;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t batch = task / call.groups, c0 = task % call.groups * call.group_channels;
    const int64_t channels = smaller(call.group_channels, call.channels - c0);
    load_taps<L>(call, c0, channels, sums.taps);
    for (int64_t i = 0; i < (width + 1) * kPitch; ++i) sums.dtaps[i] = 0;
    int64_t direct = direct_channels<L>(call.x, call.dx.dtype, channels);
    direct = smaller(direct, direct_channels<L>(call.grad_y, call.dx.dtype, channels));
    for (int64_t p = call.piece_count - 1; p >= 0; --p) {
      const Piece& piece = call.pieces[p];
      const int64_t begin = piece.begin, count = piece.end - begin, sequence = call.packed ? piece.sequence : batch;
      if (piece.last) {
        for (int64_t i = 0; i < history * kPitch; ++i) sums.later[i] = 0;
      }
      // The final state holds the last inputs, or older rows of the initial state where the sequence is shorter.
      const int64_t tail = piece.sequence_end - history;  // the position of its first row
      const T* more = nullptr;
      if (call.grad_final_state.data != nullptr && piece.end > tail && count > 0) {
        more = stage_more;
        for (int64_t i = 0; i < count * kPitch; ++i) stage_more[i] = 0;
        const int64_t from = tail > begin ? tail : begin;
        for (int64_t c = 0; c < channels; c += L::W) {
          load_rows<L>((V*)(stage_more + (from - begin) * kPitch + c), 0, call.grad_final_state, sequence, from - tail,
                       piece.end - from, c0 + c, channels - c, kPitch / L::W);
        }
      }
      if (count > 0)
        with_input_type<T>(call.dx.dtype, [&](auto* type) {
          using M = Pointee<decltype(type)>;
          const auto rows_of = [&](const Array& array) {
            return Rows<M>{(M*)array.data + batch * array.stride[0] + begin * array.stride[1] + c0 * array.stride[2],
                           array.stride[1]};
          };
          const Rows<M> dx = rows_of(call.dx);
          const auto by_stage = [&](int64_t from, int64_t to, int64_t positions) {
            if (from >= to || positions <= 0) return;
            stage_rows<L>(stage_x, call, call.x, call.initial_state, piece, batch, begin - history, history + positions,
                          c0 + from, to - from);
            stage_rows<L>(stage_g, call, call.grad_y, none, piece, batch, begin, positions, c0 + from, to - from);
            const int64_t whole = (to - from) / L::W * L::W, c = from + whole;
            conv_positions_backward<L>(Rows<T>{stage_x, kPitch}, Rows<T>{stage_g, kPitch},
                                       more == nullptr ? nullptr : more + from, Rows<M>{dx.data + from, dx.pitch},
                                       positions, whole, sums.at(from), call.silu);
            if (c == to) return;
            conv_positions_backward<L>(Rows<T>{stage_x + whole, kPitch}, Rows<T>{stage_g + whole, kPitch},
                                       more == nullptr ? nullptr : more + c, Rows<T>{(T*)part, L::W}, positions, L::W,
                                       sums.at(c), call.silu);
            store_rows<L>(part, 0, call.dx, batch, begin, positions, c0 + c, to - c);
          };
          // Whole tiles that reach back before the sequence's start go by the stage.
          int64_t early = piece.sequence_begin + history - begin;
          early = early > 0 ? smaller((early + kConvTile - 1) / kConvTile * kConvTile, count) : 0;
          if (direct > 0 && early < count) {
            const Rows<M> x = rows_of(call.x), g = rows_of(call.grad_y);
            conv_positions_backward<L>(Rows<M>{x.at(early - history), x.pitch}, Rows<M>{g.at(early), g.pitch},
                                       more == nullptr ? nullptr : more + early * kPitch,
                                       Rows<M>{dx.at(early), dx.pitch}, count - early, direct, sums, call.silu);
          }
          by_stage(0, direct, early);
          by_stage(direct, channels, count);
        });
      if (!piece.first || call.dinitial_state.data == nullptr) continue;
      for (int64_t c = 0; c < channels; c += L::W) {
        load_rows<L>(final_grad, 0, call.grad_final_state, sequence, 0, history, c0 + c, channels - c);
        const int64_t length = piece.sequence_end - piece.sequence_begin;
        for (int64_t row = 0; row < history; ++row) {  // position row - history: it reaches y_0 .. y_row
          V grad = row >= length ? final_grad[row - length] : V{};
          for (int64_t t = 0; t <= row; ++t) {
            grad += L::load(sums.at(c).later + t * L::W) * L::load(sums.at(c).taps + (row - t) * L::W);
          }
          initial_grad[row] = grad;
        }
        store_rows<L>(initial_grad, 0, call.dinitial_state, sequence, 0, history, c0 + c, channels - c);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t channel = batch * call.channels + c0 + c;
      const T* dtaps = sums.dtaps + c / L::W * L::W * (width + 1) + c % L::W;
      for (int64_t k = 0; k < width; ++k) ((T*)call.dweight_partial)[channel * width + k] = dtaps[k * L::W];
      ((T*)call.dbias_partial)[channel] = dtaps[width * L::W];
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
