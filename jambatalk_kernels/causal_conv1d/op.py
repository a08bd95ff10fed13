"""causal_conv1d and causal_conv1d_step: argument checks, backend choice, autograd and shape functions."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from jambatalk_kernels.autograd import any_requires_grad, first_derivative
from jambatalk_kernels.backends import candidates, choose, native_library, without_step_gradients
from jambatalk_kernels.causal_conv1d.reference import conv_reference, conv_step_reference
from jambatalk_kernels.checks import check_cu_seqlens, check_tensor
from jambatalk_kernels.triton_ops import Kernels, TritonOp

__all__ = ["causal_conv1d", "causal_conv1d_step"]

MAX_WIDTH = 16

# "swish" is the other name of silu, which the field uses too.
_ACTIVATIONS = {None: False, "silu": True, "swish": True}


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[False] = ..., cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[True], cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ...,
    initial_state: Tensor | None = ..., return_final_state: bool, cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution.

        y_t = activation(bias + sum_k weight[:, k] x_{t - width + 1 + k})

    Args:
        x: (batch, length, channels). weight: (channels, width), width 1 to 16. bias: (channels,). Any float dtypes.
        activation: None or "silu" (also called "swish").
        initial_state: the ``width - 1`` inputs before the first, (batch, width - 1, channels), oldest first; or zeros.
        return_final_state: also return the last ``width - 1`` inputs, the next call's ``initial_state``.
        cu_seqlens: int32 (sequences + 1,), boundaries of sequences packed along ``length`` (batch 1). States are then
            (sequences, width - 1, channels). Empty sequences are allowed. Positions outside of all of them give zeros.
        backend: "reference", "cpu", "triton" or "cuda"; by default the best that can run (see
            :mod:`jambatalk_kernels.backends`).

    Returns:
        y (batch, length, channels) in x's dtype [, final state in float32, or float64 when x is].

    Numerics: accumulation in float32, or float64 when x is float64. Deterministic, forward and backward. Autocast does
    not change the dtypes. Gradients of every tensor input and through both states; a second derivative works on
    ``reference`` and raises on the others.

    Cost: one read and one write per element, which is what binds it. Backward saves the inputs only and computes the
    sum before the activation again. Strides: any, read in place; nothing is copied beyond a chunk.

    Errors: ``TypeError``/``ValueError`` that name the argument; ``BackendUnavailable`` for a forced backend.
    """
    silu = _check_activation("causal_conv1d", activation)
    arguments = (x, weight, bias, initial_state, cu_seqlens)
    chosen = choose("causal_conv1d", backend, candidates("causal_conv1d", x))
    # A call must cost microseconds: a native op tests its arguments itself, and only when it refuses them is the
    # reason put into words here. What it cannot see is checked first: tracing runs no kernel, and values are optional.
    if chosen not in ("cpu", "cuda") or cu_seqlens is not None or torch.compiler.is_compiling():
        _check_conv(*arguments)
    if chosen == "reference":
        y, final_state = conv_reference(x, weight, bias, silu, initial_state, cu_seqlens)
        return (y, final_state) if return_final_state else y
    try:
        if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, initial_state):
            y, final_state = _CausalConv1d.apply(*arguments, silu, chosen)
        else:
            y, final_state = _FORWARD[chosen](*arguments, silu)
    except (RuntimeError, TypeError, AttributeError):
        _check_conv(*arguments)
        raise
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One position of :func:`causal_conv1d`: ``state`` drops its oldest row and gains ``x``, in place.

    Args:
        state: (batch, width - 1, channels), any float dtype. x: (batch, channels).
        weight: (channels, width), width 1 to 16. bias: (channels,). activation: None or "silu" (also called "swish").

    Returns: y (batch, channels) in x's dtype.

    Gradients: only on ``reference``; a call that needs them (gradients enabled and an input that requires them) runs
    there, with a warning. Decoding belongs under ``torch.no_grad()``.

    Errors: as :func:`causal_conv1d`.
    """
    silu = _check_activation("causal_conv1d_step", activation)
    arguments = (state, x, weight, bias)
    options = candidates("causal_conv1d_step", x)
    if torch.is_grad_enabled() and any_requires_grad(*arguments):
        options = without_step_gradients(options)
    chosen = choose("causal_conv1d_step", backend, options)
    if chosen not in ("cpu", "cuda") or torch.compiler.is_compiling():
        _check_step(*arguments)
    if chosen == "reference":
        return conv_step_reference(*arguments, silu)
    try:
        y = _STEP[chosen](*arguments, silu)
    except (RuntimeError, TypeError):
        _check_step(*arguments)
        raise
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # so that autograd sees a saved state that was overwritten
    return y


def _check_activation(op: str, activation: object) -> bool:
    """-> is it silu"""
    if activation is not None and not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected None or 'silu', got {activation!r}")
    return _ACTIVATIONS[activation]


def _check_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "causal_conv1d_step"
    check_tensor(op, "x", x, ("batch", "channels"), (None, None), None)
    batch, channels = x.shape
    width = _check_parameters(op, weight, bias, channels, x.device)
    check_tensor(op, "state", state, ("batch", "width - 1", "channels"), (batch, width - 1, channels), x.device)


def _check_parameters(op: str, weight: Tensor, bias: Tensor | None, channels: int, device: torch.device) -> int:
    """Check the tensors that have no batch; -> width."""
    check_tensor(op, "weight", weight, ("channels", "width"), (channels, None), device)
    width = weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{op}: weight: expected a width from 1 to {MAX_WIDTH}, got {width}")
    if bias is not None:
        check_tensor(op, "bias", bias, ("channels",), (channels,), device)
    return width


def _check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    op = "causal_conv1d"
    check_tensor(op, "x", x, ("batch", "length", "channels"), (None, None, None), None)
    batch, length, channels = x.shape
    width = _check_parameters(op, weight, bias, channels, x.device)
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, batch, length, x.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        axes = ("batch" if cu_seqlens is None else "sequences", "width - 1", "channels")
        check_tensor(op, "initial_state", initial_state, axes, (sequences, width - 1, channels), x.device)


class _CausalConv1d(torch.autograd.Function):
    """A kernel with its own gradient. Saved: the inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, cu_seqlens, silu, backend):
        y, final_state = _FORWARD[backend](x, weight, bias, initial_state, cu_seqlens, silu)
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.silu, ctx.backend = silu, backend
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        dx, dweight, dbias, dinitial_state = first_derivative(
            "causal_conv1d", _BACKWARD[ctx.backend], grad_y, grad_final_state, x, weight, bias, initial_state,
            cu_seqlens, ctx.silu,
        )  # fmt: skip
        return (
            dx,
            dweight,
            None if bias is None else dbias,
            None if initial_state is None else dinitial_state,
            None,
            None,
            None,
        )


# On Triton y and dx have x's order of strides, so that a channel-first x is written as it is read; natively they are
# contiguous.
def _fake_conv(like, x, weight, bias, initial_state, cu_seqlens, silu):
    _check_conv(x, weight, bias, initial_state, cu_seqlens)
    batch, _, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return like(x), x.new_empty((sequences, weight.shape[1] - 1, channels), dtype=dtype)


def _contiguous_like(tensor):
    return tensor.new_empty(tensor.shape)


def _fake_conv_backward(like, grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, silu):
    """A gradient that nobody can ask for is empty."""
    others = (weight, bias, initial_state)
    return like(x), *(x.new_empty((0,)) if other is None else _contiguous_like(other) for other in others)


def _fake_conv_step(state, x, weight, bias, silu):
    _check_step(state, x, weight, bias)
    return x.new_empty(x.shape)


# The schemas of csrc/schemas.h, for the ops that Triton's launchers become; a test compares the two.
SCHEMAS = (
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor y, Tensor final_state)",
    "causal_conv1d_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    "causal_conv1d_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
)
_MODULE = "jambatalk_kernels.causal_conv1d.triton"

# Backend -> the op that runs it. ``cpu`` and ``cuda`` are one native op, which its tensors' device tells apart.
_FORWARD: Kernels = {"triton": TritonOp(SCHEMAS[0], _MODULE, "conv_forward", partial(_fake_conv, torch.empty_like))}
_BACKWARD: Kernels = {
    "triton": TritonOp(SCHEMAS[1], _MODULE, "conv_backward", partial(_fake_conv_backward, torch.empty_like))
}
_STEP: Kernels = {"triton": TritonOp(SCHEMAS[2], _MODULE, "conv_step", _fake_conv_step)}
if native_library()[0]:
    torch.library.register_fake("jambatalk::causal_conv1d", partial(_fake_conv, _contiguous_like))
    torch.library.register_fake("jambatalk::causal_conv1d_backward", partial(_fake_conv_backward, _contiguous_like))
    torch.library.register_fake("jambatalk::causal_conv1d_step", _fake_conv_step)
    _FORWARD["cpu"] = _FORWARD["cuda"] = torch.ops.jambatalk.causal_conv1d.default
    _BACKWARD["cpu"] = _BACKWARD["cuda"] = torch.ops.jambatalk.causal_conv1d_backward.default
    _STEP["cpu"] = _STEP["cuda"] = torch.ops.jambatalk.causal_conv1d_step.default
