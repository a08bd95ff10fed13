"""The launches of the attention kernels at the bars' sizes, for tests that read the machine code."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from jambatalk_kernels.attention import triton as kernels
from jambatalk_kernels.attention import triton_step
from jambatalk_kernels.attention.heuristics import Device
from jambatalk_kernels.triton_launches import recorded_launches

__all__ = ["ahead_of_time_cases"]

# dtype, batch, length, heads, kv_heads, head_dim, options
SIZES = (
    (torch.bfloat16, 4, 2048, 16, 4, 64, dict(causal=True)),
    (torch.bfloat16, 4, 2048, 16, 4, 128, dict(causal=True)),
    (torch.bfloat16, 4, 4096, 4, 4, 256, dict(causal=True)),
    (torch.bfloat16, 1, 600, 8, 1, 64, dict(causal=False, interleaved=True)),
    (torch.bfloat16, 1, 4096, 8, 2, 64, dict(causal=True, window=512, packed=True)),
    (torch.float16, 1, 40, 2, 2, 80, dict(causal=True, window=1)),  # one tile of queries; the head is padded
    (torch.bfloat16, 1, 20, 2, 2, 256, dict(causal=True)),
    (torch.bfloat16, 4, 4096, 8, 8, 32, dict(causal=True)),
    (torch.bfloat16, 1, 600, 4, 4, 128, dict(causal=True)),
    (torch.bfloat16, 1, 600, 4, 4, 256, dict(causal=True)),
    (torch.bfloat16, 1, 1, 1, 1, 16, dict(causal=True)),  # sizes of 1 are constants to the compiler
    (torch.float32, 1, 600, 8, 1, 64, dict(causal=True)),
    (torch.float32, 1, 600, 4, 4, 128, dict(causal=True)),
    (torch.float32, 1, 600, 4, 4, 256, dict(causal=True)),
    (torch.float32, 1, 20, 2, 2, 64, dict(causal=True)),
    (torch.float32, 1, 20, 2, 2, 256, dict(causal=True)),
    (torch.float32, 1, 100, 4, 4, 64, dict(causal=True, capacity=600, window=600)),
    (torch.bfloat16, 1, 512, 8, 1, 64, dict(causal=True, capacity=4096)),  # a chunk against a cache
    (torch.bfloat16, 1, 512, 4, 4, 128, dict(causal=True, capacity=600, window=600)),
    (torch.bfloat16, 4, 4096, 4, 4, 256, dict(causal=True, capacity=4096)),
)

# dtype, batch, heads, kv_heads, head_dim, capacity, window
STEPS = (
    (torch.bfloat16, 1, 8, 8, 64, 600, None),
    (torch.bfloat16, 1, 8, 1, 64, 600, None),
    (torch.bfloat16, 64, 4, 4, 256, 600, 600),
    (torch.float32, 1, 8, 8, 64, 600, None),
    (torch.float16, 1, 1, 1, 16, 1, 1),
)


def _run(
    dtype: torch.dtype, batch: int, length: int, heads: int, kv_heads: int, head_dim: int, options: dict[str, Any]
) -> None:
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
    cache: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if "capacity" in options:
        cache_k, cache_v = (torch.empty(batch, options["capacity"], kv_heads, head_dim, dtype=dtype) for _ in range(2))
        position = torch.empty(batch, dtype=torch.int64)
        cache = (cache_k, cache_v, position)
        kernels.attention_append(k, v, cos, sin, cache_k, cache_v, position, masks[3])
    y, softmax = kernels.attention_forward(q, k, v, cos, sin, *masks, *cache, True)
    kernels.attention_backward(y, q, k, v, cos, sin, y, softmax, *masks, *cache)


def _run_step(
    dtype: torch.dtype, batch: int, heads: int, kv_heads: int, head_dim: int, capacity: int, window: int | None
) -> None:
    q = torch.empty(batch, heads, head_dim, dtype=dtype)
    k, v = (torch.empty(batch, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    cos, sin = (torch.empty(batch, head_dim // 2) for _ in range(2))
    cache_k, cache_v = (torch.empty(batch, capacity, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    position = torch.empty(batch, dtype=torch.int64)
    triton_step.attention_step(q, k, v, cos, sin, cache_k, cache_v, position, window, 0.1, False)


def ahead_of_time_cases(capability: int) -> list[dict]:
    """`capability` as compilers write it: 89, 90."""
    device = Device((capability // 10, capability % 10), 132 if capability == 90 else 128)
    cases = []
    for module, run, sizes in ((kernels, _run, SIZES), (triton_step, _run_step, STEPS)):
        for size in sizes:
            label = ", ".join(str(each).removeprefix("torch.") for each in size)
            with patch.object(module, "device_of", lambda _: device):
                cases += recorded_launches(module, label, partial(run, *size))
    return cases
