// Mixture of experts on the CPU: routing, what follows the experts' products (grouped_product.h), the sum over slots.
//
// Rows are assignments (token, slot), sorted by expert. Tasks never share an output and every sum has one order,
// whatever the number of threads.
#pragma once

#include "cpu/grouped_product.h"

namespace jambatalk {
namespace JT_ISA {

// p = softmax(logits); the top_k largest of p, ties to the lowest expert. A row with NaN, +infinity or only -infinity
// has no softmax: its probabilities and weights are NaN and its experts 0 .. top_k - 1, as in the reference.
template <class L>
void route_forward(const RouteCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  using V = typename L::V;
  const int64_t E = call.experts, vectors = (E + L::W - 1) / L::W;
  Carver carve{(char*)scratch(carved<V>(vectors) + carved<char>(E))};
  V* row = carve.take<V>(vectors);
  char* taken = carve.take<char>(E);
  const T infinity = __builtin_huge_val();
  const V lowest = L::splat(MathConstants<T>::kLow * MathConstants<T>::kLn2);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t v = 0; v < vectors; ++v) load_rows<L>(row + v, 1, call.logits, 0, t, 1, v * L::W, E - v * L::W);
    T* p = (T*)row;
    T highest = -infinity;
    bool defined = true;
    for (int64_t e = 0; e < E; ++e) {
      if (p[e] > highest) highest = p[e];
      defined = defined && p[e] == p[e];
    }
    defined = defined && highest > -infinity && highest < infinity;
    for (int64_t e = E; e < vectors * L::W; ++e) p[e] = -infinity;
    V total = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const V shifted = row[v] - L::splat(highest);
      // exp saturates above zero: what is far below the highest gets no probability at all.
      row[v] = L::select_greater(shifted, lowest, exp<L>(shifted), V{});
      total += row[v];
    }
    const T scale = defined ? T(1) / L::sum(total) : T(__builtin_nan(""));
    T* out = (T*)call.probabilities + t * E;
    for (int64_t e = 0; e < E; ++e) out[e] = p[e] = defined ? p[e] * scale : scale, taken[e] = 0;
    T* weights = (T*)call.weights + t * call.top_k;
    int32_t* chosen = call.chosen + t * call.top_k;
    T sum = 0;
    for (int64_t k = 0; k < call.top_k; ++k) {
      int64_t best = 0;
      while (taken[best]) ++best;
      for (int64_t e = best + 1; e < E; ++e) {
        if (!taken[e] && p[e] > p[best]) best = e;
      }
      taken[best] = 1, chosen[k] = int32_t(best), weights[k] = p[best], sum += p[best];
    }
    if (call.renormalize) {
      for (int64_t k = 0; k < call.top_k; ++k) weights[k] /= sum;
    }
  }
}

// dlogits_e = p_e (g_e - sum_i g_i p_i), where g is the gradient of p, those of the weights and of the
// sums over tokens included.
template <class L>
void route_backward(const RouteCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  using V = typename L::V;
  const int64_t E = call.experts, vectors = (E + L::W - 1) / L::W;
  Carver carve{(char*)scratch(carved<V>(vectors))};
  V* row = carve.take<V>(vectors);
  T* g = (T*)row;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t v = 0; v < vectors; ++v) {
      load_rows<L>(row + v, 1, call.grad_probabilities, 0, t, 1, v * L::W, E - v * L::W);
      row[v] += load_channels<L>(call.grad_probability_sums, v * L::W, E - v * L::W);
    }
    const T *p = (const T*)call.probabilities + t * E, *weights = (const T*)call.weights + t * call.top_k;
    const int32_t* chosen = call.chosen + t * call.top_k;
    if (call.grad_weights.data != nullptr) {
      const Array& in = call.grad_weights;
      const T* grad = (const T*)in.data + t * in.stride[1];
      T through_sum = 0, sum = 1;
      if (call.renormalize) {
        sum = 0;
        for (int64_t k = 0; k < call.top_k; ++k) {
          through_sum += grad[k * in.stride[2]] * weights[k];
          sum += p[chosen[k]];
        }
      }
      for (int64_t k = 0; k < call.top_k; ++k) g[chosen[k]] += (grad[k * in.stride[2]] - through_sum) / sum;
    }
    T mean = 0;
    for (int64_t e = 0; e < E; ++e) mean += g[e] * p[e];
    for (int64_t e = 0; e < E; ++e) g[e] = p[e] * (g[e] - mean);
    for (int64_t v = 0; v < vectors; ++v) store_rows<L>(row + v, 1, call.grad_logits, 0, t, 1, v * L::W, E - v * L::W);
  }
}

// erf is the C library's: exact gelu is not on the model's path.
inline float error_function(float x) { return __builtin_erff(x); }
inline double error_function(double x) { return __builtin_erf(x); }

template <class L>
JT_INLINE typename L::V normal_cdf(typename L::V x) {
  using T = typename L::T;
  typename L::V result = {};
  for (int k = 0; k < L::W; ++k) result[k] = T(0.5) * (1 + error_function(x[k] * T(0.70710678118654752)));
  return result;
}

// Calls f with a constant for the activation, so that the loops inside have no branch.
template <class F>
JT_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kSwiglu:
      return f.template operator()<Activation::kSwiglu>();
    case Activation::kGelu:
      return f.template operator()<Activation::kGelu>();
    case Activation::kRelu:
      return f.template operator()<Activation::kRelu>();
  }
}

// The same, with the type of the experts' values in memory.
template <class F>
JT_INLINE void with_experts_type(const ProductCall& call, F f) {
  with_memory_type(call.dtype, [&](auto* type) {
    with_activation(call.activation,
                    [&]<Activation kind>() { f.template operator()<kind, Pointee<decltype(type)>>(); });
  });
}

// act(first [, second]); second is there for swiglu: silu(first) * second.
template <class L, Activation kind>
JT_INLINE typename L::V activate(typename L::V first, typename L::V second) {
  if constexpr (kind == Activation::kSwiglu) return silu<L>(first) * second;
  if constexpr (kind == Activation::kGelu) return first * normal_cdf<L>(first);
  return L::max(L::splat(0), first);
}

// The first product of the experts: activated[r, :] = act(preactivation[r, :]), the sums being the preactivation.
template <class L>
void multiply_activate(const ProductCall& call, int64_t begin, int64_t end) {
  multiply_blocks<L>(
      call, begin, end,
      [&](const Segment& segment, int64_t line, int64_t panel, int64_t count, const typename L::T* sums) {
        with_experts_type(call, [&]<Activation kind, class M>() {
          using V = typename L::V;
          constexpr int kParts = kind == Activation::kSwiglu ? 2 : 1;
          const int64_t H = call.hidden, c = panel * kProductColumns<L> / kParts, valid = H - c;
          const typename L::T* tile = sums;
          for (int64_t i = 0; i < count; ++i, tile += kProductColumns<L>) {
            const int64_t row = segment.begin + line + i;
            M* pre = call.preactivation != nullptr ? (M*)call.preactivation + row * kParts * H + c : nullptr;
            M* out = (M*)call.activated + row * H + c;
            const V first = L::load(tile), second = L::load(tile + L::W);
            if (pre != nullptr) store_some<L>(pre, first, valid);
            if constexpr (kParts == 2) {  // a panel is gates and their ups
              if (pre != nullptr) store_some<L>(pre + H, second, valid);
              store_some<L>(out, activate<L, kind>(first, second), valid);
            } else {
              store_some<L>(out, activate<L, kind>(first, V{}), valid);
              if (valid <= L::W) continue;
              if (pre != nullptr) store_some<L>(pre + L::W, second, valid - L::W);
              store_some<L>(out + L::W, activate<L, kind>(second, V{}), valid - L::W);
            }
          }
        });
      });
}

// Backward of act for one vector of a row whose output had weight w; grad is the gradient of act for weight 1.
template <class L, Activation kind, class M>
JT_INLINE typename L::V activate_backward(const M* pre, M* dpre, M* act, int64_t hidden, int64_t valid,
                                          typename L::V grad, typename L::V weight) {
  using T = typename L::T;
  using V = typename L::V;
  const V first = load_some<L>(pre, valid), in = weight * grad;
  V value, d_first;
  if constexpr (kind == Activation::kSwiglu) {
    const V second = load_some<L>(pre + hidden, valid);
    const V gate = sigmoid<L>(first), passed = first * gate;
    value = passed * second;
    d_first = in * second * gate * (L::splat(1) + first * (L::splat(1) - gate));
    store_some<L>(dpre + hidden, in * passed, valid);
  } else if constexpr (kind == Activation::kGelu) {
    const V cdf = normal_cdf<L>(first);
    const V density = exp<L>(L::splat(T(-0.5)) * first * first) * L::splat(T(0.3989422804014327));
    value = first * cdf;
    d_first = in * (cdf + first * density);
  } else {
    value = L::max(L::splat(0), first);
    d_first = L::select_greater(first, L::splat(0), in, V{});
  }
  store_some<L>(dpre, d_first, valid);
  store_some<L>(act, weight * value, valid);
  return grad * value;
}

// The gradient through the second product, the sums being that of act for weight 1. Out: dpreactivation; activated = w
// act, with which the gradient of w_out is taken; and <gradient, act> over each panel of columns: their sum is the
// router's gradient, without the expert's output.
template <class L>
void multiply_activate_backward(const ProductCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  using V = typename L::V;
  multiply_blocks<L>(
      call, begin, end, [&](const Segment& segment, int64_t line, int64_t panel, int64_t count, const T* sums) {
        with_experts_type(call, [&]<Activation kind, class M>() {
          constexpr int kParts = kind == Activation::kSwiglu ? 2 : 1;
          const int64_t H = call.hidden, c = panel * kProductColumns<L>, valid = H - c;
          const T* tile = sums;
          for (int64_t i = 0; i < count; ++i, tile += kProductColumns<L>) {
            const int64_t row = segment.begin + line + i, assignment = call.assignment[row];
            const M* pre = (const M*)call.preactivation + row * kParts * H + c;
            M *dpre = (M*)call.dpreactivation + row * kParts * H + c, *act = (M*)call.activated + row * H + c;
            const V weight = L::splat(((const T*)call.weights)[assignment]);
            V dot = activate_backward<L, kind>(pre, dpre, act, H, valid, L::load(tile), weight);
            if (valid > L::W) {
              dot += activate_backward<L, kind>(pre + L::W, dpre + L::W, act + L::W, H, valid - L::W,
                                                L::load(tile + L::W), weight);
            }
            ((T*)call.dots)[panel * call.rows + assignment] = L::sum(dot);
          }
        });
      });
}

// y[t, :] = sum over slots k, in their order, of weights[t, k] rows[position[t, k], :]; weight 1 where there are none.
template <class L>
void combine_slots(const CombineCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  using V = typename L::V;
  with_memory_type(call.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* position = call.position + t * call.top_k;
      const T* weights = call.weights != nullptr ? (const T*)call.weights + t * call.top_k : nullptr;
      M* out = (M*)call.y + t * call.columns;
      for (int64_t c = 0; c < call.columns; c += L::W) {
        V total = {};
        for (int64_t k = 0; k < call.top_k; ++k) {
          const V value = load_some<L>((const M*)call.rows + position[k] * call.columns + c, call.columns - c);
          total += weights != nullptr ? L::splat(weights[k]) * value : value;
        }
        store_some<L>(out + c, total, call.columns - c);
      }
    }
  });
}

// out[r] = <x[r], w[expert, j]> for a few rows r of x, w[expert, j] read once.
template <class L, int Rows>
JT_INLINE void dot_rows(const Array& w, int64_t expert, int64_t j, const typename L::T* x, int64_t pitch, int64_t inner,
                        typename L::T* out) {
  using T = typename L::T;
  using V = typename L::V;
  constexpr int kAhead = 4;  // independent sums: the additions' latency is not waited for
  with_memory_type(w.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const M* from = (const M*)w.data + expert * w.stride[0] + j * w.stride[1];
    V sum[Rows][kAhead] = {};
    int64_t k = 0;
    if (w.stride[2] == 1) {
      for (; k + kAhead * L::W <= inner; k += kAhead * L::W) {
        for (int a = 0; a < kAhead; ++a) {
          const V value = load_as<L>(from + k + a * L::W);
          for (int r = 0; r < Rows; ++r) sum[r][a] += value * L::load(x + r * pitch + k + a * L::W);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      V all = sum[r][0];
      for (int a = 1; a < kAhead; ++a) all += sum[r][a];
      out[r] = L::sum(all);
      for (int64_t rest = k; rest < inner; ++rest) out[r] += T(widen(from[rest * w.stride[2]])) * x[r * pitch + rest];
    }
  });
}

// Few rows against their experts' weights; a task is a block of the outputs of one expert. With `activate`, outputs j
// and (for swiglu) outputs + j are made together and out is act of the two.
template <class L>
void expert_matvec(const MatvecCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t segment = task / call.groups;
    const int64_t expert = call.segments[segment].expert;
    const int64_t first = call.segments[segment].begin, last = call.segments[segment].end;
    const int64_t from = task % call.groups * call.block, to = smaller(from + call.block, call.outputs);
    for (int64_t j = from; j < to; ++j) {
      for (int64_t row = first; row < last;) {
        const T* x = (const T*)call.x + row * call.inner;
        T value[4], second[4];
        const int rows = last - row >= 4 ? 4 : 1;
        const auto dot = [&](int64_t output, T* out) {
          rows == 4 ? dot_rows<L, 4>(call.w, expert, output, x, call.inner, call.inner, out)
                    : dot_rows<L, 1>(call.w, expert, output, x, call.inner, call.inner, out);
        };
        dot(j, value);
        if (call.activate && call.activation == Activation::kSwiglu) dot(call.outputs + j, second);
        for (int r = 0; r < rows; ++r) {
          T result = value[r];
          if (call.activate) {
            with_activation(call.activation, [&]<Activation kind>() {
              result = activate<L, kind>(L::splat(value[r]), L::splat(second[r]))[0];
            });
          }
          ((T*)call.out)[(row + r) * call.outputs + j] = result;
        }
        row += rows;
      }
    }
  }
}

}  // namespace JT_ISA
}  // namespace jambatalk
