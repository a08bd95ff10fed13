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
from jambatalk_kernels.dropout import Draw

BLOCK = 32  # frames


@dataclass
class Window:
    """Who sees whom: `of` packed clips. Heads lie one behind the other too, as clips of their own: N = heads * n frames
    are one sequence."""

    back: int
    ahead: int
    mask: Tensor  # (blocks, BLOCK, BLOCK + back + ahead) float32, 0 where query sees key, else very negative

    @classmethod
    def of(cls, packing: Packing, heads: int, back: int, ahead: int) -> Window:
        """Each frame sees `back` frames before it and `ahead` after it, of its own clip."""
        clips = packing.clips
        clips = (clips + packing.shape[0] * torch.arange(heads, device=clips.device)[:, None]).flatten()
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
        """(heads, n, d) -> (blocks, BLOCK, d)"""
        return self._row(x, 0, 0).view(-1, BLOCK, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """(heads, n, d) -> (blocks, BLOCK + back + ahead, d), a view of overlapping pieces"""
        return self._row(x, self.back, self.ahead).unfold(0, self.mask.shape[2], BLOCK).transpose(1, 2)

    def _row(self, x: Tensor, before: int, after: int) -> Tensor:
        """(heads, n, d) -> (before + blocks * BLOCK + after, d), what x does not fill is zero."""
        heads, n, d = x.shape
        row = x.new_empty(before + self.mask.shape[0] * BLOCK + after, d)
        row[:before], row[before + heads * n :] = 0, 0
        row[before : before + heads * n].view(heads, n, d).copy_(x)
        return row

    def queries_backward(self, gradient: Tensor, heads: int, n: int) -> Tensor:
        """The gradient of `queries`: (blocks, BLOCK, d) -> (heads, n, d)"""
        return gradient.flatten(0, 1)[: heads * n].unflatten(0, (heads, n))

    def keys_backward(self, gradient: Tensor, heads: int, n: int) -> Tensor:
        """The gradient of `keys`: (blocks, BLOCK + back + ahead, d) -> (heads, n, d)"""
        blocks, _, d = gradient.shape
        pieces = gradient.split(BLOCK, 1)
        total = gradient.new_zeros(blocks + len(pieces) - 1, BLOCK, d)
        for number, piece in enumerate(pieces):
            total[number : number + blocks, : piece.shape[1]] += piece
        return total.flatten(0, 1)[self.back : self.back + heads * n].unflatten(0, (heads, n))


class _WindowedAttention(torch.autograd.Function):
    """q, k, v (heads, n, d) -> (heads, n, d). Scores and their softmax in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, p: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, values = window.queries(q), window.keys(k), window.keys(v)
            wide = torch.promote_types(q.dtype, torch.float32)
            mask = window.mask.to(wide)
            weights = torch.baddbmm(mask, queries.to(wide), keys.to(wide).mT, alpha=scale).softmax(-1)
            ctx.draw = Draw(weights, p) if p else None
            chosen = (ctx.draw(weights) if ctx.draw else weights).to(v.dtype)
            y = torch.bmm(chosen, values)
        ctx.save_for_backward(queries, keys, values, weights, chosen)
        ctx.window, ctx.scale, ctx.shape = window, scale, q.shape[:2]
        return window.queries_backward(y, *ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, chosen = ctx.saved_tensors
        window, dy = ctx.window, ctx.window.queries(dy)
        dv = torch.bmm(chosen.mT, dy)
        dweights = torch.bmm(dy, values.mT).to(weights.dtype)
        if ctx.draw:
            dweights = ctx.draw(dweights)
        # (dp - sum dp p) p, where the mask is zero by p
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(ctx.scale).to(queries.dtype)
        dq, dk = torch.bmm(dscores, keys), torch.bmm(dscores.mT, queries)
        return (
            window.queries_backward(dq, *ctx.shape),
            window.keys_backward(dk, *ctx.shape),
            window.keys_backward(dv, *ctx.shape),
            None,
            None,
            None,
        )


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Window,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query, key, value (1, heads, n, d) -> (1, n, heads, d), and no weights."""
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # views, unlike x[0] also in the gradient
    y = _WindowedAttention.apply(q, k, v, attention_mask, scaling, dropout)
    return y.transpose(0, 1)[None], None


def implementation() -> str:
    """The name by which transformers' configurations choose it."""
    from transformers import AttentionInterface

    AttentionInterface.register("jambatalk_windowed", attend)
    return "jambatalk_windowed"
