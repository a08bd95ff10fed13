// Norms over the channels of each row, forward and backward, on the CPU:
//
//   layer norm and GELU (Full)   n = (x + shift - mean) / sqrt(variance + eps),   y = gelu(n weight + bias)
//   RMS norm                     n = x / sqrt(mean of x^2 + eps),                 y = n weight
//
// gelu(v) = v P(v), P the normal distribution. A block is one row per lane of a vector: the rows' sums are then folded
// together, W of them at a time. A block stays in the L1 cache, so memory is read and written once: x and y forward; x,
// dy and dx backward, where statistics and sums are computed again. P(-z) = e^(-z^2 / 2) m(1 / (1 + z kMills)): its own
// tail, not one minus something, is what the polynomial m is fitted to, relative error 1e-8; and the gradient needs the
// same exponential. Cost per vector with AVX-512: about 40 operations forward and 50 backward, of them 35 the
// distribution.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

// v = +-z: P(v) and the density at v.
template <class L>
JT_INLINE void normal(typename L::V v, typename L::V& distribution, typename L::V& density) {
  using V = typename L::V;
  const V z = L::abs(v), e = exp_negative<L>(L::splat(0.5f) * z * z);
  density = e * L::splat(typename L::T(0.3989422804014327));
  V tail;
  if constexpr (sizeof(typename L::T) == 4) {
    constexpr float kMills = 0.33f;
    constexpr float kTail[10] = {6.7830634e-06f, 0.13146894f, 0.13376923f,  0.10326097f, 0.14730141f,
                                 -0.10954978f,   0.29511652f, -0.32506990f, 0.14980295f, -0.026107125f};
    const V t = L::splat(1) / (L::splat(1) + L::splat(kMills) * z);
    tail = L::splat(kTail[9]);
    for (int i = 8; i >= 0; --i) tail = tail * t + L::splat(kTail[i]);
    tail = tail * e;
  } else {
    for (int k = 0; k < L::W; ++k) tail[k] = 0.5 * __builtin_erfc(z[k] * 0.7071067811865476);
  }
  distribution = L::select_greater(v, L::splat(0), L::splat(1) - tail, tail);
}

// What belongs to channels, in compute type: zero beyond the last one and where there is none.
template <class T>
struct NormVectors {
  T *weight, *bias, *shift;
};

template <class L>
NormVectors<typename L::T> load_norm(const NormCall& call, Carver& carve, int64_t padded) {
  using T = typename L::T;
  const NormVectors<T> vectors{carve.take<T>(padded), carve.take<T>(padded), carve.take<T>(padded)};
  for (int64_t c = 0; c < call.channels; c += L::W) {
    L::store(vectors.weight + c, load_channels<L>(call.weight, c, call.channels - c));
    L::store(vectors.bias + c, load_channels<L>(call.bias, c, call.channels - c));
    L::store(vectors.shift + c, load_channels<L>(call.shift, c, call.channels - c));
  }
  return vectors;
}

// The rows of x from `row` on, W of them or as many as there are before `end`, and what turns them into n.
template <class L, bool Full, class M>
struct NormRows {
  using T = typename L::T;
  using V = typename L::V;
  int64_t pitch, count, channels;
  const M* x;
  const T* shift;
  T mean[L::W], scale[L::W];

  NormRows(const NormCall& call, const T* shift_, int64_t row, int64_t end)
      : pitch(call.x.stride[1]),
        count(smaller(L::W, end - row)),
        channels(call.channels),
        x((const M*)call.x.data + row * pitch),
        shift(shift_) {
    measure(call.eps);
  }
  JT_INLINE V moved(int64_t r, int64_t c) const {
    const V v = load_some<L>(x + r * pitch + c, channels - c);
    if constexpr (Full) return v + L::load(shift + c);
    return v;
  }
  JT_INLINE V normed(int64_t r, int64_t c) const {
    const V v = moved(r, c);
    if constexpr (Full) return (v - L::splat(mean[r])) * L::splat(scale[r]);
    return v * L::splat(scale[r]);
  }
  void measure(double eps) {
    V sums[L::W] = {};
    if constexpr (Full) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < channels; c += L::W) sums[r] += moved(r, c);
      }
      L::store(mean, sum_lanes<L>(sums) / L::splat(T(channels)));
    }
    for (int64_t r = 0; r < count; ++r) {
      V total = {};
      for (int64_t c = 0; c < channels; c += L::W) {
        V rest = moved(r, c);
        if constexpr (Full) {
          rest -= L::splat(mean[r]);
          for (int64_t k = channels - c; k < L::W; ++k) rest[k] = 0;
        }
        total += rest * rest;
      }
      sums[r] = total;
    }
    const V variance = sum_lanes<L>(sums) / L::splat(T(channels)) + L::splat(T(eps));
    for (int k = 0; k < L::W; ++k) scale[k] = T(1) / T(__builtin_sqrt(variance[k]));
  }
};

template <class L, bool Full>
void norm_forward(const NormCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t channels = call.channels, padded = (channels + L::W - 1) / L::W * L::W;
  Carver carve{(char*)scratch(3 * carved<T>(padded))};
  const NormVectors<T> vectors = load_norm<L>(call, carve, padded);
  with_input_type<T>(call.x.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t end = smaller(task_end * call.task_rows, call.rows);
    for (int64_t row = task_begin * call.task_rows; row < end; row += L::W) {
      const NormRows<L, Full, M> rows(call, vectors.shift, row, end);
      M* y = (M*)call.y.data + row * call.y.stride[1];
      for (int64_t r = 0; r < rows.count; ++r, y += call.y.stride[1]) {
        for (int64_t c = 0; c < channels; c += L::W) {
          V v = rows.normed(r, c) * L::load(vectors.weight + c);
          if constexpr (Full) {
            V distribution, density;
            v += L::load(vectors.bias + c);
            normal<L>(v, distribution, density);
            v *= distribution;
          }
          store_some<L>(y + c, v, channels - c);
        }
      }
    }
  });
}

template <class L, bool Full>
void norm_backward(const NormCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  const FlushSubnormals flush;
  const int64_t channels = call.channels, padded = (channels + L::W - 1) / L::W * L::W;
  Carver carve{(char*)scratch(6 * carved<T>(padded) + 2 * carved<T>(L::W) + carved<T>(L::W * padded))};
  const NormVectors<T> vectors = load_norm<L>(call, carve, padded);
  T *dweight = carve.take<T>(padded), *dbias = carve.take<T>(padded), *dshift = carve.take<T>(padded);
  T *mean_gradient = carve.take<T>(L::W), *mean_product = carve.take<T>(L::W);
  T* stage = carve.take<T>(L::W * padded);  // gradient of n
  with_input_type<T>(call.x.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t dy_pitch = call.grad_y.stride[1], dx_pitch = call.dx.stride[1];
    for (int64_t task = task_begin; task < task_end; ++task) {
      for (int64_t c = 0; c < padded; ++c) dweight[c] = dbias[c] = dshift[c] = 0;
      const int64_t end = smaller((task + 1) * call.task_rows, call.rows);
      for (int64_t row = task * call.task_rows; row < end; row += L::W) {
        const NormRows<L, Full, M> rows(call, vectors.shift, row, end);
        const M* dy = (const M*)call.grad_y.data + row * dy_pitch;
        M* dx = (M*)call.dx.data + row * dx_pitch;
        V gradients[L::W] = {}, products[L::W] = {};
        for (int64_t c = 0; c < channels; c += L::W) {
          const V w = L::load(vectors.weight + c), b = L::load(vectors.bias + c);
          V dw = L::load(dweight + c), db = L::load(dbias + c);
          for (int64_t r = 0; r < rows.count; ++r) {
            const V n = rows.normed(r, c);
            V g = load_some<L>(dy + r * dy_pitch + c, channels - c);
            if constexpr (Full) {
              const V v = n * w + b;
              V distribution, density;
              normal<L>(v, distribution, density);
              g *= distribution + v * density;
            }
            const V dn = g * w;
            dw += g * n, db += g;
            gradients[r] += dn, products[r] += dn * n;
            L::store(stage + r * padded + c, dn);
          }
          L::store(dweight + c, dw), L::store(dbias + c, db);
        }
        if constexpr (Full) L::store(mean_gradient, sum_lanes<L>(gradients) / L::splat(T(channels)));
        L::store(mean_product, sum_lanes<L>(products) / L::splat(T(channels)));
        for (int64_t r = 0; r < rows.count; ++r) {
          for (int64_t c = 0; c < channels; c += L::W) {
            V out = L::load(stage + r * padded + c) - rows.normed(r, c) * L::splat(mean_product[r]);
            if constexpr (Full) out -= L::splat(mean_gradient[r]);
            out *= L::splat(rows.scale[r]);
            store_some<L>(dx + r * dx_pitch + c, out, channels - c);
            if constexpr (Full) L::store(dshift + c, L::load(dshift + c) + out);  // beyond the last channel: not read
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        ((T*)call.dweight_partial)[task * channels + c] = dweight[c];
        if (!Full) continue;
        ((T*)call.dbias_partial)[task * channels + c] = dbias[c];
        ((T*)call.dshift_partial)[task * channels + c] = dshift[c];
      }
    }
  });
}

}  // namespace JT_ISA
}  // namespace jambatalk
