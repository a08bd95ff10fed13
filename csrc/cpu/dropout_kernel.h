// Dropout on the CPU: y = x * 0 with probability threshold / 2^32, x * scale otherwise.
//
// What is dropped is a function of the seed and of an element's number alone (a hash of both, two rounds of a 32-bit
// mixer by multiplications and shifts), so it is the same with any number of threads and any instruction set, and the
// gradient asks for it again instead of keeping it. About 16 vector operations a vector of float32.
#pragma once

#include "cpu/lanes.h"

namespace jambatalk {
namespace JT_ISA {

// Every lane holds 32 bits, also where it is wider.
template <class L>
JT_INLINE typename L::U mix(typename L::U h) {
  using Bits = typename L::Bits;
  constexpr Bits kMask = Bits(0xffffffffu);
  h ^= h >> 16;
  h = (h * Bits(0x21f0aaadu)) & kMask;
  h ^= h >> 15;
  h = (h * Bits(0xd35a2d97u)) & kMask;
  return h ^ (h >> 15);
}

template <class L>
void dropout(const DropoutCall& call, int64_t task_begin, int64_t task_end) {
  using T = typename L::T;
  using V = typename L::V;
  using U = typename L::U;
  using Bits = typename L::Bits;
  constexpr Bits kMask = Bits(0xffffffffu);
  const FlushSubnormals flush;
  U lane;
  for (int k = 0; k < L::W; ++k) lane[k] = k;
  with_input_type<T>(call.dtype, [&](auto* type) {
    using M = Pointee<decltype(type)>;
    const M* x = (const M*)call.x;
    M* y = (M*)call.y;
    const int64_t end = smaller(task_end * call.task_size, call.count);
    for (int64_t i = task_begin * call.task_size; i < end; i += L::W) {
      const Bits low = Bits(uint32_t(i)), high = Bits(uint32_t(i >> 32) * 0x9e3779b9u);
      U h = mix<L>((lane + low) ^ Bits(uint32_t(call.seed)));  // i is a multiple of W: no carry
      h = mix<L>((h + Bits(uint32_t(call.seed >> 32)) + high) & kMask);
      const V factor = h >= U{} + Bits(call.threshold) ? L::splat(T(call.scale)) : V{};
      store_some<L>(y + i, load_some<L>(x + i, end - i) * factor, end - i);
    }
  });
}

}  // namespace JT_ISA
}  // namespace jambatalk
