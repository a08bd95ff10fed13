// The table of one instruction set's kernels. The including file defines JT_ISA (a namespace) and JT_WIDTH (bytes).
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/causal_conv1d_kernel.h"
#include "cpu/dropout_kernel.h"
#include "cpu/moe_kernel.h"
#include "cpu/norm_kernel.h"
#include "cpu/rollout_kernel.h"
#include "cpu/selective_scan_kernel.h"

namespace jambatalk {
namespace JT_ISA {

// What the kernels leave: sums over the batch and over groups of channels, in an order that is fixed by the shape.
template <class L>
void sum_terms(const SumCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t outer = task / call.groups, row = task % call.groups;
    const T* from = (const T*)call.partial + outer * call.outer_stride + row * call.row_stride;
    for (int64_t c = 0; c < call.columns; c += L::W) {
      const int valid = int(smaller(L::W, call.columns - c));
      V total = {};
      for (int64_t term = 0; term < call.terms; ++term) {
        const T* at = from + term * call.term_stride + c;
        if (valid == L::W) {
          total += L::load(at);
        } else {
          for (int k = 0; k < valid; ++k) total[k] += at[k];
        }
      }
      store_rows<L>(&total, 1, call.target, outer, row, 1, c, valid);
    }
  }
}

template <class T>
constexpr KernelSet kernel_set() {
  return {&scan_forward<Lanes<T>>,
          &scan_backward<Lanes<T>>,
          &scan_step<Lanes<T>>,
          &conv_forward<Lanes<T>>,
          &conv_backward<Lanes<T>>,
          &conv_step<Lanes<T>>,
          &sum_terms<Lanes<T>>,
          &dropout<Lanes<T>>,
          &norm_forward<Lanes<T>, true>,
          &norm_backward<Lanes<T>, true>,
          &norm_forward<Lanes<T>, false>,
          &norm_backward<Lanes<T>, false>,
          &route_forward<Lanes<T>>,
          &route_backward<Lanes<T>>,
          kProductRows,
          kProductColumns<Lanes<T>>,
          &pack_panels<Lanes<T>>,
          &multiply_experts<Lanes<T>>,
          &multiply_activate<Lanes<T>>,
          &multiply_activate_backward<Lanes<T>>,
          &combine_slots<Lanes<T>>,
          &expert_matvec<Lanes<T>>,
          &attention_append<Lanes<T>>,
          &attention_pack<Lanes<T>>,
          &attention_forward<Lanes<T>>,
          &attention_backward<Lanes<T>>,
          &attention_finish<Lanes<T>>,
          &attention_step<Lanes<T>>,
          &attention_step_combine<Lanes<T>>,
          &rollout<Lanes<T>>};
}

}  // namespace JT_ISA
}  // namespace jambatalk
