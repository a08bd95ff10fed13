"""Dropout, drawn on a CPU in vectors by all threads: PyTorch draws one number after the other by a single thread, which
took a twentieth of a training step of the demo.

What is dropped is a function of a seed, itself drawn from PyTorch's generator, and of an element's place: nothing is
kept for the gradient, and the number of threads does not matter. Source: Srivastava et al., JMLR 15 (2014).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from jambatalk_kernels.backends import native_on_cpu

__all__ = ["Draw", "Dropout", "dropout"]


class Draw:
    """Which elements of tensors like this one are dropped, with probability p > 0. Not differentiable."""

    def __init__(self, like: Tensor, p: float):
        self.p = p
        native = p < 1 and native_on_cpu(like)
        self.seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if native else 0
        self.factors = None if native else functional.dropout(torch.ones_like(like), p)

    def __call__(self, x: Tensor) -> Tensor:
        """x with some elements zero and the others divided by 1 - p; the same ones every time."""
        if self.factors is not None:
            return x * self.factors
        return torch.ops.jambatalk.dropout(x.contiguous(), self.p, self.seed)


def dropout(x: Tensor, p: float) -> Tensor:
    """`torch.nn.functional.dropout` in training: any shape, any float dtype; differentiable."""
    if not 0 < p < 1 or not native_on_cpu(x):
        return functional.dropout(x, p)
    return _Dropout.apply(x, p)


class Dropout(nn.Dropout):
    """`nn.Dropout`, through `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and not self.inplace else super().forward(x)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.draw = Draw(x, p)
        return ctx.draw(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.draw(dy), None
