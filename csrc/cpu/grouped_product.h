// The experts' matrix products: result = left * right^T per expert, on that expert's own rows.
//
// A tile of the result (kProductRows rows of two vectors) is summed in registers, from panels: pieces of the factors
// laid out so that one step of the sum reads kProductRows numbers of the left one and two vectors of the right one.
// Laying them out also gathers the tokens and widens the dtype; what follows the product (activation, its gradient) is
// done while the tile is in the L1 cache. Sums are of the compute type; bfloat16 is widened, or, where the processor
// multiplies it (AVX512_BF16), kept in pairs of two steps.
//
// Every sum runs over its depth in one order, kProductDepth terms at a time, which are summed by themselves and then
// added, whatever else is in the tile: a row has the same bytes wherever it stands and however many there are.
//
// Cost: the multiplications bind it; 2 * kProductRows of them per 2 + kProductRows loads. Measured on a Zen 5 core, the
// tile alone runs at the processor's peak (240 of 237 GFLOP/s by AVX-512, 121 of 120 by AVX2).
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

constexpr int kProductRows = JT_WIDTH == 64 && kNativeVectors ? 12 : 6;  // of two vectors: what the registers hold
constexpr int64_t kProductDepth = 256;  // a panel of the right factor is 32 KB or less: it stays in L1

template <class L>
inline constexpr int kProductColumns = 2 * L::W;
template <class L>
inline constexpr int64_t kProductSize = int64_t{kProductRows} * kProductColumns<L>;

// to[k * pitch + i] = factor[lane + i, depth_begin + k] for i < Lanes, k < depth; zero from the valid-th lane on.
template <class L, int Lanes>
void pack(const Factor& factor, const Segment& segment, int64_t lane, int64_t valid, int64_t depth_begin, int64_t depth,
          typename L::T* to, int64_t pitch) {
  using T = typename L::T;
  using V = typename L::V;
  if (depth == 0) return;  // and the array may have no memory
  const int64_t lane_step = factor.array.stride[1], depth_step = factor.array.stride[2];
  const auto row = [&](int64_t r) { return factor.source != nullptr ? int64_t{factor.source[r]} : r; };
  with_memory_type(factor.array.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const M* base = (const M*)factor.array.data + segment.expert * factor.array.stride[0];
    const auto at_lane = [&](int64_t i) {
      return base + lane_step * (factor.rows_on == RowsOn::kLanes ? row(segment.begin + i) : i);
    };
    const auto at_depth = [&](int64_t k) {
      return depth_step * (factor.rows_on == RowsOn::kDepth ? row(segment.begin + k) : k);
    };
    constexpr int kWhole = Lanes / L::W * L::W;
    if (lane_step == 1 && factor.rows_on != RowsOn::kLanes) {
      for (int64_t k = 0; k < depth; ++k, to += pitch) {
        const M* from = base + lane + at_depth(depth_begin + k);
        if (valid >= Lanes) {
          for (int i = 0; i < kWhole; i += L::W) L::store(to + i, load_as<L>(from + i));
          for (int i = kWhole; i < Lanes; ++i) to[i] = T(widen(from[i]));
        } else {
          for (int i = 0; i < Lanes; ++i) to[i] = i < valid ? T(widen(from[i])) : T(0);
        }
      }
      return;
    }
    const M* from[Lanes];
    for (int i = 0; i < Lanes; ++i) from[i] = i < valid ? at_lane(lane + i) : nullptr;
    if (depth_step == 1 && factor.rows_on != RowsOn::kDepth) {
      for (int64_t k = 0; k < depth; k += L::W, to += L::W * pitch) {
        const int64_t left = smaller(L::W, depth - k);
        for (int i0 = 0; i0 < Lanes; i0 += L::W) {
          V square[L::W];
          for (int i = 0; i < L::W; ++i) {
            square[i] = i0 + i < Lanes && i0 + i < valid ? load_some<L>(from[i0 + i] + depth_begin + k, left) : V{};
          }
          transpose<L>(square);
          for (int j = 0; j < left; ++j) {
            if (i0 + L::W <= Lanes) {
              L::store(to + j * pitch + i0, square[j]);
            } else {
              __builtin_memcpy(to + j * pitch + i0, &square[j], (Lanes - kWhole) * sizeof(T));
            }
          }
        }
      }
      return;
    }
    for (int64_t k = 0; k < depth; ++k, to += pitch) {
      const int64_t at = at_depth(depth_begin + k);
      for (int i = 0; i < Lanes; ++i) to[i] = i < valid ? T(widen(from[i][at])) : T(0);
    }
  });
}

// Two steps of a bfloat16 panel, widened, become one of pairs, in place; the last may lack a partner. Widening filled
// up with zeros what the pairs now share.
template <class L>
void join_pairs(typename L::T* panel, int64_t depth, int64_t pitch) {
  using T = typename L::T;
  for (int64_t k = 0; k < depth; k += 2) {
    const T* from = panel + k * pitch;
    T* to = panel + k / 2 * pitch;
    for (int64_t i = 0; i < pitch; ++i) {
      typename L::Bits even, odd = 0;
      __builtin_memcpy(&even, from + i, sizeof even);
      if (k + 1 < depth) __builtin_memcpy(&odd, from + pitch + i, sizeof odd);
      even = even >> 16 | odd;
      __builtin_memcpy(to + i, &even, sizeof even);
    }
  }
}

// One panel of the left factor: [depth][kProductRows].
template <class L>
void pack_left(const Factor& factor, const Segment& segment, int64_t panel, int64_t lanes, int64_t depth_begin,
               int64_t depth, bool pairs, typename L::T* to) {
  const int64_t lane = panel * kProductRows;
  pack<L, kProductRows>(factor, segment, lane, lanes - lane, depth_begin, depth, to, kProductRows);
  if (pairs) join_pairs<L>(to, depth, kProductRows);
}

// One panel of the right factor: [depth][2 vectors], the second one from `half` lanes on where there is a half.
template <class L>
void pack_right(const Factor& factor, const Segment& segment, int64_t panel, int64_t lanes, int64_t depth_begin,
                int64_t depth, bool pairs, typename L::T* to) {
  constexpr int W = L::W;
  const int64_t first = factor.half > 0 ? panel * W : panel * 2 * W, left = lanes - first;
  const int64_t second = factor.half > 0 ? factor.half + first : first + W;
  const int64_t left_of_second = factor.half > 0 ? left : left - W;
  pack<L, W>(factor, segment, first, left, depth_begin, depth, to, 2 * W);
  pack<L, W>(factor, segment, second, left_of_second, depth_begin, depth, to + W, 2 * W);
  if (pairs) join_pairs<L>(to, depth, 2 * W);
}

// Reads what pack_right will read of panels [panel, panel_end) once in the order of memory, a byte of every cache line:
// the processor fetches ahead along memory only, and laying out jumps from row to row.
template <class L>
void touch_right(const Factor& factor, const Segment& segment, int64_t panel, int64_t panel_end, int64_t lanes,
                 int64_t depth_begin, int64_t depth) {
  const int64_t size = factor.array.dtype == Dtype::kFloat64 ? 8 : factor.array.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t lane_step = factor.array.stride[1] * size, depth_step = factor.array.stride[2] * size;
  const int64_t width = factor.half > 0 ? L::W : 2 * L::W, from = panel * width;
  const int64_t count = smaller(panel_end * width, lanes) - from;
  const bool along_depth = depth_step == size;
  if (count <= 0 || depth <= 0 || (!along_depth && lane_step != size)) return;
  const char* base = (const char*)factor.array.data + segment.expert * factor.array.stride[0] * size;
  const int64_t runs = along_depth ? count : depth, run = (along_depth ? depth : count) * size;
  const int64_t step = along_depth ? lane_step : depth_step;
  for (int64_t part = 0; part <= factor.half; part += factor.half > 0 ? factor.half : 1) {
    const char* first = base + (from + part) * lane_step + depth_begin * depth_step;
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t at = 0; at < run; at += 64) (void)*(const volatile char*)(first + i * step + at);
    }
  }
}

// c (Rows, 2 vectors) = [c +] the sum over depth of a (depth, kProductRows) times b (depth, 2 vectors). c is added
// last: roundings grow with the length of one run of the sum.
template <class L, int Rows>
__attribute__((noinline)) void multiply_tile(const typename L::T* a, const typename L::T* b, int64_t depth, bool add,
                                             typename L::T* c) {
  using V = typename L::V;
  V sum[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kProductRows, b += 2 * L::W) {
    const V first = L::load(b), second = L::load(b + L::W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const V value = L::splat(a[i]);
      sum[i][0] += value * first, sum[i][1] += value * second;
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < 2 * Rows; ++i, c += L::W) L::store(c, add ? L::load(c) + sum[i / 2][i % 2] : sum[i / 2][i % 2]);
}

#if defined(JT_AVX512)
// The same for panels of pairs: an instruction of its own multiplies bfloat16 twice as fast. `depth` counts pairs.
template <class L, int Rows>
__attribute__((noinline, target("avx512bf16"))) void multiply_tile_of_pairs(const typename L::T* a,
                                                                            const typename L::T* b, int64_t depth,
                                                                            bool add, typename L::T* c) {
  __m512 sum[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kProductRows, b += 2 * L::W) {
    const __m512bh first = (__m512bh)_mm512_loadu_ps(b), second = (__m512bh)_mm512_loadu_ps(b + L::W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const __m512bh value = (__m512bh)_mm512_set1_ps(a[i]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, first), sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, second);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < 2 * Rows; ++i, c += L::W) {
    const __m512 part = sum[i / 2][i % 2];
    _mm512_storeu_ps(c, add ? _mm512_add_ps(_mm512_loadu_ps(c), part) : part);
  }
}
#endif

// As many rows as there are, up to the next third of a tile.
template <class L, int Rows>
JT_INLINE void multiply_some(const typename L::T* a, const typename L::T* b, int64_t depth, bool pairs, bool add,
                             typename L::T* c) {
#if defined(JT_AVX512)
  if constexpr (sizeof(typename L::T) == 4) {
    if (pairs) return multiply_tile_of_pairs<L, Rows>(a, b, (depth + 1) / 2, add, c);
  }
#endif
  multiply_tile<L, Rows>(a, b, depth, add, c);
}

// Lays out panels of one factor for all tasks that will need them; a task is one panel of one segment.
template <class L>
void pack_panels(const PackCall& call, int64_t begin, int64_t end) {
  using T = typename L::T;
  for (int64_t t = begin; t < end; ++t) {
    const PackTask& task = call.tasks[t];
    const Segment& segment = call.segments[task.segment];
    const int64_t rows = segment.end - segment.begin;
    T* to = (T*)call.factor.packed;
    if (call.factor.rows_on == RowsOn::kLanes) {
      to += ((call.factor.shared ? 0 : segment.panel) + task.panel) * kProductRows * call.depth;
      pack_left<L>(call.factor, segment, task.panel, rows, 0, call.depth, call.pairs, to);
    } else {
      const int64_t panels = (call.lanes + kProductColumns<L> - 1) / kProductColumns<L>;
      to += ((call.factor.shared ? 0 : segment.begin * panels) + task.panel * rows) * kProductColumns<L>;
      pack_right<L>(call.factor, segment, task.panel, call.lanes, 0, rows, call.pairs, to);
    }
  }
}

// Product tasks [begin, end): blocks of some panels of each factor. `finish(task, segment, line, column panel, lines,
// tile)` has the sums of one tile.
template <class L, class Finish>
JT_INLINE void multiply_blocks(const ProductCall& call, int64_t begin, int64_t end, Finish finish) {
  using T = typename L::T;
  constexpr int64_t kLeft = int64_t{kProductRows} * kProductDepth, kRight = int64_t{kProductColumns<L>} * kProductDepth;
  for (int64_t t = begin; t < end; ++t) {
    const ProductTask& task = call.tasks[t];
    const Segment& segment = call.segments[task.segment];
    const bool over_rows = call.left.rows_on == RowsOn::kDepth;
    const int64_t rows = segment.end - segment.begin, lines = over_rows ? call.lines : rows;
    const int64_t depth = over_rows ? rows : call.depth;
    const int64_t left_panels = task.line_end - task.line, right_panels = task.column_end - task.column;
    const bool one_block = depth <= kProductDepth;
    Carver carve{(char*)scratch(carved<T>(left_panels * kLeft) + carved<T>(right_panels * kRight) +
                                carved<T>(left_panels * right_panels * kProductSize<L>))};
    T *left_scratch = carve.take<T>(left_panels * kLeft), *right_scratch = carve.take<T>(right_panels * kRight);
    T* tiles = carve.take<T>(left_panels * right_panels * kProductSize<L>);
    int64_t k = 0;
    do {  // once even if there is nothing to sum: the result is zero then
      const int64_t steps = smaller(kProductDepth, depth - k);
      const bool last = k + steps == depth;
      const T *left = left_scratch, *right = right_scratch;
      int64_t left_pitch = kProductRows * steps, right_pitch = kProductColumns<L> * steps;
      if (call.left.packed != nullptr) {
        left_pitch = kProductRows * depth;
        left = (const T*)call.left.packed + ((call.left.shared ? 0 : segment.panel) + task.line) * left_pitch;
        left += (call.pairs ? k / 2 : k) * kProductRows;
      } else {
        for (int64_t p = 0; p < left_panels; ++p) {
          pack_left<L>(call.left, segment, task.line + p, lines, k, steps, call.pairs, left_scratch + p * left_pitch);
        }
      }
      if (call.right.packed != nullptr) {
        const int64_t panels = (call.columns + kProductColumns<L> - 1) / kProductColumns<L>;
        right_pitch = kProductColumns<L> * depth;
        right = (const T*)call.right.packed + (call.right.shared ? 0 : segment.begin * panels * kProductColumns<L>);
        right += task.column * right_pitch + (call.pairs ? k / 2 : k) * kProductColumns<L>;
      }
      const int64_t ahead = call.right.array.stride[2] == 1 ? 2 * kProductDepth : kProductDepth;  // long runs of memory
      if (call.right.packed == nullptr && k % ahead == 0) {
        touch_right<L>(call.right, segment, task.column, task.column_end, call.columns, k, smaller(ahead, depth - k));
      }
      for (int64_t q = 0; q < right_panels; ++q) {
        if (call.right.packed == nullptr) {
          pack_right<L>(call.right, segment, task.column + q, call.columns, k, steps, call.pairs,
                        right_scratch + q * right_pitch);
        }
        for (int64_t p = 0; p < left_panels; ++p) {
          const T *a = left + p * left_pitch, *b = right + q * right_pitch;
          T* tile = one_block ? tiles : tiles + (q * left_panels + p) * kProductSize<L>;
          const int64_t line = (task.line + p) * kProductRows, count = smaller(kProductRows, lines - line);
          if (count > kProductRows / 3 * 2) {
            multiply_some<L, kProductRows>(a, b, steps, call.pairs, k > 0, tile);
          } else if (count > kProductRows / 3) {
            multiply_some<L, kProductRows / 3 * 2>(a, b, steps, call.pairs, k > 0, tile);
          } else {
            multiply_some<L, kProductRows / 3>(a, b, steps, call.pairs, k > 0, tile);
          }
          if (last) finish(segment, line, task.column + q, count, tile);
        }
      }
      k += steps;
    } while (k < depth);
  }
}

// out[segment's rows or expert, line, column] = the sums.
template <class L>
void multiply_experts(const ProductCall& call, int64_t begin, int64_t end) {
  const bool over_rows = call.left.rows_on == RowsOn::kDepth;
  multiply_blocks<L>(
      call, begin, end,
      [&](const Segment& segment, int64_t line, int64_t panel, int64_t count, const typename L::T* tile) {
        with_memory_type(call.dtype, [&](auto* type) {
          using M = Pointee<decltype(type)>;
          const int64_t column = panel * kProductColumns<L>, valid = call.columns - column;
          M* out =
              (M*)call.out + ((over_rows ? segment.expert * call.lines : segment.begin) + line) * call.columns + column;
          for (int64_t i = 0; i < count; ++i, out += call.columns, tile += kProductColumns<L>) {
            store_some<L>(out, L::load(tile), valid);
            if (valid > L::W) store_some<L>(out + L::W, L::load(tile + L::W), valid - L::W);
          }
        });
      });
}

}  // namespace JT_ISA
}  // namespace jambatalk
