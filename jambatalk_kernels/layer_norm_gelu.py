"""Layer norm and GELU of rows, in one pass on a CPU: what comes after every convolution of a speech encoder.

y = gelu((v - mean) / sqrt(variance + eps) * weight + bias), v = x + shift, gelu(v) = v P(v) with the normal
distribution P (not its approximation by tanh). PyTorch takes two passes forward and four backward, and one each for the
shift. Source: Ba et al., arXiv 1607.06450; Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from jambatalk_kernels.autograd import first_derivative
from jambatalk_kernels.backends import native_library

__all__ = ["layer_norm_gelu"]


def layer_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, shift: Tensor | None = None
) -> Tensor:
    """x (..., channels), any float dtype -> y of its shape and dtype.

    weight, bias, shift: (channels,), of x's dtype or a wider one. Statistics are over the channels, with the population
    variance. On a CPU, where the native library is there, computed in float32 (float64 for float64), with a first
    derivative; elsewhere as PyTorch does.
    """
    native = x.device.type == "cpu" and native_library()[0] and x.shape[-1:] == weight.shape == bias.shape
    if native and not torch.compiler.is_compiling():
        return _LayerNormGelu.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, shift, eps).view(x.shape)
    if shift is not None:
        x = x + shift.to(x.dtype)
    # Autocast would widen x and leave it so; on a CPU both functions compute in float32 and round to x's dtype.
    mixed = x.device.type == "cpu" and x.dtype != weight.dtype
    with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not mixed):
        return gelu(layer_norm(x, weight.shape, weight, bias, eps))


class _LayerNormGelu(torch.autograd.Function):
    """x (rows, channels). Saved: the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias, shift)
        ctx.eps = eps
        return torch.ops.jambatalk.layer_norm_gelu(x, weight, bias, shift, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, shift = ctx.saved_tensors
        dx, dweight, dbias, dshift = first_derivative(
            "layer_norm_gelu", torch.ops.jambatalk.layer_norm_gelu_backward,
            dy.contiguous(), x, weight, bias, shift, ctx.eps,
        )  # fmt: skip
        return dx, dweight, dbias, None if shift is None else dshift, None
