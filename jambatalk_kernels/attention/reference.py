"""The definition of rope_attention, in plain PyTorch. Shapes and errors: see `op.py`.

    rotate(x, t)      = per pair (a, b) of features:  (a cos_t - b sin_t,  a sin_t + b cos_t)
    score(i, j)       = scale * rotate(q_i, i) . rotate(k_j, j)
    y_i               = sum_j softmax_j(score(i, j)) v_j       over the j that i may see

The pairs are (f, f + head_dim / 2), or (2 f, 2 f + 1) when `interleaved`. Query head h reads key-value head
h // (heads / kv_heads). Position i sees j <= i (causal) and, with a window, only i - window < j: the last `window`
positions, its own included. Packed positions outside of every sequence see nothing: their y is zero.

With a window the queries are processed in blocks, each with only the keys that it can see, so that time and memory are
O(length * window). Where the math is plain causal attention it is left to torch's scaled_dot_product_attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 256  # queries per block when a mask is needed: a mask is never more than QUERY_BLOCK * keys


@dataclass
class KVCache:
    """What attention remembers: keys (already rotated) and values of earlier positions.

    k, v: (batch, capacity, kv_heads, head_dim). Position p lives in slot p % capacity, so with a window a capacity of
    `window` is a ring that never grows; without one the capacity bounds the number of positions.
    position: (batch,) int64 on the same device, the number of positions appended so far, per sequence.
    Changed in place. What is cached carries no gradient.
    """

    k: Tensor
    v: Tensor
    position: Tensor

    @staticmethod
    def empty(
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        return KVCache(
            k=torch.zeros(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device),
            v=torch.zeros(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device),
            position=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def clone(self) -> "KVCache":
        return KVCache(self.k.clone(), self.v.clone(), self.position.clone())

    def grown(self, capacity: int) -> "KVCache":
        """A copy with room for `capacity` positions. Only for a cache that has not wrapped around (no window)."""
        larger = KVCache.empty(
            self.k.shape[0],
            max(capacity, self.capacity),
            self.k.shape[2],
            self.k.shape[3],
            dtype=self.k.dtype,
            device=self.k.device,
        )
        larger.k[:, : self.capacity] = self.k
        larger.v[:, : self.capacity] = self.v
        larger.position.copy_(self.position)
        return larger

    def slot_positions(self) -> Tensor:
        """(batch, capacity) int64: the position held by each slot, negative where a slot is still empty."""
        last = self.position[:, None] - 1
        slots = torch.arange(self.capacity, device=self.k.device)
        return last - (last - slots) % self.capacity

    def append(self, k: Tensor, v: Tensor) -> None:
        """k, v (batch, length, kv_heads, head_dim), k already rotated. The oldest positions are overwritten."""
        length = k.shape[1]
        kept = min(length, self.capacity)  # of a chunk longer than the ring only the end survives
        slots = (self.position[:, None] + torch.arange(length - kept, length, device=k.device)) % self.capacity
        index = slots[:, :, None, None].expand(-1, -1, *self.k.shape[2:])
        with torch.no_grad():
            self.k.scatter_(1, index, k[:, length - kept :].detach().to(self.k.dtype))
            self.v.scatter_(1, index, v[:, length - kept :].detach().to(self.v.dtype))
            self.position += length


def rotary_table(
    positions: Tensor, head_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """positions (...,) of any integer dtype -> cos, sin (..., head_dim / 2) of  position * base ** (-2 f / head_dim).

    The angle is computed in float64: in float32 it would be off by a visible amount after hours of frames.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angle = positions.to(torch.float64)[..., None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., heads, head_dim); cos, sin (..., heads or 1, head_dim / 2), broadcastable. Computed in the dtype that the
    three promote to, returned in that of x."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return out.to(x.dtype)


def rotate_grouped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Tables with a head axis hold one row per key-value head; the query heads of a group share their key head's."""
    if cos.shape[-2] not in (1, q.shape[-2]):
        group = q.shape[-2] // cos.shape[-2]
        cos_q, sin_q = cos.repeat_interleave(group, -2), sin.repeat_interleave(group, -2)
    else:
        cos_q, sin_q = cos, sin
    return rotate(q, cos_q, sin_q, interleaved), rotate(k, cos, sin, interleaved)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """q (batch, queries, heads, head_dim), k and v (batch, keys, kv_heads, head_dim), mask (batch or 1, queries, keys)
    bool, True where visible. A query that sees nothing returns zeros."""
    grouped = q.shape[2] != k.shape[2]
    mask = None if mask is None else mask[:, None]
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


def rope_attention(
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
    cache: KVCache | None,
) -> Tensor:
    batch, length = q.shape[:2]
    if q.numel() == 0:
        return q * (k.sum() + v.sum() + cos.sum() + sin.sum())  # nothing, and gradients of zero
    if cos.dim() == 2:  # (length, head_dim / 2): the same for every head
        cos, sin = cos[:, None], sin[:, None]
    q, k = rotate_grouped(q, k, cos, sin, interleaved)
    if cu_seqlens is None and cache is None and (window is None or window >= length):
        return attend(q, k, v, None, scale, causal)

    device = q.device
    index = torch.arange(length, device=device)
    if cache is not None:
        query_position = cache.position[:, None] + index
        key_position = torch.cat([cache.slot_positions(), query_position], dim=1)
        keys, values = torch.cat([cache.k.to(k.dtype), k], 1), torch.cat([cache.v.to(v.dtype), v], 1)
        cached = cache.capacity
    else:
        query_position = key_position = index[None]
        keys, values, cached = k, v, 0
    sequence = None
    if cu_seqlens is not None:  # which sequence each packed position belongs to
        bounds = cu_seqlens.to(torch.int64).clamp(0, length).cummax(0).values
        sequence = torch.searchsorted(bounds, index, right=True)

    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        # Keys [low, high) are all that the block can see; the cache's slots come first and drop out as a whole.
        low = 0 if window is None or start < window else cached + start - window + 1
        high = cached + stop if causal else keys.shape[1]
        positions = key_position[:, None, low:high]
        at = query_position[:, start:stop, None]
        mask = (positions >= 0) & ((positions <= at) if causal else torch.ones_like(at, dtype=torch.bool))
        if window is not None:
            mask = mask & (positions > at - window)
        if sequence is not None:
            mask = mask & (sequence[start:stop, None] == sequence[None, low:high])
        blocks.append(attend(q[:, start:stop], keys[:, low:high], values[:, low:high], mask, scale))
    if cache is not None:
        cache.append(k, v)
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    if sequence is not None:  # before the first sequence and after the last nothing is seen
        inside = (sequence > 0) & (sequence < len(bounds))
        y = torch.where(inside[:, None, None], y, y.new_zeros(()))
    return y


def rope_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    window: int | None,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """One position. The new key is written first, over the one position that can no longer be seen."""
    if q.numel() == 0:
        return torch.zeros_like(q)
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    q, k = rotate_grouped(q, k, cos, sin, interleaved)
    cache.append(k[:, None], v[:, None])
    positions = cache.slot_positions()
    visible = positions >= 0
    if window is not None:
        visible = visible & (positions > cache.position[:, None] - 1 - window)
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # Plain products: for one query they are faster than the general attention call.
    grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim) * scale
    scores = grouped @ cache.k.to(q.dtype).permute(0, 2, 3, 1)
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    return (weights @ cache.v.to(q.dtype).transpose(1, 2)).reshape(batch, heads, head_dim)
