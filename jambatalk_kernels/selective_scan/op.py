"""selective_scan and selective_scan_step: argument checks, backend choice, autograd and shape functions."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from jambatalk_kernels.autograd import any_requires_grad, first_derivative
from jambatalk_kernels.backends import candidates, choose, native_library, without_step_gradients
from jambatalk_kernels.checks import check_cu_seqlens, check_flag, check_tensor
from jambatalk_kernels.selective_scan.reference import compute_dtype, scan_reference, scan_step_reference
from jambatalk_kernels.triton_ops import Kernels, TritonOp

__all__ = ["selective_scan", "selective_scan_step"]


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ..., *,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_final_state: Literal[False] = ..., cu_seqlens: Tensor | None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ..., *,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_final_state: Literal[True], cu_seqlens: Tensor | None = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ..., *,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., initial_state: Tensor | None = ...,
    return_final_state: bool, cu_seqlens: Tensor | None = ..., backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba-1.

        delta_t = softplus(delta_t + delta_bias)                 (bias and softplus where asked for)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = C_t . h_t + D u_t;  y_t *= silu(z_t) where z is given

    The paper's zero-order hold (Eq. 3) has B-hat = A^-1 (exp(delta A) - 1) B; like every Mamba implementation this
    op takes its first-order term, delta B. ``reference.scan_reference(exact_hold=True)`` computes the exact one.

    Args:
        u, delta, z: (batch, length, channels). B, C: (batch, length, states). A: (channels, states), negative in
            practice.
        D, delta_bias: (channels,). Any mix of float dtypes; no broadcasting.
        initial_state: h before the first position, (batch, channels, states); zeros by default.
        return_final_state: also return h after the last position.
        cu_seqlens: int32 (sequences + 1,), boundaries of sequences packed along ``length`` (batch 1). States are then
            (sequences, channels, states). Empty sequences are allowed. Positions outside of every sequence give zeros.
        backend: "reference", "cpu", "triton" or "cuda"; by default the best that can run (see
            :mod:`jambatalk_kernels.backends`).

    Returns:
        y (batch, length, channels) in u's dtype [, final state in float32, or float64 when u is].

    Numerics: accumulation in float32, or float64 when u is float64. Deterministic, forward and backward. Autocast does
    not change the dtypes: inputs are taken as they come. Gradients of every tensor input and through both states;
    a second derivative works on ``reference`` and raises on the others.

    Cost on ``cpu``: 16 float operations or so per channel, position and state, which is what binds it. Backward saves
    the inputs and one state per chunk of at least 2 * states positions: O(batch * length * channels), never times
    states. Strides: any, read in place; nothing is copied beyond a chunk (unit channel stride is the fast layout).

    Errors: ``TypeError``/``ValueError`` that name the argument; ``BackendUnavailable`` for a forced backend.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), algorithm 2.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    check_flag("selective_scan", "delta_softplus", delta_softplus)
    chosen = choose("selective_scan", backend, candidates("selective_scan", u))
    # A call must cost microseconds: a native op tests its arguments itself, and only when it refuses them is the
    # reason put into words here. What it cannot see is checked first: tracing runs no kernel, and values are optional.
    if chosen not in ("cpu", "cuda") or cu_seqlens is not None or torch.compiler.is_compiling():
        _check_scan(*arguments)
    if chosen == "reference":
        y, final_state = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
        return (y, final_state) if return_final_state else y
    try:
        if torch.is_grad_enabled() and any_requires_grad(u, delta, A, B, C, D, z, delta_bias, initial_state):
            y, final_state = _SelectiveScan.apply(*arguments, delta_softplus, chosen)
        else:
            y, final_state, _ = _FORWARD[chosen](*arguments, delta_softplus, False)
    except (RuntimeError, TypeError, AttributeError):
        _check_scan(*arguments)
        raise
    return (y, final_state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One position of :func:`selective_scan`: ``state`` becomes h_t in place.

    Args:
        state: (batch, channels, states), any float dtype; float32 is what selective_scan returns.
        u, delta, z: (batch, channels). A: (channels, states). B, C: (batch, states). D, delta_bias: (channels,).

    Returns: y (batch, channels) in u's dtype.

    Gradients: only on ``reference``; a call that needs them (gradients enabled and an input that requires them) runs
    there, with a warning. Decoding belongs under ``torch.no_grad()``.

    Errors: as :func:`selective_scan`.
    """
    arguments = (state, u, delta, A, B, C, D, z, delta_bias)
    check_flag("selective_scan_step", "delta_softplus", delta_softplus)
    options = candidates("selective_scan_step", u)
    if torch.is_grad_enabled() and any_requires_grad(*arguments):
        options = without_step_gradients(options)
    chosen = choose("selective_scan_step", backend, options)
    if chosen not in ("cpu", "cuda") or torch.compiler.is_compiling():
        _check_step(*arguments)
    if chosen == "reference":
        return scan_step_reference(*arguments, delta_softplus)
    try:
        y = _STEP[chosen](*arguments, delta_softplus)
    except (RuntimeError, TypeError):
        _check_step(*arguments)
        raise
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # so that autograd sees a saved state that was overwritten
    return y


def _check_parameters(
    op: str, A: Tensor, channels: int, D: Tensor | None, delta_bias: Tensor | None, device: torch.device
) -> int:
    """Check the tensors that have no batch; -> states."""
    check_tensor(op, "A", A, ("channels", "states"), (channels, None), device)
    states = A.shape[1]
    if states < 1:
        raise ValueError(f"{op}: A: expected at least one state, got shape {tuple(A.shape)}")
    if D is not None:
        check_tensor(op, "D", D, ("channels",), (channels,), device)
    if delta_bias is not None:
        check_tensor(op, "delta_bias", delta_bias, ("channels",), (channels,), device)
    return states


def _check_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:  # fmt: skip
    op = "selective_scan_step"
    check_tensor(op, "u", u, ("batch", "channels"), (None, None), None)
    batch, channels = u.shape
    device = u.device
    states = _check_parameters(op, A, channels, D, delta_bias, device)
    check_tensor(op, "delta", delta, ("batch", "channels"), (batch, channels), device)
    check_tensor(op, "B", B, ("batch", "states"), (batch, states), device)
    check_tensor(op, "C", C, ("batch", "states"), (batch, states), device)
    if z is not None:
        check_tensor(op, "z", z, ("batch", "channels"), (batch, channels), device)
    check_tensor(op, "state", state, ("batch", "channels", "states"), (batch, channels, states), device)


def _check_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    op = "selective_scan"
    positions = ("batch", "length", "channels")
    check_tensor(op, "u", u, positions, (None, None, None), None)
    batch, length, channels = u.shape
    device = u.device
    states = _check_parameters(op, A, channels, D, delta_bias, device)
    check_tensor(op, "delta", delta, positions, (batch, length, channels), device)
    check_tensor(op, "B", B, ("batch", "length", "states"), (batch, length, states), device)
    check_tensor(op, "C", C, ("batch", "length", "states"), (batch, length, states), device)
    if z is not None:
        check_tensor(op, "z", z, positions, (batch, length, channels), device)
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, batch, length, device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        axes = ("batch" if cu_seqlens is None else "sequences", "channels", "states")
        check_tensor(op, "initial_state", initial_state, axes, (sequences, channels, states), device)


class _SelectiveScan(torch.autograd.Function):
    """A kernel with its own gradient. Saved: the inputs and the state at the start of every chunk."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, backend):
        y, final_state, chunk_states = _FORWARD[backend](
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, True
        )
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states)
        ctx.delta_softplus, ctx.backend = delta_softplus, backend
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states = ctx.saved_tensors
        grads = first_derivative(
            "selective_scan", _BACKWARD[ctx.backend], grad_y, grad_final_state, u, delta, A,
            B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states, ctx.delta_softplus,
        )  # fmt: skip
        du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = grads
        return (
            du, ddelta, dA, dB, dC,
            None if D is None else dD,
            None if z is None else dz,
            None if delta_bias is None else ddelta_bias,
            None if initial_state is None else dinitial_state,
            None, None, None,
        )  # fmt: skip


# What the native ops save, as in csrc/cpu/selective_scan.cpp and csrc/cuda/binding.cpp: the state at the start of every
# chunk of positions but the first, channels padded.
def _native_chunk_states(u: Tensor, states: int) -> tuple[int, ...]:
    batch, length, channels = u.shape
    chunk = (states + 63) // 64 * 64 if u.device.type == "cuda" else max(32, 2 * states)
    return batch, max(length - 1, 0) // chunk, states, (channels + 15) // 16 * 16


def _triton_chunk_states(u: Tensor, states: int) -> tuple[int, ...]:
    from jambatalk_kernels.selective_scan.triton import chunk_states_shape

    batch, length, channels = u.shape
    return chunk_states_shape(batch, length, channels, states)


def _fake_scan(chunk_states_shape, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, _, save_states):
    _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = u.new_empty((batch, length, channels))
    final_state = u.new_empty((sequences, channels, states), dtype=dtype)
    saved = chunk_states_shape(u, states) if save_states else (0,)
    return y, final_state, u.new_empty(saved, dtype=dtype)


def _fake_scan_backward(
    grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states,
    delta_softplus,
):  # fmt: skip
    """A gradient that nobody can ask for is empty."""
    return tuple(
        u.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )


def _fake_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check_step(state, u, delta, A, B, C, D, z, delta_bias)
    return u.new_empty(u.shape)


# The schemas of csrc/schemas.h, for the ops that Triton's launchers become; a test compares the two.
SCHEMAS = (
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool save_states) "
    "-> (Tensor y, Tensor final_state, Tensor chunk_states)",
    "selective_scan_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor chunk_states, bool delta_softplus) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, "
    "Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)",
    "selective_scan_step(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, bool delta_softplus) -> Tensor",
)
_MODULE = "jambatalk_kernels.selective_scan.triton"

# Backend -> the op that runs it. ``cpu`` and ``cuda`` are one native op, which its tensors' device tells apart.
_FORWARD: Kernels = {"triton": TritonOp(SCHEMAS[0], _MODULE, "scan_forward", partial(_fake_scan, _triton_chunk_states))}
_BACKWARD: Kernels = {"triton": TritonOp(SCHEMAS[1], _MODULE, "scan_backward", _fake_scan_backward)}
_STEP: Kernels = {"triton": TritonOp(SCHEMAS[2], _MODULE, "scan_step", _fake_scan_step)}
if native_library()[0]:
    torch.library.register_fake("jambatalk::selective_scan", partial(_fake_scan, _native_chunk_states))
    torch.library.register_fake("jambatalk::selective_scan_backward", _fake_scan_backward)
    torch.library.register_fake("jambatalk::selective_scan_step", _fake_scan_step)
    _FORWARD["cpu"] = _FORWARD["cuda"] = torch.ops.jambatalk.selective_scan.default
    _BACKWARD["cpu"] = _BACKWARD["cuda"] = torch.ops.jambatalk.selective_scan_backward.default
    _STEP["cpu"] = _STEP["cuda"] = torch.ops.jambatalk.selective_scan_step.default
