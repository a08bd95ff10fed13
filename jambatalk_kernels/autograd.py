"""What the ops' gradients share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

__all__ = ["any_requires_grad", "first_derivative"]

Result = TypeVar("Result")


def any_requires_grad(*tensors: object) -> bool:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            return True
    return False


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Callable[..., Any], *arguments: Any) -> Any:
        ctx.op = op
        return gradient(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: object) -> NoReturn:
        raise RuntimeError(f"{ctx.op}: the native backends have no second derivative; use backend='reference'")


def first_derivative(op: str, gradient: Callable[..., Result], *arguments: object) -> Result:
    """``gradient(*arguments)``, a native op, as a gradient that cannot be differentiated again.

    Under ``create_graph=True`` the result is tied to its arguments, so that a second derivative raises. Detached
    (as ``once_differentiable`` leaves it where the incoming gradient needs none) it would be silently wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NoSecondDerivative.apply(op, gradient, *arguments)
    return gradient(*arguments)
