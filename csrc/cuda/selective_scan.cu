// Selective scan forward and its step on NVIDIA GPUs. Backward: selective_scan_backward.cu.
//
//   delta_t = softplus(delta_t + delta_bias);   h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
//   y_t = (C_t . h_t + D u_t) silu(z_t)
//
// Algorithm: Gu and Dao, arXiv 2312.00752, run sequentially in time with the states in registers: work-optimal, unlike
// a parallel scan over time.
#include "cuda/selective_scan.h"

namespace jambatalk::cuda {
namespace {

// ---- staging: tiles of the inputs as they lie in memory, copied to shared memory while the tile before is computed

// How one input is staged. In shared memory a tile has rows of `minor` elements: of channels (or states) where those
// are neighbours in memory, of positions where time is.
struct Staged {
  Array array;
  bool time_minor;
  bool vectors;        // 16-byte asynchronous copies; otherwise element by element, which any strides allow
  int32_t log2_bytes;  // of an element
  int32_t log2_minor;
  int32_t elements;  // of a tile, without padding
  int32_t row;       // elements from row to row: `minor`, padded by 16 bytes for the banks' sake where time is minor
  int32_t offset;    // of the first of two buffers in shared memory, in bytes
  int32_t buffer;    // bytes of one
};

JT_DEVICE void copy_element(unsigned char* to, const unsigned char* from, int log2_bytes) {
  if (log2_bytes == 1)
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  else if (log2_bytes == 2)
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  else
    *reinterpret_cast<uint64_t*>(to) = *reinterpret_cast<const uint64_t*>(from);
}

// Copies the tile that begins at position `start` and `column`: its positions in [first, last) and its columns below
// `columns`. What lies outside is left as it was.
JT_DEVICE void stage(const Staged& input, unsigned char* to, int64_t batch, int64_t start, int first, int last,
                     int64_t column, int columns) {
  const int bytes = 1 << input.log2_bytes, minor = 1 << input.log2_minor;
  const unsigned char* from =
      static_cast<const unsigned char*>(input.array.data) + offset(input.array, batch, start, column) * bytes;
  const int row_first = input.time_minor ? 0 : first, row_last = input.time_minor ? columns : last;
  const int minor_first = input.time_minor ? first : 0, minor_last = input.time_minor ? last : columns;
  const int64_t row_step = input.array.stride[input.time_minor ? 2 : 1] * bytes;
  const int64_t step = input.array.stride[input.time_minor ? 1 : 2] * bytes;
  if (input.vectors) {
    const int log2_each = 4 - input.log2_bytes, each = 1 << log2_each, log2_pieces = input.log2_minor - log2_each;
#pragma unroll 1
    for (int i = threadIdx.x; i < input.elements >> log2_each; i += kScanThreads) {
      const int r = i >> log2_pieces, m = (i & ((1 << log2_pieces) - 1)) << log2_each;
      if (r < row_first || r >= row_last) continue;
      unsigned char* target = to + (r * input.row + m) * bytes;
      const unsigned char* source = from + r * row_step + m * bytes;
      if (m >= minor_first && m + each <= minor_last) {
        __pipeline_memcpy_async(target, source, 16);
      } else {
#pragma unroll 1
        for (int e = 0; e < each; ++e) {
          if (m + e >= minor_first && m + e < minor_last)
            copy_element(target + e * bytes, source + e * bytes, input.log2_bytes);
        }
      }
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < input.elements; i += kScanThreads) {
      const int r = i >> input.log2_minor, m = i & (minor - 1);
      if (r >= row_first && r < row_last && m >= minor_first && m < minor_last)
        copy_element(to + (r * input.row + m) * bytes, from + r * row_step + m * step, input.log2_bytes);
    }
  }
}

template <class T, class From>
JT_DEVICE void read_four(const unsigned char* tile, int at, int step, T (&to)[4]) {
  const From* from = reinterpret_cast<const From*>(tile) + at;
  if (step == 1) {
    const Vector<From, 4> v = *reinterpret_cast<const Vector<From, 4>*>(from);
    JT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = convert<T>(v.lane[i]);
  } else {
    JT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = convert<T>(from[i * step]);
  }
}

// Four elements of a staged tile from (t, c) on, along time or along the columns.
template <class T>
JT_DEVICE void read_four(const Staged& input, const unsigned char* tile, int t, int c, bool along_time, T (&to)[4]) {
  const int at = input.time_minor ? c * input.row + t : t * input.row + c;
  const int step = along_time == input.time_minor ? 1 : input.row;
  switch (input.array.dtype) {
    case Dtype::kFloat32:
      return read_four<T, float>(tile, at, step, to);
    case Dtype::kFloat64:
      return read_four<T, double>(tile, at, step, to);
    case Dtype::kBFloat16:
      return read_four<T, __nv_bfloat16>(tile, at, step, to);
    default:
      return read_four<T, __half>(tile, at, step, to);
  }
}

// Four positions of y, those in [first, last) of the tile.
template <class T>
JT_DEVICE void store_four(const Array& array, int64_t at, int t, int first, int last, const T (&from)[4]) {
  const auto store = [&](auto* to) {
    using To = std::remove_pointer_t<decltype(to)>;
    if (t >= first && t + 4 <= last) {
      JT_UNROLL
      for (int i = 0; i < 4; ++i) to[i * array.stride[1]] = convert<To>(from[i]);
    } else {
      JT_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (t + i >= first && t + i < last) to[i * array.stride[1]] = convert<To>(from[i]);
      }
    }
  };
  switch (array.dtype) {
    case Dtype::kFloat32:
      return store(static_cast<float*>(array.data) + at);
    case Dtype::kFloat64:
      return store(static_cast<double*>(array.data) + at);
    case Dtype::kBFloat16:
      return store(static_cast<__nv_bfloat16*>(array.data) + at);
    default:
      return store(static_cast<__half*>(array.data) + at);
  }
}

// ---- forward

enum Input { kU, kDelta, kZ, kB, kC };

struct ForwardPlan {
  ScanForward call;
  Staged inputs[5];
  int64_t channel_blocks;
};

// A block: 128 / LANES channels of one sequence. It walks time in tiles of TILE positions:
//   1. u, delta, z, B, C of the next tile are on their way (cp.async) into one of two buffers, in their own dtype;
//   2. softplus(delta + bias) and delta u of this tile, once per channel and position, and B and C, in the compute
//   type;
//   3. the recurrence, without a barrier: four positions at a time, their y reduced over a channel's lanes together;
//   4. (y + D u) silu(z), once per channel and position, to memory.
//
// Inputs of any dtype and strides (16-byte copies where channels or positions are neighbours and aligned, element by
// element otherwise); T float, or double where u is. Saves for backward the state at the start of every chunk.
//
// Cost per channel and position, N = 16, bfloat16 u, delta, z, y: 8 bytes, and 4 N / chunk of saved states; N + 3
// special functions, 16 per clock and multiprocessor; some 150 instructions of a thread (2 lanes), 128 per clock. On an
// H200 the last two bind, 1.2 clocks each; on a 4090 the bytes do. The inner loop, per warp and four positions: 4
// STATES MUFU.EX2, 8 STATES FMUL, 8 STATES FFMA; 2 STATES + 2 LDS.128 (with STATES 1: 4); SHFL 0, 2, 3, 4, 5, 6 for
// LANES 1, 2, 4 ... 32; one STS. With <2, 8> 205 instructions for 64 channels and positions, <4, 4> 116 for 32, <16, 1>
// 55 for 8: <2, 8> issues least, <16, 1> has the shortest chain. Largest request of dynamic shared memory: 99 KB
// (float32 inputs with time fastest, 2 lanes of 8 states).
template <class T, int LANES, int STATES, int TILE>
JT_DEVICE void scan_forward_block(const ForwardPlan& plan) {
  constexpr int kChannels = kScanThreads / LANES, kStates = LANES * STATES, kRow = TILE + 4;
  JT_DYNAMIC_SHARED(shared);
  T* const tile_delta = reinterpret_cast<T*>(shared);  // (channel, position), rows padded
  T* const tile_x = tile_delta + kChannels * kRow;     // delta u, then y
  T* const tile_B = tile_x + kChannels * kRow;
  T* const tile_C = tile_B + TILE * kStates;

  const ScanForward& call = plan.call;
  const int lane = threadIdx.x % LANES, mine = threadIdx.x / LANES;
  const int64_t channel0 = blockIdx.x % plan.channel_blocks * kChannels, channel = channel0 + mine;
  const Span span = span_of(call, blockIdx.x / plan.channel_blocks);
  const bool gated = call.z.data != nullptr;
  const int64_t begin = span.begin, end = span.end;

  T A[STATES], h[STATES];
  JT_UNROLL
  for (int s = 0; s < STATES; ++s) {
    const int n = state_of<LANES, STATES>(lane, s);
    const bool exists = n < call.states && channel < call.channels;
    A[s] = exists ? load_any<T>(call.A, offset(call.A, 0, channel, n)) * kLog2e<T> : T(0);
    h[s] = exists ? load_or<T>(call.initial_state, offset(call.initial_state, span.sequence, channel, n), T(0)) : T(0);
  }
  // Between the loops over time a thread works on this channel, every LANES-th group of four positions.
  const int column = threadIdx.x % kChannels, group = threadIdx.x / kChannels;
  const bool column_exists = channel0 + column < call.channels;
  const T bias =
      column_exists ? load_or<T>(call.delta_bias, (channel0 + column) * call.delta_bias.stride[2], T(0)) : T(0);
  const T D = column_exists ? load_or<T>(call.D, (channel0 + column) * call.D.stride[2], T(0)) : T(0);

  const auto save = [&](int64_t chunk, bool zero) {
    if (chunk == 0 || channel >= call.padded_channels) return;  // the first chunk starts from initial_state
    const int64_t row = span.batch * ((call.length - 1) / call.chunk) + chunk - 1;
    T* to = static_cast<T*>(call.chunk_states) + row * call.states * call.padded_channels;
    JT_UNROLL
    for (int s = 0; s < STATES; ++s) {
      const int n = state_of<LANES, STATES>(lane, s);
      if (n < call.states) to[n * call.padded_channels + channel] = zero ? T(0) : h[s];
    }
  };
  outside(call, span, [&](int64_t from, int64_t to) {
    if (column_exists) {
      for (int64_t t = from + group; t < to; t += LANES) {
        store_any<T>(call.y, offset(call.y, span.batch, t, channel0 + column), T(0));
      }
    }
    if (call.chunk_states != nullptr) {
      for (int64_t i = (from + call.chunk - 1) / call.chunk; i * call.chunk < to; ++i) save(i, true);
    }
  });

  const auto staged = [&](int which, int buffer) {
    return shared + plan.inputs[which].offset + buffer * plan.inputs[which].buffer;
  };

  int64_t next_chunk = (begin + call.chunk - 1) / call.chunk;
  int64_t next_save = call.chunk_states == nullptr ? end : next_chunk * call.chunk;  // end: never
  const int64_t aligned = begin / TILE * TILE;  // tiles begin at multiples of TILE, so that rows stay aligned
  int buffer = 1;
  for (int64_t start = aligned - TILE; start < end; start += TILE, buffer ^= 1) {  // the first round only stages
    __pipeline_wait_prior(0);
    __syncthreads();
    const int64_t next = start + TILE;
    if (next < end) {
      const int first = int(max(begin - next, int64_t(0))), last = int(min(end - next, int64_t(TILE)));
#pragma unroll 1
      for (int i = 0; i < 5; ++i) {
        const bool matrix = i >= kB;
        if (plan.inputs[i].array.data == nullptr) continue;
        stage(plan.inputs[i], staged(i, buffer ^ 1), span.batch, next, first, last, matrix ? 0 : channel0,
              int(min(matrix ? call.states : call.channels - channel0, int64_t(kScanThreads * 2))));
      }
      __pipeline_commit();
    }
    if (start < aligned) continue;

    // Positions of this tile that lie in the sequence.
    const int first = int(max(begin - start, int64_t(0))), last = int(min(end - start, int64_t(TILE)));
#pragma unroll 1
    for (int q = threadIdx.x; q < TILE * kStates / 2; q += kScanThreads) {  // B, then C
      const bool second = q >= TILE * kStates / 4;
      const int which = second ? kC : kB;
      int t, n, t_step, n_step;
      locate_four<LANES, STATES>(second ? q - TILE * kStates / 4 : q, &t, &n, &t_step, &n_step);
      T v[4];
      read_four(plan.inputs[which], staged(which, buffer), t, n, t_step == 1, v);
      if (t < first || t + 3 * t_step >= last || n + 3 * n_step >= int(call.states)) {
        JT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = t + i * t_step;
          if (at < first || at >= last || n + i * n_step >= int(call.states)) v[i] = T(0);
        }
      }
      reinterpret_cast<Four<T>*>(tile_B)[q] = Four<T>{{v[0], v[1], v[2], v[3]}};
    }
#pragma unroll 1
    for (int t = group * 4; t < TILE; t += LANES * 4) {
      T u[4], delta[4];
      read_four(plan.inputs[kDelta], staged(kDelta, buffer), t, column, true, delta);
      read_four(plan.inputs[kU], staged(kU, buffer), t, column, true, u);
      JT_UNROLL
      for (int i = 0; i < 4; ++i) {
        delta[i] += bias;
        if (call.softplus) delta[i] = softplus_fast(delta[i]);
        u[i] *= delta[i];
      }
      if (!column_exists || t < first || t + 4 > last) {
        JT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!column_exists || t + i < first || t + i >= last) delta[i] = u[i] = T(0);
        }
      }
      *reinterpret_cast<Four<T>*>(tile_delta + column * kRow + t) = Four<T>{{delta[0], delta[1], delta[2], delta[3]}};
      *reinterpret_cast<Four<T>*>(tile_x + column * kRow + t) = Four<T>{{u[0], u[1], u[2], u[3]}};
    }
    __syncthreads();

#pragma unroll 1
    for (int t = 0; t < TILE;) {
      const int stop = next_save < end ? int(min(next_save - start, int64_t(TILE))) : TILE;
#pragma unroll 1
      for (; t < stop; t += 4) {
        const Four<T> d = *reinterpret_cast<const Four<T>*>(tile_delta + mine * kRow + t);
        const Four<T> x = *reinterpret_cast<const Four<T>*>(tile_x + mine * kRow + t);
        const Rows<LANES, STATES, T> rows_B(tile_B, t, lane), rows_C(tile_C, t, lane);
        T y[4];
        JT_UNROLL
        for (int i = 0; i < 4; ++i) {
          T B[STATES], C[STATES];
          rows_B.read(i, B);
          rows_C.read(i, C);
          y[i] = T(0);
          JT_UNROLL
          for (int s = 0; s < STATES; ++s) {
            h[s] = exp2_fast(d.lane[i] * A[s]) * h[s] + x.lane[i] * B[s];
            y[i] += h[s] * C[s];
          }
        }
        sum_over_lanes<LANES>(y, tile_x + mine * kRow + t, lane);
      }
      if (t < TILE) {
        save(next_chunk, false);
        ++next_chunk, next_save += call.chunk;
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int t = group * 4; t < TILE; t += LANES * 4) {
      if (!column_exists) break;
      T u[4], z[4];
      read_four(plan.inputs[kU], staged(kU, buffer), t, column, true, u);
      if (gated) read_four(plan.inputs[kZ], staged(kZ, buffer), t, column, true, z);
      const Four<T> sum = *reinterpret_cast<const Four<T>*>(tile_x + column * kRow + t);
      T y[4];
      JT_UNROLL
      for (int i = 0; i < 4; ++i) {
        y[i] = sum.lane[i] + D * u[i];
        if (gated) y[i] *= z[i] * sigmoid_fast(z[i]);
      }
      store_four(call.y, offset(call.y, span.batch, start + t, channel0 + column), t, first, last, y);
    }
  }
  if (channel < call.channels) {
    JT_UNROLL
    for (int s = 0; s < STATES; ++s) {
      const int n = state_of<LANES, STATES>(lane, s);
      if (n < call.states)
        static_cast<T*>(call.final_state.data)[offset(call.final_state, span.sequence, channel, n)] = h[s];
    }
  }
}

// budget: registers <= 128, spills 0, shared <= 0
template <int LANES, int STATES, int TILE>
__global__ void __launch_bounds__(kScanThreads, 4) scan_forward_kernel(const ForwardPlan plan) {
  scan_forward_block<float, LANES, STATES, TILE>(plan);
}
// budget: registers <= 255, spills 0, shared <= 0
template <int LANES, int STATES, int TILE>
__global__ void __launch_bounds__(kScanThreads, 2) scan_forward_float64_kernel(const ForwardPlan plan) {
  scan_forward_block<double, LANES, STATES, TILE>(plan);
}

template <class T, int LANES, int STATES, int TILE>
const char* run_forward(const ScanForward& call) {
  constexpr int64_t kChannels = kScanThreads / LANES, kStates = LANES * STATES;
  ForwardPlan plan{};
  plan.call = call;
  int64_t shared = int64_t(sizeof(T)) * (2 * kChannels * (TILE + 4) + 2 * TILE * kStates);
  const Array* const arrays[5] = {&call.u, &call.delta, &call.z, &call.B, &call.C};
  for (int i = 0; i < 5; ++i) {
    const Array& array = *arrays[i];
    Staged& s = plan.inputs[i];
    s.array = array;
    const int columns = int(i >= kB ? kStates : kChannels);
    const auto log2 = [](int64_t x) {
      return x < 2 ? 0 : x < 4 ? 1 : x < 8 ? 2 : x < 16 ? 3 : x < 32 ? 4 : x < 64 ? 5 : x < 128 ? 6 : x < 256 ? 7 : 8;
    };
    const auto size = [](int64_t stride) { return stride < 0 ? -stride : stride; };
    const int bytes = array.dtype == Dtype::kFloat64 ? 8 : array.dtype == Dtype::kFloat32 ? 4 : 2;
    s.log2_bytes = log2(bytes);
    s.time_minor = size(array.stride[1]) < size(array.stride[2]);
    const int minor = s.time_minor ? TILE : columns;
    s.log2_minor = log2(minor);
    s.elements = TILE * columns;
    s.row = s.time_minor ? TILE + 16 / bytes : columns;
    s.vectors = array.stride[s.time_minor ? 1 : 2] == 1 && minor * bytes % 16 == 0 &&
                array.stride[s.time_minor ? 2 : 1] * bytes % 16 == 0 && array.stride[0] * bytes % 16 == 0 &&
                reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
    s.offset = int32_t(shared);
    s.buffer = (s.time_minor ? columns : TILE) * s.row * bytes;
    if (array.data != nullptr) shared += 2 * s.buffer;
  }
  const int64_t channels = call.chunk_states == nullptr ? call.channels : call.padded_channels;
  plan.channel_blocks = (channels + kChannels - 1) / kChannels;
  const dim3 blocks(unsigned(plan.channel_blocks * call.sequences));
  if constexpr (std::is_same_v<T, float>)
    return launch(scan_forward_kernel<LANES, STATES, TILE>, blocks, kScanThreads, shared, call.device, plan);
  else
    return launch(scan_forward_float64_kernel<LANES, STATES, TILE>, blocks, kScanThreads, shared, call.device, plan);
}

// ---- step

// One position. A group of lanes, a power of two, takes the states of one channel, neighbours in memory by neighbouring
// lanes: the state is read and written once, coalesced. 2 * batch * channels * states numbers of state move, which
// binds; for few of them the latency of one pass through memory.
//
// budget: registers <= 64, spills 0, shared <= 0
template <class T>
__global__ void __launch_bounds__(kScanThreads) scan_step_kernel(const ScanStep call, int lanes) {
  const int64_t index = (int64_t(blockIdx.x) * kScanThreads + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  const bool exists = index < call.batch * call.channels;
  const int64_t batch = exists ? index / call.channels : 0, channel = exists ? index % call.channels : 0;
  T delta = load_any<T>(call.delta, offset(call.delta, 0, batch, channel)) +
            load_or<T>(call.delta_bias, channel * call.delta_bias.stride[2], T(0));
  if (call.softplus) delta = softplus_fast(delta);
  const T u = load_any<T>(call.u, offset(call.u, 0, batch, channel)), x = delta * u, rate = delta * kLog2e<T>;
  T y = T(0);
  for (int64_t n = lane; exists && n < call.states; n += lanes) {
    const int64_t at = offset(call.state, batch, channel, n);
    const T decay = exp2_fast(rate * load_any<T>(call.A, offset(call.A, 0, channel, n)));
    const T h = decay * load_any<T>(call.state, at) + x * load_any<T>(call.B, offset(call.B, 0, batch, n));
    y += h * load_any<T>(call.C, offset(call.C, 0, batch, n));
    store_any<T>(call.state, at, h);
  }
  for (int apart = lanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(kAllLanes, y, apart);
  if (!exists || lane != 0) return;
  y += load_or<T>(call.D, channel * call.D.stride[2], T(0)) * u;
  if (call.z.data != nullptr) {
    const T z = load_any<T>(call.z, offset(call.z, 0, batch, channel));
    y *= z * sigmoid_fast(z);
  }
  store_any<T>(call.y, offset(call.y, 0, batch, channel), y);
}

}  // namespace

int64_t scan_forward_workspace(const ScanForward&) { return 0; }

const char* launch_scan_forward(const ScanForward& call) {
  if (call.sequences == 0 || call.channels == 0) return nullptr;
  if (call.states > 256) return "selective_scan: at most 256 states";
  ScanShape shape = scan_forward_shape(call.sequences, call.channels, call.states, call.device.multiprocessors);
  for (const Array* array : {&call.delta, &call.z, &call.B, &call.C}) {
    // Tiles of 64 or 128 channels in float64 do not fit into the 99 KB of shared memory that some cards have.
    if (array->data != nullptr && array->dtype == Dtype::kFloat64 && shape.lanes <= 2) shape = {4, 4};
  }
  if (call.u.dtype == Dtype::kFloat64) {
    if (call.states <= 16) return run_forward<double, 4, 4, 16>(call);
    if (call.states <= 128) return run_forward<double, 32, 4, 8>(call);
    return run_forward<double, 32, 8, 4>(call);
  }
  switch (shape.lanes * 100 + shape.states) {
    case 104:
      return run_forward<float, 1, 4, 16>(call);
    case 204:
      return run_forward<float, 2, 4, 32>(call);
    case 208:
      return run_forward<float, 2, 8, 32>(call);
    case 404:
      return run_forward<float, 4, 4, 32>(call);
    case 1601:
      return run_forward<float, 16, 1, 64>(call);
    case 804:
      return run_forward<float, 8, 4, 32>(call);
    case 1604:
      return run_forward<float, 16, 4, 32>(call);
    case 3204:
      return run_forward<float, 32, 4, 16>(call);
    default:
      return run_forward<float, 32, 8, 8>(call);
  }
}

const char* launch_scan_step(const ScanStep& call) {
  int lanes = 1;
  while (lanes < 32 && lanes < call.states) lanes *= 2;
  const int64_t threads = call.batch * call.channels * lanes;
  const dim3 blocks(unsigned((threads + kScanThreads - 1) / kScanThreads));
  if (call.u.dtype == Dtype::kFloat64)
    return launch(scan_step_kernel<double>, blocks, kScanThreads, 0, call.device, call, lanes);
  return launch(scan_step_kernel<float>, blocks, kScanThreads, 0, call.device, call, lanes);
}

}  // namespace jambatalk::cuda
