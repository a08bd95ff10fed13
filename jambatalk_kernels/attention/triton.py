"""Triton kernels of `rope_attention`, forward and backward, in the flash style.

    q'_i = rotate(q_i, i),   k'_j = rotate(k_j, j)          rotate per pair: (a, b) -> (a c - b s, a s + b c)
    s_ij = scale q'_i . k'_j,   p_ij = softmax over the visible j,   y_i = sum over j of p_ij v_j

    backward   delta_i = <dy_i, y_i>,   ds_ij = p_ij (<dy_i, v_j> - delta_i)
               dv_j = sum over i of p_ij dy_i,   dk'_j = scale sum over i of ds_ij q'_i
               dq'_i = scale sum over j of ds_ij k'_j
               of a pair:  da = c da' + s db',  db = c db' - s da',  dcos = a da' + b db',  dsin = a db' - b da'

Every mask here lets position i see an interval of keys, and both its ends grow with i: so a tile of queries meets
tiles of keys that it sees in part, then some that it sees as a whole (no mask is computed), then again some in part.
Keys outside are never read. The same holds for the queries that see a tile of keys.

The query heads of a group are rows of one tile, position by position, so keys and values are read once per group. The
keys are rotated once, in a launch of their own, into a contiguous copy in their dtype (as the reference rounds them),
except for very short clips, where each tile of queries rotates what it loads. Nothing assumes a norm of (cos, sin).

With a cache (chunked prefill) keys stand in `capacity` places before those of the chunk, in the order of their
positions: place a < capacity is slot (position + a) % capacity, and the last min(position, capacity) of these places
are filled. So a ring that has wrapped around is read in order, where it lies; `attention_append` is a launch of its
own, for after the queries have seen what it overwrites. Cached keys get no gradient, so only that of q reads them.

Packed positions outside of every sequence see nothing and nobody sees them.

Saved: y, and for each row the op's logsumexp in two parts, float32: weights are exp2(score - shift) * share, the score
in units of log2. In float32 these are the largest score and one over the sum, since a logarithm of the sum would be
rounded by an ulp of the largest score, and the weights by as much, several times what PyTorch's are. In half precision
share is 1. A row that saw nothing has shift 0 and share 1; its y and gradients are zero.
Every sum has a fixed order and nothing is added by atomics: dk and dv by programs that own keys (where these are too
few, by some per group of heads, whose parts are added in order), dq by programs that own queries, dcos and dsin in a
last pass over positions, heads in order, which also turns dq' and dk' back.

float32, bfloat16 and float16, sums in float32; float32 products are IEEE unless torch allows TF32. float64: refused.

Cost: 4 * heads * head_dim operations forward and 14 backward per visible pair (7 products of which two compute s and
<dy, v> a second time), bound by the matrix units from about 1000 positions on and by launches below. Bytes: q, k, v
and y once, keys and values once more for each tile of rows, from L2. Source: kernels.md 1.6; FlashAttention-2
(arXiv 2307.08691) for the order of the loops.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from jambatalk_kernels.attention import heuristics
from jambatalk_kernels.attention.heuristics import Device
from jambatalk_kernels.triton_interpreter import dot, rounded

__all__ = ["attention_append", "attention_backward", "attention_forward"]

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


# ---- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_pairs(rows, stride, inside, half, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr):
    """rows: pointers to the first feature of each. -> the pairs' first and second members, float32."""
    if INTERLEAVED:
        f = tl.arange(0, 2 * BLOCK_H)
        x = tl.load(rows[:, None] + f[None, :] * stride, mask=inside[:, None] & (f < 2 * half)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_H, 2)))
    else:
        f = tl.arange(0, BLOCK_H)
        held = inside[:, None] & (f < half)[None, :]
        a = tl.load(rows[:, None] + f[None, :] * stride, mask=held, other=0.0)
        b = tl.load(rows[:, None] + (half + f)[None, :] * stride, mask=held, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_table(rows, stride, pair, inside, half):
    """rows: pointers to each row's table, of which `pair` are read; float32."""
    mask = inside[:, None] & (pair < half)[None, :]
    return tl.load(rows[:, None] + pair[None, :] * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rotated(
    rows, stride, cos, cos_stride, sin, sin_stride, inside, half, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """rows, cos, sin (R,): pointers to the first feature or angle of each. -> (R, BLOCK_D) rotated, features in order,
    in the dtype of the rows."""
    if INTERLEAVED:
        pair = tl.arange(0, BLOCK_D // 2)
        a, b = _load_pairs(rows, stride, inside, half, True, BLOCK_D // 2)
        c = _load_table(cos, cos_stride, pair, inside, half)
        s = _load_table(sin, sin_stride, pair, inside, half)
        turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (rows.shape[0], BLOCK_D))
    else:  # each feature reads its partner too, from L1: halves of a tile cannot be put together
        f = tl.arange(0, BLOCK_D)
        first = f < half
        pair = tl.where(first, f, f - half)
        held = inside[:, None] & (f < 2 * half)[None, :]
        own = tl.load(rows[:, None] + f[None, :] * stride, mask=held, other=0.0).to(tl.float32)
        partner = tl.where(first, f + half, pair)
        other = tl.load(rows[:, None] + partner[None, :] * stride, mask=held, other=0.0).to(tl.float32)
        c = _load_table(cos, cos_stride, pair, inside, half)
        s = _load_table(sin, sin_stride, pair, inside, half)
        turned = own * c + tl.where(first, -1.0, 1.0)[None, :] * other * s
    return rounded(turned, rows.dtype.element_ty)


@triton.jit
def _load_rows(rows, stride, inside, features, MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    return _load_tile(
        rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride, inside, features, MASKED, EVEN_D, BLOCK_D
    )


@triton.jit
def _load_tile(pointers, inside, features, MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Without MASKED all rows are inside, with EVEN_D all features are."""
    f = tl.arange(0, BLOCK_D)
    if MASKED:
        if EVEN_D:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (f < features)[None, :], other=0.0)
    elif EVEN_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(f < features)[None, :], other=0.0)


@triton.jit
def _load_keys(
    start, new, new_t, new_d, cache, cache_t, cache_d, capacity, turn, filled, length, features,
    MASKED: tl.constexpr, CACHED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys or values from place `start` on: of the chunk, and with CACHED those of the cache before."""
    place = start + tl.arange(0, BLOCK_N)
    if CACHED:
        f = tl.arange(0, BLOCK_D)
        slot = place + turn
        slot = tl.where(slot >= capacity, slot - capacity, slot).to(tl.int64)
        old = cache + slot[:, None] * cache_t + f[None, :] * cache_d
        pointers = new + (place - capacity).to(tl.int64)[:, None] * new_t + f[None, :] * new_d
        pointers = tl.where((place < capacity)[:, None], old, pointers)
        inside = (place >= capacity - filled) & (place < capacity + length)
        return _load_tile(pointers, inside, features, MASKED, EVEN_D, BLOCK_D)
    else:
        rows = new + tl.cast(start, tl.int64) * new_t + tl.arange(0, BLOCK_N).to(tl.int64) * new_t
        return _load_rows(rows, new_d, place < length, features, MASKED, EVEN_D, BLOCK_D)


@triton.jit
def _cache_state(position, batch, position_b, capacity, CACHED: tl.constexpr):
    """-> the places before the chunk's, how far the ring has turned, how many of the places are filled."""
    if CACHED:
        before = tl.maximum(tl.load(position + batch * position_b), 0)
        return capacity, (before % capacity).to(tl.int32), tl.minimum(before, capacity).to(tl.int32)
    else:
        return 0, 0, 0


@triton.jit
def _visible_keys(
    position, starts, stops, length, window, capacity, filled,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """-> the first place that each position sees and the one after the last."""
    if PACKED:
        low = tl.load(starts + position)
        high = tl.load(stops + position)
    else:
        low = tl.zeros_like(position) + (capacity - filled)
        high = tl.zeros_like(position) + (capacity + length)
    if CAUSAL:
        high = tl.minimum(high, capacity + position + 1)
    if WINDOW:
        low = tl.maximum(low, capacity + position - window + 1)
    return low, high


@triton.jit
def _seeing_queries(
    position, starts, stops, length, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """-> the first query that sees each position of the chunk and the one after the last."""
    if PACKED:
        low = tl.load(starts + position)
        high = tl.load(stops + position)
    else:
        low = tl.zeros_like(position)
        high = low + length
    if CAUSAL:
        low = tl.maximum(low, position)
    if WINDOW:
        high = tl.minimum(high, position + window)
    return low, high


@triton.jit
def _stretch(low, high, PHASE: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of BLOCK that the intervals [low, high) of a tile's rows touch, from a first to before a last: PHASE 0,
    those that some see in part; 1, those that all see as a whole; 2, again those that some see in part."""
    whole = tl.cdiv(tl.max(low, 0), BLOCK) * BLOCK
    whole_end = tl.min(high, 0) // BLOCK * BLOCK
    end = tl.max(high, 0)
    if PHASE == 0:
        return tl.min(low, 0) // BLOCK * BLOCK, tl.minimum(whole, end)
    elif PHASE == 1:
        return whole, whole_end
    else:
        return tl.maximum(whole, whole_end), end


# ---- around the products --------------------------------------------------------------------------------------------


@triton.jit
def _packing_kernel(cu_seqlens, starts, stops, bounds, length, BLOCK: tl.constexpr):
    """The sequence of each packed position: its first position and the one after its last. A position before the first
    bound or after the last has none: it stops where it starts. Bounds are clamped, and become their running maximum."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.full((BLOCK,), -1, tl.int32)
    stop = tl.full((BLOCK,), -1, tl.int32)
    bound = 0
    for i in range(bounds):
        bound = tl.maximum(bound, tl.minimum(tl.load(cu_seqlens + i), length))
        start = tl.where(bound <= position, bound, start)
        stop = tl.where((bound > position) & (stop < 0), bound, stop)
    outside = (start < 0) | (stop < 0)
    tl.store(starts + position, tl.where(outside, position, start), mask=position < length)
    tl.store(stops + position, tl.where(outside, position, stop), mask=position < length)


@triton.jit
def _rotate_kernel(
    x, cos, sin, rotated, y, grad_y, delta, length, heads, half, tiles,
    x_b, x_t, x_h, x_d, cos_b, cos_t, cos_h, cos_d, sin_b, sin_t, sin_h, sin_d, grad_b, grad_t, grad_h, grad_d,
    GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, DELTA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rotated (batch, length, heads, head_dim), contiguous; with DELTA also <y, grad_y> per row."""
    program = tl.program_id(0)
    head = program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    position = program % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = position < length
    wide = position.to(tl.int64)
    table_head = (head // GROUP).to(tl.int64)
    value = load_rotated(
        x + batch * x_b + head.to(tl.int64) * x_h + wide * x_t, x_d,
        cos + batch * cos_b + table_head * cos_h + wide * cos_t, cos_d,
        sin + batch * sin_b + table_head * sin_h + wide * sin_t, sin_d,
        inside, half, INTERLEAVED, BLOCK_D,
    )  # fmt: skip
    f = tl.arange(0, BLOCK_D)
    held = inside[:, None] & (f < 2 * half)[None, :]
    at = ((batch * length + position) * heads + head)[:, None] * (2 * half) + f[None, :]
    tl.store(rotated + at, value, mask=held)
    if DELTA:
        rows = grad_y + batch * grad_b + head.to(tl.int64) * grad_h + wide * grad_t
        grad = tl.load(rows[:, None] + f[None, :] * grad_d, mask=held, other=0.0).to(tl.float32)
        product = grad * tl.load(y + at, mask=held, other=0.0).to(tl.float32)
        tl.store(delta + (batch * heads + head) * length + position, tl.sum(product, 1), mask=inside)


@triton.jit
def _append_kernel(
    k, v, cos, sin, cache_k, cache_v, position, length, kept, kv_heads, half, tiles, capacity,
    k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, cos_b, cos_t, cos_h, cos_d, sin_b, sin_t, sin_h, sin_d,
    cache_k_b, cache_k_t, cache_k_h, cache_k_d, cache_v_b, cache_v_t, cache_v_h, cache_v_d, position_b,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last `kept` keys, rotated, and values of the chunk go to their slots."""
    program = tl.program_id(0)
    head = (program // tiles % kv_heads).to(tl.int64)
    batch = (program // tiles // kv_heads).to(tl.int64)
    wide = (length - kept + program % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = wide < length
    key = load_rotated(
        k + batch * k_b + head * k_h + wide * k_t, k_d,
        cos + batch * cos_b + head * cos_h + wide * cos_t, cos_d,
        sin + batch * sin_b + head * sin_h + wide * sin_t, sin_d,
        inside, half, INTERLEAVED, BLOCK_D,
    )  # fmt: skip
    value = _load_rows(v + batch * v_b + head * v_h + wide * v_t, v_d, inside, 2 * half, True, False, BLOCK_D)
    slot = (tl.maximum(tl.load(position + batch * position_b), 0) + wide) % capacity
    f = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (f < 2 * half)[None, :]
    cache_k += batch * cache_k_b + head * cache_k_h
    cache_v += batch * cache_v_b + head * cache_v_h
    key = rounded(key, cache_k.dtype.element_ty)
    value = rounded(value, cache_v.dtype.element_ty)
    tl.store(cache_k + slot[:, None] * cache_k_t + f[None, :] * cache_k_d, key, mask=mask)
    tl.store(cache_v + slot[:, None] * cache_v_t + f[None, :] * cache_v_d, value, mask=mask)


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tiles(
    queries, total, maximum, normalizer, low, high, first, last,
    k, v, k_t, k_d, v_t, v_d, cos, cos_t, cos_d, sin, sin_t, sin_d,
    cache_k, cache_v, cache_k_t, cache_k_d, cache_v_t, cache_v_d, capacity, turn, filled, length, half, scale,
    MASKED: tl.constexpr, CACHED: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles of keys first, first + BLOCK_N, ... < last."""
    for start in range(first, last, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        if ROTATE:
            wide = place.to(tl.int64)
            keys = load_rotated(
                k + wide * k_t, k_d, cos + wide * cos_t, cos_d, sin + wide * sin_t, sin_d, place < length, half,
                INTERLEAVED, BLOCK_D,
            )  # fmt: skip
        else:
            keys = _load_keys(
                start, k, k_t, k_d, cache_k, cache_k_t, cache_k_d, capacity, turn, filled, length, 2 * half,
                MASKED, CACHED, EVEN_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        scores = tl.zeros((queries.shape[0], BLOCK_N), tl.float32)
        scores = dot(queries, tl.trans(keys), scores, PRECISION)
        if MASKED:
            seen = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        if MASKED:  # a row may have seen nothing so far
            shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum) * scale
        else:
            shift = new_maximum * scale
        # The product with scale is not rounded by itself: large scores would lose digits that their differences need.
        shrink = tl.exp2(tl.fma(maximum, scale, -shift))
        weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        normalizer = normalizer * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        values = _load_keys(
            start, v, v_t, v_d, cache_v, cache_v_t, cache_v_d, capacity, turn, filled, length, 2 * half,
            MASKED, CACHED, EVEN_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        total = dot(rounded(weights, values.dtype), values, total, PRECISION)
        maximum = new_maximum
    return total, maximum, normalizer


@triton.jit
def _forward_kernel(
    q, k, v, cos, sin, cache_k, cache_v, cache_position, starts, stops, y, softmax,
    length, kv_heads, half, groups, tiles, window, capacity, scale,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d,
    cos_b, cos_t, cos_h, cos_d, sin_b, sin_t, sin_h, sin_d,
    cache_k_b, cache_k_t, cache_k_h, cache_k_d, cache_v_b, cache_v_t, cache_v_h, cache_v_d, position_b,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, CACHED: tl.constexpr,
    ROTATE: tl.constexpr, ROTATE_QUERIES: tl.constexpr, INTERLEAVED: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale is in units of log2. Without ROTATE, k is already rotated; without ROTATE_QUERIES, q is."""
    program = tl.program_id(0)
    tile = tiles - 1 - program // groups  # the tiles with the most keys start first
    batch = (program % groups // kv_heads).to(tl.int64)
    kv_head = (program % groups % kv_heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < length * GROUP
    row = tl.minimum(row, length * GROUP - 1)
    position = row // GROUP
    wide = position.to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    cos += batch * cos_b + kv_head * cos_h
    sin += batch * sin_b + kv_head * sin_h
    q += batch * q_b + wide * q_t + head * q_h
    if ROTATE_QUERIES:
        queries = load_rotated(
            q, q_d, cos + wide * cos_t, cos_d, sin + wide * sin_t, sin_d, inside, half, INTERLEAVED, BLOCK_D
        )
    else:
        queries = _load_rows(q, q_d, inside, 2 * half, True, EVEN_D, BLOCK_D)
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    if CACHED:
        cache_k += batch * cache_k_b + kv_head * cache_k_h
        cache_v += batch * cache_v_b + kv_head * cache_v_h
    room, turn, filled = _cache_state(cache_position, batch, position_b, capacity, CACHED)
    low, high = _visible_keys(position, starts, stops, length, window, room, filled, CAUSAL, WINDOW, PACKED)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    normalizer = tl.zeros((BLOCK_M,), tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or WINDOW or PACKED or CACHED:
            first, last = _stretch(low, high, phase, BLOCK_N)
            total, maximum, normalizer = _forward_tiles(
                queries, total, maximum, normalizer, low, high, first, last,
                k, v, k_t, k_d, v_t, v_d, cos, cos_t, cos_d, sin, sin_t, sin_d,
                cache_k, cache_v, cache_k_t, cache_k_d, cache_v_t, cache_v_d, room, turn, filled, length, half, scale,
                phase != 1, CACHED, ROTATE, INTERLEAVED, PRECISION, EVEN_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    nothing = normalizer == 0.0
    normalizer = tl.where(nothing, 1.0, normalizer)
    f = tl.arange(0, BLOCK_D)
    at = (batch * length + position) * (kv_heads * GROUP) + head
    tl.store(
        y + at[:, None] * (2 * half) + f[None, :],
        rounded(total / normalizer[:, None], y.dtype.element_ty),
        mask=inside[:, None] & (f < 2 * half)[None, :],
    )
    if SAVE:
        rows_in_all = tl.cast(groups, tl.int64) * GROUP * length
        at = (batch * kv_heads * GROUP + head) * length + position
        shift = tl.where(nothing, 0.0, maximum * scale)
        share = 1.0 / normalizer
        if queries.dtype != tl.float32:
            shift += tl.log2(normalizer)
            share = tl.full((BLOCK_M,), 1.0, tl.float32)
        tl.store(softmax + at, shift, mask=inside)
        tl.store(softmax + rows_in_all + at, share, mask=inside)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_softmax(softmax, rows_in_all, at, inside, EXACT: tl.constexpr):
    """-> shift and share of the rows `at`: weights are exp2(score - shift) * share; without EXACT the share is 1."""
    shift = tl.load(softmax + at, mask=inside, other=0.0)
    if EXACT:
        return shift, tl.load(softmax + rows_in_all + at, mask=inside, other=1.0)
    else:
        return shift, 1.0


@triton.jit
def _query_gradient_tiles(
    queries, grads, total, shift, share, delta, low, high, first, last, k, v, k_t, v_t, v_d,
    cache_k, cache_v, cache_k_t, cache_k_d, cache_v_t, cache_v_d, capacity, turn, filled, length, features, scale,
    MASKED: tl.constexpr, CACHED: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BLOCK_N):
        keys = _load_keys(
            start, k, k_t, 1, cache_k, cache_k_t, cache_k_d, capacity, turn, filled, length, features,
            MASKED, CACHED, EVEN_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        values = _load_keys(
            start, v, v_t, v_d, cache_v, cache_v_t, cache_v_d, capacity, turn, filled, length, features,
            MASKED, CACHED, EVEN_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scores = tl.zeros((queries.shape[0], BLOCK_N), tl.float32)
        scores = tl.fma(dot(queries, tl.trans(keys), scores, PRECISION), scale, -shift[:, None])
        if MASKED:
            place = start + tl.arange(0, BLOCK_N)
            seen = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        weights = tl.exp2(scores)
        if queries.dtype == tl.float32:
            weights *= share[:, None]
        slopes = tl.zeros((queries.shape[0], BLOCK_N), tl.float32)
        slopes = dot(grads, tl.trans(values), slopes, PRECISION)
        slopes = weights * (slopes - delta[:, None])
        total = dot(rounded(slopes, keys.dtype), keys, total, PRECISION)
    return total


@triton.jit
def _query_gradient_kernel(
    q, k, v, grad_y, softmax, delta, starts, stops, cache_k, cache_v, cache_position, grad_q,
    length, kv_heads, features, groups, tiles, window, capacity, scale,
    v_b, v_t, v_h, v_d, grad_b, grad_t, grad_h, grad_d,
    cache_k_b, cache_k_t, cache_k_h, cache_k_d, cache_v_b, cache_v_t, cache_v_h, cache_v_d, position_b,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, CACHED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_q (batch, length, heads, head_dim) float32: of the rotated queries. q and k are rotated and contiguous;
    scale is in units of log2."""
    program = tl.program_id(0)
    tile = tiles - 1 - program // groups
    batch = (program % groups // kv_heads).to(tl.int64)
    kv_head = (program % groups % kv_heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < length * GROUP
    row = tl.minimum(row, length * GROUP - 1)
    position = row // GROUP
    head = kv_head * GROUP + row % GROUP
    heads = kv_heads * GROUP
    q_rows = ((batch * length + position) * heads + head) * features
    queries = _load_rows(q + q_rows, 1, inside, features, True, EVEN_D, BLOCK_D)
    grads = _load_rows(
        grad_y + batch * grad_b + position.to(tl.int64) * grad_t + head * grad_h, grad_d, inside, features,
        True, EVEN_D, BLOCK_D,
    )  # fmt: skip
    at = (batch * heads + head) * length + position
    rows_in_all = tl.cast(groups, tl.int64) * GROUP * length
    shift, share = _load_softmax(softmax, rows_in_all, at, inside, queries.dtype == tl.float32)
    row_delta = tl.load(delta + at)
    k += (batch * length * kv_heads + kv_head) * features
    k_t = tl.cast(kv_heads, tl.int64) * features
    v += batch * v_b + kv_head * v_h
    if CACHED:
        cache_k += batch * cache_k_b + kv_head * cache_k_h
        cache_v += batch * cache_v_b + kv_head * cache_v_h
    room, turn, filled = _cache_state(cache_position, batch, position_b, capacity, CACHED)
    low, high = _visible_keys(position, starts, stops, length, window, room, filled, CAUSAL, WINDOW, PACKED)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or WINDOW or PACKED or CACHED:
            first, last = _stretch(low, high, phase, BLOCK_N)
            total = _query_gradient_tiles(
                queries, grads, total, shift, share, row_delta, low, high, first, last, k, v, k_t, v_t, v_d,
                cache_k, cache_v, cache_k_t, cache_k_d, cache_v_t, cache_v_d, room, turn, filled, length, features,
                scale, phase != 1, CACHED, PRECISION, EVEN_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    f = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (f < features)[None, :]
    tl.store(grad_q + q_rows[:, None] + f[None, :], total * (scale * _LN_2), mask=mask)


@triton.jit
def _key_gradient_tiles(
    keys, values, grad_k, grad_v, low, high, first, last, q, grad_y, softmax, delta, length, features, scale,
    rows_in_all, q_t, grad_t, grad_h, grad_d,
    HEADS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first, first + BLOCK_M, ... < last; row r is position r // HEADS of head r % HEADS."""
    m = tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_M):
        row = start + m
        position = row // HEADS
        head = (row % HEADS).to(tl.int64)
        inside = position < length
        wide = position.to(tl.int64)
        queries = _load_rows(q + wide * q_t + head * features, 1, inside, features, MASKED, EVEN_D, BLOCK_D)
        grads = _load_rows(grad_y + wide * grad_t + head * grad_h, grad_d, inside, features, MASKED, EVEN_D, BLOCK_D)
        at = head * length + position
        shift, share = _load_softmax(softmax, rows_in_all, at, inside, keys.dtype == tl.float32)
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        scores = tl.zeros((keys.shape[0], BLOCK_M), tl.float32)
        scores = tl.fma(dot(keys, tl.trans(queries), scores, PRECISION), scale, -shift[None, :])
        if MASKED:
            seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        weights = tl.exp2(scores)
        if keys.dtype == tl.float32:
            weights *= share[None, :]
        grad_v = dot(rounded(weights, grads.dtype), grads, grad_v, PRECISION)
        slopes = tl.zeros((keys.shape[0], BLOCK_M), tl.float32)
        slopes = dot(values, tl.trans(grads), slopes, PRECISION)
        slopes = weights * (slopes - row_delta[None, :])
        grad_k = dot(rounded(slopes, queries.dtype), queries, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit
def _key_gradient_kernel(
    q, k, v, grad_y, softmax, delta, starts, stops, grad_k, grad_v,
    length, kv_heads, features, groups, tiles, window, scale, part,
    v_b, v_t, v_h, v_d, grad_b, grad_t, grad_h, grad_d,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v (SPLITS, batch, length, kv_heads, head_dim): a split's HEADS query heads of each group; `part`
    elements from one to the next. grad_k is of the rotated keys. q and k are rotated and contiguous."""
    program = tl.program_id(0)
    tile = program // (groups * SPLITS)  # with causal masks the first keys are seen by the most queries
    split = (program // groups % SPLITS).to(tl.int64)
    batch = (program % groups // kv_heads).to(tl.int64)
    kv_head = (program % groups % kv_heads).to(tl.int64)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = key < length
    key = tl.minimum(key, length - 1)
    k_rows = ((batch * length + key) * kv_heads + kv_head) * features
    keys = _load_rows(k + k_rows, 1, inside, features, True, EVEN_D, BLOCK_D)
    values = _load_rows(
        v + batch * v_b + key.to(tl.int64) * v_t + kv_head * v_h, v_d, inside, features, True, EVEN_D, BLOCK_D
    )
    low, high = _seeing_queries(key, starts, stops, length, window, CAUSAL, WINDOW, PACKED)
    low = tl.where(inside, low, length)  # keys past the end are seen by none, so no tile is whole for them
    heads = tl.cast(kv_heads, tl.int64) * (HEADS * SPLITS)
    head = kv_head * (HEADS * SPLITS) + split * HEADS
    q += (batch * length * heads + head) * features
    grad_y += batch * grad_b + head * grad_h
    softmax += (batch * heads + head) * length
    rows_in_all = tl.cast(groups, tl.int64) * (HEADS * SPLITS) * length
    delta += (batch * heads + head) * length
    q_t = heads * features
    total_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        first, last = _stretch(low * HEADS, high * HEADS, phase, BLOCK_M)
        total_k, total_v = _key_gradient_tiles(
            keys, values, total_k, total_v, low, high, first, last, q, grad_y, softmax, delta,
            length, features, scale, rows_in_all, q_t, grad_t, grad_h, grad_d,
            HEADS, phase != 1, PRECISION, EVEN_D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    f = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (f < features)[None, :]
    at = split * part + k_rows[:, None] + f[None, :]
    tl.store(grad_k + at, total_k * (scale * _LN_2), mask=mask)
    tl.store(grad_v + at, rounded(total_v, grad_v.dtype.element_ty), mask=mask)


@triton.jit
def _store_pairs(rows, a, b, inside, half, INTERLEAVED: tl.constexpr):
    """rows: pointers to the first feature of each, contiguous."""
    kind = rows.dtype.element_ty
    if INTERLEAVED:
        f = tl.arange(0, 2 * a.shape[1])
        mask = inside[:, None] & (f < 2 * half)[None, :]
        value = tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))
        tl.store(rows[:, None] + f[None, :], rounded(value, kind), mask=mask)
    else:
        f = tl.arange(0, a.shape[1])
        mask = inside[:, None] & (f < half)[None, :]
        tl.store(rows[:, None] + f[None, :], rounded(a, kind), mask=mask)
        tl.store(rows[:, None] + (half + f)[None, :], rounded(b, kind), mask=mask)


@triton.jit
def _turn_back(
    x_rows, x_d, grad_rows, part, grad_x_rows, c, s, inside, half,
    PARTS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of x from that of x rotated, in PARTS; -> the gradients of cos and sin."""
    x_a, x_b = _load_pairs(x_rows, x_d, inside, half, INTERLEAVED, BLOCK_H)
    a, b = _load_pairs(grad_rows, 1, inside, half, INTERLEAVED, BLOCK_H)
    for i in range(1, PARTS):
        rows = grad_rows + tl.cast(i, tl.int64) * part
        more_a, more_b = _load_pairs(rows, 1, inside, half, INTERLEAVED, BLOCK_H)
        a += more_a
        b += more_b
    _store_pairs(grad_x_rows, c * a + s * b, c * b - s * a, inside, half, INTERLEAVED)
    return a * x_a + b * x_b, b * x_a - a * x_b


@triton.jit
def _turn_back_kernel(
    q, k, cos, sin, grad_q_rotated, grad_k_rotated, grad_q, grad_k, grad_cos, grad_sin,
    length, kv_heads, half, tiles, part,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, cos_b, cos_t, cos_h, cos_d, sin_b, sin_t, sin_h, sin_d,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Some positions of a key head and of its query heads. grad_cos, grad_sin (batch, length, kv_heads, half)."""
    program = tl.program_id(0)
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    batch = (program // tiles // kv_heads).to(tl.int64)
    position = (program % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = position < length
    f = tl.arange(0, BLOCK_H)
    c = _load_table(cos + batch * cos_b + kv_head * cos_h + position * cos_t, cos_d, f, inside, half)
    s = _load_table(sin + batch * sin_b + kv_head * sin_h + position * sin_t, sin_d, f, inside, half)
    at = ((batch * length + position) * kv_heads + kv_head) * (2 * half)
    total_c, total_s = _turn_back(
        k + batch * k_b + position * k_t + kv_head * k_h, k_d, grad_k_rotated + at, part, grad_k + at,
        c, s, inside, half, SPLITS, INTERLEAVED, BLOCK_H,
    )  # fmt: skip
    for g in range(GROUP):
        head = kv_head * GROUP + g
        at = ((batch * length + position) * (kv_heads * GROUP) + head) * (2 * half)
        more_c, more_s = _turn_back(
            q + batch * q_b + position * q_t + head * q_h, q_d, grad_q_rotated + at, part, grad_q + at,
            c, s, inside, half, 1, INTERLEAVED, BLOCK_H,
        )  # fmt: skip
        total_c += more_c
        total_s += more_s
    at = ((batch * length + position) * kv_heads + kv_head)[:, None] * half + f[None, :]
    mask = inside[:, None] & (f < half)[None, :]
    tl.store(grad_cos + at, total_c, mask=mask)
    tl.store(grad_sin + at, total_s, mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


@functools.cache
def device_of(index: int) -> Device:
    if index < 0:
        return Device((8, 0), 108)  # in the interpreter: an A100
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check(q: Tensor) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"rope_attention: the Triton kernels take float32, bfloat16 and float16, got q of {q.dtype}")
    if q.shape[-1] > heuristics.MAX_HEAD_DIM:
        raise ValueError(
            f"rope_attention: the Triton kernels take head_dim up to {heuristics.MAX_HEAD_DIM}, got {q.shape[-1]}"
        )
    if q.shape[1] * q.shape[2] >= 2**30:
        raise ValueError(f"rope_attention: length * heads must be less than 2**30, got {q.shape[1]} * {q.shape[2]}")


def _per_head(table: Tensor, batch: int, kv_heads: int) -> Tensor:
    """(batch, length, kv_heads, head_dim / 2), a view."""
    if table.dim() == 2:
        table = table[:, None]
    return table.expand(batch, -1, kv_heads, -1)


def _packing(cu_seqlens: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        return None, None
    cu_seqlens = cu_seqlens.contiguous()
    starts, stops = cu_seqlens.new_empty(2, length).unbind()
    _packing_kernel[(triton.cdiv(length, 128),)](
        cu_seqlens, starts, stops, cu_seqlens.numel(), length, BLOCK=128, num_warps=4
    )
    return starts, stops


def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    group: int,
    y: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> x rotated, contiguous; and with y and its gradient their products (batch, heads, length)."""
    batch, length, heads, head_dim = x.shape
    rotated = x.new_empty(x.shape)
    delta = None if y is None else x.new_empty(batch, heads, length, dtype=torch.float32)
    block = heuristics.rotation_rows(head_dim, length)
    tiles = triton.cdiv(length, block)
    _rotate_kernel[(tiles * heads * batch,)](
        x, cos, sin, rotated, y, grad, delta, length, heads, head_dim // 2, tiles,
        *x.stride(), *cos.stride(), *sin.stride(), *((0,) * 4 if grad is None else grad.stride()),
        GROUP=group, INTERLEAVED=interleaved, DELTA=y is not None,
        BLOCK_T=block, BLOCK_D=heuristics.padded_head_dim(head_dim), num_warps=4,
    )  # fmt: skip
    return rotated, delta


def _cache_strides(cache: tuple[Tensor, Tensor, Tensor] | None) -> tuple[int, ...]:
    return (0,) * 9 if cache is None else (*cache[0].stride(), *cache[1].stride(), cache[2].stride(0))


def _cached(
    cache_k: Tensor | None, cache_v: Tensor | None, position: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The cache in the dtype of the keys (a copy, where it has another), or None."""
    if cache_k is None or cache_v is None or position is None:  # all three, or none of them
        return None
    return cache_k.to(like.dtype), cache_v.to(like.dtype), position


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """-> y, contiguous, and with `save` the shift and the share of every softmax (2, batch, heads, length), float32;
    else an empty tensor.

    The cache (batch, capacity, kv_heads, head_dim) is read only; a copy is made of one that has not the dtype of k.
    """
    check(q)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    y = q.new_empty(q.shape)
    softmax = q.new_empty((2, batch, heads, length) if save else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return y, softmax
    group, groups = heads // kv_heads, batch * kv_heads
    cos, sin = _per_head(cos, batch, kv_heads), _per_head(sin, batch, kv_heads)
    cache = _cached(cache_k, cache_v, position, k)
    capacity = 0 if cache is None else cache[0].shape[1]
    device = device_of(q.get_device())
    plan = heuristics.forward_plan(length, capacity, group, groups, head_dim, q.element_size(), device)
    if not plan.rotate_keys_on_load:
        k, _ = _rotate(k, cos, sin, interleaved, 1)
    if not plan.rotate_queries_on_load:
        q, _ = _rotate(q, cos, sin, interleaved, group)
    starts, stops = _packing(cu_seqlens, length)
    tiles = triton.cdiv(length * group, plan.tile.block_m)
    block_d = heuristics.padded_head_dim(head_dim)
    _forward_kernel[(tiles * groups,)](
        q, k, v, cos, sin, *(cache or (None,) * 3), starts, stops, y, softmax,
        length, kv_heads, head_dim // 2, groups, tiles, min(window or 0, capacity + length), capacity, scale * LOG2_E,
        *q.stride(), *k.stride(), *v.stride(), *cos.stride(), *sin.stride(), *_cache_strides(cache),
        GROUP=group, CAUSAL=causal, WINDOW=window is not None and window < capacity + length,
        PACKED=cu_seqlens is not None, CACHED=cache is not None, ROTATE=plan.rotate_keys_on_load,
        ROTATE_QUERIES=plan.rotate_queries_on_load, INTERLEAVED=interleaved, SAVE=save, PRECISION=_precision(q),
        EVEN_D=block_d == head_dim, BLOCK_M=plan.tile.block_m, BLOCK_N=plan.tile.block_n, BLOCK_D=block_d,
        num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages,
    )  # fmt: skip
    return y, softmax


def attention_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    interleaved: bool,
) -> None:
    """The keys, rotated, and values of a chunk go into the cache, in place; `position` is not changed.

    Of a chunk longer than the cache only the end. Any strides and dtypes.
    """
    batch, length, kv_heads, head_dim = k.shape
    if k.numel() == 0:
        return
    cos, sin = _per_head(cos, batch, kv_heads), _per_head(sin, batch, kv_heads)
    capacity = cache_k.shape[1]
    kept = min(length, capacity)
    block = heuristics.rotation_rows(head_dim, kept)
    tiles = triton.cdiv(kept, block)
    _append_kernel[(tiles * kv_heads * batch,)](
        k, v, cos, sin, cache_k, cache_v, position, length, kept, kv_heads, head_dim // 2, tiles, capacity,
        *k.stride(), *v.stride(), *cos.stride(), *sin.stride(), *_cache_strides((cache_k, cache_v, position)),
        INTERLEAVED=interleaved, BLOCK_T=block, BLOCK_D=heuristics.padded_head_dim(head_dim), num_warps=4,
    )  # fmt: skip


def _summed_to(grad: Tensor, table: Tensor) -> Tensor:
    """The gradient (batch, length, kv_heads, head_dim / 2) of `_per_head(table)`, summed where that expanded it."""
    if table.dim() == 2:
        return grad.sum((0, 2)).to(table.dtype)
    if table.dim() == 3:
        return grad.sum(0).to(table.dtype)
    return (grad if table.shape[2] == grad.shape[2] else grad.sum(2, keepdim=True)).to(table.dtype)


def attention_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    softmax: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, cos and sin, in their shapes and dtypes. y and softmax as the forward gave them,
    and the cache as it found it; grad_y may have any strides."""
    check(q)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if q.numel() == 0:
        grad_q, grad_k, grad_v, grad_cos, grad_sin = (t.new_zeros(t.shape) for t in (q, k, v, cos, sin))
        return grad_q, grad_k, grad_v, grad_cos, grad_sin
    group, groups = heads // kv_heads, batch * kv_heads
    cache = _cached(cache_k, cache_v, position, k)
    capacity = 0 if cache is None else cache[0].shape[1]
    device = device_of(q.get_device())
    plan = heuristics.backward_plan(length, capacity, group, groups, head_dim, q.element_size(), device)
    tables = _per_head(cos, batch, kv_heads), _per_head(sin, batch, kv_heads)
    q_rotated, delta = _rotate(q, *tables, interleaved, group, y.contiguous(), grad_y)
    k_rotated, _ = _rotate(k, *tables, interleaved, 1)
    softmax = softmax.contiguous()
    starts, stops = _packing(cu_seqlens, length)
    block_d = heuristics.padded_head_dim(head_dim)
    common = dict(
        CAUSAL=causal, PACKED=cu_seqlens is not None, PRECISION=_precision(q), EVEN_D=block_d == head_dim,
        BLOCK_D=block_d,
    )  # fmt: skip
    inputs = (q_rotated, k_rotated, v, grad_y, softmax, delta, starts, stops)

    grad_q_rotated = q.new_empty(q.shape, dtype=torch.float32)
    tile = plan.queries
    tiles = triton.cdiv(length * group, tile.block_m)
    _query_gradient_kernel[(tiles * groups,)](
        *inputs, *(cache or (None,) * 3), grad_q_rotated,
        length, kv_heads, head_dim, groups, tiles, min(window or 0, capacity + length), capacity, scale * LOG2_E,
        *v.stride(), *grad_y.stride(), *_cache_strides(cache),
        GROUP=group, WINDOW=window is not None and window < capacity + length, CACHED=cache is not None, **common,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip

    splits = plan.splits
    grad_k_rotated = k.new_empty(splits, *k.shape, dtype=torch.float32)
    grad_v = v.new_empty(splits, *v.shape, dtype=v.dtype if splits == 1 else torch.float32)
    tile = plan.keys
    tiles = triton.cdiv(length, tile.block_n)
    _key_gradient_kernel[(tiles * groups * splits,)](
        *inputs, grad_k_rotated, grad_v,
        length, kv_heads, head_dim, groups, tiles, min(window or 0, length), scale * LOG2_E, k.numel(),
        *v.stride(), *grad_y.stride(),
        HEADS=group // splits, SPLITS=splits, WINDOW=window is not None and window < length, **common,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    grad_v = grad_v[0] if splits == 1 else grad_v.sum(0).to(v.dtype)

    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    # Two tensors, not halves of one: outputs of an op may not share memory.
    grad_cos, grad_sin = (grad_k_rotated.new_empty(batch, length, kv_heads, head_dim // 2) for _ in range(2))
    block = heuristics.rotation_rows(head_dim, length)
    tiles = triton.cdiv(length, block)
    _turn_back_kernel[(tiles * groups,)](
        q, k, *tables, grad_q_rotated, grad_k_rotated, grad_q, grad_k, grad_cos, grad_sin,
        length, kv_heads, head_dim // 2, tiles, k.numel(),
        *q.stride(), *k.stride(), *tables[0].stride(), *tables[1].stride(),
        GROUP=group, SPLITS=splits, INTERLEAVED=interleaved, BLOCK_T=block, BLOCK_H=block_d // 2, num_warps=4,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, _summed_to(grad_cos, cos), _summed_to(grad_sin, sin)
