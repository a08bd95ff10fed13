"""Triton kernels for one frame of the loop: what the other ops' steps leave over (formulas: `reference.linear_step`).

    _linear_kernel   y = residual + W f(x) + bias;  f: RMSNorm, silu(gate) * up, or nothing
    _norms_kernel    RMSNorm of neighbouring stretches of a row
    _keep_kernel     the state of the sequences that end with this frame, put aside

A frame is a chain of launches, and a launch costs more than the work of most of them: hence norms, gates and residuals
inside of the products. The norm's factor is applied to the sum, so that x is read once: W (n * x r) = r W (n * x).

Cost of a product: every weight read once for all rows, which binds it; weights may be of a narrower dtype than x. Sums
are float32 in a fixed order. Above MATRIX_VECTOR_ROWS rows torch's products serve better. Source: kernels.md 5.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.attention.reference import KVCache
from jambatalk_kernels.attention.triton_step import attention_step
from jambatalk_kernels.causal_conv1d.triton import conv_step
from jambatalk_kernels.gpu import next_power_of_2
from jambatalk_kernels.moe.heuristics import vector_plan
from jambatalk_kernels.moe.triton_mlp import mlp_forward
from jambatalk_kernels.moe.triton_route import route_forward
from jambatalk_kernels.rollout.graph import MATRIX_VECTOR_ROWS
from jambatalk_kernels.rollout.program import MoEMLP
from jambatalk_kernels.rollout.reference import StepOps, linear_step
from jambatalk_kernels.selective_scan.triton import scan_step
from jambatalk_kernels.triton_interpreter import rounded

__all__ = ["TRITON", "ahead_of_time_cases", "keep_ended"]

_KEEP_WORDS = 4096  # of a sequence's state, copied by one program


@triton.jit
def _linear_kernel(
    x, weight, bias, norm, residual, y, rows, out, features, eps, x_b, x_k, weight_n, weight_k, residual_b,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of every row; y is contiguous, and so are bias, norm and the rows of residual."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = n < out
    w = weight + n.to(tl.int64)[:, None] * weight_n + k.to(tl.int64)[None, :] * weight_k
    for row in range(rows):
        a = x + tl.cast(row, tl.int64) * x_b + k.to(tl.int64) * x_k
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, features, BLOCK_K):
            near = k < features - start
            step = tl.cast(start, tl.int64)
            value = tl.load(a + step * x_k, mask=near, other=0.0).to(tl.float32)
            if norm is not None:
                squares += value * value
                value *= tl.load(norm + start + k, mask=near, other=0.0).to(tl.float32)
            if GATED:
                up = tl.load(a + (step + features) * x_k, mask=near, other=0.0).to(tl.float32)
                value = value / (1.0 + tl.exp(-value)) * up
            part = tl.load(w + step * weight_k, mask=held[:, None] & near[None, :], other=0.0).to(tl.float32)
            sums += part * value[None, :]
        total = tl.sum(sums, 1)
        if norm is not None:
            total *= 1.0 / tl.sqrt(tl.sum(squares, 0) / features + eps)
        if bias is not None:
            total += tl.load(bias + n, mask=held, other=0.0).to(tl.float32)
        if residual is not None:
            total += tl.load(residual + tl.cast(row, tl.int64) * residual_b + n, mask=held, other=0.0).to(tl.float32)
        tl.store(y + tl.cast(row, tl.int64) * out + n, rounded(total, y.dtype.element_ty), mask=held)


@triton.jit
def _norms_kernel(x, first, second, third, y, size0, size1, size2, eps, x_b, x_k, BLOCK: tl.constexpr):
    """Stretch program_id(1) of row program_id(0); y is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    k = tl.arange(0, BLOCK)
    begin = 0
    size = size0
    if which == 0:
        scale = tl.load(first + k, mask=k < size0, other=0.0).to(tl.float32)
    elif which == 1:
        begin = size0
        size = size1
        scale = tl.load(second + k, mask=k < size1, other=0.0).to(tl.float32)
    else:
        begin = size0 + size1
        size = size2
        scale = tl.load(third + k, mask=k < size2, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_b + (begin + k).to(tl.int64) * x_k, mask=k < size, other=0.0).to(tl.float32)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps) * scale
    at = y + row * (size0 + size1 + size2) + begin + k
    tl.store(at, rounded(value, y.dtype.element_ty), mask=k < size)


@triton.jit
def _keep_kernel(state, kept, lengths, frame, words, BLOCK: tl.constexpr):
    """state, kept (batch, words) int32, contiguous. Frame `frame` is the last one of a sequence of `frame` + 1."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(lengths + row) != tl.load(frame) + 1:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(state + row * words + at, mask=at < words, other=0)
    tl.store(kept + row * words + at, value, mask=at < words)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.linear_step`. For few rows `weight` may be of another dtype than x."""
    rows, out = x.shape[0], weight.shape[0]
    if rows > MATRIX_VECTOR_ROWS:
        if norm is not None:
            (x,) = norms(x, (norm,), eps)
        return linear_step(x, weight, bias, gated=gated, residual=residual)
    y = x.new_empty(rows, out)
    plan = vector_plan(out, weight.shape[1])
    _linear_kernel[(triton.cdiv(out, plan.block_n),)](
        x, weight, bias, norm, residual, y, rows, out, weight.shape[1], eps, *x.stride(), *weight.stride(),
        0 if residual is None else residual.stride(0),
        GATED=gated, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, num_warps=plan.num_warps,
    )  # fmt: skip
    return y


def norms(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """RMSNorm of up to three neighbouring stretches of x (batch, features), one launch."""
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(x.shape[0], sum(sizes))
    missing = 3 - len(weights)
    _norms_kernel[(x.shape[0], len(weights))](
        x, *weights, *[None] * missing, y, *sizes, *[0] * missing, eps, *x.stride(),
        BLOCK=next_power_of_2(max(sizes)), num_warps=4,
    )  # fmt: skip
    return y.split(sizes, 1)


def conv(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    return conv_step(state, x, weight, bias, activation == "silu")


def scan(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    *, delta_bias: Tensor, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    return scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, *, window: int | None, scale: float
) -> Tensor:
    y = attention_step(q, k, v, cos, sin, cache.k, cache.v, cache.position, window, scale, False)
    cache.position += 1
    return y


def experts(mlp: MoEMLP, x: Tensor, eps: float) -> Tensor:
    (normed,) = norms(x, (mlp.norm,), eps)
    weights, chosen, _, order, offsets, _ = route_forward(linear(normed, mlp.router), mlp.top_k, False)
    return x + mlp_forward(normed, weights, chosen, order, offsets, mlp.w_in, mlp.w_out, "swiglu", False)[0]


TRITON = StepOps(linear, norms, conv, scan, attention, experts)


def keep_ended(state: Tensor, kept: Tensor, lengths: Tensor, frame: Tensor) -> None:
    """kept[b] = state[b] for the sequences whose last frame was `frame`; others cost a look at their length."""
    batch, words = state.shape
    _keep_kernel[(batch, triton.cdiv(words, _KEEP_WORDS))](
        state, kept, lengths, frame, words, BLOCK=_KEEP_WORDS, num_warps=4
    )


# ---- proof ----------------------------------------------------------------------------------------------------------


def _every_launch(x_dtype: torch.dtype, weight_dtype: torch.dtype, d: int) -> None:
    def matrix(out: int, size: int) -> Tensor:
        return torch.empty(out, size, dtype=weight_dtype)

    x, norm = torch.empty(1, d, dtype=x_dtype), torch.empty(d, dtype=x_dtype)
    both = linear(x, matrix(4 * d, d), norm=norm, eps=1e-6)
    u = both[:, : 2 * d]
    low = linear(u, matrix(64, 2 * d))
    dt, _, _ = norms(low, (norm[:32], norm[:16], norm[:16]), 1e-6)
    linear(dt, matrix(2 * d, 32))
    linear(both, matrix(d, 2 * d), gated=True, residual=x)
    linear(u, matrix(d, 2 * d), residual=x)
    linear(x, matrix(d, d), norm)
    counter = torch.empty(1, dtype=torch.int64)
    state, kept = torch.empty(2, 1, 99, dtype=torch.int32).unbind()
    keep_ended(state, kept, counter, counter)


def ahead_of_time_cases() -> list[dict]:
    """The launches of the `vocaset` and `demo` presets."""
    import sys

    from jambatalk_kernels.triton_launches import recorded_launches

    cases = []
    for dtypes, d in (
        ((torch.float32, torch.bfloat16), 512),
        ((torch.bfloat16,) * 2, 512),
        ((torch.float32,) * 2, 128),
    ):
        label = f"x {str(dtypes[0])[6:]}, weights {str(dtypes[1])[6:]}, d {d}"
        cases += recorded_launches(sys.modules[__name__], label, partial(_every_launch, *dtypes, d))
    return cases
