// Vectors of JT_WIDTH bytes, in the compiler's own vector extension: one source for every instruction set.
// Included by one file per instruction set, inside its own namespace (JT_ISA), so that code compiled for AVX-512 can
// never be linked into the path that runs without it.
#pragma once

#include "common/math.h"
#include "cpu/kernels.h"

namespace jambatalk {
namespace JT_ISA {

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
  static constexpr int kMantissa = 52;
};

template <class T_>
struct Lanes {
  using T = T_;
  using Bits = typename BitsOf<T>::type;
  static constexpr int W = JT_WIDTH / sizeof(T);
  typedef T V __attribute__((vector_size(JT_WIDTH)));
  typedef Bits U __attribute__((vector_size(JT_WIDTH)));

  static JT_INLINE V splat(T value) { return value - V{}; }  // x - 0 folds to a broadcast; x + 0 may not
  static JT_INLINE V load(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
  }
  static JT_INLINE void store(T* to, V value) { __builtin_memcpy(to, &value, sizeof(V)); }
  static JT_INLINE V max(V bound, V x) { return bound > x ? bound : x; }
  static JT_INLINE V min(V bound, V x) { return bound < x ? bound : x; }
  static JT_INLINE V select_greater(V a, V b, V x, V y) { return a > b ? x : y; }
  static JT_INLINE V abs(V x) { return (V)((U)x & (Bits)(~Bits{0} >> 1)); }
  static JT_INLINE V scale_by_shifted(V p, V shifted) { return (V)((U)p + ((U)shifted << BitsOf<T>::kMantissa)); }
  static JT_INLINE T sum(V x) {
    T total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
  }
};

// ---- any dtype in memory, T in registers ----------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

JT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
JT_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

JT_INLINE float widen(float x) { return x; }
JT_INLINE double widen(double x) { return x; }
JT_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
JT_INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Exponent and mantissa moved into place and the bias corrected by a product, which also makes subnormals right.
  if (magnitude < 0x0400u) return bits_to_float(sign | float_to_bits(float(magnitude) * 5.9604644775390625e-8f));
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

template <class Memory>
struct Narrow;
template <>
struct Narrow<float> {
  template <class T>
  static JT_INLINE float from(T x) {
    return float(x);
  }
};
template <>
struct Narrow<double> {
  template <class T>
  static JT_INLINE double from(T x) {
    return double(x);
  }
};
template <>
struct Narrow<BFloat16> {  // round to nearest even; NaN stays NaN
  template <class T>
  static JT_INLINE BFloat16 from(T x) {
    const uint32_t bits = float_to_bits(float(x));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x0040u)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<Float16> {  // round to nearest even, overflow to infinity, subnormals kept
  template <class T>
  static JT_INLINE Float16 from(T x) {
    const uint32_t all = float_to_bits(float(x));
    const uint32_t sign = (all >> 16) & 0x8000u, bits = all & 0x7fffffffu;
    if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more
    if (bits < 0x38800000u) {
      // Below the smallest normal (2^-14): adding 1/2 leaves a multiple of 2^-24 in the low bits, rounded by the FPU.
      return {uint16_t(sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13))};
  }
};

// Calls f with a null pointer of the array's memory type: one branch a block, not one an element.
template <class F>
JT_INLINE void with_memory_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f((float*)nullptr);
    case Dtype::kFloat64:
      return f((double*)nullptr);
    case Dtype::kBFloat16:
      return f((BFloat16*)nullptr);
    case Dtype::kFloat16:
      return f((Float16*)nullptr);
  }
}

JT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P>
struct PointeeOf;
template <class M>
struct PointeeOf<M*> {
  using type = M;
};
template <class P>
using Pointee = typename PointeeOf<P>::type;

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// Channels are staged by the strip: a cache line's worth of float32, so that a row that is pages away from the next is
// touched once.
template <class L>
inline constexpr int kStrip = 64 / JT_WIDTH;  // vectors

// rows[r * pitch + t] = array[i, j0 + t, c0 + r * W ..) for r < R vectors; `valid` of the R * W channels exist, the
// others are zero, as is an absent array.
template <class L, int R = 1>
void load_rows(typename L::V* rows, int64_t pitch, const Array& array, int64_t i, int64_t j0, int64_t count, int64_t c0,
               int64_t valid) {
  using T = typename L::T;
  using V = typename L::V;
  if (array.data == nullptr) {
    for (int r = 0; r < R; ++r) {
      for (int64_t t = 0; t < count; ++t) rows[r * pitch + t] = V{};
    }
    return;
  }
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t row = array.stride[1], step = array.stride[2];
    const M* from = (const M*)array.data + i * array.stride[0] + j0 * row + c0 * step;
    if (valid >= R * L::W && step == 1) {
      for (int64_t t = 0; t < count; ++t, from += row) {
        // The next strip's part of the row, on its way to the L2 cache while this strip is computed.
        if constexpr (R * L::W * sizeof(M) >= 64) __builtin_prefetch(from + R * L::W, 0, 2);
        for (int r = 0; r < R; ++r) {
          if constexpr (kSame<M, T>) {
            rows[r * pitch + t] = L::load((const T*)from + r * L::W);
          } else {
            V value;
            for (int k = 0; k < L::W; ++k) value[k] = T(widen(from[r * L::W + k]));
            rows[r * pitch + t] = value;
          }
        }
      }
      return;
    }
    for (int r = 0; r < R; ++r, from += L::W * step) {
      const int64_t lanes = smaller(L::W, valid - r * L::W);
      if (row == 1) {  // time runs fastest in memory: read along it
        for (int k = 0; k < L::W; ++k) {
          for (int64_t t = 0; t < count; ++t) rows[r * pitch + t][k] = k < lanes ? T(widen(from[k * step + t])) : T(0);
        }
      } else {
        for (int64_t t = 0; t < count; ++t) {
          V value = {};
          for (int k = 0; k < lanes; ++k) value[k] = T(widen(from[t * row + k * step]));
          rows[r * pitch + t] = value;
        }
      }
    }
  });
}

template <class L, int R = 1>
void store_rows(const typename L::V* rows, int64_t pitch, const Array& array, int64_t i, int64_t j0, int64_t count,
                int64_t c0, int64_t valid) {
  if (array.data == nullptr) return;
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t row = array.stride[1], step = array.stride[2];
    M* to = (M*)array.data + i * array.stride[0] + j0 * row + c0 * step;
    for (int64_t t = 0; t < count; ++t, to += row) {
      for (int r = 0; r < R; ++r) {
        const typename L::V value = rows[r * pitch + t];
        if constexpr (kSame<M, typename L::T>) {
          if (valid >= (r + 1) * L::W && step == 1) {
            L::store((typename L::T*)to + r * L::W, value);
            continue;
          }
        }
        const int64_t lanes = smaller(L::W, valid - r * L::W);
        for (int k = 0; k < lanes; ++k) to[(r * L::W + k) * step] = Narrow<M>::from(value[k]);
      }
    }
  });
}

// flat[j * columns + k] = array[i, j0 + j, k]
template <class T>
void load_matrix(T* flat, const Array& array, int64_t i, int64_t j0, int64_t rows, int64_t columns) {
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const M* from = (const M*)array.data + i * array.stride[0] + j0 * array.stride[1];
    for (int64_t j = 0; j < rows; ++j, from += array.stride[1]) {
      if constexpr (kSame<M, T>) {
        if (array.stride[2] == 1) {
          __builtin_memcpy(flat + j * columns, from, size_t(columns) * sizeof(T));
          continue;
        }
      }
      for (int64_t k = 0; k < columns; ++k) flat[j * columns + k] = T(widen(from[k * array.stride[2]]));
    }
  });
}

// A (channels,) array as one vector: array[c0 .. c0 + W).
template <class L>
typename L::V load_channels(const Array& array, int64_t c0, int64_t valid) {
  typename L::V value;
  load_rows<L>(&value, 1, array, 0, 0, 1, c0, valid);
  return value;
}

// A (channels, columns) array with channels in lanes: rows[n] = array[c0 .. c0 + W, n].
template <class L>
void load_transposed(typename L::V* rows, const Array& array, int64_t i, int64_t c0, int64_t columns, int64_t valid) {
  const Array turned{array.data, array.dtype, {array.stride[0], array.stride[2], array.stride[1]}};
  load_rows<L>(rows, columns, turned, i, 0, columns, c0, valid);
}
template <class L>
void store_transposed(const typename L::V* rows, const Array& array, int64_t i, int64_t c0, int64_t columns,
                      int64_t valid) {
  const Array turned{array.data, array.dtype, {array.stride[0], array.stride[2], array.stride[1]}};
  store_rows<L>(rows, columns, turned, i, 0, columns, c0, valid);
}

// Subnormal numbers cost a hundred cycles each on some machines, and a decaying state fed with zeros becomes one.
// While a kernel runs they count as zero.
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned saved = __builtin_ia32_stmxcsr();
  FlushSubnormals() { __builtin_ia32_ldmxcsr(saved | 0x8040u); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved); }
#endif
};

// Cuts the thread's scratch memory into aligned arrays.
struct Carver {
  char* at;
  template <class X>
  X* take(int64_t count) {
    X* result = (X*)at;
    at += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return result;
  }
};
// What `take` needs for one array.
template <class X>
int64_t carved(int64_t count) {
  return (count * int64_t(sizeof(X)) + 63) / 64 * 64;
}

}  // namespace JT_ISA
}  // namespace jambatalk
