"""The launches of the attention kernels at the bars' sizes, for tests that read the machine code."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch

from jambatalk_kernels.attention import triton as kernels
from jambatalk_kernels.attention.heuristics import Device
from jambatalk_kernels.moe.ahead_of_time import recorded_launches

__all__ = ["ahead_of_time_cases"]

# dtype, batch, length, heads, kv_heads, head_dim, options
SIZES = (
    (torch.bfloat16, 4, 4096, 8, 8, 64, dict(causal=True)),
    (torch.bfloat16, 4, 4096, 8, 8, 128, dict(causal=True)),
    (torch.bfloat16, 4, 4096, 4, 4, 256, dict(causal=True)),
    (torch.bfloat16, 1, 600, 8, 1, 64, dict(causal=False, interleaved=True)),
    (torch.bfloat16, 1, 4096, 8, 2, 64, dict(causal=True, window=512, packed=True)),
    (torch.float16, 1, 40, 2, 2, 80, dict(causal=True)),  # one tile of queries; the head is padded
    (torch.float32, 1, 600, 8, 1, 64, dict(causal=True)),
    (torch.float32, 1, 600, 4, 4, 256, dict(causal=True)),
)


def _run(dtype, batch, length, heads, kv_heads, head_dim, options) -> None:
    q = torch.empty(batch, length, heads, head_dim, dtype=dtype)
    k, v = (torch.empty(batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    cos, sin = (torch.empty(length, head_dim // 2) for _ in range(2))
    masks = (
        options["causal"],
        options.get("window"),
        0.1,
        options.get("interleaved", False),
        torch.empty(5, dtype=torch.int32) if options.get("packed") else None,
    )
    kernels.attention_forward(q, k, v, cos, sin, *masks, True)


def ahead_of_time_cases(capability: int) -> list[dict]:
    """`capability` as compilers write it: 89, 90."""
    device = Device((capability // 10, capability % 10), 132 if capability == 90 else 128)
    cases = []
    for size in SIZES:
        dtype, _, length, heads, kv_heads, head_dim, options = size
        label = f"{str(dtype)[6:]} {head_dim}, length {length}, {heads}/{kv_heads} heads, {options}"
        with patch.object(kernels, "_device", lambda _: device):
            cases += recorded_launches(kernels, label, partial(_run, *size))
    return cases
