"""Norms over the channels of each row, in one pass on a CPU.

`layer_norm_gelu`, what comes after every convolution of a speech encoder, takes PyTorch two passes forward and four
backward; `rms_norm` (`RMSNorm`) is a chain of elementwise functions there. Sources: Ba et al., arXiv 1607.06450;
Hendrycks and Gimpel, arXiv 1606.08415; Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jambatalk_kernels.autograd import first_derivative
from jambatalk_kernels.backends import native_on_cpu

__all__ = ["RMSNorm", "layer_norm_gelu", "rms_norm"]


def layer_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, shift: Tensor | None = None
) -> Tensor:
    """gelu((v - mean) / sqrt(variance + eps) * weight + bias), v = x + shift; gelu(v) = v P(v) with the normal
    distribution P (not its approximation by tanh), variance of the population.

    x (..., channels), any float dtype -> y of its shape and dtype. weight, bias, shift: (channels,), of x's dtype or a
    wider one. On a CPU, where the native library is there, computed in float32 (float64 for float64), with a first
    derivative; elsewhere as PyTorch does.
    """
    if native_on_cpu(x) and x.shape[-1:] == weight.shape == bias.shape:
        return _LayerNormGelu.apply(_rows(x), weight, bias, shift, eps).view(x.shape)
    if shift is not None:
        x = x + shift.to(x.dtype)
    # Autocast would widen x and leave it so; on a CPU both functions compute in float32 and round to x's dtype.
    mixed = x.device.type == "cpu" and x.dtype != weight.dtype
    with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not mixed):
        return functional.gelu(functional.layer_norm(x, weight.shape, weight, bias, eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight; dtypes, devices and derivatives as `layer_norm_gelu`."""
    if native_on_cpu(x) and x.shape[-1:] == weight.shape:
        return _RMSNorm.apply(_rows(x), weight, eps).view(x.shape)
    return functional.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension, with a weight, through `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


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
            _rows(dy), x, weight, bias, shift, ctx.eps,
        )  # fmt: skip
        return dx, dweight, dbias, None if shift is None else dshift, None


class _RMSNorm(torch.autograd.Function):
    """x (rows, channels). Saved: the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return torch.ops.jambatalk.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.ops.jambatalk.rms_norm_backward
        return *first_derivative("rms_norm", gradient, _rows(dy), *ctx.saved_tensors, ctx.eps), None
