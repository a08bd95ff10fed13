"""Dense layers, whose float32 products run through oneDNN on a CPU with AVX-512 that is not Intel's.

PyTorch gives float32 products to MKL, which uses half of the vector width on processors that are not Intel's: 85-100
GFLOP/s a thread on a Zen 5 core, against 160-220 by oneDNN, which PyTorch carries for convolutions and its compiler.
The first product of a new shape costs about half a millisecond more, for which oneDNN writes the code. On an Intel core
(Sapphire Rapids) MKL is the faster one: 170-180 GFLOP/s against 150-160, and twice as fast for some weights' gradients.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 16  # with fewer, a product reads the weights and does little else: MKL is as fast
FEATURES = 32  # oneDNN has no fast code for some odd smaller ones
OPERATIONS = 1 << 21  # multiply-adds below which the call costs more than the product gains


class Linear(nn.Linear):
    """`nn.Linear`, through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def adopt(module: nn.Module) -> None:
    """Make every `nn.Linear` of a module of somebody else's a `Linear`, in place; names and weights stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., inputs), weight (outputs, inputs), bias (outputs,) -> x weight^T + bias (..., outputs), any float dtype.

    As `torch.nn.functional.linear`, to which it leaves all but large float32 products on a CPU where oneDNN is faster;
    differentiable any number of times.
    """
    if not _onednn(x, weight, bias):
        return functional.linear(x, weight, bias)
    return _Product.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def linear_into(out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """out = x weight^T + bias, with `add` out + x weight^T; returns out. Not differentiable.

    out (rows, outputs) or (batch, rows, outputs), any strides, x (rows, inputs) or (batch, rows, inputs); None: new
    memory. PyTorch's own products go where they are to be; oneDNN's are put there.
    """
    onednn = _onednn(x, weight, bias)
    direct = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not onednn
    if not direct or (out is not None and out.dtype != x.dtype):
        y = linear(x, weight, bias)
        return y if out is None else out.add_(y) if add else out.copy_(y)
    if out is None:
        out = x.new_empty(*x.shape[:-1], len(weight))
    for to, rows in zip(out, x, strict=True) if x.dim() == 3 else [(out, x)]:
        if add:
            to.addmm_(rows, weight.T)
        elif bias is None:
            torch.mm(rows, weight.T, out=to)
        else:
            torch.addmm(bias, rows, weight.T, out=to)
    return out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() < 2:
        return False
    rows = x.shape[:-1].numel()
    return (
        x.dtype == weight.dtype == torch.float32
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and rows >= ROWS
        and min(weight.shape) >= FEATURES
        and rows * weight.numel() >= OPERATIONS
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and _wide_vectors()
        and not _intel()
    )


@cache
def _intel() -> bool:
    """Whether the processor is one that MKL is written for."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


@cache
def _wide_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Product(torch.autograd.Function):
    """left (m, k), right (n, k), bias (n,) or None -> left right^T + bias (m, n)."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(left, right)
        return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            _Product.apply(gradient, right.t(), None) if ctx.needs_input_grad[0] else None,
            _Product.apply(gradient.t(), left.t(), None) if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _dense(matrix: Tensor) -> Tensor:
    """Rows, or columns, that lie one after the other without gaps. Other matrices oneDNN may multiply by its reference
    code: half a second for the gradient of a slice of 32 columns, where the copy takes 50 microseconds."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
