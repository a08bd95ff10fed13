"""What Triton's interpreter (3.9) gets wrong in bfloat16, done right; on a card these are the plain operations."""

import triton
import triton.language as tl

__all__ = ["dot", "rounded"]

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in `dtype`, to the nearest, ties to even. The interpreter truncates float32 to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32. The interpreter multiplies the bits of bfloat16 numbers."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
