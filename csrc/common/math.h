// exp2, exp, log1p, softplus, sigmoid and silu by polynomial: the formulas that host and device share.
//
// Every function is a template over "lanes" L, which says what a value is (a vector of floats on the CPU, one float on
// a GPU) and supplies the few operations that differ:
//   L::T, L::V                    element type and value type
//   L::splat(T) -> V              all lanes equal
//   L::max(bound, x), L::min(bound, x)   NaN in x comes through
//   L::select_greater(a, b, x, y) a > b ? x : y in every lane
//   L::abs(x)
//   L::scale_by_shifted(p, s)     p * 2^n where the low bits of s hold n (see kMagic)
// and, where the machine has instructions for them, all or none of
//   L::round(x), L::rest(x)       n, the integer next to x, and x - n (0 where x is infinite)
//   L::scale(p, n)                p * 2^n for any n
//
// Polynomials: relative minimax fits (Remez), p(0) = 1 exactly, so that exp2(0) = 1 and a decay close to 1 stays
// accurate. Measured in tests/jambatalk_kernels through the ops that use them.
#pragma once

#if defined(__CUDACC__)
#define JT_INLINE __host__ __device__ __forceinline__
#else
#define JT_INLINE inline __attribute__((always_inline))
#endif

namespace jambatalk {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  // Adding 1.5 * 2^23 leaves round(x) in the low mantissa bits; the same trick with 2^52 for double.
  static constexpr float kMagic = 12582912.0f;
  // Clamped to the range of normal results; 2^128 comes out as infinity.
  static constexpr float kLow = -126.0f, kHigh = 128.0f;
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2 = 0.693147181f;
  // ln 2 in two parts, the first short enough for n * kLn2High to be exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kExp2Degree = 6;
  static constexpr float kExp2[7] = {1.0f,
                                     0.693147214967884963f,
                                     0.240226527828761768f,
                                     0.0555031055120698058f,
                                     0.00961769297614318723f,
                                     0.00134066438474800602f,
                                     0.000155946770151054106f};
  // e^x on [-ln(2)/2, ln(2)/2]
  static constexpr float kExp[7] = {1.0f,
                                    1.0f,
                                    0.4999999403953552f,
                                    0.1666652113199234f,
                                    0.041668277233839035f,
                                    0.008368686772882938f,
                                    0.001381982583552599f};
  static constexpr int kAtanhDegree = 4;
  static constexpr float kAtanh[5] = {1.0f, 0.3333320814293106f, 0.200107636151252674f, 0.140009027009058756f,
                                      0.140059931245908045f};
};

template <>
struct MathConstants<double> {
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLow = -1022.0, kHigh = 1024.0;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2 = 0.69314718055994531;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kExp2Degree = 11;
  static constexpr double kExp2[12] = {1.0,
                                       0.693147180559945697,
                                       0.24022650695910098,
                                       0.0555041086647903945,
                                       0.00961812910760700262,
                                       0.00133335581534399697,
                                       0.000154035304415718501,
                                       0.0000152527273851897748,
                                       1.32154426754528552e-6,
                                       1.01806476605730693e-7,
                                       7.07257039454079943e-9,
                                       4.07807178609287042e-10};
  static constexpr double kExp[12] = {1.0,
                                      1.00000000000000067,
                                      0.500000000000000555,
                                      0.16666666666657301,
                                      0.0416666666665736346,
                                      0.00833333333771546329,
                                      0.00138888889323405445,
                                      0.000198412614913874726,
                                      2.48015045112679762e-05,
                                      2.75642549330642097e-06,
                                      2.76262964828382306e-07,
                                      2.2981310730188986e-08};
  static constexpr int kAtanhDegree = 9;
  static constexpr double kAtanh[10] = {1.0,
                                        0.333333333333388472,
                                        0.199999999980248555,
                                        0.142857145289979404,
                                        0.111110964523747011,
                                        0.0909140703450945813,
                                        0.0768214779711296478,
                                        0.0679315674360467106,
                                        0.0495141265907419645,
                                        0.0886987444026829566};
};

// 2^x for x in [-1/2, 1/2].
template <class L>
JT_INLINE typename L::V exp2_unit(typename L::V x) {
  using K = MathConstants<typename L::T>;
  typename L::V p = L::splat(K::kExp2[K::kExp2Degree]);
  for (int i = K::kExp2Degree - 1; i >= 0; --i) p = p * x + L::splat(K::kExp2[i]);
  return p;
}

// 2^x. Relative error 3e-9 (float: below its rounding) and 2e-17 (double) plus roundings.
template <class L>
JT_INLINE typename L::V exp2(typename L::V x) {
  using K = MathConstants<typename L::T>;
  if constexpr (requires { L::scale(x, x); }) {
    return L::scale(exp2_unit<L>(L::rest(x)), L::round(x));
  } else {
    x = L::min(L::splat(K::kHigh), L::max(L::splat(K::kLow), x));
    const typename L::V shifted = x + L::splat(K::kMagic);
    return L::scale_by_shifted(exp2_unit<L>(x - (shifted - L::splat(K::kMagic))), shifted);
  }
}

// e^-x, with the argument reduced in two steps: accurate to the last bits for large |x| too, which exp2(-x * log2(e))
// is not. Where it would be larger than the largest finite number it is infinite or, without L::scale, just below that
// number. (Of -x: that is what sigmoid and softplus need.)
template <class L>
JT_INLINE typename L::V exp_negative(typename L::V x) {
  using K = MathConstants<typename L::T>;
  constexpr bool scales = requires { L::scale(x, x); };
  x = L::min(L::splat(-K::kLow * K::kLn2), x);
  typename L::V n, shifted;
  if constexpr (scales) {
    n = L::round(x * L::splat(-K::kLog2e));
  } else {
    // A little above the overflow: rounding must not push the result past infinity's bit pattern.
    x = L::max(L::splat((1.0f / 1024 - K::kHigh) * K::kLn2), x);
    shifted = L::splat(K::kMagic) - x * L::splat(K::kLog2e);
    n = shifted - L::splat(K::kMagic);
  }
  const typename L::V r = (x + n * L::splat(K::kLn2High)) + n * L::splat(K::kLn2Low);  // minus what is left of -x
  typename L::V p = L::splat(K::kExp2Degree & 1 ? -K::kExp[K::kExp2Degree] : K::kExp[K::kExp2Degree]);
  for (int i = K::kExp2Degree - 1; i >= 0; --i) p = p * r + L::splat(i & 1 ? -K::kExp[i] : K::kExp[i]);
  if constexpr (scales) {
    return L::scale(p, n);
  } else {
    return L::scale_by_shifted(p, shifted);
  }
}

template <class L>
JT_INLINE typename L::V exp(typename L::V x) {
  return exp_negative<L>(-x);
}

// log(1 + x) for x in [0, 1], relative accuracy also near 0: 2 atanh(x / (2 + x)).
template <class L>
JT_INLINE typename L::V log1p_unit(typename L::V x) {
  using K = MathConstants<typename L::T>;
  const typename L::V s = x / (x + L::splat(2));
  const typename L::V q = s * s;
  typename L::V p = L::splat(K::kAtanh[K::kAtanhDegree]);
  for (int i = K::kAtanhDegree - 1; i >= 0; --i) p = p * q + L::splat(K::kAtanh[i]);
  return (s + s) * p;
}

// log(1 + e^x); x itself above 20, as torch.nn.functional.softplus.
template <class L>
JT_INLINE typename L::V softplus(typename L::V x) {
  const typename L::V y = L::max(L::splat(0), x) + log1p_unit<L>(exp_negative<L>(L::abs(x)));
  return L::select_greater(x, L::splat(20), x, y);
}

template <class L>
JT_INLINE typename L::V sigmoid(typename L::V x) {
  return L::splat(1) / (L::splat(1) + exp_negative<L>(x));
}

// The derivative of softplus, with the same threshold and the same exponential.
template <class L>
JT_INLINE typename L::V softplus_slope(typename L::V x) {
  const typename L::V e = exp_negative<L>(L::abs(x)), part = L::splat(1) / (L::splat(1) + e);
  return L::select_greater(x, L::splat(20), L::splat(1), L::select_greater(x, L::splat(0), part, e * part));
}

// From where silu is less than 1e-36 on, its argument stops: times a sigmoid that may not have reached zero it would
// grow again.
template <class L>
JT_INLINE typename L::V silu_argument(typename L::V x) {
  using K = MathConstants<typename L::T>;
  return L::max(L::splat((1.0f / 1024 - K::kHigh) * K::kLn2), x);
}
template <class L>
JT_INLINE typename L::V silu(typename L::V x) {
  x = silu_argument<L>(x);
  if constexpr (requires { L::scale(x, x); }) {
    return x / (L::splat(1) + exp_negative<L>(x));  // vectors divide while they multiply
  } else {
    return x * sigmoid<L>(x);
  }
}

}  // namespace jambatalk
