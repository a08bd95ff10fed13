"""selective_scan and selective_scan_step: argument checks, backend choice, autograd and shape functions."""

from __future__ import annotations

import torch
from torch import Tensor

from jambatalk_kernels.autograd import first_derivative
from jambatalk_kernels.backends import choose, native_library
from jambatalk_kernels.checks import check_cu_seqlens, check_tensor
from jambatalk_kernels.selective_scan.reference import compute_dtype, scan_reference, scan_step_reference

__all__ = ["selective_scan", "selective_scan_step"]

_LOADED, _WHY_NOT = native_library()


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
        backend: "reference" or "cpu"; by default the first that can run (see :mod:`jambatalk_kernels.backends`).

    Returns:
        y (batch, length, channels) in u's dtype [, final state in float32, or float64 when u is].

    Numerics: accumulation in float32, or float64 when u is float64. Deterministic, forward and backward. Autocast does
    not change the dtypes: inputs are taken as they come. Gradients of every tensor input and through both states;
    a second derivative raises on ``cpu`` and works on ``reference``.

    Cost on ``cpu``: 16 float operations or so per channel, position and state, which is what binds it. Backward saves
    the inputs and one state per chunk of at least 4 * states positions: O(batch * length * channels), never times
    states. Strides: any, read in place; nothing is copied beyond a chunk (unit channel stride is the fast layout).

    Errors: ``TypeError``/``ValueError`` that name the argument; ``BackendUnavailable`` for a forced backend.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), algorithm 2.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    chosen = choose("selective_scan", backend, _candidates(u))
    # A call must cost microseconds: the native op tests its arguments itself, and only when it refuses them is the
    # reason put into words here. What it cannot see is checked first: tracing runs no kernel, and values are optional.
    if chosen == "reference" or cu_seqlens is not None or torch.compiler.is_compiling():
        _check_scan(*arguments)
    if chosen == "reference":
        y, final_state = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
        return (y, final_state) if return_final_state else y
    try:
        if torch.is_grad_enabled() and _any_requires_grad(u, delta, A, B, C, D, z, delta_bias, initial_state):
            y, final_state = _SelectiveScan.apply(*arguments, delta_softplus)
        else:
            y, final_state, _ = torch.ops.jambatalk.selective_scan.default(*arguments, delta_softplus, False)
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
    needs_grad = torch.is_grad_enabled() and _any_requires_grad(*arguments)
    chosen = choose("selective_scan_step", backend, _candidates(u, needs_grad))
    if chosen == "reference" or torch.compiler.is_compiling():
        _check_step(*arguments)
    if chosen == "reference":
        return scan_step_reference(*arguments, delta_softplus)
    try:
        y = torch.ops.jambatalk.selective_scan_step.default(*arguments, delta_softplus)
    except (RuntimeError, TypeError):
        _check_step(*arguments)
        raise
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # so that autograd sees a saved state that was overwritten
    return y


_ON_CPU = {"cpu": None if _LOADED else _WHY_NOT, "reference": None}
_ON_CPU_WITH_GRAD = {
    "cpu": _ON_CPU["cpu"] or "steps have no gradients there and this call needs them",
    "reference": None,
}


def _candidates(u: object, step_needs_grad: bool = False) -> dict[str, str | None]:
    """The backends for inputs like ``u``, best first; something that is not a tensor is left to the checks."""
    if isinstance(u, Tensor) and u.device.type != "cpu":
        return {"reference": None, "cpu": f"the inputs are on {u.device}"}
    return _ON_CPU_WITH_GRAD if step_needs_grad else _ON_CPU


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            return True
    return False


def _check_parameters(op: str, A: object, channels: int, D: object, delta_bias: object, device: torch.device) -> int:
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


def _check_step(state, u, delta, A, B, C, D, z, delta_bias) -> None:
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


def _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens) -> None:
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
    """The native op with its native gradient. Saved: the inputs and the state at the start of every chunk."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus):
        y, final_state, chunk_states = torch.ops.jambatalk.selective_scan.default(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, True
        )
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final_state):
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states = ctx.saved_tensors
        grads = first_derivative(
            "selective_scan", torch.ops.jambatalk.selective_scan_backward.default, grad_y, grad_final_state, u, delta,
            A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states, ctx.delta_softplus,
        )  # fmt: skip
        du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = grads
        return (
            du, ddelta, dA, dB, dC,
            None if D is None else dD,
            None if z is None else dz,
            None if delta_bias is None else ddelta_bias,
            None if initial_state is None else dinitial_state,
            None, None,
        )  # fmt: skip


# The chunk of positions between two saved states, and the padding of channels in them: as in csrc/cpu/selective_scan.h.
def _chunk_length(states: int) -> int:
    return max(64, 4 * states)


def _padded(channels: int) -> int:
    return (channels + 15) // 16 * 16


def _fake_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save_states):
    _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = u.new_empty((batch, length, channels))
    final_state = u.new_empty((sequences, channels, states), dtype=dtype)
    if not save_states:
        return y, final_state, u.new_empty((0,), dtype=dtype)
    chunks = (length + _chunk_length(states) - 1) // _chunk_length(states)
    return y, final_state, u.new_empty((batch, chunks, states, _padded(channels)), dtype=dtype)


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


if _LOADED:
    torch.library.register_fake("jambatalk::selective_scan", _fake_scan)
    torch.library.register_fake("jambatalk::selective_scan_backward", _fake_scan_backward)
    torch.library.register_fake("jambatalk::selective_scan_step", _fake_scan_step)
