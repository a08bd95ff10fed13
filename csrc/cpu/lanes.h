// Vectors of JT_WIDTH bytes, in the compiler's own vector extension: one source for every instruction set.
// Included by one file per instruction set, inside its own namespace (JT_ISA), so that code compiled for AVX-512 can
// never be linked into the path that runs without it.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/math.h"
#include "cpu/kernels.h"

// Where the vectors are the machine's own, instructions say what the vector extension cannot. ("wide" has vectors of
// 64 bytes too, and no instructions for them.)
#if defined(__AVX512F__) && JT_WIDTH == 64
#define JT_AVX512 1
#elif defined(__AVX2__) && JT_WIDTH == 32
#define JT_AVX2 1
#endif
#if defined(JT_AVX512) || JT_WIDTH < 64
#define JT_NATIVE true
#else
#define JT_NATIVE false
#endif

namespace jambatalk {
namespace JT_ISA {

constexpr bool kNativeVectors = JT_NATIVE;

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
  static JT_INLINE V max(V bound, V x) {
#if defined(JT_AVX512)
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_max_ps(-1, (__m512)bound, (__m512)x);
#elif defined(JT_AVX2)
    if constexpr (sizeof(T) == 4) return (V)_mm256_max_ps((__m256)bound, (__m256)x);
#endif
    return bound > x ? bound : x;
  }
  static JT_INLINE V min(V bound, V x) {
#if defined(JT_AVX512)
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_min_ps(-1, (__m512)bound, (__m512)x);
#elif defined(JT_AVX2)
    if constexpr (sizeof(T) == 4) return (V)_mm256_min_ps((__m256)bound, (__m256)x);
#endif
    return bound < x ? bound : x;
  }
  static JT_INLINE V select_greater(V a, V b, V x, V y) { return a > b ? x : y; }
  static JT_INLINE V abs(V x) { return (V)((U)x & (Bits)(~Bits{0} >> 1)); }
  static JT_INLINE V scale_by_shifted(V p, V shifted) { return (V)((U)p + ((U)shifted << BitsOf<T>::kMantissa)); }
  static JT_INLINE T sum(V x) {
    T total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
  }
#if defined(JT_AVX512)
  // What common/math.h uses where it is there: x rounded to an integer n, the rest x - n (0 for an infinite x), p *
  // 2^n.
  static JT_INLINE V round(V x)
    requires(sizeof(T) == 4)
  {
    return (V)_mm512_maskz_roundscale_ps(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static JT_INLINE V rest(V x)
    requires(sizeof(T) == 4)
  {
    return (V)_mm512_maskz_reduce_ps(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static JT_INLINE V scale(V p, V n)
    requires(sizeof(T) == 4)
  {
    return (V)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n);
  }
#endif
};

// ---- across lanes ---------------------------------------------------------------------------------------------------

// Swaps blocks of S lanes between two vectors: low = a with its odd blocks from b's even ones, high = b with its even
// blocks from a's odd ones.
template <class L, int S>
JT_INLINE void exchange(typename L::V a, typename L::V b, typename L::V& low, typename L::V& high) {
#if defined(__clang__)
  for (int j = 0; j < L::W; ++j) low[j] = j & S ? b[j - S] : a[j], high[j] = j & S ? b[j] : a[j + S];
#else
  typename L::U to_low, to_high;
  for (int j = 0; j < L::W; ++j) to_low[j] = j & S ? L::W + j - S : j, to_high[j] = j & S ? L::W + j : j + S;
  low = __builtin_shuffle(a, b, to_low), high = __builtin_shuffle(a, b, to_high);
#endif
}

// A square of W vectors, turned in registers.
template <class L, int S>
JT_INLINE void exchange_rows(typename L::V* square) {
#pragma GCC unroll 16
  for (int i = 0; i < L::W; ++i) {
    if ((i & S) == 0) exchange<L, S>(square[i], square[i + S], square[i], square[i + S]);
  }
  if constexpr (S > 1) exchange_rows<L, S / 2>(square);
}
template <class L>
__attribute__((noinline)) void transpose(typename L::V* square) {
  if constexpr (kNativeVectors) {
    typename L::V rows[L::W];
    for (int i = 0; i < L::W; ++i) rows[i] = square[i];
    exchange_rows<L, L::W / 2>(rows);
    for (int i = 0; i < L::W; ++i) square[i] = rows[i];
  } else {
    for (int i = 0; i < L::W; ++i) {
      for (int j = 0; j < i; ++j) {
        const typename L::T kept = square[i][j];
        square[i][j] = square[j][i], square[j][i] = kept;
      }
    }
  }
}

// Lane j of the result: the sum of the lanes of rows[j].
template <class L, int S>
JT_INLINE typename L::V fold_rows(const typename L::V* rows) {
  typename L::V half[S];
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    typename L::V low, high;
    exchange<L, S>(rows[i], rows[i + S], low, high);
    half[i] = low + high;
  }
  if constexpr (S > 1) {
    return fold_rows<L, S / 2>(half);
  } else {
    return half[0];
  }
}
template <class L>
__attribute__((noinline)) typename L::V sum_lanes(const typename L::V* rows) {
  if constexpr (kNativeVectors) {
    return fold_rows<L, L::W / 2>(rows);
  } else {
    typename L::V sums;
    for (int i = 0; i < L::W; ++i) sums[i] = L::sum(rows[i]);
    return sums;
  }
}

// to[i] = the sum of the lanes of rows[i]
template <class L>
JT_INLINE void sum_lanes_of(const typename L::V* rows, int64_t count, typename L::T* to) {
  int64_t i = 0;
  for (; i + L::W <= count; i += L::W) L::store(to + i, sum_lanes<L>(rows + i));
  for (; i < count; ++i) to[i] = L::sum(rows[i]);
}

// ---- any dtype in memory, T in registers ----------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

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

// W numbers of any type in memory, as a vector, and back.
template <class L, class M>
JT_INLINE typename L::V load_as(const M* from) {
  using V = typename L::V;
  if constexpr (kSame<M, typename L::T>) {
    return L::load(from);
  } else if constexpr (kSame<M, BFloat16> && kSame<typename L::T, float>) {
#if defined(JT_AVX512)
    return (V)_mm512_maskz_slli_epi32(-1, _mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i*)from)),
                                      16);
#else
    typedef uint16_t Half __attribute__((vector_size(L::W * 2)));
    Half bits;
    __builtin_memcpy(&bits, from, sizeof(Half));
    return (V)(__builtin_convertvector(bits, typename L::U) << 16);
#endif
  } else {
#if defined(JT_AVX512)
    if constexpr (kSame<M, Float16> && kSame<typename L::T, float>) {
      return (V)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)from));
    }
#elif defined(JT_AVX2)
    if constexpr (kSame<M, Float16> && kSame<typename L::T, float>) {
      return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    }
#endif
    V value = {};
    for (int k = 0; k < L::W; ++k) value[k] = typename L::T(widen(from[k]));
    return value;
  }
}
template <class L, class M>
JT_INLINE void store_as(M* to, typename L::V value) {
  if constexpr (kSame<M, typename L::T>) {
    L::store(to, value);
  } else if constexpr (kSame<M, BFloat16> && kSame<typename L::T, float>) {  // as Narrow, in lanes
    using U = typename L::U;
    const U bits = (U)value;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U kept = value == value ? rounded : U{} + 0x7fc0;
#if defined(JT_AVX512)
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(-1, (__m512i)kept));
#else
    typedef uint16_t Half __attribute__((vector_size(L::W * 2)));
    const Half half = __builtin_convertvector(kept, Half);
    __builtin_memcpy(to, &half, sizeof(Half));
#endif
  } else {
#if defined(JT_AVX512)
    if constexpr (kSame<M, Float16> && kSame<typename L::T, float>) {
      return _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(-1, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(JT_AVX2)
    if constexpr (kSame<M, Float16> && kSame<typename L::T, float>) {
      return _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (int k = 0; k < L::W; ++k) to[k] = Narrow<M>::from(value[k]);
  }
}

// One vector of a contiguous row; `valid` of its lanes exist, the others are zero and are not stored.
template <class L, class M>
JT_INLINE typename L::V load_some(const M* from, int64_t valid) {
  if (valid >= L::W) return load_as<L>(from);
  typename L::V value = {};
  for (int k = 0; k < valid; ++k) value[k] = typename L::T(widen(from[k]));
  return value;
}
template <class L, class M>
JT_INLINE void store_some(M* to, typename L::V value, int64_t valid) {
  if (valid >= L::W) return store_as<L>(to, value);
  for (int k = 0; k < valid; ++k) to[k] = Narrow<M>::from(value[k]);
}

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

// The same for an array of u's or x's dtype, which decides what is computed in.
template <class T, class F>
JT_INLINE void with_input_type(Dtype dtype, F f) {
  if constexpr (kSame<T, double>) {
    f((double*)nullptr);
  } else if (dtype == Dtype::kFloat32) {
    f((float*)nullptr);
  } else if (dtype == Dtype::kBFloat16) {
    f((BFloat16*)nullptr);
  } else {
    f((Float16*)nullptr);
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

// Channels are staged by the strip: a cache line's worth of float32, so that a row that is pages away from the next is
// touched once.
template <class L>
inline constexpr int kStrip = 64 / JT_WIDTH;  // vectors

// rows[r * pitch + t * step] = array[i, j0 + t, c0 + r * W ..) for r < R vectors; `valid` of the R * W channels exist,
// the others are zero, as is an absent array.
template <class L, int R = 1>
void load_rows(typename L::V* rows, int64_t pitch, const Array& array, int64_t i, int64_t j0, int64_t count, int64_t c0,
               int64_t valid, int64_t step = 1) {
  using T = typename L::T;
  using V = typename L::V;
  if (array.data == nullptr) {
    for (int r = 0; r < R; ++r) {
      for (int64_t t = 0; t < count; ++t) rows[r * pitch + t * step] = V{};
    }
    return;
  }
  with_memory_type(array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const int64_t row = array.stride[1], column = array.stride[2];
    const M* from = (const M*)array.data + i * array.stride[0] + j0 * row + c0 * column;
    if (valid >= R * L::W && column == 1) {
      for (int64_t t = 0; t < count; ++t, from += row) {
        for (int r = 0; r < R; ++r) rows[r * pitch + t * step] = load_as<L>(from + r * L::W);
      }
      return;
    }
    for (int r = 0; r < R; ++r, from += L::W * column) {
      const int64_t lanes = smaller(L::W, valid - r * L::W);
      V* to = rows + r * pitch;
      int64_t t = 0;
      if (row == 1) {  // time runs fastest in memory: read along it, and turn squares of W channels and positions
        for (; t + L::W <= count; t += L::W) {
          V square[L::W];
          for (int k = 0; k < L::W; ++k) square[k] = k < lanes ? load_as<L>(from + k * column + t) : V{};
          transpose<L>(square);
          for (int k = 0; k < L::W; ++k) to[(t + k) * step] = square[k];
        }
      }
      for (; t < count; ++t) {
        V value = {};
        for (int k = 0; k < lanes; ++k) value[k] = T(widen(from[t * row + k * column]));
        to[t * step] = value;
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
    const int64_t row = array.stride[1], column = array.stride[2];
    M* to = (M*)array.data + i * array.stride[0] + j0 * row + c0 * column;
    for (int64_t t = 0; t < count; ++t, to += row) {
      for (int r = 0; r < R; ++r) {
        const typename L::V value = rows[r * pitch + t];
        const int64_t lanes = smaller(L::W, valid - r * L::W);
        if (lanes == L::W && column == 1) {
          store_as<L>(to + r * L::W, value);
        } else {
          for (int k = 0; k < lanes; ++k) to[(r * L::W + k) * column] = Narrow<M>::from(value[k]);
        }
      }
    }
  });
}

// The strip of channels of some rows that will be loaded or stored next, fetched into the L2 cache line by line while
// this one is computed: fetch(t) for every row. Asked for all at once they would hold up what is behind them, as a core
// waits for a dozen or so lines at a time; and rows are pages apart, which the hardware's own prefetching stops at.
class NextStrip {
 public:
  NextStrip() = default;
  NextStrip(const Array& array, int64_t i, int64_t j0, int64_t c0) {
    if (array.data == nullptr) return;
    with_memory_type(array.dtype, [&](auto* type) {
      const int64_t size = sizeof(*type), row = array.stride[1] * size, column = array.stride[2] * size;
      from_ = (const char*)array.data + i * array.stride[0] * size + j0 * row + c0 * column;
      // Where time is contiguous, 16 rows are a line or less of each channel.
      row_ = row == size ? column : row, rows_ = 16 * row;
    });
  }
  JT_INLINE void fetch(int64_t t) const {
    if (from_ != nullptr) __builtin_prefetch(from_ + t % 16 * row_ + t / 16 * rows_, 0, 2);
  }

 private:
  const char* from_ = nullptr;
  int64_t row_ = 0, rows_ = 0;
};

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
  typename L::V value = {};
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
