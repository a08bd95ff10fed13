"""Attention over a bounded window, without what lies outside of it.

Queries in blocks of `BLOCK` frames; a block sees the keys from `back` frames before its first to `ahead` frames after
its last, and among them a mask leaves the window of each query. Work and memory are linear in the frames, and clips can
lie one behind the other. It is an attention function of transformers' (`implementation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from jambatalk.packing import Packing

BLOCK = 32  # frames


def kept(shape: tuple[int, ...] | torch.Size, p: float, like: Tensor) -> Tensor:
    """Dropout's factors on a CPU, in like's dtype: 0 with probability p, else 1 / (1 - p). Four of them are drawn at
    once, PyTorch draws each by itself and all by one thread. p is rounded to a multiple of 2^-16."""
    drop = round(p * 65536)
    if drop == 65536:
        return like.new_zeros(shape)
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (words[:count].view(shape) >= drop - 32768).to(like.dtype).mul_(65536 / (65536 - drop))


@dataclass
class Window:
    """Who sees whom: `of` packed clips."""

    back: int
    ahead: int
    mask: Tensor  # (blocks, BLOCK, BLOCK + back + ahead) float32, 0 where query sees key, else very negative

    @classmethod
    def of(cls, packing: Packing, back: int, ahead: int) -> Window:
        """Each frame sees `back` frames before it and `ahead` after it, of its own clip."""
        clips = packing.clips
        blocks = -(-len(clips) // BLOCK)
        rest = blocks * BLOCK - len(clips)
        queries = pad(clips, (0, rest), value=-1).view(blocks, BLOCK, 1)
        keys = pad(clips, (back, ahead + rest), value=-2).unfold(0, BLOCK + back + ahead, BLOCK)[:, None]
        index = torch.arange(BLOCK + back + ahead, device=clips.device)
        offset = index - index[:BLOCK, None]  # 0: `back` before the query
        sees = (queries == keys) & (offset >= 0) & (offset <= back + ahead)
        mask = torch.zeros(sees.shape, device=clips.device).masked_fill_(~sees, torch.finfo(torch.float32).min)
        return cls(back, ahead, mask)

    def queries(self, x: Tensor) -> Tensor:
        """(heads, n, d) -> (heads, blocks, BLOCK, d)"""
        return pad(x, (0, 0, 0, len(self.mask) * BLOCK - x.shape[1])).unflatten(1, (-1, BLOCK))

    def keys(self, x: Tensor) -> Tensor:
        """(heads, n, d) -> (heads, blocks, BLOCK + back + ahead, d), a view of overlapping pieces"""
        x = pad(x, (0, 0, self.back, len(self.mask) * BLOCK - x.shape[1] + self.ahead))
        return x.unfold(1, self.mask.shape[2], BLOCK).transpose(2, 3)

    def unfold_backward(self, gradient: Tensor, n: int) -> Tensor:
        """The gradient of `keys`: (heads, blocks, BLOCK + back + ahead, d) -> (heads, n, d)"""
        heads, blocks, width, d = gradient.shape
        pieces = gradient.split(BLOCK, 2)
        total = gradient.new_zeros(heads, blocks + len(pieces) - 1, BLOCK, d)
        for number, piece in enumerate(pieces):
            total[:, number : number + blocks, : piece.shape[2]] += piece
        return total.flatten(1, 2)[:, self.back : self.back + n]


class _WindowedAttention(torch.autograd.Function):
    """q, k, v (heads, n, d) -> (heads, n, d). Scores and their softmax in float32, as PyTorch's attention.

    Head by head: so no product needs a copy of what it reads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, p: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            blocked, keys, values = window.queries(q), window.keys(k), window.keys(v)
            scores = torch.stack([torch.bmm(a, b.mT) for a, b in zip(blocked, keys, strict=True)]).float()
            weights = torch.add(window.mask, scores, alpha=scale).softmax(-1)
            factors = None
            if p > 0:
                cpu = q.device.type == "cpu"
                factors = kept(weights.shape, p, weights) if cpu else nn.functional.dropout(torch.ones_like(weights), p)
            chosen = (weights if factors is None else weights * factors).to(v.dtype)
            y = torch.stack([torch.bmm(a, b) for a, b in zip(chosen, values, strict=True)])
        ctx.save_for_backward(q, k, v, weights, factors)
        ctx.window, ctx.scale = window, scale
        return y.flatten(1, 2)[:, : q.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, factors = ctx.saved_tensors
        window, n = ctx.window, q.shape[1]
        blocked, keys, values, dy = window.queries(q), window.keys(k), window.keys(v), window.queries(dy)
        chosen = (weights if factors is None else weights * factors).to(v.dtype)
        dv = torch.stack([torch.bmm(a.mT, b) for a, b in zip(chosen, dy, strict=True)])
        dweights = torch.stack([torch.bmm(a, b.mT) for a, b in zip(dy, values, strict=True)]).float()
        if factors is not None:
            dweights *= factors
        # (dp - sum dp p) p, where the mask is zero by p
        dscores = torch._softmax_backward_data(dweights, weights, -1, torch.float32).mul_(ctx.scale).to(q.dtype)
        dq = torch.stack([torch.bmm(a, b) for a, b in zip(dscores, keys, strict=True)]).flatten(1, 2)[:, :n]
        dk = torch.stack([torch.bmm(a.mT, b) for a, b in zip(dscores, blocked, strict=True)])
        return dq, window.unfold_backward(dk, n), window.unfold_backward(dv, n), None, None, None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Window,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query, key, value (1, heads, n, d) -> (1, n, heads, d), and no weights."""
    y = _WindowedAttention.apply(query[0], key[0], value[0], attention_mask, scaling, dropout)
    return y.transpose(0, 1)[None], None


def implementation() -> str:
    """The name by which transformers' configurations choose it."""
    from transformers import AttentionInterface

    AttentionInterface.register("jambatalk_windowed", attend)
    return "jambatalk_windowed"
