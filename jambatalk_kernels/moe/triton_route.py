"""Triton kernels of `moe_route`: two launches at most, nothing read on the host, equal bytes on every run.

    p = softmax(l)   (float32; float64 for float64 logits)
    experts = the top_k largest of p, ties to the lowest index;   weights = p[experts], over their sum if renormalised
    order, offsets = the stable sort of the assignments (token * top_k + slot) by expert
    probability_sums = the sum of p over the tokens

The first kernel has one row of logits per token in registers: softmax, then top_k times the arg-max; it also counts the
picks of its tokens per expert and sums their probabilities (what the load-balancing loss wants). The second sums those
counts (an exclusive prefix sum over programs and experts: where
the picks of this program belong) and writes each assignment to its place. Within an expert the assignments of a stable
sort are in the order of their tokens, since no token picks an expert twice; so an assignment's rank in its program is
the number of earlier tokens that picked the same expert. When one block holds all tokens, the first kernel does it all.

A row with a NaN or +inf, or with nothing but -inf, has NaN probabilities (softmax's own answer): its experts are
0 .. top_k - 1 and its weights NaN. Other rows do not notice. Experts are in range whatever the logits are.

Cost: tokens * (experts * (in + 4) + 8 top_k) bytes and 4 * tokens * top_k to sort, bound by latency (a few us) at the
model's sizes. Source: kernels.md 1.5; the scheme of histogram, prefix sum and scatter is that of vLLM and Liger.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.gpu import next_power_of_2
from jambatalk_kernels.moe.heuristics import MAX_EXPERTS, MAX_TOP_K, route_plan
from jambatalk_kernels.triton_interpreter import rounded

__all__ = ["ahead_of_time_cases", "route_backward", "route_forward"]


@triton.jit
def _scatter(slot, place, order, t, TOP_K: tl.constexpr):
    """Write the picks of a block of tokens to `order`: those of expert e from place[e] on.

    slot: (tokens, experts), the slot in which a token has picked an expert, or -1. Returns the next places.
    """
    picked = (slot >= 0).to(tl.int32)
    rank = tl.cumsum(picked, 0) - picked
    assignment = t[:, None] * TOP_K + slot
    tl.store(order + (place[None, :] + rank), assignment, mask=slot >= 0)
    return place + tl.sum(picked, 0)


@triton.jit
def _store_offsets(offsets, ends, e, experts):
    tl.store(offsets + 1 + e, ends, mask=e < experts)
    tl.store(offsets, 0)


@triton.jit
def _choose_kernel(
    logits, weights, chosen, probabilities, counts, sums, order, offsets,
    tokens, experts, stride_t, stride_e, blocks_per_program,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    real = weights.dtype.element_ty
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    picks = tl.zeros((BLOCK_E,), tl.int32)
    summed = tl.zeros((BLOCK_E,), real)
    first = program * blocks_per_program
    for block in range(first, min(first + blocks_per_program, tl.cdiv(tokens, BLOCK_T))):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None]
        row = tl.minimum(t, tokens - 1).to(tl.int64)[:, None]  # past the end: the last one again, not stored
        column = e.to(tl.int64)[None, :]
        real_expert = (e < experts)[None, :]
        held = inside & real_expert
        x = tl.load(logits + row * stride_t + column * stride_e, mask=real_expert, other=float("-inf")).to(real)
        grown = tl.exp(x - tl.max(x, 1)[:, None])
        p = grown / tl.sum(grown, 1)[:, None]
        tl.store(probabilities + row * experts + column, p, mask=held)
        summed += tl.sum(tl.where(held, p, 0.0), 0)

        # What is left to pick: probabilities, 0 in a row of NaN; below 0 where there is nothing or it has been picked.
        broken = (p != p) & real_expert
        left = tl.where(real_expert, tl.where(broken, 0.0, p), -1.0)
        slot = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
        kept = tl.zeros((BLOCK_T, BLOCK_K), real)
        indices = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
        for s in range(TOP_K):
            value, index = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
            here = e[None, :] == index[:, None]
            slot = tl.where(here, s, slot)
            left = tl.where(here, -1.0, left)
            kept = tl.where(k[None, :] == s, value[:, None], kept)
            indices = tl.where(k[None, :] == s, index[:, None], indices)
        if RENORMALIZE:
            kept = kept / tl.sum(kept, 1)[:, None]
        any_broken = tl.max(broken.to(tl.int32), 1)[:, None] > 0
        kept = tl.where(any_broken, float("nan"), kept)
        asked = inside & (k < TOP_K)[None, :]
        tl.store(weights + row * TOP_K + k[None, :], kept, mask=asked)
        tl.store(chosen + row * TOP_K + k[None, :], indices, mask=asked)

        slot = tl.where(held, slot, -1)
        picks += tl.sum((slot >= 0).to(tl.int32), 0)
        if ONE_BLOCK:
            ends = tl.cumsum(picks, 0)
            _store_offsets(offsets, ends, e, experts)
            _scatter(slot, ends - picks, order, t, TOP_K)
    # Of one block these are the sums, of many this program's part of them.
    tl.store(sums + program * experts + e, summed, mask=e < experts)
    if not ONE_BLOCK:
        tl.store(counts + program * experts + e, picks, mask=e < experts)


@triton.jit
def _sort_kernel(
    chosen, counts, parts, order, offsets, sums, tokens, experts, blocks_per_program, programs,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, programs, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        picks = tl.load(counts + p * experts + e[None, :], mask=(p < programs) & (e < experts)[None, :], other=0)
        total += tl.sum(picks, 0)
        earlier += tl.sum(tl.where(p < program, picks, 0), 0)
    ends = tl.cumsum(total, 0)
    if program == 0:
        _store_offsets(offsets, ends, e, experts)
        summed = tl.zeros((BLOCK_E,), sums.dtype.element_ty)
        for start in range(0, programs, BLOCK_P):
            p = (start + tl.arange(0, BLOCK_P))[:, None]
            held = (p < programs) & (e < experts)[None, :]
            summed += tl.sum(tl.load(parts + p * experts + e[None, :], mask=held, other=0.0), 0)
        tl.store(sums + e, summed, mask=e < experts)
    place = ends - total + earlier
    first = program * blocks_per_program
    for block in range(first, min(first + blocks_per_program, tl.cdiv(tokens, BLOCK_T))):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        slot = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
        for s in range(TOP_K):
            index = tl.load(chosen + t.to(tl.int64) * TOP_K + s, mask=t < tokens, other=-1)
            slot = tl.where(index[:, None] == e[None, :], s, slot)
        place = _scatter(slot, place, order, t, TOP_K)


@triton.jit
def _choose_backward_kernel(
    grad_weights, grad_probabilities, grad_sums, weights, chosen, probabilities, grad_logits, tokens, experts,
    stride_wt, stride_wk, stride_pt, stride_pe, stride_s,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    real = weights.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = t < tokens
    t = t.to(tl.int64)
    column = e.to(tl.int64)[None, :]
    held = inside[:, None] & (e < experts)[None, :]
    p = tl.load(probabilities + t[:, None] * experts + column, mask=held, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), real)
    if grad_probabilities is not None:
        pointers = grad_probabilities + t[:, None] * stride_pt + column * stride_pe
        grad += tl.load(pointers, mask=held, other=0.0).to(real)
    if grad_sums is not None:
        grad += tl.load(grad_sums + e.to(tl.int64) * stride_s, mask=e < experts, other=0.0).to(real)[None, :]
    if grad_weights is not None:
        # With renormalisation w = p / S over the picks, S their sum: dp = (dw - <dw, w>) / S.
        scale = tl.full((BLOCK_T,), 1.0, real)
        shift = tl.zeros((BLOCK_T,), real)
        if RENORMALIZE:
            total = tl.zeros((BLOCK_T,), real)
            for s in range(TOP_K):
                index = tl.load(chosen + t * TOP_K + s, mask=inside, other=0)
                index = tl.minimum(tl.maximum(index, 0), experts - 1)
                total += tl.load(probabilities + t * experts + index, mask=inside, other=1.0)
                w = tl.load(weights + t * TOP_K + s, mask=inside, other=0.0)
                shift += w * tl.load(grad_weights + t * stride_wt + s * stride_wk, mask=inside, other=0.0).to(real)
            scale = 1.0 / total
        for s in range(TOP_K):
            index = tl.load(chosen + t * TOP_K + s, mask=inside, other=-1)
            dw = tl.load(grad_weights + t * stride_wt + s * stride_wk, mask=inside, other=0.0).to(real)
            grad += tl.where(index[:, None] == e[None, :], ((dw - shift) * scale)[:, None], 0.0)
    inner = tl.sum(tl.where(held, grad * p, 0.0), 1)
    result = p * (grad - inner[:, None])
    tl.store(grad_logits + t[:, None] * experts + column, rounded(result, grad_logits.dtype.element_ty), mask=held)


def _check(tokens: int, experts: int, top_k: int) -> None:
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ValueError(
            f"moe_route: the Triton kernels take up to {MAX_EXPERTS} experts and top_k up to {MAX_TOP_K}, "
            f"got {experts} experts and top_k {top_k}"
        )
    if tokens * top_k >= 2**31:
        raise ValueError(f"moe_route: tokens * top_k must be less than 2**31, got {tokens} * {top_k}")


def route_forward(
    logits: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits (tokens, experts), any strides -> the tensors of `Routing`, in its order.

    weights, probabilities and their sums are float32 (float64 for float64 logits), the others int32. One launch for few
    tokens (`route_plan`), else two.
    """
    tokens, experts = logits.shape
    _check(tokens, experts, top_k)
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = logits.new_empty(tokens, top_k, dtype=real)
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int32)
    probabilities = logits.new_empty(tokens, experts, dtype=real)
    order = logits.new_empty(tokens * top_k, dtype=torch.int32)
    if tokens == 0:
        offsets, sums = logits.new_zeros(experts + 1, dtype=torch.int32), logits.new_zeros(experts, dtype=real)
        return weights, chosen, probabilities, order, offsets, sums
    sums = logits.new_empty(experts, dtype=real)
    offsets = logits.new_empty(experts + 1, dtype=torch.int32)
    plan = route_plan(tokens, experts)
    one_block = plan.programs == 1 and plan.blocks_per_program == 1
    counts = offsets if one_block else logits.new_empty(plan.programs, experts, dtype=torch.int32)
    parts = sums if one_block else logits.new_empty(plan.programs, experts, dtype=real)
    block_e = next_power_of_2(experts)
    _choose_kernel[(plan.programs,)](
        logits, weights, chosen, probabilities, counts, parts, order, offsets,
        tokens, experts, logits.stride(0), logits.stride(1), plan.blocks_per_program,
        TOP_K=top_k, RENORMALIZE=renormalize, ONE_BLOCK=one_block,
        BLOCK_T=plan.block_tokens, BLOCK_E=block_e, BLOCK_K=next_power_of_2(top_k), num_warps=plan.num_warps,
    )  # fmt: skip
    if not one_block:
        _sort_kernel[(plan.programs,)](
            chosen, counts, parts, order, offsets, sums, tokens, experts, plan.blocks_per_program, plan.programs,
            TOP_K=top_k, BLOCK_T=plan.block_tokens, BLOCK_E=block_e, BLOCK_P=plan.block_counts,
            num_warps=plan.num_warps,
        )  # fmt: skip
    return weights, chosen, probabilities, order, offsets, sums


def route_backward(
    grad_weights: Tensor | None,
    grad_probabilities: Tensor | None,
    grad_probability_sums: Tensor | None,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    probabilities: Tensor,
    renormalize: bool,
) -> Tensor:
    """dl = p * (g - <g, p>), g = grad_probabilities + grad_probability_sums + grad_weights at the picked experts.

    Of logits only dtype and shape are used. One launch; a row of NaN probabilities has NaN gradients.
    """
    tokens, num_experts = logits.shape
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if tokens == 0:
        return grad_logits
    plan = route_plan(tokens, num_experts)
    block = min(plan.block_tokens, 64)
    _choose_backward_kernel[(triton.cdiv(tokens, block),)](
        grad_weights, grad_probabilities, grad_probability_sums, weights, experts, probabilities, grad_logits,
        tokens, num_experts,
        *(grad_weights.stride() if grad_weights is not None else (0, 0)),
        *(grad_probabilities.stride() if grad_probabilities is not None else (0, 0)),
        grad_probability_sums.stride(0) if grad_probability_sums is not None else 0,
        TOP_K=weights.shape[1], RENORMALIZE=renormalize, BLOCK_T=block, BLOCK_E=next_power_of_2(num_experts),
        num_warps=plan.num_warps,
    )  # fmt: skip
    return grad_logits


def ahead_of_time_cases() -> list[dict]:
    """What launches at the model's sizes, at the bar's and at the limits are compiled as."""
    from jambatalk_kernels.triton_launches import recorded_launches

    cases = []
    for tokens, experts, top_k in ((1, 8, 2), (8192, 8, 2), (8192, 8, 8), (8192, 256, 16)):

        def run(tokens=tokens, experts=experts, top_k=top_k):
            logits = torch.empty(tokens, experts)
            weights, chosen, probabilities, *_ = route_forward(logits, top_k, False)
            route_backward(weights, None, logits[0], logits, weights, chosen, probabilities, False)

        label = f"{tokens} tokens, {experts} experts, top {top_k}"
        cases += recorded_launches(sys.modules[__name__], label, run)
    return cases
