"""What the ops' gradients share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["any_requires_grad", "first_derivative"]


def any_requires_grad(*tensors: object) -> bool:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            return True
    return False


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, gradient: Callable, *arguments):
        ctx.op = op
        return gradient(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: the native backends have no second derivative; use backend='reference'")


def first_derivative(op: str, gradient: Callable[..., tuple[Tensor, ...]], *arguments) -> tuple[Tensor, ...]:
    """``gradient(*arguments)``, a native op, as a gradient that cannot be differentiated again.

    Under ``create_graph=True`` the result is tied to its arguments, so that a second derivative raises. Detached
    (as ``once_differentiable`` leaves it where the incoming gradient needs none) it would be silently wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NoSecondDerivative.apply(op, gradient, *arguments)
    return gradient(*arguments)
