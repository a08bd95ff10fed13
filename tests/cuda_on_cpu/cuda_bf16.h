#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fff)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat16 __double2bfloat16(double x) {
  // Rounded once: to odd in float32 first, which has bits to spare.
  float y = float(x);
  if (double(y) != x && !std::isnan(x) && (__float_as_uint(y) & 1) == 0) {
    y = std::fabs(double(y)) > std::fabs(x) ? __uint_as_float(__float_as_uint(y) - 1)
                                            : __uint_as_float(__float_as_uint(y) + 1);
  }
  return __float2bfloat16_rn(y);
}
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__float2bfloat16_rn(v.x), __float2bfloat16_rn(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return __float22bfloat162_rn({x, y}); }
