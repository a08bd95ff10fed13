"""The selective scan of Mamba-1 in plain PyTorch: the definition that every kernel is held against.

    delta_t = softplus(delta_t + delta_bias)                       (bias and softplus where asked for)
    h_t = exp(delta_t A) h_{t-1} + (delta_t B_t) u_t               per channel and state
    y_t = C_t . h_t + D u_t;  y_t *= silu(z_t) where z is given

The paper's discretisation (JambaTalk Eq. 3, zero-order hold) has B-hat = A^-1 (exp(delta A) - 1) B. Every Mamba
implementation simplifies it to delta B, its first-order term, and so do all backends here. ``exact_hold=True`` computes
the paper's B-hat; a test states how far the two are apart.

Memory is O(batch * length * channels * states): this is a definition, not a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["scan_reference", "scan_step_reference"]

# Above it softplus(x) is x, as in F.softplus and in every Mamba implementation.
SOFTPLUS_THRESHOLD = 20.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of states: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    exact_hold: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> y (batch, length, channels) in u's dtype, final state (sequences, channels, states) in the compute dtype.

    Shapes as in :func:`jambatalk_kernels.selective_scan`. Packed positions outside of every sequence give zeros.
    """
    dtype = compute_dtype(u.dtype)
    batch, length, channels = u.shape
    states = A.shape[1]
    out_dtype = u.dtype
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    delta = _positive_delta(delta, delta_bias, delta_softplus)

    decay = torch.exp(delta.unsqueeze(-1) * A)  # (batch, length, channels, states)
    drive = _input_gain(delta, A, exact_hold) * B.unsqueeze(2) * u.unsqueeze(-1)

    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = u.new_zeros(sequences, channels, states)
    initial_state = initial_state.to(dtype)
    if cu_seqlens is None:
        hidden = _recurrence(decay, drive, initial_state)
        final_state = hidden[-1] if length else initial_state
    else:
        # bounds: what any cu_seqlens means after clamping, so that no value of it reads outside of the tensors.
        bounds = cu_seqlens.long().clamp(0, length).cummax(0).values
        position = torch.arange(length, device=u.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), position, right=True).clamp(max=sequences - 1)
        starts = position == bounds[:-1][sequence]
        hidden = _recurrence(decay, drive, initial_state[:1], starts, initial_state[sequence])
        empty = (bounds[1:] == bounds[:-1])[:, None, None]
        stacked = torch.cat([initial_state[:1], *hidden])  # row i + 1 is the state after position i
        final_state = torch.where(empty, initial_state, stacked[bounds[1:]])
    y = torch.einsum("btcn,btn->btc", torch.stack(hidden, 1), C) if length else u * 0
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if cu_seqlens is not None:
        covered = (position >= bounds[0]) & (position < bounds[-1])
        y = torch.where(covered[:, None], y, y.new_zeros(()))
    return y.to(out_dtype), final_state


def _recurrence(
    decay: Tensor, drive: Tensor, state: Tensor, starts: Tensor | None = None, restarts: Tensor | None = None
) -> list[Tensor]:
    """The states after every position; where ``starts[t]``, position t continues from ``restarts[t]`` instead."""
    hidden = []
    # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole, for every position.
    for t, (kept, added) in enumerate(zip(decay.unbind(1), drive.unbind(1), strict=True)):
        if starts is not None and restarts is not None:  # both or neither
            state = torch.where(starts[t], restarts[t], state)
        state = kept * state + added
        hidden.append(state)
    return hidden


def _positive_delta(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta, threshold=SOFTPLUS_THRESHOLD) if delta_softplus else delta


def _input_gain(delta: Tensor, A: Tensor, exact_hold: bool) -> Tensor:
    """What multiplies B_t u_t: delta, or A^-1 (exp(delta A) - 1) for the exact zero-order hold.

    (batch, length, channels, 1 or states)
    """
    delta = delta.unsqueeze(-1)
    if not exact_hold:
        return delta
    # At A = 0 the integral is delta itself; 1 there keeps the division (and its gradient) finite.
    nonzero = A != 0
    return torch.where(nonzero, torch.expm1(delta * A) / torch.where(nonzero, A, torch.ones_like(A)), delta)


def scan_step_reference(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One position: ``state`` (batch, channels, states) becomes h_t in place; -> y (batch, channels) in u's dtype."""
    y, final_state = scan_reference(
        u.unsqueeze(1), delta.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D, None if z is None else z.unsqueeze(1),
        delta_bias, delta_softplus, state,
    )  # fmt: skip
    state.copy_(final_state)
    return y.squeeze(1)
