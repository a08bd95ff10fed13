"""Triton kernels of `rope_attention_step`: one new position of every sequence against its cache.

    k'_p = rotate(k, p) and v go to slot p % capacity of the cache
    y = sum over the visible slots of softmax(scale q'_p . k') v

p = position, the number of positions cached before. A slot's age is how many positions ago it was written: slot s holds
position p - age, and it is visible where that is not negative and, with a window, age < window. The new position is
read from registers: the program whose slots hold it starts its softmax from it and stores it, so no program waits for
another one's store. The keys of the cache are already rotated. Sums are float32.

Where batch * kv_heads programs would leave the GPU idle the cache is split over several, each of which writes its
maximum, sum and weighted values (float32); a second launch adds these in the order of the slots: no atomics. A program
whose slots are all empty reads nothing but the position.

Cost: 2 * min(position + 1, capacity) * kv_heads * head_dim elements of the cache read per sequence (1.2 MB at 600
positions of 8 heads of 64 in bfloat16, 1.2 us on a 4090): bound by these bytes for large batches, by latency for one
sequence. Source: kernels.md 1.6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.attention import heuristics
from jambatalk_kernels.attention.triton import LOG2_E, check, device_of, load_rotated
from jambatalk_kernels.gpu import next_power_of_2
from jambatalk_kernels.triton_interpreter import dot, rounded

__all__ = ["attention_step"]


@triton.jit
def _step_kernel(
    q, k, v, cos, sin, cache_k, cache_v, position, y, parts, maxima, sums,
    kv_heads, half, capacity, slots, window, scale,
    q_b, q_h, q_d, k_b, k_h, k_d, v_b, v_h, v_d, cos_b, cos_h, cos_d, sin_b, sin_h, sin_d,
    cache_k_b, cache_k_t, cache_k_h, cache_k_d, cache_v_b, cache_v_t, cache_v_h, cache_v_d, position_b,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, INTERLEAVED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale is in units of log2. Program (batch * kv_heads, split); GROUP query heads, BLOCK_G rows."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    batch = (row // kv_heads).to(tl.int64)
    kv_head = (row % kv_heads).to(tl.int64)
    cos += batch * cos_b + kv_head * cos_h
    sin += batch * sin_b + kv_head * sin_h
    g = tl.arange(0, BLOCK_G)
    f = tl.arange(0, BLOCK_D)
    held = f < 2 * half
    head = kv_head * GROUP + g
    rows = head * 0
    queries = load_rotated(
        q + batch * q_b + head * q_h, q_d, cos + rows, cos_d, sin + rows, sin_d, g < GROUP, half, INTERLEAVED, BLOCK_D
    )  # fmt: skip

    p = tl.maximum(tl.load(position + batch * position_b), 0)
    newest = (p % capacity).to(tl.int32)
    oldest_age = tl.minimum(p, capacity - 1).to(tl.int32)
    if WINDOW:
        oldest_age = tl.minimum(oldest_age, window - 1)
    first = split * slots
    # Until the cache has wrapped around, slots past the newest are empty.
    last = tl.where(p < capacity, newest + 1, capacity)
    last = tl.minimum(first + slots, last)

    keys_at = cache_k + batch * cache_k_b + kv_head * cache_k_h
    values_at = cache_v + batch * cache_v_b + kv_head * cache_v_h
    maximum = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    normalizer = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if (newest >= first) & (newest < first + slots):
        one = tl.arange(0, 1)
        key = load_rotated(
            k + batch * k_b + kv_head * k_h + one, k_d, cos + one, cos_d, sin + one, sin_d, one == 0, half,
            INTERLEAVED, BLOCK_D,
        )  # fmt: skip
        value = tl.load(v + batch * v_b + kv_head * v_h + f * v_d, mask=held, other=0.0)[None, :]
        key = rounded(key, cache_k.dtype.element_ty)
        value = rounded(value, cache_v.dtype.element_ty)
        slot = newest.to(tl.int64)
        tl.store(keys_at + slot * cache_k_t + f[None, :] * cache_k_d, key, mask=held[None, :])
        tl.store(values_at + slot * cache_v_t + f[None, :] * cache_v_d, value, mask=held[None, :])
        maximum = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1) * scale
        normalizer = normalizer + 1.0
        total = total + value.to(tl.float32)

    n = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        slot = start + n
        age = tl.where(slot <= newest, newest - slot, newest - slot + capacity)
        seen = (slot < last) & (age > 0) & (age <= oldest_age)
        mask = seen[:, None] & held[None, :]
        at = slot.to(tl.int64)[:, None]
        keys = tl.load(keys_at + at * cache_k_t + f[None, :] * cache_k_d, mask=mask, other=0.0)
        values = tl.load(values_at + at * cache_v_t + f[None, :] * cache_v_d, mask=mask, other=0.0)
        if BLOCK_G == 1:
            scores = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)[None, :] * scale
        else:
            scores = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
            scores = dot(queries, tl.trans(rounded(keys, queries.dtype)), scores, "ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        shrink = tl.exp2(maximum - shift)
        weights = tl.exp2(scores - shift[:, None])
        normalizer = normalizer * shrink + tl.sum(weights, 1)
        if BLOCK_G == 1:
            total = total * shrink[:, None] + tl.sum(tl.trans(weights) * values.to(tl.float32), 0)[None, :]
        else:
            values = rounded(values, queries.dtype)
            total = dot(rounded(weights, values.dtype), values, total * shrink[:, None], "ieee")
        maximum = new_maximum

    inside = g < GROUP
    at = batch * kv_heads * GROUP + head
    stored = inside[:, None] & held[None, :]
    if SPLITS == 1:  # at least the new position was seen
        result = rounded(total / normalizer[:, None], y.dtype.element_ty)
        tl.store(y + at[:, None] * (2 * half) + f[None, :], result, mask=stored)
    else:
        at = at * SPLITS + split
        tl.store(parts + at[:, None] * (2 * half) + f[None, :], total, mask=stored)
        tl.store(maxima + at, maximum, mask=inside)
        tl.store(sums + at, normalizer, mask=inside)


@triton.jit
def _combine_kernel(
    parts, maxima, sums, y, features, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row of y from its parts."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    f = tl.arange(0, BLOCK_D)
    maximum = tl.load(maxima + row * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
    share = tl.exp2(maximum - tl.max(maximum, 0))
    normalizer = tl.sum(share * tl.load(sums + row * SPLITS + s, mask=s < SPLITS, other=0.0), 0)
    at = (row * SPLITS + s)[:, None] * features + f[None, :]
    part = tl.load(parts + at, mask=(s < SPLITS)[:, None] & (f < features)[None, :], other=0.0)
    result = tl.sum(part * share[:, None], 0) / normalizer
    tl.store(y + row * features + f, rounded(result, y.dtype.element_ty), mask=f < features)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    window: int | None,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """-> y (batch, heads, head_dim), contiguous. cache_k and cache_v are changed in place; `position` is not.

    Any strides; the cache may be of another dtype than q. cos, sin (batch, head_dim / 2) or with a head axis.
    """
    check(q)
    batch, heads, head_dim = q.shape
    kv_heads, capacity = k.shape[1], cache_k.shape[1]
    y = q.new_empty(q.shape)
    if q.numel() == 0:
        return y
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = (table.expand(-1, kv_heads, -1) for table in (cos, sin))
    group, groups = heads // kv_heads, batch * kv_heads
    device = device_of(q.get_device())
    plan = heuristics.step_plan(capacity, groups, head_dim, cache_k.element_size(), device)
    parts = maxima = sums = None
    if plan.splits > 1:
        parts = q.new_empty(batch, heads, plan.splits, head_dim, dtype=torch.float32)
        maxima, sums = parts.new_empty(2, batch, heads, plan.splits).unbind()
    block_d = heuristics.padded_head_dim(head_dim)
    _step_kernel[(groups, plan.splits)](
        q, k, v, cos, sin, cache_k, cache_v, position, y, parts, maxima, sums,
        kv_heads, head_dim // 2, capacity, plan.slots, 0 if window is None else min(window, capacity),
        scale * LOG2_E,
        *q.stride(), *k.stride(), *v.stride(), *cos.stride(), *sin.stride(),
        *cache_k.stride(), *cache_v.stride(), position.stride(0),
        GROUP=group, WINDOW=window is not None, INTERLEAVED=interleaved, SPLITS=plan.splits,
        BLOCK_G=1 if group == 1 else max(16, next_power_of_2(group)), BLOCK_N=plan.block_n,
        BLOCK_D=block_d, num_warps=plan.num_warps,
    )  # fmt: skip
    if plan.splits > 1:
        _combine_kernel[(batch * heads,)](
            parts, maxima, sums, y, head_dim,
            SPLITS=plan.splits, BLOCK_S=next_power_of_2(plan.splits), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return y
