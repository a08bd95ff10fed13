// The autoregressive loop: all frames and all layers in one launch (formulas: jambatalk_kernels/rollout/program.py and
// reference.py; the packed program: packing.py).
//
// A team of blocks works on one sequence. A frame is a chain of phases, at the end of which the team meets: a Mamba
// mixer has four (in_proj with convolution and gate; x_proj; dt_proj with the scan; out_proj with the residual),
// attention three, an MLP two, the feedback one. Norms, routing and rotation are done by every block for itself, since
// that costs less than to meet once more.
//
// A team of one block keeps its vectors in shared memory and meets at a barrier of the block: for small models, whose
// weights all blocks read from L2, so that many sequences share a card. A larger team passes vectors through global
// memory and meets at a counter (release on arrival, acquire on departure); its blocks must all be on the device, so
// the launch is cooperative and no larger than what fits. Who waits for longer than kPatience says so and leaves, and
// so does everybody else: a hang becomes an error that the caller reads when the call is over.
//
// A product's task is eight outputs: a warp reads 16 bytes of weights per lane, eight outputs by four stretches of
// `in` at a time, and adds the four by shuffles. Where a block has fewer tasks than warps, several share one, each with
// a part of `in`, and their sums are added in order. Every sum has one order that depends on the sizes and the team
// only: the same bytes in every run.
//
// Cost per frame: the active weights once per team from L2 (2 bytes a weight in bfloat16), about 64 bytes per clock and
// multiprocessor (kernels.md 1.0); and 42 meetings for seven layers, of some 0.7 us in a large team. Arithmetic is
// float32. States are read and written in place, in global memory.
#include "cuda/device.h"
#include "cuda/selective_scan.h"

namespace jambatalk::cuda {
namespace {

constexpr int kThreads = kRolloutThreads, kWarps = kThreads / 32;
constexpr int kPanel = 32, kOutputs = 8;  // of a panel of the packing, of a task
constexpr int kMostParts = 16;            // of the positions that attention sees, per head
constexpr int kStripes = kRolloutHeadDim / 32;
constexpr uint64_t kPatience = 4'000'000'000;  // nanoseconds
constexpr unsigned kAll = 0xffffffffu;

// Floats of the scratch at the end of a block's memory: the meeting's flag, the sums of a block, those of products that
// warps share, the routing.
constexpr int kBlockSums = 16, kPartial = kBlockSums + 2 * kWarps, kChosen = kPartial + kWarps * 2 * kOutputs;
constexpr int kScratch = kChosen + 2 * kRolloutSlots + kRolloutExperts;

JT_DEVICE constexpr int padded(int size, int to) { return (size + to - 1) / to * to; }
JT_DEVICE constexpr int parts_of(int team, int heads) {
  const int most = team * kWarps / heads;
  return most < 1 ? 1 : most < kMostParts ? most : kMostParts;
}

// ---- teams

struct Alone {
  static constexpr bool kAlone = true;
  int rank = 0, size = 1;

  JT_DEVICE Alone(const RolloutCall&, int*) {}
  JT_DEVICE int64_t first() const { return blockIdx.x; }
  JT_DEVICE int64_t teams() const { return gridDim.x; }
  JT_DEVICE bool meet() {
    __syncthreads();
    return true;
  }
};

class Several {
 public:
  static constexpr bool kAlone = false;
  int rank, size;

  // `alive`: in shared memory
  JT_DEVICE Several(const RolloutCall& call, int* alive)
      : rank(int(blockIdx.x) % call.team), size(call.team), error_(call.error), alive_(alive) {
    counter_ = static_cast<unsigned*>(call.workspace) + first() * 32;  // a line for each team
    if (threadIdx.x == 0) *alive = 1;
  }
  JT_DEVICE int64_t first() const { return int(blockIdx.x) / size; }
  JT_DEVICE int64_t teams() const { return int(gridDim.x) / size; }

  // False: somebody did not come. The caller must leave.
  JT_DEVICE bool meet() {
    target_ += unsigned(size);
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter_, 1);
      uint64_t since = 0;
      // The counter may wrap around: their difference counts.
      for (int turn = 0; int(load_acquire(counter_) - target_) < 0; ++turn) {
        if (turn % 64 != 63) {
#if defined(__CUDACC__)
          continue;
#endif
        }
        const uint64_t now = look_at_clock();
        if (since == 0) since = now;
        if (now - since > kPatience) *static_cast<volatile int32_t*>(error_) = 1;
        if (*static_cast<volatile int32_t*>(error_) != 0) {
          *alive_ = 0;
          break;
        }
      }
    }
    __syncthreads();
    return *alive_ != 0;
  }

 private:
  unsigned *counter_, target_ = 0;
  int32_t* error_;
  int* alive_;
};

// ---- small functions of a warp

JT_DEVICE float warp_sum(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kAll, x, apart);
  return x;
}
JT_DEVICE float warp_max(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, apart));
  return x;
}

// sum[0], sum[1] += 16 bytes of weights times as many elements of x; even and odd apart, for shorter chains.
JT_DEVICE void multiply(const uint4& w, const float* x, float (&sum)[2], float) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  sum[0] += __uint_as_float(w.x) * v.x;
  sum[1] += __uint_as_float(w.y) * v.y;
  sum[0] += __uint_as_float(w.z) * v.z;
  sum[1] += __uint_as_float(w.w) * v.w;
}
JT_DEVICE void multiply(const uint4& w, const float* x, float (&sum)[2], __nv_bfloat16) {
  const unsigned words[4] = {w.x, w.y, w.z, w.w};
  JT_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const float4 v = *reinterpret_cast<const float4*>(x + 2 * i);
    sum[0] += __uint_as_float(words[i] << 16) * v.x;
    sum[1] += __uint_as_float(words[i] & 0xffff0000u) * v.y;
    sum[0] += __uint_as_float(words[i + 1] << 16) * v.z;
    sum[1] += __uint_as_float(words[i + 1] & 0xffff0000u) * v.w;
  }
}

// ---- one block

template <class Team, class Weight>
class Rollout {
  static constexpr int kTogether = 16 / sizeof(Weight);  // neighbours of `in` in 16 bytes

 public:
  JT_DEVICE Rollout(const RolloutCall& call, float* shared)
      : call_(call), at_(call.at), shared_(shared), team_(call, reinterpret_cast<int*>(shared + call.at.scratch)) {
    warp_ = int(threadIdx.x) / 32, lane_ = int(threadIdx.x) % 32;
    output_ = lane_ % kOutputs, quarter_ = lane_ / kOutputs;
    // After the counters of all teams.
    if constexpr (!Team::kAlone) {
      mirror_ = static_cast<float*>(call.workspace) + team_.teams() * 32 + team_.first() * call.at.end;
    }
  }

  JT_DEVICE void run() {
    for (sequence_ = team_.first(); sequence_ < call_.batch; sequence_ += team_.teams()) {
      const int64_t own = call_.lengths[sequence_], last = own < call_.end ? own : call_.end;
      // What a wider layer leaves in a narrower one's padding meets weights of zero, so it only must not be a NaN of
      // another sequence.
      __syncthreads();
      for (int i = int(threadIdx.x); i < at_.scratch; i += kThreads) shared_[i] = 0;
      __syncthreads();
      for (int i = int(threadIdx.x); i < call_.width; i += kThreads) {
        shared_[at_.feedback + i] = call_.feedback_state[sequence_ * call_.width + i];
      }
      for (frame_ = call_.begin; frame_ < last; ++frame_) {
        if (!step()) return;
      }
      if (call_.begin < last && team_.rank == 0) finish_sequence(last - call_.begin);
    }
  }

 private:
  // ---- vectors: every block has its own copy in shared memory; what a team computes goes through `mirror_`

  JT_DEVICE void publish(int at, float value) {
    if constexpr (Team::kAlone) {
      shared_[at] = value;
    } else {
      __stcg(mirror_ + at, value);
    }
  }
  JT_DEVICE float read(int at) const {
    if constexpr (Team::kAlone) {
      return shared_[at];
    } else {
      return __ldcg(mirror_ + at);
    }
  }
  JT_DEVICE void gather(int at, int size) {
    if constexpr (!Team::kAlone) {
#pragma unroll 2
      for (int i = int(threadIdx.x); i < size; i += kThreads) shared_[at + i] = __ldcg(mirror_ + at + i);
      __syncthreads();
    }
  }

  template <class T>
  JT_DEVICE const T* section(uint32_t offset) const {
    return reinterpret_cast<const T*>(call_.storage + int64_t(offset) * 64);
  }

  // ---- norms

  JT_DEVICE float block_sum(float x) {
    float* sums = shared_ + at_.scratch + kBlockSums + turn_ * kWarps;  // two in turns: one barrier is enough
    turn_ ^= 1;
    x = warp_sum(x);
    if (lane_ == 0) sums[warp_] = x;
    __syncthreads();
    x = 0;
    JT_UNROLL
    for (int i = 0; i < kWarps; ++i) x += sums[i];
    return x;
  }

  // normed = norm(x)
  JT_DEVICE void norm(uint32_t weight) {
    const float *x = shared_ + at_.x, *scale = section<float>(weight);
    float squares = 0;
#pragma unroll 2
    for (int i = int(threadIdx.x); i < call_.width; i += kThreads) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(block_sum(squares) / float(call_.width) + call_.eps);
#pragma unroll 2
    for (int i = int(threadIdx.x); i < call_.width; i += kThreads) shared_[at_.normed + i] = x[i] * factor * scale[i];
    __syncthreads();
  }

  // The same by one warp, for a short vector.
  JT_DEVICE void norm_short(int from, int to, int size, uint32_t weight) {
    const float* scale = section<float>(weight);
    float squares = 0;
    for (int i = lane_; i < size; i += 32) squares += shared_[from + i] * shared_[from + i];
    const float factor = 1.0f / sqrtf(warp_sum(squares) / float(size) + call_.eps);
    for (int i = lane_; i < size; i += 32) shared_[to + i] = shared_[from + i] * factor * scale[i];
  }

  // ---- products

  // What a warp adds up of eight rows: groups [begin, end) of 16 bytes of each.
  template <int Rows>
  JT_DEVICE void accumulate(const uint4* const (&w)[Rows], const float* x, int begin, int end, float (&sum)[Rows][2]) {
    constexpr int kAhead = Rows == 1 ? 4 : 2;  // loads of each that are under way together
    int g = begin + quarter_;
    for (; g + 4 * (kAhead - 1) < end; g += 4 * kAhead) {
      uint4 loaded[kAhead][Rows];
      JT_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        JT_UNROLL
        for (int r = 0; r < Rows; ++r) loaded[i][r] = load_streamed(w[r] + (g + 4 * i) * kPanel);
      }
      JT_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        JT_UNROLL
        for (int r = 0; r < Rows; ++r) multiply(loaded[i][r], x + (g + 4 * i) * kTogether, sum[r], Weight());
      }
    }
    for (; g < end; g += 4) {
      JT_UNROLL
      for (int r = 0; r < Rows; ++r) multiply(load_streamed(w[r] + g * kPanel), x + g * kTogether, sum[r], Weight());
    }
  }

  // finish(unit, values) for the units of this block, by whole warps; lanes with the same `output_` have the same
  // values. A unit is `Rows` times eight outputs; locate(unit, row, term) says which eight of the matrix. The sum goes
  // over `terms` vectors, `pitch` apart, each with a matrix of its own.
  template <int Rows, class Locate, class Finish>
  JT_DEVICE void product(uint32_t matrix, int in, int units, int terms, int x, int pitch, Locate locate,
                         Finish finish) {
    const int groups = padded(in, 8) / kTogether;
    const uint4* base = section<uint4>(matrix) + output_;
    const int share = (units + team_.size - 1) / team_.size, slices = share >= kWarps ? 1 : kWarps / share;
    const int slice = warp_ % slices, length = padded((groups + slices - 1) / slices, 4);
    const int begin = slice * length, end = begin + length < groups ? begin + length : groups;
    float* partial = shared_ + at_.scratch + kPartial;
    for (int local = warp_ / slices; local < share; local += kWarps / slices) {
      const int unit = team_.rank + local * team_.size;
      if (unit >= units) break;
      float sum[Rows][2] = {}, value[Rows];
      for (int term = 0; term < terms; ++term) {
        const uint4* w[Rows];
        JT_UNROLL
        for (int r = 0; r < Rows; ++r) {
          const int eight = locate(unit, r, term);
          w[r] = base + (int64_t(eight / 4) * groups * kPanel + eight % 4 * kOutputs);
        }
        accumulate<Rows>(w, shared_ + x + term * pitch, begin, end, sum);
      }
      JT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        value[r] = sum[r][0] + sum[r][1];
        value[r] += __shfl_xor_sync(kAll, value[r], 8);
        value[r] += __shfl_xor_sync(kAll, value[r], 16);
        if (slices > 1 && quarter_ == 0) partial[((local * Rows + r) * slices + slice) * kOutputs + output_] = value[r];
      }
      if (slices == 1) finish(unit, value);
    }
    if (slices == 1) return;
    __syncthreads();
    for (int local = warp_; local < share; local += kWarps) {
      const int unit = team_.rank + local * team_.size;
      if (unit >= units) break;
      float value[Rows];
      JT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        value[r] = 0;
#pragma unroll 2
        for (int i = 0; i < slices; ++i) value[r] += partial[((local * Rows + r) * slices + i) * kOutputs + output_];
      }
      finish(unit, value);
    }
  }

  // One matrix, one vector: finish(output, value), by all lanes; the output may be beyond the last.
  template <class Finish>
  JT_DEVICE void multiply_all(uint32_t matrix, int in, int out, int x, Finish finish) {
    product<1>(
        matrix, in, (out + kOutputs - 1) / kOutputs, 1, x, 0, [](int unit, int, int) { return unit; },
        [&](int unit, const float (&value)[1]) { finish(unit * kOutputs + output_, value[0]); });
  }

  JT_DEVICE void add_to_x(int n, float value) {
    if (quarter_ == 0 && n < call_.width) publish(at_.x + n, shared_[at_.x + n] + value);
  }

  // ---- one frame

  JT_DEVICE bool step() {
    if (call_.has_feedback && frame_ > call_.begin) gather(at_.feedback, call_.width);
    const float* input = static_cast<const float*>(call_.inputs.data) + offset(call_.inputs, sequence_, frame_, 0);
    __syncthreads();
#pragma unroll 2
    for (int i = int(threadIdx.x); i < call_.width; i += kThreads) {
      shared_[at_.x + i] = input[i * call_.inputs.stride[2]] + shared_[at_.feedback + i];
    }
    __syncthreads();
    for (int l = 0; l < call_.layer_count; ++l) {
      const RolloutLayer& layer = call_.layers[l];
      if (l > 0) gather(at_.x, call_.width);
      norm(layer.norm);
      if (!(layer.attention ? attention(layer) : mamba(layer))) return false;
      if (!mlp(layer)) return false;
    }
    if (call_.layer_count > 0) gather(at_.x, call_.width);
    norm(call_.final_norm);
    if (team_.rank == 0) {
      float* hidden = static_cast<float*>(call_.hidden.data) + offset(call_.hidden, sequence_, frame_, 0);
#pragma unroll 2
      for (int i = int(threadIdx.x); i < call_.width; i += kThreads) {
        hidden[i * call_.hidden.stride[2]] = shared_[at_.normed + i];
      }
    }
    if (!call_.has_feedback) return true;
    const float* bias = section<float>(call_.feedback_bias);
    multiply_all(call_.feedback, call_.width, call_.width, at_.normed, [&](int n, float value) {
      if (quarter_ == 0 && n < call_.width) publish(at_.feedback + n, value + bias[n]);
    });
    return team_.meet();
  }

  JT_DEVICE void finish_sequence(int64_t frames) {
    if (call_.has_feedback) {
      gather(at_.feedback, call_.width);
      for (int i = int(threadIdx.x); i < call_.width; i += kThreads) {
        call_.feedback_state[sequence_ * call_.width + i] = shared_[at_.feedback + i];
      }
    }
    if (threadIdx.x != 0) return;
    call_.position[sequence_] += frames;
    for (int l = 0; l < call_.layer_count; ++l) {
      if (call_.layers[l].attention) call_.layers[l].position[sequence_] += frames;
    }
  }

  // ---- Mamba

  JT_DEVICE bool mamba(const RolloutLayer& layer) {
    const int half = padded(layer.inner, kPanel);
    multiply_all(layer.in, call_.width, 2 * half, at_.normed, [&](int n, float value) {
      const int channel = n < half ? n : n - half;
      if (quarter_ != 0 || channel >= layer.inner) return;
      if (n < half) {
        publish(at_.first + channel, convolve(layer, channel, value));
      } else {
        publish(at_.gate + channel, value * sigmoid_fast(value));
      }
    });
    if (!team_.meet()) return false;
    gather(at_.first, layer.inner);
    const int low = layer.rank + 2 * layer.states;
    multiply_all(layer.x_proj, layer.inner, low, at_.first, [&](int n, float value) {
      if (quarter_ == 0 && n < low) publish(at_.projected + n, value);
    });
    if (!team_.meet()) return false;
    gather(at_.projected, low);
    const int B = at_.low + padded(layer.rank, 8), C = B + padded(layer.states, 8);
    if (warp_ == 0) norm_short(at_.projected, at_.low, layer.rank, layer.dt_norm);
    if (warp_ == 1) norm_short(at_.projected + layer.rank, B, layer.states, layer.b_norm);
    if (warp_ == 2) norm_short(at_.projected + layer.rank + layer.states, C, layer.states, layer.c_norm);
    __syncthreads();
    multiply_all(layer.dt_proj, layer.rank, layer.inner, at_.low,
                 [&](int n, float value) { scan(layer, n, value, shared_ + B, shared_ + C); });
    if (!team_.meet()) return false;
    gather(at_.mixed, layer.inner);
    multiply_all(layer.out, layer.inner, call_.width, at_.mixed, [&](int n, float value) { add_to_x(n, value); });
    return team_.meet();
  }

  // The convolution's step with its silu; its state moves up by one.
  JT_DEVICE float convolve(const RolloutLayer& layer, int channel, float value) {
    const int history = layer.width - 1;
    const float* taps = section<float>(layer.taps) + channel / kPanel * (layer.width + 1) * kPanel + channel % kPanel;
    float* state = layer.conv + sequence_ * history * layer.inner + channel;
    float sum = taps[layer.width * kPanel] + value * taps[history * kPanel];
#pragma unroll 1
    for (int j = 0; j < history; ++j) {
      sum += state[int64_t(j) * layer.inner] * taps[j * kPanel];
      state[int64_t(j) * layer.inner] = j + 1 < history ? state[int64_t(j + 1) * layer.inner] : value;
    }
    return sum * sigmoid_fast(sum);
  }

  // Four lanes share a channel's states. All lanes of the warp come here.
  JT_DEVICE void scan(const RolloutLayer& layer, int channel, float value, const float* B, const float* C) {
    const int N = layer.states;
    const bool exists = channel < layer.inner;
    if (!exists) channel = 0;
    const float delta = softplus_fast(value + section<float>(layer.dt_bias)[channel]);
    const float u = shared_[at_.first + channel], drive = delta * u;
    const float* A = section<float>(layer.A) + channel / kPanel * N * kPanel + channel % kPanel;
    float* state = layer.scan + (sequence_ * layer.inner + channel) * N;
    float y = 0;
    if (N == 16 && exists) {
      float4 h = reinterpret_cast<float4*>(state)[quarter_];
      const float4 b = reinterpret_cast<const float4*>(B)[quarter_], c = reinterpret_cast<const float4*>(C)[quarter_];
      A += 4 * quarter_ * kPanel;
      h.x = exp2_fast(delta * A[0]) * h.x + drive * b.x;
      h.y = exp2_fast(delta * A[kPanel]) * h.y + drive * b.y;
      h.z = exp2_fast(delta * A[2 * kPanel]) * h.z + drive * b.z;
      h.w = exp2_fast(delta * A[3 * kPanel]) * h.w + drive * b.w;
      reinterpret_cast<float4*>(state)[quarter_] = h;
      y = (h.x * c.x + h.y * c.y) + (h.z * c.z + h.w * c.w);
    } else if (exists) {
#pragma unroll 1
      for (int n = quarter_; n < N; n += 4) {
        const float h = exp2_fast(delta * A[n * kPanel]) * state[n] + drive * B[n];
        state[n] = h;
        y += h * C[n];
      }
    }
    y += __shfl_xor_sync(kAll, y, 8);
    y += __shfl_xor_sync(kAll, y, 16);
    if (!exists || quarter_ != 0) return;
    y += section<float>(layer.D)[channel] * u;
    publish(at_.mixed + channel, y * read(at_.gate + channel));
  }

  // ---- attention

  JT_DEVICE bool attention(const RolloutLayer& layer) {
    const int D = layer.head_dim, size = layer.heads * D, all = size + 2 * layer.kv_heads * D;
    multiply_all(layer.in, call_.width, all, at_.normed, [&](int n, float value) {
      if (quarter_ == 0 && n < all) publish(at_.first + n, value);
    });
    if (!team_.meet()) return false;
    gather(at_.first, all);
    rotate(layer);
    const int parts = parts_of(team_.size, layer.heads);
    for (int task = team_.rank + warp_ * team_.size; task < layer.heads * parts; task += kWarps * team_.size) {
      attend(layer, task / parts, task % parts, parts);
    }
    if (!team_.meet()) return false;
    combine(layer, parts);
    multiply_all(layer.out, size, call_.width, at_.mixed, [&](int n, float value) { add_to_x(n, value); });
    return team_.meet();
  }

  // Turns q and k by the position's angles, and scales q, for a softmax of powers of two.
  JT_DEVICE void rotate(const RolloutLayer& layer) {
    const int half = layer.head_dim / 2, pairs = (layer.heads + layer.kv_heads) * half;
    const double position = double(call_.position[sequence_] + frame_ - call_.begin);
    const float scale = MathConstants<float>::kLog2e / sqrtf(float(layer.head_dim));
    for (int i = int(threadIdx.x); i < pairs; i += kThreads) {
      const int head = i / half, f = i % half;
      const double turns = position * section<double>(layer.frequency)[f] * 0.15915494309189535;
      float sine, cosine;
      sincospif(float(2.0 * (turns - rint(turns))), &sine, &cosine);
      float* first = shared_ + at_.first + head * layer.head_dim + f;
      const float a = first[0], b = first[half], factor = head < layer.heads ? scale : 1.0f;
      first[0] = (a * cosine - b * sine) * factor;
      first[half] = (a * sine + b * cosine) * factor;
    }
    __syncthreads();
  }

  // One head's softmax over a part of the visible positions, by one warp; the new position's part stores it.
  JT_DEVICE void attend(const RolloutLayer& layer, int head, int part, int parts) {
    const int D = layer.head_dim, group = layer.heads / layer.kv_heads, kv_head = head / group;
    const int capacity = layer.capacity;
    const int64_t seen = layer.position[sequence_] + frame_ - call_.begin;
    int visible = seen + 1 < capacity ? int(seen) + 1 : capacity;
    if (layer.window > 0 && visible > layer.window) visible = layer.window;
    const int newest = int(seen % capacity);  // slot
    const int oldest = newest - (visible - 1) + (newest < visible - 1 ? capacity : 0);
    const int64_t step = int64_t(layer.kv_heads) * D, base = sequence_ * capacity * step + int64_t(kv_head) * D;
    const int length = padded((visible + parts - 1) / parts, 32);
    const int begin = part * length;
    int end = begin + length < visible ? begin + length : visible;
    const float* q = shared_ + at_.first + head * D;
    float top = -INFINITY, total = 0, sum[kStripes] = {};
    if (begin < end && end == visible) {  // the new position is the last
      --end;
      const float *k = shared_ + at_.first + (layer.heads + kv_head) * D, *v = k + layer.kv_heads * D;
      const int64_t slot = base + newest * step;
      float score = 0;
      JT_UNROLL
      for (int i = 0; i < kStripes; ++i) {
        const int f = i * 32 + lane_;
        if (f >= D) continue;
        score += q[f] * k[f];
        sum[i] = v[f];
        if (head % group == 0) layer.keys[slot + f] = k[f], layer.values[slot + f] = v[f];
      }
      top = warp_sum(score), total = 1;
    }
    for (int j = begin; j < end; j += 32) {
      const int count = end - j < 32 ? end - j : 32;
      const auto place = [&](int i) {
        const int slot = oldest + j + i;
        return base + (slot < capacity ? slot : slot - capacity) * step;
      };
      float score = -INFINITY;
      if (lane_ < count) {
        const float* k = layer.keys + place(lane_);
        score = 0;
        if (D % 4 == 0) {
#pragma unroll 2
          for (int f = 0; f < D; f += 4) {
            const float4 a = *reinterpret_cast<const float4*>(q + f), b = *reinterpret_cast<const float4*>(k + f);
            score += (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
          }
        } else {
#pragma unroll 1
          for (int f = 0; f < D; ++f) score += q[f] * k[f];
        }
      }
      const float higher = fmaxf(top, warp_max(score));
      const float fade = exp2_fast(top - higher), weight = exp2_fast(score - higher);
      top = higher;
      total = total * fade + warp_sum(weight);
      JT_UNROLL
      for (int s = 0; s < kStripes; ++s) sum[s] *= fade;
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const float one = __shfl_sync(kAll, weight, i);
        const float* v = layer.values + place(i);
        JT_UNROLL
        for (int s = 0; s < kStripes; ++s) {
          if (s * 32 + lane_ < D) sum[s] += one * v[s * 32 + lane_];
        }
      }
    }
    const int to = at_.parts + (head * parts + part) * (D + 2);
    JT_UNROLL
    for (int s = 0; s < kStripes; ++s) {
      if (s * 32 + lane_ < D) publish(to + s * 32 + lane_, sum[s]);
    }
    if (lane_ == 0) publish(to + D, top), publish(to + D + 1, total);
  }

  JT_DEVICE void combine(const RolloutLayer& layer, int parts) {
    const int D = layer.head_dim;
    for (int i = int(threadIdx.x); i < layer.heads * D; i += kThreads) {
      const int from = at_.parts + i / D * parts * (D + 2), f = i % D;
      float top = -INFINITY, total = 0, sum = 0;
      for (int p = 0; p < parts; ++p) top = fmaxf(top, read(from + p * (D + 2) + D));
#pragma unroll 2
      for (int p = 0; p < parts; ++p) {
        const int at = from + p * (D + 2);
        const float share = exp2_fast(read(at + D) - top);
        total += share * read(at + D + 1);
        sum += share * read(at + f);
      }
      shared_[at_.mixed + i] = sum / total;
    }
    __syncthreads();
  }

  // ---- MLP

  JT_DEVICE bool mlp(const RolloutLayer& layer) {
    gather(at_.x, call_.width);
    norm(layer.mlp_norm);
    route(layer);
    const int* chosen = reinterpret_cast<const int*>(shared_ + at_.scratch + kChosen);
    const float* weights = shared_ + at_.scratch + kChosen + kRolloutSlots;
    // A panel of w_in: 16 gates, then their ups; a unit is half of it.
    const int halves = (layer.hidden + kOutputs - 1) / kOutputs, panels = padded(layer.hidden, 16) / 16;
    const int pitch = padded(layer.hidden, 8);
    product<2>(
        layer.w_in, call_.width, layer.top_k * halves, 1, at_.normed, 0,
        [&](int unit, int row, int) {
          const int half = unit % halves;
          return (chosen[unit / halves] * panels + half / 2) * 4 + half % 2 + 2 * row;
        },
        [&](int unit, const float (&value)[2]) {
          const int slot = unit / halves, n = unit % halves * kOutputs + output_;
          if (quarter_ != 0 || n >= layer.hidden) return;
          publish(at_.activated + slot * pitch + n, value[0] * sigmoid_fast(value[0]) * value[1] * weights[slot]);
        });
    if (!team_.meet()) return false;
    for (int slot = 0; slot < layer.top_k; ++slot) gather(at_.activated + slot * pitch, layer.hidden);
    const int out_panels = padded(call_.width, kPanel) / kPanel;
    product<1>(
        layer.w_out, layer.hidden, (call_.width + kOutputs - 1) / kOutputs, layer.top_k, at_.activated, pitch,
        [&](int unit, int, int term) { return chosen[term] * out_panels * 4 + unit; },
        [&](int unit, const float (&value)[1]) { add_to_x(unit * kOutputs + output_, value[0]); });
    return team_.meet();
  }

  // The largest of softmax(router x), ties to the lowest expert. Without a softmax (NaN): the first, with weight NaN.
  JT_DEVICE void route(const RolloutLayer& layer) {
    int* chosen = reinterpret_cast<int*>(shared_ + at_.scratch + kChosen);
    float *weights = shared_ + at_.scratch + kChosen + kRolloutSlots, *p = weights + kRolloutSlots;
    const int E = layer.experts, pitch = padded(call_.width, kPanel);
    for (int e = warp_; layer.has_router && e < E; e += kWarps) {
      const float* w = section<float>(layer.router) + int64_t(e) * pitch;
      float sum = 0;
      for (int i = lane_; i < call_.width; i += 32) sum += w[i] * shared_[at_.normed + i];
      sum = warp_sum(sum);
      if (lane_ == 0) p[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (!layer.has_router) {
        chosen[0] = 0, weights[0] = 1;
      } else {
        float highest = -INFINITY, total = 0;
#pragma unroll 1
        for (int e = 0; e < E; ++e) highest = p[e] > highest ? p[e] : highest;
#pragma unroll 1
        for (int e = 0; e < E; ++e) total += p[e] = expf(p[e] - highest);
        for (int k = 0; k < layer.top_k; ++k) {
          int best = -1;
#pragma unroll 1
          for (int e = 0; e < E; ++e) {
            if (!(p[e] < 0) && (best < 0 || p[e] > p[best])) best = e;
          }
          chosen[k] = best, weights[k] = p[best] / total, p[best] = -1;
        }
      }
    }
    __syncthreads();
  }

 private:
  const RolloutCall& call_;
  const RolloutPlaces& at_;
  float* shared_;
  Team team_;
  float* mirror_ = nullptr;
  int warp_, lane_, output_, quarter_, turn_ = 0;
  int64_t sequence_ = 0, frame_ = 0;
};

// Short loops are unrolled less than the compiler would: all of them together are the kernel's registers, and the 128
// that 512 threads have must do. Dynamic shared memory: some 25 KB for the `vocaset` preset, 96 KB at most.
//
// budget: registers <= 128, spills 0, shared <= 0
template <class Team, class Weight>
__global__ void __launch_bounds__(kThreads, 1) rollout_kernel(const __grid_constant__ RolloutCall call) {
  JT_DYNAMIC_SHARED(bytes);
  Rollout<Team, Weight>(call, reinterpret_cast<float*>(bytes)).run();
}

template <class Team, class Weight>
const char* run(const RolloutCall& call) {
  const auto kernel = rollout_kernel<Team, Weight>;
  const int64_t shared = int64_t(call.at.end) * 4;
  if (shared > 96 * 1024) return "the vectors of this program do not fit into shared memory";
  if constexpr (Team::kAlone) {
    return launch(kernel, unsigned(call.batch), kThreads, shared, call.device, call);
  } else {
    const int64_t room = most_blocks(kernel, kThreads, shared, call.device) / call.team;
    if (room < 1) return "the device does not hold so many blocks per sequence at once";
    const int64_t teams = call.batch < room ? call.batch : room;
    const cudaError_t error =
        cudaMemsetAsync(call.workspace, 0, size_t(teams) * 128, static_cast<cudaStream_t>(call.device.stream));
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return launch_some(true, kernel, unsigned(teams * call.team), kThreads, shared, call.device, call);
  }
}

}  // namespace

void place_rollout(RolloutCall& call) {
  int first = 0, gate = 0, projected = 0, low = 0, mixed = 0, activated = 0, parts = 0;
  const auto grow = [](int& size, int to) { size = size < to ? to : size; };
  for (int l = 0; l < call.layer_count; ++l) {
    const RolloutLayer& layer = call.layers[l];
    grow(activated, layer.top_k * padded(layer.hidden, 8));
    if (layer.attention) {
      grow(first, (layer.heads + 2 * layer.kv_heads) * layer.head_dim);
      grow(mixed, layer.heads * layer.head_dim);
      grow(parts, layer.heads * parts_of(call.team, layer.heads) * (layer.head_dim + 2));
    } else {
      grow(first, layer.inner), grow(gate, layer.inner), grow(mixed, layer.inner);
      grow(projected, layer.rank + 2 * layer.states);
      grow(low, padded(layer.rank, 8) + 2 * padded(layer.states, 8));
    }
  }
  int end = 0;
  const auto take = [&](int size) {
    const int at = end;
    end += padded(size, 8);
    return at;
  };
  call.at.x = take(call.width), call.at.normed = take(call.width), call.at.feedback = take(call.width);
  call.at.first = take(first), call.at.gate = take(gate), call.at.projected = take(projected);
  call.at.low = take(low), call.at.mixed = take(mixed), call.at.activated = take(activated);
  call.at.parts = take(parts);
  call.at.scratch = take(kScratch);
  call.at.end = end;
}

int64_t rollout_workspace(const RolloutCall& call) {
  if (call.team == 1) return 0;
  // A team per sequence at most: its counter's line, and its vectors.
  return call.batch * (128 + int64_t(call.at.end) * 4);
}

const char* launch_rollout(const RolloutCall& call) {
  if (call.batch == 0 || call.begin >= call.end) return nullptr;
  if (call.team == 1) return call.bfloat16 ? run<Alone, __nv_bfloat16>(call) : run<Alone, float>(call);
  return call.bfloat16 ? run<Several, __nv_bfloat16>(call) : run<Several, float>(call);
}

}  // namespace jambatalk::cuda
