// The gradient of the selective scan on NVIDIA GPUs. With a_t = exp(delta_t A) and g_t the gradient of h_t:
//
//   g_t = C_t dy_t + a_{t+1} g_{t+1}      dy_t = grad_y_t silu(z_t), where z is given
//   dC_t = sum over channels of dy_t h_t                 dB_t = sum over channels of g_t delta_t u_t
//   dA = sum over t of g_t a_t h_{t-1} delta_t           ddelta_t = sum over states of g_t a_t h_{t-1} A + (g_t . B_t)
//   u_t du_t = (g_t . B_t) delta_t + D dy_t                  dz_t = grad_y_t (C_t . h_t + D u_t) silu'(z_t) dD = sum
//   over t of dy_t u_t
//
// The products a_t h_{t-1} are recomputed as such: h_t - delta_t u_t B_t, which is the same, loses digits where a_t is
// small. No atomics: every sum has a fixed order.
#include "cuda/selective_scan.h"

namespace jambatalk::cuda {
namespace {

constexpr int kSub = 4;  // positions whose h and a are in registers at a time

struct BackwardPlan {
  ScanBackward call;
  int64_t channel_blocks;  // per sequence
  int64_t groups;          // of 128 / LANES channels, that a block takes one after another within a segment of time
  bool vectors[4];         // of delta, u, z, grad_y: four positions are neighbours in memory and aligned
  void* kept;              // (blocks, groups, kKept)
  void* dA;                // (sequences, channels, states)
  void* dD;                // (sequences, channels)
  void* ddelta_bias;       // (sequences, channels)
  void* dBC;               // (batch, channel blocks, length, 2, states)
};

template <class T, class From>
JT_DEVICE void load_positions(const Array& array, int64_t at, bool vector, int first, int last, T (&to)[4]) {
  const From* from = static_cast<const From*>(array.data) + at;
  const int64_t step = array.stride[1];
  if (first > 0 || last < 4) {
    JT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = i >= first && i < last ? convert<T>(from[i * step]) : T(0);
  } else if (vector) {
    const Vector<From, 4> v = *reinterpret_cast<const Vector<From, 4>*>(from);
    JT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = convert<T>(v.lane[i]);
  } else {
    JT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = convert<T>(from[i * step]);
  }
}

// Four positions of a channel; those outside of [first, last) are zeros and are not read.
template <class T>
JT_DEVICE void load_positions(const Array& array, int64_t at, bool vector, int first, int last, T (&to)[4]) {
  switch (array.dtype) {
    case Dtype::kFloat32:
      return load_positions<T, float>(array, at, vector, first, last, to);
    case Dtype::kFloat64:
      return load_positions<T, double>(array, at, vector, first, last, to);
    case Dtype::kBFloat16:
      return load_positions<T, __nv_bfloat16>(array, at, vector, first, last, to);
    default:
      return load_positions<T, __half>(array, at, vector, first, last, to);
  }
}

// Sums v over the 32 / LANES channels of a warp. Halves of v go opposite ways as long as there are two, so that a lane
// ends with `kLeft` of the sums, v[0 ..] being those from the returned index on, at COUNT - kLeft shuffles or so.
template <int LANES, int COUNT>
constexpr int kLeft = COUNT * LANES / 32 > 1 ? COUNT * LANES / 32 : 1;

template <int LANES, int COUNT, class T>
JT_DEVICE int sum_over_channels(T (&v)[COUNT], int warp_lane) {
  int first = 0, width = COUNT;
  JT_UNROLL
  for (int apart = LANES; apart < 32; apart *= 2) {
    if (width > 1) {
      width /= 2;
      const bool upper = (warp_lane & apart) != 0;
      JT_UNROLL
      for (int k = 0; k < width; ++k) {
        const T keep = upper ? v[k + width] : v[k], give = upper ? v[k] : v[k + width];
        v[k] = keep + __shfl_xor_sync(kAllLanes, give, apart);
      }
      first += upper ? width : 0;
    } else {
      v[0] += __shfl_xor_sync(kAllLanes, v[0], apart);
    }
  }
  return first;
}

// What a thread remembers of a group between segments: the gradient of the states, and its sums for dA, dD and
// ddelta_bias (a segment is summed in registers first: less rounding than one long sum, and dD and ddelta_bias take
// none in the loop over time). In shared memory where there is one group, and room for it.
template <int STATES>
constexpr int kKept = (2 * STATES + 2) * kScanThreads;
constexpr bool kept_in_shared(int states, int64_t groups) { return states < 8 && groups == 1; }

// Elements of dynamic shared memory.
template <class T, int LANES, int STATES, int SEGMENT>
constexpr int kDynamic =
    3 * kScanThreads / LANES * (SEGMENT + 4) + 2 * SEGMENT * LANES * STATES + SEGMENT / kSub * STATES * kScanThreads +
    LANES * STATES * (kScanThreads / 16 * kSub > SEGMENT ? kScanThreads / 16 * kSub : SEGMENT) +
    (kept_in_shared(STATES, 1) ? kKept<STATES> : 0);

// A block: groups of 128 / LANES channels of one sequence. It walks the sequence backwards in segments of SEGMENT
// positions, and within a segment takes the groups one after another:
//   1. from the state at the start of the chunk, saved by forward, to the segment's start (nothing where the segment is
//      the chunk's first), and on: the states at every kSub-th position, into shared memory;
//   2. kSub positions at a time, last first: h and a again, kept in registers, then back through them. dB and dC are
//   summed
//      over the warp's channels by shuffles, over the warps in shared memory, over the groups in the block's own rows
//      of `dBC`; scan_sum_kernel adds the blocks up;
//   3. du, ddelta, dz, once per channel and position.
//
// Inputs of any dtype and strides, gradients of their input's; T float, or double where u is.
//
// Cost per channel and position, N = 16, bfloat16: 14 bytes (u, delta, z, grad_y in; du, ddelta, dz out), 4 N / chunk
// of saved states and 16 N / (channels of a block) of partial dB and dC; 2.4 N + 6 special functions, of which 0.5 N
// are for the way from the chunk's start; some 750 instructions of a thread (600 of them in the loops over time), which
// bind. Back through four positions, per warp, LANES 4 and STATES 4: 16 MUFU.EX2; 37 SHFL (28 for dB and dC, 3 each for
// du, ddelta and dz); 4 + 2 STS. With more than 64 states segments are shorter than 32 positions and a chunk longer
// than 64: the way from the chunk's start is then up to 7.5 times the segment's own. Largest request of dynamic shared
// memory: 89 KB (float64, 256 states); 41 KB with N = 16.
template <class T, int LANES, int STATES, int SEGMENT>
JT_DEVICE void scan_backward_block(const BackwardPlan& plan) {
  constexpr int kChannels = kScanThreads / LANES, kStates = LANES * STATES, kRow = SEGMENT + 4;
  constexpr int kSubs = SEGMENT / kSub, kWarps = kScanThreads / 32, kSums = 2 * STATES;
  constexpr bool kKeepDecay = sizeof(T) * STATES < 64;  // in registers; otherwise there are too few
  JT_DYNAMIC_SHARED(shared);
  T* const tile_delta = reinterpret_cast<T*>(shared);  // (channel, position); then the gradient of delta A log2(e)
  T* const tile_x = tile_delta + kChannels * kRow;     // delta u; then its gradient
  T* const tile_dy = tile_x + kChannels * kRow;        // dy; then C . h
  T* const tile_B = tile_dy + kChannels * kRow;
  T* const tile_C = tile_B + SEGMENT * kStates;
  T* const starts = tile_C + SEGMENT * kStates;                // (kSub-th position, state, thread)
  T* const exchange = starts + kSubs * STATES * kScanThreads;  // (warp, position, dB or dC, state)
  T* const tile_before = exchange;                             // B of the positions between chunk's and segment's start
  const ScanBackward& call = plan.call;
  const int warp_lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % LANES, mine = threadIdx.x / LANES;
  const int column = threadIdx.x % kChannels, quarter = threadIdx.x / kChannels;
  const int64_t block = blockIdx.x % plan.channel_blocks;
  const Span span = span_of(call, blockIdx.x / plan.channel_blocks);
  const int64_t begin = span.begin, end = span.end, channels = call.channels, states = call.states;
  const bool gated = call.z.data != nullptr;
  const int64_t block_channel = block * plan.groups * kChannels;
  T* const dBC = static_cast<T*>(plan.dBC) + (span.batch * plan.channel_blocks + block) * call.length * 2 * states;

  // (carry, dA: STATES numbers each; dD; ddelta_bias) by threads
  const auto kept_of = [&](int64_t group) {
    if (kept_in_shared(STATES, plan.groups))
      return tile_delta + kDynamic<T, LANES, STATES, SEGMENT> - kKept<STATES> + threadIdx.x;
    return static_cast<T*>(plan.kept) + (int64_t(blockIdx.x) * plan.groups + group) * kKept<STATES> + threadIdx.x;
  };
  for (int64_t group = 0; group < plan.groups; ++group) {
    const int64_t channel = block_channel + group * kChannels + mine;
    T* const kept = kept_of(group);
    JT_UNROLL
    for (int s = 0; s < STATES; ++s) {
      const int n = state_of<LANES, STATES>(lane, s);
      const bool exists = channel < channels && n < states;
      const Array& from = call.grad_final_state;
      kept[s * kScanThreads] = exists ? load_or<T>(from, offset(from, span.sequence, channel, n), T(0)) : T(0);
      kept[(STATES + s) * kScanThreads] = T(0);
    }
    kept[kSums * kScanThreads] = kept[(kSums + 1) * kScanThreads] = T(0);
  }

  outside(call, span, [&](int64_t from, int64_t to) {
    for (int64_t c = block_channel + column; c < min(channels, block_channel + plan.groups * kChannels);
         c += kChannels) {
      for (int64_t t = from + quarter; t < to; t += LANES) {
        store_any<T>(call.du, offset(call.du, span.batch, t, c), T(0));
        store_any<T>(call.ddelta, offset(call.ddelta, span.batch, t, c), T(0));
        if (gated) store_any<T>(call.dz, offset(call.dz, span.batch, t, c), T(0));
      }
    }
    for (int64_t i = from * 2 * states + threadIdx.x; i < to * 2 * states; i += kScanThreads) dBC[i] = T(0);
  });

  const auto load_matrix = [&](const Array& from, int64_t start, int64_t stop, T* to) {
#pragma unroll 1
    for (int q = threadIdx.x; q < SEGMENT * kStates / 4; q += kScanThreads) {
      int t, n, t_step, n_step;
      locate_four<LANES, STATES>(q, &t, &n, &t_step, &n_step);
      Four<T> v;
      JT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t at = start + t + i * t_step, state = n + i * n_step;
        const bool exists = at >= begin && at < stop && state < states;
        v.lane[i] = exists ? load_any<T>(from, offset(from, span.batch, at, state)) : T(0);
      }
      reinterpret_cast<Four<T>*>(to)[q] = v;
    }
  };
  const int64_t saved_row = span.batch * ((call.length - 1) / call.chunk) - 1;  // of chunk 0, which has none

  for (int64_t chunk = end > begin ? (end - 1) / call.chunk : -1; chunk >= 0 && (chunk + 1) * call.chunk > begin;
       --chunk) {
    const int64_t chunk_begin = chunk * call.chunk, chunk_end = min(chunk_begin + call.chunk, end);
    for (int64_t start = chunk_begin + (chunk_end - 1 - chunk_begin) / SEGMENT * SEGMENT;
         start >= chunk_begin && start + SEGMENT > begin; start -= SEGMENT) {
      const int64_t stop = min(start + SEGMENT, chunk_end);
      __syncthreads();  // the last segment's tiles are read no more
      load_matrix(call.B, start, stop, tile_B);
      load_matrix(call.C, start, stop, tile_C);
      for (int64_t group = 0; group < plan.groups; ++group) {
        const int64_t channel0 = block_channel + group * kChannels, channel = channel0 + mine,
                      other = channel0 + column;
        if (channel0 >= channels) break;
        T* const kept = kept_of(group);
        T A[STATES], h[STATES], carry[STATES], dA[STATES];
        JT_UNROLL
        for (int s = 0; s < STATES; ++s) {
          const int n = state_of<LANES, STATES>(lane, s);
          const bool exists = channel < channels && n < states;
          A[s] = exists ? load_any<T>(call.A, offset(call.A, 0, channel, n)) * kLog2e<T> : T(0);
          carry[s] = kept[s * kScanThreads];
          dA[s] = h[s] = T(0);
          if (exists && chunk_begin > begin) {
            h[s] = static_cast<const T*>(
                call.chunk_states)[((saved_row + chunk) * states + n) * call.padded_channels + channel];
          } else if (exists) {
            h[s] = load_or<T>(call.initial_state, offset(call.initial_state, span.sequence, channel, n), T(0));
          }
        }
        const bool exists = other < channels;
        const T bias = exists ? load_or<T>(call.delta_bias, other * call.delta_bias.stride[2], T(0)) : T(0);
        const T D = exists ? load_or<T>(call.D, other * call.D.stride[2], T(0)) : T(0);

        // Of the four positions from `at`, those to read lie in [first, last).
        const auto first_of = [&](int64_t at) { return exists ? int(max(begin - at, int64_t(0))) : 4; };
        const auto last_of = [&](int64_t at, int64_t limit) { return int(min(limit - at, int64_t(4))); };
        const auto positions = [&](const Array& array, int which, int64_t at, int first, int last, T(&to)[4]) {
          if (first >= last) {
            to[0] = to[1] = to[2] = to[3] = T(0);
          } else {
            load_positions<T>(array, offset(array, span.batch, at, other), plan.vectors[which], first, last, to);
          }
        };
        // delta and delta u of SEGMENT positions from `from` on, and dy
        const auto load_tiles = [&](int64_t from, int64_t limit, bool with_dy) {
#pragma unroll 1
          for (int t = quarter * 4; t < SEGMENT; t += LANES * 4) {
            const int first = first_of(from + t), last = last_of(from + t, limit);
            T delta[4], u[4], z[4], grad[4];
            positions(call.delta, 0, from + t, first, last, delta);
            positions(call.u, 1, from + t, first, last, u);
            if (with_dy && gated) positions(call.z, 2, from + t, first, last, z);
            if (with_dy && call.grad_y.data != nullptr) positions(call.grad_y, 3, from + t, first, last, grad);
            Four<T> kept_delta, kept_x, kept_dy;
            JT_UNROLL
            for (int i = 0; i < 4; ++i) {
              const bool inside = i >= first && i < last;
              T d = delta[i] + bias;
              if (call.softplus) d = softplus_fast(d);
              kept_delta.lane[i] = inside ? d : T(0);
              kept_x.lane[i] = inside ? d * u[i] : T(0);
              kept_dy.lane[i] = !inside || call.grad_y.data == nullptr ? T(0)
                                : gated                                ? grad[i] * z[i] * sigmoid_fast(z[i])
                                                                       : grad[i];
            }
            *reinterpret_cast<Four<T>*>(tile_delta + column * kRow + t) = kept_delta;
            *reinterpret_cast<Four<T>*>(tile_x + column * kRow + t) = kept_x;
            if (with_dy) *reinterpret_cast<Four<T>*>(tile_dy + column * kRow + t) = kept_dy;
          }
        };
        // h, on over the positions [from, to) of the tiles
        const auto advance = [&](const T* B_tile, int from, int to) {
#pragma unroll 1
          for (int t = from; t < to; t += 4) {
            const Four<T> d = *reinterpret_cast<const Four<T>*>(tile_delta + mine * kRow + t);
            const Four<T> x = *reinterpret_cast<const Four<T>*>(tile_x + mine * kRow + t);
            const Rows<LANES, STATES, T> rows(B_tile, t, lane);
            JT_UNROLL
            for (int i = 0; i < 4; ++i) {
              T B[STATES];
              rows.read(i, B);
              JT_UNROLL
              for (int s = 0; s < STATES; ++s) h[s] = exp2_fast(d.lane[i] * A[s]) * h[s] + x.lane[i] * B[s];
            }
          }
        };

#pragma unroll 1
        for (int64_t from = chunk_begin; from <= start; from += SEGMENT) {
          if (from + SEGMENT <= begin) continue;
          __syncthreads();
          load_tiles(from, min(from + SEGMENT, stop), from == start);
          if (from < start) load_matrix(call.B, from, start, tile_before);
          __syncthreads();
          if (from < start) advance(tile_before, 0, SEGMENT);
        }
#pragma unroll 1
        for (int sub = 0; sub < kSubs; ++sub) {
          JT_UNROLL
          for (int s = 0; s < STATES; ++s) starts[(sub * STATES + s) * kScanThreads + threadIdx.x] = h[s];
          if (sub + 1 < kSubs) advance(tile_B, sub * kSub, (sub + 1) * kSub);
        }

#pragma unroll 1
        for (int sub = kSubs - 1; sub >= 0; --sub) {
          const int from = sub * kSub;
          T decay[kKeepDecay ? kSub : 1][STATES], before[kSub][STATES];
          JT_UNROLL
          for (int s = 0; s < STATES; ++s) h[s] = starts[(sub * STATES + s) * kScanThreads + threadIdx.x];
          const Four<T> d = *reinterpret_cast<const Four<T>*>(tile_delta + mine * kRow + from);
          const Four<T> x = *reinterpret_cast<const Four<T>*>(tile_x + mine * kRow + from);
          const Rows<LANES, STATES, T> rows_B(tile_B, from, lane), rows_C(tile_C, from, lane);
          JT_UNROLL
          for (int i = 0; i < 4; ++i) {
            T B[STATES];
            rows_B.read(i, B);
            JT_UNROLL
            for (int s = 0; s < STATES; ++s) {
              before[i][s] = h[s];
              const T a = exp2_fast(d.lane[i] * A[s]);
              if constexpr (kKeepDecay) decay[i][s] = a;
              h[s] = a * h[s] + x.lane[i] * B[s];
            }
          }
          const Four<T> dy = *reinterpret_cast<const Four<T>*>(tile_dy + mine * kRow + from);
          T to_x[4], to_decay[4], y[4];
          JT_UNROLL
          for (int i = 3; i >= 0; --i) {
            T B[STATES], C[STATES], sums[kSums];
            rows_B.read(i, B);
            rows_C.read(i, C);
            to_x[i] = to_decay[i] = y[i] = T(0);
            JT_UNROLL
            for (int s = 0; s < STATES; ++s) {
              const T g = dy.lane[i] * C[s] + carry[s];
              sums[s] = g * x.lane[i];
              sums[STATES + s] = dy.lane[i] * h[s];
              to_x[i] += g * B[s];
              carry[s] = g * (kKeepDecay ? decay[kKeepDecay ? i : 0][s] : exp2_fast(d.lane[i] * A[s]));
              const T through_decay = carry[s] * before[i][s];
              to_decay[i] += through_decay * A[s];
              dA[s] += through_decay * d.lane[i];
              y[i] += C[s] * h[s];
              h[s] = before[i][s];
            }
            const int first_sum = sum_over_channels<LANES>(sums, warp_lane);
            constexpr int kMine = kLeft<LANES, kSums>;
            T* const row = exchange + (warp * kSub + i) * 2 * kStates;
            // Where there are more channels than sums, several lanes have the same one.
            if (kSums * LANES >= 32 || (warp_lane & (32 - kSums * LANES)) == 0) {
              if constexpr (kMine % 4 == 0) {
                JT_UNROLL
                for (int k = 0; k < kMine; k += 4) {
                  const int which = first_sum + k, n = state_of<LANES, STATES>(lane, which % STATES);
                  *reinterpret_cast<Four<T>*>(row + (which >= STATES ? kStates : 0) + n) =
                      Four<T>{{sums[k], sums[k + 1], sums[k + 2], sums[k + 3]}};
                }
              } else {
                JT_UNROLL
                for (int k = 0; k < kMine; ++k) {
                  const int which = first_sum + k;
                  row[(which >= STATES ? kStates : 0) + state_of<LANES, STATES>(lane, which % STATES)] = sums[k];
                }
              }
            }
          }
          sum_over_lanes<LANES>(to_x, tile_x + mine * kRow + from, lane);
          sum_over_lanes<LANES>(to_decay, tile_delta + mine * kRow + from, lane);
          if (gated) sum_over_lanes<LANES>(y, tile_dy + mine * kRow + from, lane);
          __syncthreads();
#pragma unroll 1
          for (int e = threadIdx.x; e < kSub * 2 * kStates; e += kScanThreads) {
            const int step = e / (2 * kStates), which = e / kStates % 2, n = e % kStates;
            const int64_t at = start + from + step;
            if (at < begin || at >= stop || n >= states) continue;
            T sum = exchange[e];
            JT_UNROLL
            for (int w = 1; w < kWarps; ++w) sum += exchange[w * kSub * 2 * kStates + e];
            T* const to = dBC + (at * 2 + which) * states + n;
            *to = group == 0 ? sum : *to + sum;
          }
          __syncthreads();
        }

        T dD = T(0), dbias = T(0);
#pragma unroll 1
        for (int t = quarter * 4; t < SEGMENT; t += LANES * 4) {
          const int64_t at = start + t;
          const int first = first_of(at), last = last_of(at, stop);
          if (first >= last) continue;
          T raw[4], u[4], z[4], grad[4];
          positions(call.delta, 0, at, first, last, raw);
          positions(call.u, 1, at, first, last, u);
          if (gated) positions(call.z, 2, at, first, last, z);
          if (call.grad_y.data != nullptr) positions(call.grad_y, 3, at, first, last, grad);
          const Four<T> to_decay = *reinterpret_cast<const Four<T>*>(tile_delta + column * kRow + t);
          const Four<T> to_x = *reinterpret_cast<const Four<T>*>(tile_x + column * kRow + t);
          const Four<T> y = *reinterpret_cast<const Four<T>*>(tile_dy + column * kRow + t);
          JT_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (i < first || i >= last) continue;
            const T x = raw[i] + bias, delta = call.softplus ? softplus_fast(x) : x;
            T ddelta = to_x.lane[i] * u[i] + to_decay.lane[i] * MathConstants<T>::kLn2;
            if (call.softplus) ddelta *= softplus_slope(x);
            T dy = call.grad_y.data == nullptr ? T(0) : grad[i];
            if (gated) {
              const T gate = sigmoid_fast(z[i]);
              const T dz = dy * (y.lane[i] + D * u[i]) * gate * (T(1) + z[i] * (T(1) - gate));
              store_any<T>(call.dz, offset(call.dz, span.batch, at + i, other), dz);
              dy *= z[i] * gate;
            }
            store_any<T>(call.ddelta, offset(call.ddelta, span.batch, at + i, other), ddelta);
            store_any<T>(call.du, offset(call.du, span.batch, at + i, other), to_x.lane[i] * delta + D * dy);
            dbias += ddelta;
            dD += dy * u[i];
          }
        }
        JT_UNROLL
        for (int s = 0; s < STATES; ++s) {
          kept[s * kScanThreads] = carry[s];
          kept[(STATES + s) * kScanThreads] += dA[s];
        }
        kept[kSums * kScanThreads] += dD;
        kept[(kSums + 1) * kScanThreads] += dbias;
      }
    }
  }

  for (int64_t group = 0; group < plan.groups; ++group) {
    const int64_t channel0 = block_channel + group * kChannels, channel = channel0 + mine;
    if (channel0 >= channels) break;
    T* const kept = kept_of(group);
    JT_UNROLL
    for (int s = 0; s < STATES; ++s) {
      const int n = state_of<LANES, STATES>(lane, s);
      if (channel >= channels || n >= states) continue;
      static_cast<T*>(plan.dA)[(span.sequence * channels + channel) * states + n] = kept[(STATES + s) * kScanThreads];
      if (call.dinitial_state.data != nullptr) {
        const int64_t at = offset(call.dinitial_state, span.sequence, channel, n);
        store_any<T>(call.dinitial_state, at, kept[s * kScanThreads]);
      }
    }
    __syncthreads();
    if (quarter == 0 && channel0 + column < channels) {
      const T *const dD = kept + kSums * kScanThreads, *const dbias = dD + kScanThreads;  // of threads from this one on
      T sum_D = T(0), sum_bias = T(0);
      for (int i = 0; i < LANES; ++i) sum_D += dD[i * kChannels], sum_bias += dbias[i * kChannels];
      static_cast<T*>(plan.dD)[span.sequence * channels + channel0 + column] = sum_D;
      static_cast<T*>(plan.ddelta_bias)[span.sequence * channels + channel0 + column] = sum_bias;
    }
  }
}

// budget: registers <= 168, spills 0, shared <= 0
template <int LANES, int STATES, int SEGMENT>
__global__ void __launch_bounds__(kScanThreads, 3) scan_backward_kernel(const BackwardPlan plan) {
  scan_backward_block<float, LANES, STATES, SEGMENT>(plan);
}
// More than 128 states.
// budget: registers <= 255, spills 0, shared <= 0
template <int LANES, int STATES, int SEGMENT>
__global__ void __launch_bounds__(kScanThreads, 2) scan_backward_large_kernel(const BackwardPlan plan) {
  scan_backward_block<float, LANES, STATES, SEGMENT>(plan);
}
// More than 128 states do not quite fit into registers.
// budget of <32, 8, 4>: registers <= 255, spills 80, shared <= 0
// budget: registers <= 255, spills 0, shared <= 0
template <int LANES, int STATES, int SEGMENT>
__global__ void __launch_bounds__(kScanThreads, 2) scan_backward_float64_kernel(const BackwardPlan plan) {
  scan_backward_block<double, LANES, STATES, SEGMENT>(plan);
}

// to[outer, row, column] = sum over terms of partial[outer][term][row][column], in the order of the terms. `to` is
// contiguous.
struct SumCall {
  const void* partial;
  int64_t outer, terms, rows, columns;
  int64_t outer_stride, term_stride, row_stride;
  Array to;
};

// budget: registers <= 40, spills 0, shared <= 0
template <class T>
__global__ void __launch_bounds__(kScanThreads) scan_sum_kernel(const SumCall call) {
  const int64_t index = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (index >= call.outer * call.rows * call.columns) return;
  const int64_t column = index % call.columns, row = index / call.columns % call.rows;
  const T* from = static_cast<const T*>(call.partial) + index / call.columns / call.rows * call.outer_stride +
                  row * call.row_stride + column;
  T sum = T(0);
  for (int64_t term = 0; term < call.terms; ++term) sum += from[term * call.term_stride];
  store_any<T>(call.to, index, sum);
}

// ---- host side

struct Workspace {
  int64_t channel_blocks, groups;
  int64_t kept, dA, dD, ddelta_bias, dBC, bytes;  // where they begin
};

ScanShape shape_of(const ScanBackward& call) {
  if (call.u.dtype == Dtype::kFloat64) return {call.states <= 16 ? 4 : 32, call.states <= 128 ? 4 : 8};
  return scan_backward_shape(call.sequences, call.channels, call.states, call.device.multiprocessors);
}

Workspace workspace_of(const ScanBackward& call) {
  const ScanShape shape = shape_of(call);
  const int64_t element = call.u.dtype == Dtype::kFloat64 ? 8 : 4, width = kScanThreads / shape.lanes;
  Workspace w{};
  w.groups = scan_backward_groups(call.sequences, call.channels, width, call.device.multiprocessors);
  w.channel_blocks = (call.channels + width * w.groups - 1) / (width * w.groups);
  const auto take = [&](int64_t elements) {
    const int64_t at = w.bytes;
    w.bytes += (elements * element + 15) / 16 * 16;
    return at;
  };
  const int64_t pairs = call.sequences * call.channels;
  const int64_t blocks = call.sequences * w.channel_blocks;
  w.kept = take(kept_in_shared(shape.states, w.groups) ? 0 : blocks * w.groups * (2 * shape.states + 2) * kScanThreads);
  w.dA = take(pairs * call.states), w.dD = take(pairs), w.ddelta_bias = take(pairs);
  w.dBC = take(call.batch * w.channel_blocks * call.length * 2 * call.states);
  return w;
}

template <class T, int LANES, int STATES, int SEGMENT>
const char* run_backward(const BackwardPlan& plan) {
  constexpr int64_t shared = kDynamic<T, LANES, STATES, SEGMENT> * int64_t(sizeof(T));
  const dim3 blocks(unsigned(plan.channel_blocks * plan.call.sequences));
  const auto start = [&](auto kernel) { return launch(kernel, blocks, kScanThreads, shared, plan.call.device, plan); };
  if constexpr (sizeof(T) == 8)
    return start(scan_backward_float64_kernel<LANES, STATES, SEGMENT>);
  else if constexpr (STATES == 8)
    return start(scan_backward_large_kernel<LANES, STATES, SEGMENT>);
  else
    return start(scan_backward_kernel<LANES, STATES, SEGMENT>);
}

const char* run_backward(const BackwardPlan& plan) {
  const ScanShape shape = shape_of(plan.call);
  const int key = shape.lanes * 100 + shape.states;
  if (plan.call.u.dtype == Dtype::kFloat64) {
    if (key == 404) return run_backward<double, 4, 4, 16>(plan);
    if (key == 3204) return run_backward<double, 32, 4, 8>(plan);
    return run_backward<double, 32, 8, 4>(plan);
  }
  switch (key) {
    case 204:
      return run_backward<float, 2, 4, 32>(plan);
    case 404:
      return run_backward<float, 4, 4, 32>(plan);
    case 1601:
      return run_backward<float, 16, 1, 32>(plan);
    case 804:
      return run_backward<float, 8, 4, 32>(plan);
    case 1604:
      return run_backward<float, 16, 4, 32>(plan);
    case 3204:
      return run_backward<float, 32, 4, 16>(plan);
    default:
      return run_backward<float, 32, 8, 16>(plan);
  }
}

}  // namespace

int64_t scan_backward_workspace(const ScanBackward& call) { return workspace_of(call).bytes; }

const char* launch_scan_backward(const ScanBackward& call) {
  if (call.states > 256) return "selective_scan: at most 256 states";
  const Workspace w = workspace_of(call);
  char* const memory = static_cast<char*>(call.workspace);
  BackwardPlan plan{};
  plan.call = call;
  plan.channel_blocks = w.channel_blocks, plan.groups = w.groups;
  plan.kept = memory + w.kept, plan.dA = memory + w.dA, plan.dD = memory + w.dD;
  plan.ddelta_bias = memory + w.ddelta_bias, plan.dBC = memory + w.dBC;
  const Array* const inputs[4] = {&call.delta, &call.u, &call.z, &call.grad_y};
  for (int i = 0; i < 4; ++i) {
    const Array& array = *inputs[i];
    const int64_t bytes = array.dtype == Dtype::kFloat64 ? 8 : array.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t align = min(4 * bytes, int64_t(16));
    plan.vectors[i] = array.stride[1] == 1 && reinterpret_cast<uintptr_t>(array.data) % align == 0 &&
                      array.stride[0] * bytes % align == 0 && array.stride[2] * bytes % align == 0;
  }
  const char* error = call.sequences * call.channels == 0 ? nullptr : run_backward(plan);

  const bool wide = call.u.dtype == Dtype::kFloat64;
  const int64_t element = wide ? 8 : 4, states = call.states, length = call.length;
  const auto sum = [&](const SumCall& terms) {
    const int64_t count = terms.outer * terms.rows * terms.columns;
    if (error != nullptr || terms.to.data == nullptr || count == 0) return;
    const dim3 blocks(unsigned((count + kScanThreads - 1) / kScanThreads));
    error =
        launch(wide ? scan_sum_kernel<double> : scan_sum_kernel<float>, blocks, kScanThreads, 0, call.device, terms);
  };
  const int64_t terms = call.channels == 0 ? 0 : w.channel_blocks, rows = length * 2 * states;
  sum({plan.dBC, call.batch, terms, length, states, w.channel_blocks * rows, rows, 2 * states, call.dB});
  sum({static_cast<char*>(plan.dBC) + states * element, call.batch, terms, length, states, w.channel_blocks * rows,
       rows, 2 * states, call.dC});
  const int64_t width = call.channels * states;
  sum({plan.dA, 1, call.sequences, 1, width, 0, width, 0, call.dA});
  sum({plan.dD, 1, call.sequences, 1, call.channels, 0, call.channels, 0, call.dD});
  sum({plan.ddelta_bias, 1, call.sequences, 1, call.channels, 0, call.channels, 0, call.ddelta_bias});
  return error;
}

}  // namespace jambatalk::cuda
