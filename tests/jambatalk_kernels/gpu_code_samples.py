"""Two small kernels that test_gpu_code_harness.py compiles: one as it should be, one that spills."""

import triton
import triton.language as tl


@triton.jit
def scale(x, y, length, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for t in range(length):
        total += tl.exp2(tl.load(x + t * 1024 + i).to(tl.float32))
    tl.store(y + i, total)


@triton.jit
def outer(x, y, length, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for t in range(length):
        row = tl.load(x + t * SIZE + i)
        total = total * row[:, None] + tl.exp2(row)[None, :]
    tl.store(y + i[:, None] * SIZE + i[None, :], total)


def ahead_of_time_cases():
    signature = {"x": "*bf16:16", "y": "*fp32:16", "length": "i32", "SIZE": "constexpr"}
    unaligned = {**signature, "x": "*bf16", "y": "*fp32"}
    wide = {"kernel": scale, "constexprs": {"SIZE": 256}, "num_warps": 1}
    return [
        {"name": "wide", "signature": signature, **wide},
        {"name": "narrow", "signature": unaligned, **wide},
        {
            "name": "spilling",
            "kernel": outer,
            "signature": {**signature, "x": "*fp32:16"},
            "constexprs": {"SIZE": 128},
            "num_warps": 1,
        },
    ]
