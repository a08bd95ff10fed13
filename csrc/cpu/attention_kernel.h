// Attention on the CPU: rotation, tiles of scores in the flash style, forward and backward, and one position against a
// cache (formulas: jambatalk_kernels/attention/reference.py).
//
// A tile is kTileRows rows against a panel of kTileKeys keys. Rows are (position, query head of a group), so that a
// group's keys are read once, and few keys beyond the diagonal are computed. Keys are rotated once and packed in panels
// that are turned, so that keys are in lanes: scores are broadcast query features times vectors of keys, softmax goes
// along vectors, and values are summed as broadcast weights times rows of values. So all products, backward's too, are
// one kernel (multiply_rows) with broadcasts from any strides, and nothing is turned on the way.
//
// Every mask lets a row see an interval of keys, and both its ends grow with the rows: panels outside of the interval
// of a tile are not read, and of a panel only those vectors that one of four neighbouring rows sees.
//
// Forward: a task is a tile of rows. Softmax on the way, in units of log2. Backward: a task is a chunk of tiles; it
// owns their dq and sums dk and dv over its own rows, and a last pass adds the chunks' sums in their order, turns dq
// and dk back and sums dcos and dsin. Chunks depend on the shape alone: the same bytes with any number of threads.
//
// Cost: 4 size operations for each visible pair and head forward, 10 size backward (scores are computed again); bound
// by multiplications. Memory: the packed keys and values; backward also the chunks' sums, 8 times dk and dv at most.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

// ---- softmax --------------------------------------------------------------------------------------------------------

// All lanes: the largest lane; NaN may be lost.
template <class L, int S = L::W / 2>
JT_INLINE typename L::V highest_lane(typename L::V x) {
  typename L::V low, high;
  exchange<L, S>(x, x, low, high);
  x = L::max(low, high);
  if constexpr (S > 1) {
    return highest_lane<L, S / 2>(x);
  } else {
    return x;
  }
}

// exp(x) for x <= 0, down to zero: where exp saturates nothing is left.
template <class L>
JT_INLINE typename L::V exp_or_zero(typename L::V x) {
  using K = MathConstants<typename L::T>;
  // A NaN is not below the bound.
  return L::select_greater(L::splat(K::kLow * K::kLn2), x, typename L::V{}, exp<L>(x));
}
template <class L>
JT_INLINE typename L::V exp2_or_zero(typename L::V x) {
  if constexpr (requires { L::scale(x, x); }) {
    return exp2<L>(x);
  } else {
    return L::select_greater(L::splat(MathConstants<typename L::T>::kLow), x, typename L::V{}, exp2<L>(x));
  }
}

// Below every score, and finite: the difference of two maxima is a number.
template <class T>
constexpr T kNoScore = sizeof(T) == 4 ? T(-1e38f) : T(-1e307);

// ---- one query against cached keys ----------------------------------------------------------------------------------

// What a softmax has seen so far of one query.
template <class L>
struct OnlineSoftmax {
  typename L::T top;    // the highest score
  typename L::V total;  // of the weights, by lanes
};

constexpr int kKeyVectors = 4;  // scores that a maximum is taken of at a time, in vectors

// `count` keys (kKeyVectors * W at most) and their values, rows of `size` features: sums = those before, and these.
// Vectors: of a row, or 0 where that is no whole number of them.
template <class L, int Vectors>
void attend_keys(const typename L::T* q, const typename L::T* keys, int64_t key_step, const typename L::T* values,
                 int64_t value_step, int64_t count, int64_t size, OnlineSoftmax<L>& seen, typename L::T* sums) {
  using T = typename L::T;
  using V = typename L::V;
  const int64_t vectors = Vectors > 0 ? Vectors : (size + L::W - 1) / L::W;
  const auto load = [&](const T* from, int64_t v) {
    if constexpr (Vectors > 0) return L::load(from + v * L::W);
    return load_some<L>(from + v * L::W, size - v * L::W);
  };
  V query[Vectors > 0 ? Vectors : 1], scores[kKeyVectors], rows[L::W];
  for (int v = 0; v < Vectors; ++v) query[v] = load(q, v);
  V highest = L::splat(kNoScore<T>);
  const int64_t blocks = (count + L::W - 1) / L::W;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t some = smaller(L::W, count - b * L::W);
    for (int64_t i = 0; i < some; ++i) {
      const T* key = keys + (b * L::W + i) * key_step;
      V sum = {};
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        sum += (Vectors > 0 ? query[Vectors > 0 ? v : 0] : load(q, v)) * load(key, v);
      }
      rows[i] = sum;
    }
    for (int64_t i = some; i < L::W; ++i) rows[i] = V{};
    scores[b] = sum_lanes<L>(rows);
    for (int64_t i = some; i < L::W; ++i) scores[b][i] = -__builtin_huge_val();
    highest = L::max(highest, scores[b]);
  }
  highest = L::max(L::splat(seen.top), highest_lane<L>(highest));
  const V fade = exp_or_zero<L>(L::splat(seen.top) - highest);
  seen.top = highest[0], seen.total *= fade;
  T weight[kKeyVectors * L::W];
  for (int64_t b = 0; b < blocks; ++b) {
    const V weights = exp_or_zero<L>(scores[b] - highest);
    seen.total += weights;
    L::store(weight + b * L::W, weights);
  }
  if constexpr (Vectors > 0) {
    constexpr int kSets = Vectors < 4 ? 2 : 1;  // independent sums: the additions' latency is not waited for
    V sum[kSets][Vectors] = {};
    for (int v = 0; v < Vectors; ++v) sum[0][v] = L::load(sums + v * L::W) * fade;
    int64_t i = 0;
    for (; i + kSets <= count; i += kSets) {
#pragma GCC unroll 2
      for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[set][v] += load(values + (i + set) * value_step, v) * weight[i + set];
      }
    }
    for (; i < count; ++i) {
      for (int v = 0; v < Vectors; ++v) sum[0][v] += load(values + i * value_step, v) * weight[i];
    }
    for (int v = 0; v < Vectors; ++v) L::store(sums + v * L::W, kSets > 1 ? sum[0][v] + sum[kSets - 1][v] : sum[0][v]);
  } else {
    for (int64_t v = 0; v < vectors; ++v) {
      V sum = L::load(sums + v * L::W) * fade;
      for (int64_t i = 0; i < count; ++i) sum += load(values + i * value_step, v) * weight[i];
      L::store(sums + v * L::W, sum);
    }
  }
}

// f of the template argument that attend_keys wants.
template <class L, class F>
JT_INLINE void with_vectors(int64_t size, F f) {
  switch (size % L::W == 0 ? size / L::W : 0) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    default:
      return f.template operator()<0>();
  }
}

// ---- rows in memory -------------------------------------------------------------------------------------------------

template <class L>
void load_features(const HeadArray& array, int64_t entry, int64_t position, int64_t head, int64_t size,
                   typename L::T* to) {
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t step = array.stride[3];
    const M* from =
        (const M*)array.data + entry * array.stride[0] + position * array.stride[1] + head * array.stride[2];
    int64_t f = 0;
    if (step == 1) {
      for (; f + L::W <= size; f += L::W) L::store(to + f, load_as<L>(from + f));
    }
    for (; f < size; ++f) to[f] = typename L::T(widen(from[f * step]));
  });
}

template <class L>
void store_features(const HeadArray& array, int64_t entry, int64_t position, int64_t head, int64_t size,
                    const typename L::T* from) {
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t step = array.stride[3];
    M* to = (M*)array.data + entry * array.stride[0] + position * array.stride[1] + head * array.stride[2];
    int64_t f = 0;
    if (step == 1) {
      for (; f + L::W <= size; f += L::W) store_as<L>(to + f, L::load(from + f));
    }
    for (; f < size; ++f) to[f * step] = Narrow<M>::from(from[f]);
  });
}

// Pairs (a, b) -> (a cos - b sin, a sin + b cos); with -sin that is the transpose.
template <class T>
JT_INLINE void rotate_pairs(T* __restrict x, const T* __restrict cos, const T* __restrict sin, int64_t half,
                            bool interleaved, T sign = 1) {
  if (interleaved) {
    for (int64_t f = 0; f < half; ++f) {
      const T a = x[2 * f], b = x[2 * f + 1], c = cos[f], s = sign * sin[f];
      x[2 * f] = a * c - b * s, x[2 * f + 1] = a * s + b * c;
    }
  } else {
    for (int64_t f = 0; f < half; ++f) {
      const T a = x[f], b = x[half + f], c = cos[f], s = sign * sin[f];
      x[f] = a * c - b * s, x[half + f] = a * s + b * c;
    }
  }
}

// One row of cos and sin, read once for all heads that it turns.
template <class T>
struct Angles {
  T *cos, *sin;
  int64_t entry = -1, position = -1, head = -1;

  template <class L>
  void at(const AttentionCall& call, int64_t b, int64_t p, int64_t g) {
    if (b == entry && p == position && g == head) return;
    load_features<L>(call.cos, b, p, g, call.size / 2, cos);
    load_features<L>(call.sin, b, p, g, call.size / 2, sin);
    entry = b, position = p, head = g;
  }
};

// A key, rotated and rounded to its dtype: the same number whether it is used at once or cached before.
template <class L>
void load_key(const AttentionCall& call, Angles<typename L::T>& angles, int64_t entry, int64_t position, int64_t head,
              typename L::T* to) {
  angles.template at<L>(call, entry, position, head);
  load_features<L>(call.k, entry, position, head, call.size, to);
  rotate_pairs(to, angles.cos, angles.sin, call.size / 2, call.interleaved);
  with_memory_type(call.k.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    if constexpr (!kSame<M, typename L::T>) {
      M rounded[L::W];
      int64_t f = 0;
      for (; f + L::W <= call.size; f += L::W) {
        store_as<L>(rounded, L::load(to + f));
        L::store(to + f, load_as<L>(rounded));
      }
      for (; f < call.size; ++f) to[f] = typename L::T(widen(Narrow<M>::from(to[f])));
    }
  });
}

// Writes the new keys and values into the cache, the last `capacity` of them. Tasks: entries * kv_heads.
template <class L>
void attention_append(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  const FlushSubnormals flush;
  Carver carve{(char*)scratch(3 * carved<T>(call.pitch))};
  T* row = carve.take<T>(call.pitch);
  Angles<T> angles{carve.take<T>(call.pitch), carve.take<T>(call.pitch)};
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t entry = task / call.kv_heads, head = task % call.kv_heads;
    for (int64_t t = call.length - smaller(call.length, call.capacity); t < call.length; ++t) {
      const int64_t slot = (call.position[entry] + t) % call.capacity;
      load_key<L>(call, angles, entry, t, head, row);
      store_features<L>(call.cache_k, entry, slot, head, call.size, row);
      load_features<L>(call.v, entry, t, head, call.size, row);
      store_features<L>(call.cache_v, entry, slot, head, call.size, row);
    }
  }
}

// ---- step -----------------------------------------------------------------------------------------------------------

// Some query heads of one key-value head against a stretch of the cache. Tasks: batch * kv_heads * parts * splits.
template <class L>
void attention_step(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int64_t kBlock = kKeyVectors * L::W;
  const FlushSubnormals flush;
  const int64_t size = call.size, pitch = call.pitch;
  Carver carve{(char*)scratch(carved<T>(kStepHeads * pitch) + 2 * carved<T>(kBlock * pitch) + 2 * carved<T>(pitch))};
  T *q = carve.take<T>(kStepHeads * pitch), *keys = carve.take<T>(kBlock * pitch),
    *values = carve.take<T>(kBlock * pitch);
  Angles<T> angles{carve.take<T>(pitch), carve.take<T>(pitch)};
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t split = task % call.splits, part = task / call.splits % call.parts;
    const int64_t g = task / (call.splits * call.parts) % call.kv_heads, entry = task / call.groups;
    const int64_t first = g * call.group + part * kStepHeads,
                  heads = smaller(kStepHeads, call.group - part * kStepHeads);
    T* partial = (T*)call.partial + task * kStepHeads * (pitch + 2);
    OnlineSoftmax<L> seen[kStepHeads];
    angles.template at<L>(call, entry, 0, g);
    for (int64_t h = 0; h < heads; ++h) {
      T* row = q + h * pitch;
      load_features<L>(call.q, entry, 0, first + h, size, row);
      rotate_pairs(row, angles.cos, angles.sin, size / 2, call.interleaved);
      for (int64_t f = 0; f < size; ++f) row[f] *= T(call.scale);
      seen[h] = {kNoScore<T>, V{}};
      for (int64_t f = 0; f < pitch; ++f) partial[h * (pitch + 2) + f] = 0;
    }
    const int64_t positions = call.position[entry] + 1;  // the new one included
    int64_t visible = smaller(positions, call.capacity);
    if (call.window > 0) visible = smaller(visible, call.window);
    // Stretches are whole blocks, so that they are the same however many follow.
    const int64_t stretch = ((visible + call.splits - 1) / call.splits + kBlock - 1) / kBlock * kBlock;
    const int64_t end = smaller((split + 1) * stretch, visible);
    const auto in_place = [&](const HeadArray& cache) {
      return cache.dtype == (sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64) && cache.stride[3] == 1;
    };
    const bool keys_in_place = in_place(call.cache_k), values_in_place = in_place(call.cache_v);
    for (int64_t j = split * stretch; j < end;) {
      const int64_t slot = (positions - visible + j) % call.capacity;
      const int64_t count = smaller(smaller(kBlock, end - j), call.capacity - slot);
      const auto rows = [&](const HeadArray& cache, bool lies_well, T* stage, int64_t& step) -> const T* {
        if (lies_well) {
          step = cache.stride[1];
          return (const T*)cache.data + entry * cache.stride[0] + slot * step + g * cache.stride[2];
        }
        step = pitch;
        for (int64_t i = 0; i < count; ++i) load_features<L>(cache, entry, slot + i, g, size, stage + i * pitch);
        return stage;
      };
      int64_t key_step, value_step;
      const T* key = rows(call.cache_k, keys_in_place, keys, key_step);
      const T* value = rows(call.cache_v, values_in_place, values, value_step);
      with_vectors<L>(size, [&]<int Vectors>() {
        for (int64_t h = 0; h < heads; ++h) {
          attend_keys<L, Vectors>(q + h * pitch, key, key_step, value, value_step, count, size, seen[h],
                                  partial + h * (pitch + 2));
        }
      });
      j += count;
    }
    for (int64_t h = 0; h < heads; ++h) {
      partial[h * (pitch + 2) + pitch] = L::sum(seen[h].total), partial[h * (pitch + 2) + pitch + 1] = seen[h].top;
    }
  }
}

// Adds the stretches of the cache, in their order. Tasks: batch * heads.
template <class L>
void attention_step_combine(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t pitch = call.pitch, row = pitch + 2;
  Carver carve{(char*)scratch(carved<T>(pitch))};
  T* sums = carve.take<T>(pitch);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t entry = task / call.heads, head = task % call.heads, g = head / call.group, h = head % call.group;
    const T* from =
        (const T*)call.partial +
        (((entry * call.kv_heads + g) * call.parts + h / kStepHeads) * call.splits * kStepHeads + h % kStepHeads) * row;
    T top = kNoScore<T>, total = 0;
    for (int64_t s = 0; s < call.splits; ++s) {
      const T its_top = from[s * kStepHeads * row + pitch + 1];
      if (its_top > top) top = its_top;
    }
    for (int64_t f = 0; f < pitch; ++f) sums[f] = 0;
    for (int64_t s = 0; s < call.splits; ++s) {
      const T* partial = from + s * kStepHeads * row;
      const V fade = exp_or_zero<L>(L::splat(partial[pitch + 1] - top));
      total += partial[pitch] * fade[0];
      for (int64_t f = 0; f < pitch; f += L::W) {
        L::store(sums + f, L::load(sums + f) + L::load(partial + f) * fade);
      }
    }
    for (int64_t f = 0; f < call.size; ++f) sums[f] /= total;
    store_features<L>(call.y, entry, 0, head, call.size, sums);
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int kColumnVectors = JT_WIDTH == 64 ? 4 : 2;  // of a product in registers, beside kRowStrip rows

// c[r, :] (+)= sum over k < depth of a[r * a_row + k * a_step] b[k, :], for kRowStrip rows and C vectors of columns. What
// is in c is added last: a sum over many tiles in one long chain would round three times as much.
template <class L, int C>
void multiply_strip(const typename L::T* a, int64_t a_row, int64_t a_step, const typename L::T* b, int64_t b_pitch,
                    int64_t depth, typename L::T* c, int64_t c_pitch, bool add) {
  using V = typename L::V;
  V sum[kRowStrip][C];
#pragma GCC unroll 4
  for (int r = 0; r < kRowStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = V{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_pitch) {
    V row[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) row[v] = L::load(b + v * L::W);
#pragma GCC unroll 4
    for (int r = 0; r < kRowStrip; ++r) {
      const V factor = L::splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRowStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      typename L::T* to = c + r * c_pitch + v * L::W;
      L::store(to, add ? L::load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// The same for any whole number of vectors of columns.
template <class L>
void multiply_rows(const typename L::T* a, int64_t a_row, int64_t a_step, const typename L::T* b, int64_t b_pitch,
                   int64_t depth, typename L::T* c, int64_t c_pitch, int64_t columns, bool add) {
  int64_t j = 0;
  for (; j + kColumnVectors * L::W <= columns; j += kColumnVectors * L::W) {
    multiply_strip<L, kColumnVectors>(a, a_row, a_step, b + j, b_pitch, depth, c + j, c_pitch, add);
  }
  for (; j < columns; j += L::W) multiply_strip<L, 1>(a, a_row, a_step, b + j, b_pitch, depth, c + j, c_pitch, add);
}

// Where the packed keys or values of a panel are; a panel is the same number of elements either way.
template <class T>
JT_INLINE T* panel_at(const AttentionCall& call, void* packed, int64_t entry, int64_t head, int64_t panel) {
  return (T*)packed + ((entry * call.kv_heads + head) * call.panels + panel) * kTileKeys * call.pitch;
}

// to[f, i] = from[i, f]
template <class L>
void turn_panel(const typename L::T* from, typename L::T* to, int64_t pitch) {
  for (int64_t i = 0; i < kTileKeys; i += L::W) {
    for (int64_t f = 0; f < pitch; f += L::W) {
      typename L::V square[L::W];
      for (int k = 0; k < L::W; ++k) square[k] = L::load(from + (i + k) * pitch + f);
      transpose<L>(square);
      for (int k = 0; k < L::W; ++k) L::store(to + (f + k) * kTileKeys + i, square[k]);
    }
  }
}

// Keys, rotated, and values in panels; what is beyond the last key is zero. Tasks: entries * kv_heads * panels.
template <class L>
void attention_pack(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  const FlushSubnormals flush;
  const int64_t pitch = call.pitch;
  Carver carve{(char*)scratch(carved<T>(kTileKeys * pitch) + 2 * carved<T>(pitch))};
  T* stage = carve.take<T>(kTileKeys * pitch);
  Angles<T> angles{carve.take<T>(pitch), carve.take<T>(pitch)};
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t panel = task % call.panels, head = task / call.panels % call.kv_heads, entry = task / call.groups;
    const int64_t past = call.past != nullptr ? call.past[entry] : 0;
    const auto fill = [&](T* to, const HeadArray& cache, auto load_new) {
      for (int64_t i = 0; i < kTileKeys; ++i) {
        const int64_t key = panel * kTileKeys + i;
        T* row = to + i * pitch;
        if (key < past) {
          load_features<L>(cache, entry, (call.position[entry] - past + key) % call.capacity, head, call.size, row);
        } else if (key < past + call.length) {
          load_new(key - past, row);
        }
        for (int64_t f = key < past + call.length ? call.size : 0; f < pitch; ++f) row[f] = 0;
      }
    };
    T* rows = call.key_rows != nullptr ? panel_at<T>(call, call.key_rows, entry, head, panel) : stage;
    fill(rows, call.cache_k, [&](int64_t t, T* row) { load_key<L>(call, angles, entry, t, head, row); });
    turn_panel<L>(rows, panel_at<T>(call, call.turned_keys, entry, head, panel), pitch);
    rows = call.value_rows != nullptr ? panel_at<T>(call, call.value_rows, entry, head, panel) : stage;
    fill(rows, call.cache_v, [&](int64_t t, T* row) { load_features<L>(call.v, entry, t, head, call.size, row); });
    if (call.turned_values != nullptr) {
      turn_panel<L>(rows, panel_at<T>(call, call.turned_values, entry, head, panel), pitch);
    }
  }
}

// The queries of a tile, rotated and times scale * log2(e), and which keys each sees. Rows up to a whole strip are zero
// and see what the last one does.
template <class T>
struct QueryTile {
  T* q;
  Visible seen[kTileRows];
  int64_t rows, strips;  // strips: rows, up to a whole one

  template <class L>
  void load(const AttentionCall& call, Angles<T>& angles, int64_t entry, int64_t g, int64_t tile) {
    const int64_t begin = tile * kTileRows, pitch = call.pitch;
    const T factor = T(call.scale * 1.4426950408889634);
    rows = smaller(kTileRows, call.length * call.group - begin);
    strips = (rows + kRowStrip - 1) / kRowStrip * kRowStrip;
    for (int64_t r = 0; r < strips; ++r) {
      T* row = q + r * pitch;
      if (r >= rows) {
        for (int64_t f = 0; f < pitch; ++f) row[f] = 0;
        seen[r] = seen[rows - 1];
        continue;
      }
      const int64_t position = (begin + r) / call.group, head = g * call.group + (begin + r) % call.group;
      angles.template at<L>(call, entry, position, g);
      load_features<L>(call.q, entry, position, head, call.size, row);
      rotate_pairs(row, angles.cos, angles.sin, call.size / 2, call.interleaved);
      for (int64_t f = 0; f < call.size; ++f) row[f] *= factor;
      for (int64_t f = call.size; f < pitch; ++f) row[f] = 0;
      seen[r] = visible_keys(call, entry, position);
    }
  }

  // The panels that some row sees.
  int64_t first_panel() const { return seen[0].low / kTileKeys; }
  int64_t end_panel() const { return (seen[rows - 1].high + kTileKeys - 1) / kTileKeys; }
};

// The keys of a panel that some row of a strip sees, as such and in whole vectors, and whether one of the rows sees only
// some of these.
struct StripMask {
  int64_t low, high;
  int64_t begin, end;
  bool partial;
};
template <class L>
JT_INLINE StripMask strip_mask(const Visible* seen, int64_t base) {
  int64_t low = seen[0].low - base;
  if (low < 0) low = 0;
  const int64_t high = smaller(seen[kRowStrip - 1].high - base, kTileKeys);
  const int64_t begin = low / L::W * L::W, end = (high + L::W - 1) / L::W * L::W;
  bool partial = false;
  for (int r = 0; r < kRowStrip; ++r) partial |= seen[r].low > base + begin || seen[r].high < base + end;
  return {low, high, begin, end, partial};
}

// Scores of keys [base + j, + W) as one row sees them.
template <class L>
JT_INLINE typename L::V masked(typename L::V scores, const Visible& seen, int64_t from) {
  using T = typename L::T;
  typename L::V lane;
  for (int k = 0; k < L::W; ++k) lane[k] = T(k);
  const auto clamp = [](int64_t x) { return L::splat(T(x < -1 ? -1 : smaller(x, L::W))); };
  const typename L::V nothing = L::splat(T(-__builtin_huge_val()));
  scores = L::select_greater(clamp(seen.high - from), lane, scores, nothing);
  return L::select_greater(lane, clamp(seen.low - from - 1), scores, nothing);
}

// What the softmax of some rows has seen so far: the highest scores, the weights' sums by lanes, and the weighted sums of
// values (rows, pitch). Scores are in units of log2.
template <class L>
struct TileSoftmax {
  typename L::T* top;
  typename L::V* total;
  typename L::T* sums;

  void clear(int64_t rows, int64_t pitch) {
    for (int64_t r = 0; r < rows; ++r) top[r] = kNoScore<typename L::T>, total[r] = typename L::V{};
    for (int64_t i = 0; i < rows * pitch; ++i) sums[i] = 0;
  }
};

// One strip of rows against one panel, whose first key is number `base`: its turned keys, and its values in rows of
// `pitch`, as the queries are. scores: (kRowStrip, kTileKeys), of this strip.
template <class L>
JT_INLINE void attend_panel(const typename L::T* q, int64_t size, int64_t pitch, const typename L::T* keys,
                            const typename L::T* values, const Visible* seen, int64_t base, typename L::T* scores,
                            TileSoftmax<L> softmax) {
  using V = typename L::V;
  const StripMask mask = strip_mask<L>(seen, base);
  if (mask.low >= mask.high) return;
  multiply_rows<L>(q, pitch, 1, keys + mask.begin, kTileKeys, size, scores + mask.begin, kTileKeys,
                   mask.end - mask.begin, false);
  for (int64_t r = 0; r < kRowStrip; ++r) {
    typename L::T *row = scores + r * kTileKeys, *sums = softmax.sums + r * pitch;
    V highest = L::splat(softmax.top[r]);
    for (int64_t j = mask.begin; j < mask.end; j += L::W) {
      V score = L::load(row + j);
      if (mask.partial) L::store(row + j, score = masked<L>(score, seen[r], base + j));
      highest = L::max(highest, score);
    }
    highest = highest_lane<L>(highest);
    if (highest[0] > softmax.top[r]) {
      const V fade = exp2_or_zero<L>(L::splat(softmax.top[r]) - highest);
      softmax.total[r] *= fade;
      for (int64_t f = 0; f < pitch; f += L::W) L::store(sums + f, L::load(sums + f) * fade);
      softmax.top[r] = highest[0];
    }
    for (int64_t j = mask.begin; j < mask.end; j += L::W) {
      const V weights = exp2_or_zero<L>(L::load(row + j) - highest);
      L::store(row + j, weights);
      softmax.total[r] += weights;
    }
  }
  // No value beyond those that are seen: it need not be a number.
  multiply_rows<L>(scores + mask.low, kTileKeys, 1, values + mask.low * pitch, pitch, mask.high - mask.low,
                   softmax.sums, pitch, pitch, true);
}

// Tasks: entries * kv_heads * tiles; a tile is a task.
template <class L>
void attention_forward(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t pitch = call.pitch;
  Carver carve{(char*)scratch(2 * carved<T>(kTileRows * pitch) + carved<T>(kRowStrip * kTileKeys) +
                              carved<V>(kTileRows) + 2 * carved<T>(pitch))};
  QueryTile<T> tile;
  tile.q = carve.take<T>(kTileRows * pitch);
  T *sums = carve.take<T>(kTileRows * pitch), *scores = carve.take<T>(kRowStrip * kTileKeys), top[kTileRows];
  V* total = carve.take<V>(kTileRows);
  Angles<T> angles{carve.take<T>(pitch), carve.take<T>(pitch)};
  for (int64_t task = task_begin; task < task_end; ++task) {
    // First, last, second, last but one ...: any stretch of tasks sees about as many keys as another.
    const int64_t turn = task % call.tiles, number = turn % 2 == 0 ? turn / 2 : call.tiles - 1 - turn / 2;
    const int64_t g = task / call.tiles % call.kv_heads, entry = task / call.groups;
    tile.template load<L>(call, angles, entry, g, number);
    TileSoftmax<L>{top, total, sums}.clear(tile.strips, pitch);
    for (int64_t panel = tile.first_panel(); panel < tile.end_panel(); ++panel) {
      const T* keys = panel_at<T>(call, call.turned_keys, entry, g, panel);
      const T* values = panel_at<T>(call, call.value_rows, entry, g, panel);
      for (int64_t r = 0; r < tile.strips; r += kRowStrip) {
        attend_panel<L>(tile.q + r * pitch, call.size, pitch, keys, values, tile.seen + r, panel * kTileKeys, scores,
                        {top + r, total + r, sums + r * pitch});
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = number * kTileRows + r, position = row / call.group, head = g * call.group + row % call.group;
      const T sum = L::sum(total[r]);
      const bool nothing = tile.seen[r].low >= tile.seen[r].high;
      const V factor = L::splat(nothing ? T(0) : T(1) / sum);
      for (int64_t f = 0; f < pitch; f += L::W) {
        L::store(sums + r * pitch + f, L::load(sums + r * pitch + f) * factor);
      }
      store_features<L>(call.y, entry, position, head, call.size, sums + r * pitch);
      if (call.logsumexp == nullptr) continue;
      const T log_of_sum = sizeof(T) == 4 ? T(__builtin_logf(float(sum))) : T(__builtin_log(double(sum)));
      ((T*)call.logsumexp)[(entry * call.heads + head) * call.length + position] =
          nothing ? T(-__builtin_huge_val()) : top[r] * T(0.69314718055994531) + log_of_sum;
    }
  }
}

// Tasks: entries * kv_heads * chunks.
template <class L>
void attention_backward(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t pitch = call.pitch;
  Carver carve{
      (char*)scratch(3 * carved<T>(kTileRows * pitch) + 2 * carved<T>(kTileRows * kTileKeys) + 3 * carved<T>(pitch))};
  QueryTile<T> tile;
  tile.q = carve.take<T>(kTileRows * pitch);
  T *grad = carve.take<T>(kTileRows * pitch), *dq = carve.take<T>(kTileRows * pitch);
  T *weights = carve.take<T>(kTileRows * kTileKeys), *slopes = carve.take<T>(kTileRows * kTileKeys);
  T* y = carve.take<T>(pitch);
  Angles<T> angles{carve.take<T>(pitch), carve.take<T>(pitch)};
  T through_sum[kTileRows], log2_of_sum[kTileRows];
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t g = task / call.chunk_count % call.kv_heads, entry = task / call.groups;
    const AttentionChunk& chunk = call.chunks[entry * call.chunk_count + task % call.chunk_count];
    const int64_t first = (entry * call.kv_heads + g) * call.partial_panels + chunk.offset;
    T* dkeys = (T*)call.partial_keys + first * kTileKeys * pitch;
    T* dvalues = (T*)call.partial_values + first * kTileKeys * pitch;
    for (int64_t i = 0; i < (chunk.end_panel - chunk.first_panel) * kTileKeys * pitch; ++i) dkeys[i] = dvalues[i] = 0;
    for (int64_t number = chunk.first_tile; number < chunk.end_tile; ++number) {
      tile.template load<L>(call, angles, entry, g, number);
      for (int64_t i = 0; i < tile.strips * pitch; ++i) dq[i] = 0;
      for (int64_t r = 0; r < tile.strips; ++r) {
        T* row = grad + r * pitch;
        through_sum[r] = log2_of_sum[r] = 0;
        for (int64_t f = r < tile.rows ? call.size : 0; f < pitch; ++f) row[f] = 0;
        if (r >= tile.rows) continue;
        const int64_t at = number * kTileRows + r, position = at / call.group, head = g * call.group + at % call.group;
        load_features<L>(call.grad_y, entry, position, head, call.size, row);
        load_features<L>(call.y, entry, position, head, call.size, y);
        for (int64_t f = call.size; f < pitch; ++f) y[f] = 0;
        V sum = {};
        for (int64_t f = 0; f < pitch; f += L::W) sum += L::load(row + f) * L::load(y + f);
        through_sum[r] = L::sum(sum);
        // A row that sees nothing has no weights, whatever its sum.
        if (tile.seen[r].low < tile.seen[r].high) {
          log2_of_sum[r] =
              T(1.4426950408889634) * ((const T*)call.logsumexp)[(entry * call.heads + head) * call.length + position];
        }
      }
      for (int64_t panel = tile.first_panel(); panel < tile.end_panel(); ++panel) {
        const int64_t base = panel * kTileKeys;
        const T* keys = panel_at<T>(call, call.turned_keys, entry, g, panel);
        const T* values = panel_at<T>(call, call.turned_values, entry, g, panel);
        const T* key_rows = panel_at<T>(call, call.key_rows, entry, g, panel);
        for (int64_t r0 = 0; r0 < tile.strips; r0 += kRowStrip) {
          const StripMask mask = strip_mask<L>(tile.seen + r0, base);
          for (int64_t r = r0; r < r0 + kRowStrip; ++r) {
            for (int64_t j = 0; j < kTileKeys; j += L::W) {
              if (j >= mask.begin && j < mask.end) continue;
              L::store(weights + r * kTileKeys + j, V{}), L::store(slopes + r * kTileKeys + j, V{});
            }
          }
          if (mask.begin >= mask.end) continue;
          T *p = weights + r0 * kTileKeys, *ds = slopes + r0 * kTileKeys;
          const int64_t columns = mask.end - mask.begin;
          multiply_rows<L>(tile.q + r0 * pitch, pitch, 1, keys + mask.begin, kTileKeys, call.size, p + mask.begin,
                           kTileKeys, columns, false);
          multiply_rows<L>(grad + r0 * pitch, pitch, 1, values + mask.begin, kTileKeys, call.size, ds + mask.begin,
                           kTileKeys, columns, false);
          for (int64_t r = 0; r < kRowStrip; ++r) {
            for (int64_t j = mask.begin; j < mask.end; j += L::W) {
              T *weight = p + r * kTileKeys + j, *slope = ds + r * kTileKeys + j;
              V score = L::load(weight);
              if (mask.partial) score = masked<L>(score, tile.seen[r0 + r], base + j);
              const V x = exp2_or_zero<L>(score - L::splat(log2_of_sum[r0 + r]));
              L::store(weight, x);
              L::store(slope, x * (L::load(slope) - L::splat(through_sum[r0 + r])));
            }
          }
          multiply_rows<L>(ds + mask.begin, kTileKeys, 1, key_rows + mask.begin * pitch, pitch, columns,
                           dq + r0 * pitch, pitch, pitch, true);
        }
        const int64_t shift = (panel - chunk.first_panel) * kTileKeys * pitch;
        for (int64_t j = 0; j < kTileKeys; j += kRowStrip) {
          multiply_rows<L>(weights + j, 1, kTileKeys, grad, pitch, tile.strips, dvalues + shift + j * pitch, pitch,
                           pitch, true);
          multiply_rows<L>(slopes + j, 1, kTileKeys, tile.q, pitch, tile.strips, dkeys + shift + j * pitch, pitch,
                           pitch, true);
        }
      }
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t at = number * kTileRows + r, position = at / call.group, head = g * call.group + at % call.group;
        T* to = (T*)call.rotated_grad + ((entry * call.length + position) * call.heads + head) * call.size;
        for (int64_t f = 0; f < call.size; ++f) to[f] = dq[r * pitch + f] * T(call.scale);
      }
    }
  }
}

// The sums over chunks, dq and dk turned back, dcos and dsin. Tasks: positions.
template <class L>
void attention_finish(const AttentionCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  const FlushSubnormals flush;
  const int64_t size = call.size, half = size / 2, pitch = call.pitch;
  const int64_t table_heads = call.tables_by_head ? call.kv_heads : 1;
  Carver carve{(char*)scratch(5 * carved<T>(pitch) + 2 * carved<T>(table_heads * half))};
  T *x = carve.take<T>(pitch), *dx = carve.take<T>(pitch), *dv = carve.take<T>(pitch);
  T *dcos = carve.take<T>(table_heads * half), *dsin = carve.take<T>(table_heads * half);
  Angles<T> angles{carve.take<T>(pitch), carve.take<T>(pitch)};
  for (int64_t t = task_begin; t < task_end; ++t) {
    for (int64_t entry = 0; entry < call.entries; ++entry) {
      if (call.tables_by_entry || entry == 0) {
        for (int64_t i = 0; i < table_heads * half; ++i) dcos[i] = dsin[i] = 0;
      }
      const int64_t key = (call.past != nullptr ? call.past[entry] : 0) + t, panel = key / kTileKeys;
      for (int64_t g = 0; g < call.kv_heads; ++g) {
        T *dc = dcos + (call.tables_by_head ? g * half : 0), *ds = dsin + (call.tables_by_head ? g * half : 0);
        angles.template at<L>(call, entry, t, g);
        // x as it was, dx the gradient of x rotated -> dx the gradient of x, and the pairs' share of dcos and dsin
        const auto turn_back = [&] {
          const int64_t next = call.interleaved ? 1 : half, step = call.interleaved ? 2 : 1;
          for (int64_t f = 0; f < half; ++f) {
            const T a = x[f * step], b = x[f * step + next], da = dx[f * step], db = dx[f * step + next];
            dc[f] += a * da + b * db, ds[f] += a * db - b * da;
          }
          rotate_pairs(dx, angles.cos, angles.sin, half, call.interleaved, T(-1));
        };
        for (int64_t h = g * call.group; h < (g + 1) * call.group; ++h) {
          const T* from = (const T*)call.rotated_grad + ((entry * call.length + t) * call.heads + h) * size;
          for (int64_t f = 0; f < size; ++f) dx[f] = from[f];
          load_features<L>(call.q, entry, t, h, size, x);
          turn_back();
          store_features<L>(call.dq, entry, t, h, size, dx);
        }
        for (int64_t f = 0; f < pitch; ++f) dx[f] = dv[f] = 0;
        for (int64_t c = 0; c < call.chunk_count; ++c) {
          const AttentionChunk& chunk = call.chunks[entry * call.chunk_count + c];
          if (panel < chunk.first_panel || panel >= chunk.end_panel) continue;
          const int64_t row =
              ((entry * call.kv_heads + g) * call.partial_panels + chunk.offset + panel - chunk.first_panel) *
                  kTileKeys +
              key % kTileKeys;
          for (int64_t f = 0; f < pitch; f += L::W) {
            L::store(dx + f, L::load(dx + f) + L::load((const T*)call.partial_keys + row * pitch + f));
            L::store(dv + f, L::load(dv + f) + L::load((const T*)call.partial_values + row * pitch + f));
          }
        }
        for (int64_t f = 0; f < size; ++f) dx[f] *= T(0.69314718055994531);  // queries were in units of log2
        load_features<L>(call.k, entry, t, g, size, x);
        turn_back();
        store_features<L>(call.dk, entry, t, g, size, dx);
        store_features<L>(call.dv, entry, t, g, size, dv);
      }
      if (!call.tables_by_entry && entry + 1 < call.entries) continue;
      for (int64_t g = 0; g < table_heads; ++g) {
        store_features<L>(call.dcos, entry, t, g, half, dcos + g * half);
        store_features<L>(call.dsin, entry, t, g, half, dsin + g * half);
      }
    }
  }
}

}  // namespace JT_ISA
}  // namespace jambatalk
