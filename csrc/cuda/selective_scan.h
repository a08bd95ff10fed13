// What the selective scan's kernels share: arithmetic, the layout of tiles in shared memory, staging.
//
// A channel's states lie on LANES neighbouring lanes of a warp, STATES in the registers of each; time is a loop. Lane l
// holds the states n = (j * LANES + l) * 4 + k (with STATES 1: n = l), so that a row of B or C is read by vectors of
// four as it lies in shared memory. A warp's 32 / LANES channels read the same B and C: broadcasts, without conflicts.
// Positions outside of the sequence and states and channels that do not exist are computed as delta = u = B = C = 0,
// which leaves every state as it is.
#pragma once

#include <cuda_pipeline.h>

#include "common/math.h"
#include "cuda/device.h"

namespace jambatalk::cuda {

constexpr int kScanThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- how many lanes share a channel

struct ScanShape {
  int lanes, states;  // lanes of a channel, states of a lane
};

// With many channels few lanes: the work that all lanes of a channel repeat (loads of delta, the reduction of y) weighs
// less. With few channels many lanes, down to one state per lane, so that every multiprocessor has warps to run: at
// (1, 600, 1024) with N = 16, 4 lanes are 128 warps of some 45 clocks per position, 16 lanes are 512 warps of some 20.
constexpr ScanShape scan_forward_shape(int64_t sequences, int64_t channels, int64_t states, int64_t multiprocessors) {
  const auto warps = [&](int64_t lanes) { return sequences * channels * lanes / 32; };
  if (states <= 16) {
    if (states <= 4 && warps(1) >= 8 * multiprocessors) return {1, 4};
    if (states <= 8 && warps(2) >= 8 * multiprocessors) return {2, 4};
    if (states > 8 && warps(2) >= 8 * multiprocessors) return {2, 8};
    if (states > 8 && warps(4) >= 4 * multiprocessors) return {4, 4};
    return {16, 1};
  }
  if (states <= 32) return {8, 4};
  if (states <= 64) return {16, 4};
  if (states <= 128) return {32, 4};
  return {32, 8};
}

// The same for backward.
constexpr ScanShape scan_backward_shape(int64_t sequences, int64_t channels, int64_t states, int64_t multiprocessors) {
  const auto warps = [&](int64_t lanes) { return sequences * channels * lanes / 32; };
  if (states <= 8 && warps(2) >= 4 * multiprocessors) return {2, 4};
  if (states <= 16) return warps(4) >= 4 * multiprocessors ? ScanShape{4, 4} : ScanShape{16, 1};
  if (states <= 32) return {8, 4};
  if (states <= 64) return {16, 4};
  if (states <= 128) return {32, 4};
  return {32, 8};
}

// Groups of `width` channels that a block of backward takes one after another: they share the rows of partial dB and
// dC, so more of them write less; as many as leave three blocks for each multiprocessor.
constexpr int64_t scan_backward_groups(int64_t sequences, int64_t channels, int64_t width, int64_t multiprocessors) {
  int64_t groups = 1;
  while (groups < 16 &&
         sequences * ((channels + 2 * groups * width - 1) / (2 * groups * width)) >= 3 * multiprocessors) {
    groups *= 2;
  }
  return groups;
}

// ---- arithmetic

// In float32: the special function unit, whose 16 results per clock are what binds forward on large cards, and as few
// other instructions as accuracy allows. In float64: the ordinary functions.

// 2^x; relative error 2^-22, below 2^-126 it is 0. (A polynomial on the multiply-add pipe for a share of the states was
// counted: at 14 instructions each it costs the issue slots that it saves.)
JT_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

template <int FROM = 0>
JT_DEVICE double exp2_polynomial(double f) {
  constexpr double kCoefficient = MathConstants<double>::kExp2[FROM];
  if constexpr (FROM == MathConstants<double>::kExp2Degree)
    return kCoefficient;
  else
    return exp2_polynomial<FROM + 1>(f) * f + kCoefficient;
}
JT_DEVICE double exp2_fast(double x) {  // common/math.h's; CUDA's own takes too many registers when inlined per state
  using K = MathConstants<double>;
  x = x < K::kLow ? K::kLow : x;  // NaN comes through
  x = x > K::kHigh ? K::kHigh : x;
  const double shifted = x + K::kMagic, p = exp2_polynomial(x - (shifted - K::kMagic));
  return __longlong_as_double(__double_as_longlong(p) + (__double_as_longlong(shifted) << 52));
}

JT_DEVICE float reciprocal(float x) {  // 1 ulp
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
JT_DEVICE double reciprocal(double x) { return 1.0 / x; }

JT_DEVICE float sigmoid_fast(float x) { return reciprocal(1.0f + exp2_fast(x * -MathConstants<float>::kLog2e)); }
JT_DEVICE double sigmoid_fast(double x) { return 1.0 / (1.0 + ::exp(-x)); }

// log(1 + e^x), relative accuracy for very negative x too. PyTorch's threshold (x itself above 20) is what rounding
// does in float32.
JT_DEVICE float softplus_fast(float x) {
  constexpr float kLog2e = MathConstants<float>::kLog2e, kLn2 = MathConstants<float>::kLn2;
  // e^-|x|, with the rounding of log2(e) and of the product put right: they grow with |x|. Below e^-87 there are no
  // normal numbers.
  constexpr float kLog2eLow = 1.925963033e-8f;  // log2(e) - kLog2e
  const float m = ::fminf(::fabsf(x), 87.0f), t = m * -kLog2e;
  const float rounding = __fmaf_rn(m, -kLog2eLow, __fmaf_rn(m, -kLog2e, -t));
  float e = exp2_fast(t);
  e = __fmaf_rn(e * kLn2, rounding, e);
  // log(1 + e) / e: relative minimax fit (Remez) on [0, 1], error 3.4e-8. No division: that would be one more MUFU.
  float p = 0.005364826414734125f;
  p = __fmaf_rn(p, e, -0.03006580099463463f);
  p = __fmaf_rn(p, e, 0.07920455187559128f);
  p = __fmaf_rn(p, e, -0.13753803074359894f);
  p = __fmaf_rn(p, e, 0.1915365606546402f);
  p = __fmaf_rn(p, e, -0.24857163429260254f);
  p = __fmaf_rn(p, e, 0.3332132399082184f);
  p = __fmaf_rn(p, e, -0.49999648332595825f);
  p = __fmaf_rn(p, e, 1.0f);
  return __fmaf_rn(p, e, x < 0.0f ? 0.0f : x);
}
JT_DEVICE double softplus_fast(double x) { return x > 20.0 ? x : ::log1p(::exp(x)); }

template <class T>
JT_DEVICE T softplus_slope(T x) {
  return x > T(20) ? T(1) : sigmoid_fast(x);
}

template <class T>
constexpr T kLog2e = MathConstants<T>::kLog2e;

// ---- tiles in shared memory, of the compute type

template <class T>
using Four = Vector<T, 4>;

// The state that register s of lane `lane` holds.
template <int LANES, int STATES>
JT_DEVICE constexpr int state_of(int lane, int s) {
  return STATES == 1 ? lane : ((s / 4) * LANES + lane) * 4 + s % 4;
}

// This lane's states of B or C at the four positions from t. Tiles are (position, state); where STATES is 1, groups of
// four positions: (position / 4, state, position % 4). Either way a lane reads vectors of four, where they are used: to
// hold all of them would take too many registers.
template <int LANES, int STATES, class T>
class Rows {
 public:
  JT_DEVICE Rows(const T* tile, int t, int lane) : at_(tile + t * LANES * STATES + lane * 4) {
    if constexpr (STATES == 1) four_ = *reinterpret_cast<const Four<T>*>(at_);
  }
  JT_DEVICE void read(int i, T (&to)[STATES]) const {
    if constexpr (STATES == 1) {
      to[0] = four_.lane[i];
    } else {
      JT_UNROLL
      for (int j = 0; j < STATES / 4; ++j) {
        const Four<T> v = *reinterpret_cast<const Four<T>*>(at_ + (i * STATES + j * 4) * LANES);
        JT_UNROLL
        for (int k = 0; k < 4; ++k) to[j * 4 + k] = v.lane[k];
      }
    }
  }

 private:
  const T* at_;
  Four<T> four_;
};

// The position and state of element 4 * q of such a tile; the next three are of the same position, or state.
template <int LANES, int STATES>
JT_DEVICE void locate_four(int q, int* t, int* n, int* t_step, int* n_step) {
  constexpr int kStates = LANES * STATES;
  if constexpr (STATES == 1) {
    *t = q / kStates * 4, *n = q % kStates, *t_step = 1, *n_step = 0;
  } else {
    *t = q / (kStates / 4), *n = q % (kStates / 4) * 4, *t_step = 0, *n_step = 1;
  }
}

// Sums v[i] over the LANES lanes of a channel and writes the four sums: halves of the four go opposite ways, so that it
// takes 3 shuffles (and one for every doubling of LANES beyond 4) for four positions instead of 4 log2(LANES).
template <int LANES, class T>
JT_DEVICE void sum_over_lanes(const T (&v)[4], T* to, int lane) {
  if constexpr (LANES == 1) {
    *reinterpret_cast<Four<T>*>(to) = Four<T>{{v[0], v[1], v[2], v[3]}};
  } else {
    const bool upper = (lane & 1) != 0, second = (lane & 2) != 0;
    T first = upper ? v[2] : v[0], last = upper ? v[3] : v[1];
    first += __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 1);
    last += __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 1);
    if constexpr (LANES == 2) {
      *reinterpret_cast<Vector<T, 2>*>(to + (upper ? 2 : 0)) = Vector<T, 2>{{first, last}};
    } else {
      T sum = second ? last : first;
      sum += __shfl_xor_sync(kAllLanes, second ? first : last, 2);
      JT_UNROLL
      for (int apart = 4; apart < LANES; apart *= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
      if (lane < 4) to[(upper ? 2 : 0) + (second ? 1 : 0)] = sum;
    }
  }
}

// ---- the part of a call that one block does

struct Span {
  int64_t batch, sequence, begin, end;  // positions
};

JT_DEVICE Span span_of(const ScanCall& call, int64_t sequence) {
  if (call.bounds == nullptr) return {sequence, sequence, 0, call.length};
  return {0, sequence, call.bounds[sequence], call.bounds[sequence + 1]};
}

// Positions of a packed call outside of every sequence belong to the first or the last one: calls visit(begin, end).
template <class Visit>
JT_DEVICE void outside(const ScanCall& call, const Span& span, const Visit& visit) {
  if (call.bounds == nullptr) return;
  if (span.sequence == 0) visit(int64_t(0), span.begin);
  if (span.sequence == call.sequences - 1) visit(span.end, call.length);
}

template <class T>
JT_DEVICE T load_or(const Array& array, int64_t at, T otherwise) {
  return array.data == nullptr ? otherwise : load_any<T>(array, at);
}

}  // namespace jambatalk::cuda
