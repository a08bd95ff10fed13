// The autoregressive loop on the CPU: all frames, all layers, for some sequences at once (formulas: rollout/program.py
// and rollout/reference.py).
//
// A frame is a chain of phases, most of them one matrix times the vectors of all sequences. A task is one panel of
// kPanel outputs: its weights are one contiguous stream, outputs are in lanes, x is broadcast; no sum goes across
// lanes. What follows element by element (convolution, gates, scan, residual) is done with the panel still in
// registers; what needs a whole vector (norms, softmax of the router, rotation) is done by whoever ends the phase,
// before the next begins.
//
// Threads take tasks from a common counter. Nobody waits for a thread that has not come: one alone can do everything,
// and one that comes late skips what is over. So a pool that is smaller than it says, or busy, costs time only. Every
// sum has one order, whoever does it and whatever else is in the batch: the same bytes with any number of threads.
//
// Attention is the flash tiles of attention_kernel.h with a frame's query heads as rows. A call begins by copying the
// visible part of the caches into their panels, and each frame is put into both.
//
// Cost per frame: every active weight is read once (memory binds), and per sequence two operations per weight, one
// exponential per scan state and attention's keys and values. A call's copy of the caches takes about as long as a
// frame's attention.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/moe_kernel.h"

namespace jambatalk {
namespace JT_ISA {

// How many sequences share one load of the weights, as far as the registers go.
constexpr int kShare = JT_WIDTH == 64 ? 4 : 2;
constexpr int64_t kWorthTaking = 8192;  // weights, about a microsecond
constexpr int kSums = 4;                // independent sums per output: rounding and the latency of an addition

JT_INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One thread on one machine.
class Worker {
 public:
  explicit Worker(RolloutMachine& machine) : machine_(machine) {}

  // run(i) for every i < tasks, by all workers together; then after(), once; then on. Who takes tasks takes many while
  // many are left, and `chunk` at the end, so that all end together.
  template <class Run, class After>
  JT_INLINE void phase(int64_t tasks, int64_t chunk, Run run, After after) {
    if (machine_.workers == 1) {
      for (int64_t i = 0; i < tasks; ++i) run(i);
      return after();
    }
    const uint64_t mine = phase_++;
    for (;;) {
      uint64_t now = __atomic_load_n(&machine_.ticket, __ATOMIC_ACQUIRE);
      if (now >> 32 != mine) return;  // over
      const int64_t begin = int64_t(now & 0xffffffffu), left = tasks - begin;
      if (left <= 0) return wait(mine);
      const int64_t share = left / (2 * machine_.workers), count = smaller(share > chunk ? share : chunk, left);
      if (!__atomic_compare_exchange_n(&machine_.ticket, &now, now + uint64_t(count), false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED)) {
        continue;
      }
      for (int64_t i = begin; i < begin + count; ++i) run(i);
      if (int64_t(__atomic_add_fetch(&machine_.done, uint64_t(count), __ATOMIC_ACQ_REL)) < tasks) continue;
      after();
      __atomic_store_n(&machine_.done, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&machine_.ticket, (mine + 1) << 32, __ATOMIC_RELEASE);
      return;
    }
  }

 private:
  void wait(uint64_t mine) {
    for (int64_t turn = 0; __atomic_load_n(&machine_.ticket, __ATOMIC_ACQUIRE) >> 32 == mine; ++turn) {
      // Soon another thread needs this core more than we do; it may be the one that we wait for.
      turn < 2000 ? pause_briefly() : machine_.give_way();
    }
  }

  RolloutMachine& machine_;
  uint64_t phase_ = 0;
};

// G vectors x against S vectors of a panel's outputs. `w` is at those outputs' first column.
template <class L, class M, int G, int S>
JT_INLINE void multiply_columns(const M* w, int64_t in, const typename L::T* const* x, typename L::V* out) {
  using V = typename L::V;
  using U = typename L::U;
  constexpr int kVectors = kPanel / L::W;
  V sum[kSums][G][S] = {};
  const typename L::T* vector[G];
  for (int g = 0; g < G; ++g) vector[g] = x[g];
  for (int64_t k = 0; k < in; k += kSums, w += kSums * kPanel) {
    if constexpr (kSame<M, BFloat16>) {
#pragma GCC unroll 4
      for (int j = 0; j < kSums; j += 2) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
          U both;
          __builtin_memcpy(&both, w + j * kPanel + s * L::W * 2, sizeof(U));
          const V even = (V)(both << 16), odd = (V)(both & 0xffff0000u);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            sum[j][g][s] += even * vector[g][k + j];
            sum[j + 1][g][s] += odd * vector[g][k + j + 1];
          }
        }
      }
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
          const V weight = L::load(w + j * kPanel + s * L::W);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) sum[j][g][s] += weight * vector[g][k + j];
        }
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int s = 0; s < S; ++s) out[g * kVectors + s] = (sum[0][g][s] + sum[1][g][s]) + (sum[2][g][s] + sum[3][g][s]);
  }
}

// out[g][..] = the panel's kPanel outputs for G vectors.
template <class L, class M, int G>
__attribute__((noinline)) void multiply_panel(const M* w, int64_t in, const typename L::T* const* x,
                                              typename L::V* out) {
  constexpr int kVectors = kPanel / L::W, kRegisters = kShare == 4 ? 16 : 8;  // for sums
  constexpr int S = G * kSums * 2 <= kRegisters ? 2 : 1;
  for (int v = 0; v < kVectors; v += S) {
    multiply_columns<L, M, G, S>(w + v * L::W * (kSame<M, BFloat16> ? 2 : 1), in, x, out + v);
  }
}

// to = norm(x) * weight
template <class L>
void rms_norm(const typename L::T* x, const void* weight, int64_t size, double eps, typename L::T* to) {
  using T = typename L::T;
  using V = typename L::V;
  const T* scale = (const T*)weight;
  V squares = {};
  int64_t i = 0;
  for (; i + L::W <= size; i += L::W) squares += L::load(x + i) * L::load(x + i);
  T sum = L::sum(squares);
  for (; i < size; ++i) sum += x[i] * x[i];
  const T mean = sum / T(size) + T(eps);
  const T factor = T(1) / (sizeof(T) == 4 ? T(__builtin_sqrtf(float(mean))) : T(__builtin_sqrt(double(mean))));
  for (i = 0; i + L::W <= size; i += L::W) L::store(to + i, L::load(x + i) * L::splat(factor) * L::load(scale + i));
  for (; i < size; ++i) to[i] = x[i] * factor * scale[i];
}

template <class L>
class Rollout {
  using T = typename L::T;
  using V = typename L::V;
  static constexpr int kVectors = kPanel / L::W;

 public:
  Rollout(const RolloutCall& call, RolloutMachine& machine) : call_(call), machine_(machine), worker_(machine) {}

  void run() {
    const FlushSubnormals flush;
    live_ = machine_.count;
    worker_.phase(live_, 1, [&](int64_t s) { load_state(s); }, [] {});
    const int64_t frames = machine_.count > 0 ? machine_.sequences[0].frames : 0;
    for (frame_ = 0; frame_ < frames; ++frame_) {
      while (machine_.sequences[live_ - 1].frames <= frame_) --live_;
      step();
    }
    live_ = machine_.count;
    worker_.phase(live_, 1, [&](int64_t s) { store_state(s); }, [] {});
  }

 private:
  T* at(int64_t s, int64_t offset) const { return (T*)machine_.memory + s * call_.pitch + offset; }
  int64_t row(int64_t s) const { return machine_.sequences[s].row; }

  // ---- states ----

  template <class F>
  void for_states(int64_t s, F f) {
    for (int64_t l = 0; l < call_.layer_count; ++l) {
      const RolloutLayer& layer = call_.layers[l];
      if (layer.attention) continue;
      for (int64_t c = 0; c < layer.inner; c += L::W) {
        f(layer, (V*)at(s, layer.conv_offset) + c / L::W * (layer.width - 1),
          (V*)at(s, layer.scan_offset) + c / L::W * layer.states, c);
      }
    }
  }

  void load_state(int64_t s) {
    for (int64_t l = 0; l < call_.layer_count; ++l) {
      const RolloutLayer& layer = call_.layers[l];
      if (!layer.attention) continue;
      const int64_t seen = layer.position[row(s)];
      for (int64_t j = visible(layer, seen); j > 0; --j) put_in_panel(layer, s, (seen - j) % layer.capacity);
    }
    for_states(s, [&](const RolloutLayer& layer, V* conv, V* scan, int64_t c) {
      load_rows<L>(conv, 0, layer.conv_state, row(s), 0, layer.width - 1, c, layer.inner - c);
      load_transposed<L>(scan, layer.scan_state, row(s), c, layer.states, layer.inner - c);
    });
    const T* feedback = (const T*)call_.feedback_state + row(s) * call_.width;
    for (int64_t i = 0; i < call_.width; ++i) at(s, call_.feedback_vector)[i] = feedback[i];
  }

  void store_state(int64_t s) {
    for_states(s, [&](const RolloutLayer& layer, V* conv, V* scan, int64_t c) {
      store_rows<L>(conv, 0, layer.conv_state, row(s), 0, layer.width - 1, c, layer.inner - c);
      store_transposed<L>(scan, layer.scan_state, row(s), c, layer.states, layer.inner - c);
    });
    T* feedback = (T*)call_.feedback_state + row(s) * call_.width;
    for (int64_t i = 0; i < call_.width; ++i) feedback[i] = at(s, call_.feedback_vector)[i];
    call_.position[row(s)] += machine_.sequences[s].frames;
  }

  // ---- products ----

  // Panel `panel` of the matrix number `number` times the vectors at `in` of `count` sequences (those in `list`, or the
  // first ones): each(sequence, index in the list, outputs).
  template <class M, class Each>
  JT_INLINE void multiply_with(const PackedMatrix& matrix, int64_t number, int64_t panel, const int32_t* list,
                               int64_t count, int64_t in, int64_t in_step, Each each) {
    const M* w = (const M*)matrix.data + (number * matrix.panels + panel) * matrix.in * kPanel;
    for (int64_t i = 0; i < count;) {
      const int64_t left = count - i;
      const int group = left >= 4 && kShare == 4 ? 4 : left >= 2 ? 2 : 1;
      const T* x[kShare];
      int64_t sequence[kShare];
      for (int g = 0; g < group; ++g) {
        // An entry of a list is a sequence and one of its slots.
        const int64_t entry = list != nullptr ? list[i + g] : (i + g) * call_.most_slots;
        sequence[g] = entry / call_.most_slots;
        x[g] = at(sequence[g], in) + entry % call_.most_slots * in_step;
      }
      V out[kShare * kVectors];
      if (group == 1) {
        multiply_panel<L, M, 1>(w, matrix.in, x, out);
      } else if (group == 2) {
        multiply_panel<L, M, 2>(w, matrix.in, x, out);
      } else if constexpr (kShare == 4) {
        multiply_panel<L, M, 4>(w, matrix.in, x, out);
      }
      for (int g = 0; g < group; ++g) each(sequence[g], i + g, out + g * kVectors);
      i += group;
    }
  }

  template <class Each>
  JT_INLINE void multiply(const PackedMatrix& matrix, int64_t number, int64_t panel, const int32_t* list, int64_t count,
                          int64_t in, int64_t in_step, Each each) {
    if constexpr (kSame<T, float>) {
      if (call_.bfloat16) {
        return multiply_with<BFloat16>(matrix, number, panel, list, count, in, in_step, each);
      }
    }
    multiply_with<T>(matrix, number, panel, list, count, in, in_step, each);
  }

  // A phase that is a product for all live sequences.
  template <class Each, class After>
  JT_INLINE void product(const PackedMatrix& matrix, int64_t in, Each each, After after) {
    worker_.phase(
        matrix.panels, chunk(matrix, 1),
        [&](int64_t panel) {
          multiply(matrix, 0, panel, nullptr, live_, in, 0,
                   [&](int64_t s, int64_t, const V* out) { each(s, panel, out); });
        },
        after);
  }

  // Panels that are worth a look at the common counter.
  static int64_t chunk(const PackedMatrix& matrix, int64_t times) {
    const int64_t panels = kWorthTaking / (kPanel * matrix.in * times);
    return panels > 0 ? panels : 1;
  }

  void add(int64_t s, int64_t offset, int64_t panel, const V* out) {
    T* to = at(s, offset) + panel * kPanel;
    for (int v = 0; v < kVectors; ++v) L::store(to + v * L::W, L::load(to + v * L::W) + out[v]);
  }
  void set(int64_t s, int64_t offset, int64_t panel, const V* out) {
    T* to = at(s, offset) + panel * kPanel;
    for (int v = 0; v < kVectors; ++v) L::store(to + v * L::W, out[v]);
  }

  // ---- one frame ----

  void step() {
    const auto nothing = [] {};
    worker_.phase(1, 1, [&](int64_t) { begin_frame(); }, nothing);
    for (int64_t l = 0; l < call_.layer_count; ++l) {
      const RolloutLayer& layer = call_.layers[l];
      layer.attention ? attention(layer) : mamba(layer);
      mlp(layer, l + 1 < call_.layer_count ? call_.layers[l + 1].norm : nullptr);
    }
    if (call_.layer_count == 0) worker_.phase(1, 1, [&](int64_t) { end_frame(); }, nothing);
    if (call_.feedback.data != nullptr) {
      product(
          call_.feedback, call_.normed,
          [&](int64_t s, int64_t panel, const V* out) {
            const T* bias = (const T*)call_.feedback_bias + panel * kPanel;
            T* to = at(s, call_.feedback_vector) + panel * kPanel;
            for (int v = 0; v < kVectors; ++v) L::store(to + v * L::W, out[v] + L::load(bias + v * L::W));
          },
          nothing);
    }
  }

  void begin_frame() {
    const Array& inputs = call_.inputs;
    for (int64_t s = 0; s < live_; ++s) {
      const T* from = (const T*)inputs.data + row(s) * inputs.stride[0] + (call_.begin + frame_) * inputs.stride[1];
      T *x = at(s, call_.x), *feedback = at(s, call_.feedback_vector);
      for (int64_t i = 0; i < call_.width; ++i) x[i] = from[i * inputs.stride[2]] + feedback[i];
      if (call_.layer_count > 0) norm(s, call_.layers[0].norm);
    }
  }

  void end_frame() {
    const Array& hidden = call_.hidden;
    for (int64_t s = 0; s < live_; ++s) {
      norm(s, call_.final_norm);
      T* to = (T*)hidden.data + row(s) * hidden.stride[0] + (call_.begin + frame_) * hidden.stride[1];
      for (int64_t i = 0; i < call_.width; ++i) to[i] = at(s, call_.normed)[i];
    }
  }

  void norm(int64_t s, const void* weight) {
    rms_norm<L>(at(s, call_.x), weight, call_.width, call_.eps, at(s, call_.normed));
  }

  // ---- Mamba ----

  void mamba(const RolloutLayer& layer) {
    const int64_t inner_panels = layer.in.panels / 2;
    product(
        layer.in, call_.normed,
        [&](int64_t s, int64_t panel, const V* out) {
          panel < inner_panels ? convolve(layer, s, panel, out) : gate(s, panel, out);
        },
        [] {});
    product(
        layer.x_proj, call_.first, [&](int64_t s, int64_t panel, const V* out) { set(s, call_.projected, panel, out); },
        [&] {
          for (int64_t s = 0; s < live_; ++s) {
            T *dt = at(s, call_.projected), *B = dt + layer.rank, *C = B + layer.states;
            rms_norm<L>(dt, layer.dt_norm, layer.rank, call_.eps, at(s, call_.low));
            rms_norm<L>(B, layer.b_norm, layer.states, call_.eps, B);
            rms_norm<L>(C, layer.c_norm, layer.states, call_.eps, C);
          }
        });
    product(
        layer.dt_proj, call_.low, [&](int64_t s, int64_t panel, const V* out) { scan(layer, s, panel, out); }, [] {});
    project_out(layer);
  }

  void project_out(const RolloutLayer& layer) {
    product(
        layer.out, call_.mixed, [&](int64_t s, int64_t panel, const V* out) { add(s, call_.x, panel, out); },
        [&] {
          for (int64_t s = 0; s < live_; ++s) norm(s, layer.mlp_norm);
          route(layer);
        });
  }

  // The convolution's step with its silu; its state moves up by one.
  void convolve(const RolloutLayer& layer, int64_t s, int64_t panel, const V* out) {
    const int64_t history = layer.width - 1;
    for (int v = 0; v < kVectors; ++v) {
      const T* taps = (const T*)layer.taps + panel * (layer.width + 1) * kPanel + v * L::W;
      V* state = (V*)at(s, layer.conv_offset) + (panel * kVectors + v) * history;
      V sum = L::load(taps + layer.width * kPanel) + out[v] * L::load(taps + history * kPanel);
      for (int64_t j = 0; j < history; ++j) {
        sum += state[j] * L::load(taps + j * kPanel);
        state[j] = j + 1 < history ? state[j + 1] : out[v];
      }
      L::store(at(s, call_.first) + panel * kPanel + v * L::W, silu<L>(sum));
    }
  }

  void gate(int64_t s, int64_t panel, const V* out) {
    T* to = at(s, call_.first) + panel * kPanel;
    for (int v = 0; v < kVectors; ++v) L::store(to + v * L::W, silu<L>(out[v]));
  }

  void scan(const RolloutLayer& layer, int64_t s, int64_t panel, const V* out) {
    const int64_t N = layer.states;
    const T *B = at(s, call_.projected) + layer.rank, *C = B + N;
    const T *u = at(s, call_.first) + panel * kPanel, *z = u + layer.in.panels / 2 * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = panel * kPanel + v * L::W;
      const T* A = (const T*)layer.A + panel * N * kPanel + v * L::W;
      V* state = (V*)at(s, layer.scan_offset) + c / L::W * N;
      const V delta = softplus<L>(out[v] + L::load((const T*)layer.dt_bias + c));
      const V input = L::load(u + v * L::W), drive = delta * input;
      V y = L::load((const T*)layer.D + c) * input;
      for (int64_t n = 0; n < N; ++n) {
        state[n] = exp2<L>(delta * L::load(A + n * kPanel)) * state[n] + drive * B[n];
        y += state[n] * C[n];
      }
      L::store(at(s, call_.mixed) + c, y * L::load(z + v * L::W));
    }
  }

  // ---- attention ----

  void attention(const RolloutLayer& layer) {
    product(
        layer.in, call_.normed, [&](int64_t s, int64_t panel, const V* out) { set(s, call_.first, panel, out); },
        [&] {
          for (int64_t s = 0; s < live_; ++s) append(layer, s);
        });
    // One thread reads a panel once for all strips of its head; several share the strips.
    const int64_t together = machine_.workers > 1 ? 1 : layer.strips, tasks = layer.kv_heads * layer.strips / together;
    worker_.phase(
        live_ * tasks, 1, [&](int64_t i) { attend_strips(layer, i / tasks, i % tasks * together, together); }, [] {});
    project_out(layer);
  }

  // Turns q and k by the position's angles, scales q, and writes k and v into the cache.
  void append(const RolloutLayer& layer, int64_t s) {
    const int64_t half = layer.head_dim / 2, size = layer.kv_heads * layer.head_dim;
    const double position = double(call_.position[row(s)] + frame_);
    T *q = at(s, call_.first), *k = q + layer.heads * layer.head_dim, *v = k + size;
    int64_t& seen = layer.position[row(s)];
    const int64_t slot = seen % layer.capacity, place = (row(s) * layer.capacity + slot) * size;
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * layer.frequency[i];
      const T cosine = T(__builtin_cos(angle)), sine = T(__builtin_sin(angle));
      for (int64_t h = 0; h < layer.heads + layer.kv_heads; ++h) {
        T *first = q + h * layer.head_dim + i, *second = first + half;
        const T a = *first, b = *second;
        *first = a * cosine - b * sine, *second = a * sine + b * cosine;
      }
    }
    const T scale = T(1.4426950408889634 / __builtin_sqrt(double(layer.head_dim)));
    const int64_t group = layer.heads / layer.kv_heads;
    for (int64_t h = 0; h < layer.heads; ++h) {
      T* to = at(s, call_.queries) + (h / group * layer.strips * kRowStrip + h % group) * layer.pitch;
      for (int64_t f = 0; f < layer.head_dim; ++f) to[f] = q[h * layer.head_dim + f] * scale;
    }
    for (int64_t i = 0; i < size; ++i) ((T*)layer.keys)[place + i] = k[i], ((T*)layer.values)[place + i] = v[i];
    put_in_panel(layer, s, slot);
    ++seen;
  }

  // Cached keys that a query sees which has seen so many, itself included.
  static int64_t visible(const RolloutLayer& layer, int64_t seen) {
    const int64_t there = smaller(seen, layer.capacity);
    return layer.window > 0 ? smaller(there, layer.window) : there;
  }

  // Where a panel of one key-value head is among this call's copies of the caches: its keys, turned, and its values.
  T* panel_of(const RolloutLayer& layer, int64_t s, int64_t g, int64_t panel) const {
    return (T*)machine_.caches + s * call_.cache_pitch + layer.cache_offset +
           (g * layer.panels + panel) * 2 * kTileKeys * layer.pitch;
  }

  void put_in_panel(const RolloutLayer& layer, int64_t s, int64_t slot) {
    const int64_t size = layer.head_dim, place = (row(s) * layer.capacity + slot) * layer.kv_heads * size;
    for (int64_t g = 0; g < layer.kv_heads; ++g) {
      const T *key = (const T*)layer.keys + place + g * size, *value = (const T*)layer.values + place + g * size;
      T *keys = panel_of(layer, s, g, slot / kTileKeys) + slot % kTileKeys,
        *values = panel_of(layer, s, g, slot / kTileKeys) + (kTileKeys + slot % kTileKeys) * layer.pitch;
      for (int64_t f = 0; f < size; ++f) keys[f * kTileKeys] = key[f], values[f] = value[f];
      for (int64_t f = size; f < layer.pitch; ++f) values[f] = 0;
    }
  }

  // Some strips of query heads of one key-value head and of one sequence: `strip` counts those of all heads.
  void attend_strips(const RolloutLayer& layer, int64_t s, int64_t strip, int64_t count) {
    const int64_t size = layer.head_dim, pitch = layer.pitch, group = layer.heads / layer.kv_heads;
    const int64_t g = strip / layer.strips, first = strip % layer.strips * kRowStrip, rows = count * kRowStrip;
    const int64_t seen = layer.position[row(s)], keys = visible(layer, seen);
    const T* queries = at(s, call_.queries) + strip * kRowStrip * pitch;
    alignas(64) T scores[kRowStrip * kTileKeys];
    T* sums = at(s, call_.sums) + strip * kRowStrip * pitch;
    Carver carve{(char*)scratch(carved<T>(rows) + carved<V>(rows))};
    TileSoftmax<L> softmax{carve.take<T>(rows), carve.take<V>(rows), sums};
    softmax.clear(rows, pitch);
    for (int64_t j = 0; j < keys;) {
      const int64_t slot = (seen - keys + j) % layer.capacity, panel = slot / kTileKeys;
      const int64_t end = smaller(smaller((panel + 1) * kTileKeys, layer.capacity), slot + keys - j);
      const Visible range{slot, end}, ranges[kRowStrip] = {range, range, range, range};
      const T* turned = panel_of(layer, s, g, panel);
      for (int64_t r = 0; r < rows; r += kRowStrip) {
        attend_panel<L>(queries + r * pitch, size, pitch, turned, turned + kTileKeys * pitch, ranges, panel * kTileKeys,
                        scores, {softmax.top + r, softmax.total + r, sums + r * pitch});
      }
      j += end - slot;
    }
    for (int64_t r = 0; r < smaller(rows, group - first); ++r) {
      const V factor = L::splat(T(1) / L::sum(softmax.total[r]));
      T* to = at(s, call_.mixed) + (g * group + first + r) * size;
      for (int64_t f = 0; f < size; f += L::W) store_some<L>(to + f, L::load(sums + r * pitch + f) * factor, size - f);
    }
  }

  // ---- MLP ----

  // Which expert works on which sequences: entries [begin[e], begin[e + 1]) of the list, an entry being
  // sequence * most_slots + slot.
  int32_t* route_begin() const { return machine_.routes; }
  int32_t* route_list() const { return machine_.routes + call_.list_offset; }

  void route(const RolloutLayer& layer) {
    int32_t *begin = route_begin(), *list = route_list();
    const int64_t E = layer.experts, slots = layer.top_k;
    int32_t* chosen = list + machine_.count * call_.most_slots;
    for (int64_t e = 0; e <= E; ++e) begin[e] = 0;
    for (int64_t s = 0; s < live_; ++s) {
      if (layer.router != nullptr) {
        choose(layer, s, chosen + s * slots);
      } else {
        chosen[s] = 0, at(s, call_.probabilities)[0] = 1;
      }
      for (int64_t k = 0; k < slots; ++k) ++begin[chosen[s * slots + k] + 1];
    }
    for (int64_t e = 0; e < E; ++e) begin[e + 1] += begin[e];
    for (int64_t s = 0; s < live_; ++s) {
      for (int64_t k = 0; k < slots; ++k) list[begin[chosen[s * slots + k]]++] = int32_t(s * call_.most_slots + k);
    }
    for (int64_t e = E; e > 0; --e) begin[e] = begin[e - 1];
    begin[0] = 0;
  }

  // The largest of softmax(router x), ties to the lowest expert. Without a softmax (NaN): the first, with weight NaN.
  void choose(const RolloutLayer& layer, int64_t s, int32_t* chosen) {
    const int64_t E = layer.experts, padded = (call_.width + kPanel - 1) / kPanel * kPanel;
    const T* x = at(s, call_.normed);
    T *weights = at(s, call_.probabilities), *p = weights + call_.most_slots;
    const T infinity = __builtin_huge_val();
    T highest = -infinity;
    for (int64_t e = 0; e < E; ++e) {
      const T* w = (const T*)layer.router + e * padded;
      V sum[kVectors] = {};
      for (int64_t i = 0; i < padded; i += kPanel) {
        for (int v = 0; v < kVectors; ++v) sum[v] += L::load(w + i + v * L::W) * L::load(x + i + v * L::W);
      }
      for (int v = 1; v < kVectors; ++v) sum[0] += sum[v];
      p[e] = L::sum(sum[0]);
      if (p[e] > highest) highest = p[e];
    }
    T total = 0;
    for (int64_t e = 0; e < E; ++e) total += p[e] = exp_or_zero<L>(L::splat(p[e] - highest))[0];
    for (int64_t k = 0; k < layer.top_k; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; ++e) {
        if (!(p[e] < 0) && (best < 0 || p[e] > p[best])) best = e;
      }
      chosen[k] = int32_t(best), weights[k] = p[best] / total, p[best] = -1;
    }
  }

  void mlp(const RolloutLayer& layer, const void* next_norm) {
    constexpr int kHalf = kVectors / 2;
    const int64_t padded = layer.w_in.panels * (kPanel / 2);
    const int32_t *begin = route_begin(), *list = route_list();
    worker_.phase(
        layer.w_in.panels, chunk(layer.w_in, layer.top_k),
        [&](int64_t panel) {
          for (int64_t e = 0; e < layer.experts; ++e) {
            const int32_t* entries = list + begin[e];
            multiply(layer.w_in, e, panel, entries, begin[e + 1] - begin[e], call_.normed, 0,
                     [&](int64_t s, int64_t i, const V* out) {
                       T* to = at(s, call_.activated) + entries[i] % call_.most_slots * padded + panel * (kPanel / 2);
                       for (int v = 0; v < kHalf; ++v) L::store(to + v * L::W, silu<L>(out[v]) * out[kHalf + v]);
                     });
          }
        },
        [] {});
    worker_.phase(
        layer.w_out.panels, chunk(layer.w_out, layer.top_k),
        [&](int64_t panel) {
          // Experts in their order: a sequence's sum does not depend on the others.
          for (int64_t e = 0; e < layer.experts; ++e) {
            const int32_t* entries = list + begin[e];
            multiply(layer.w_out, e, panel, entries, begin[e + 1] - begin[e], call_.activated, padded,
                     [&](int64_t s, int64_t i, const V* out) {
                       const V weight = L::splat(at(s, call_.probabilities)[entries[i] % call_.most_slots]);
                       V scaled[kVectors];
                       for (int v = 0; v < kVectors; ++v) scaled[v] = weight * out[v];
                       add(s, call_.x, panel, scaled);
                     });
          }
        },
        [&] {
          if (next_norm == nullptr) return end_frame();
          for (int64_t s = 0; s < live_; ++s) norm(s, next_norm);
        });
  }

  const RolloutCall& call_;
  RolloutMachine& machine_;
  Worker worker_;
  int64_t frame_ = 0, live_ = 0;
};

template <class L>
void rollout(const RolloutCall& call, RolloutMachine& machine) {
  Rollout<L>(call, machine).run();
}

}  // namespace JT_ISA
}  // namespace jambatalk
