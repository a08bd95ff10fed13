"""Causal depthwise convolution in plain PyTorch: the definition that every kernel is held against.

    y_t = activation(bias + sum_k weight[:, k] x_{t - width + 1 + k}),   k = 0 .. width - 1

x before the first position comes from the initial state (its rows are x_{-width+1} .. x_{-1}), else it is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_reference", "conv_step_reference"]


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> y (batch, length, channels) in x's dtype, final state (sequences, width - 1, channels) in the compute dtype.

    Shapes as in :func:`jambatalk_kernels.causal_conv1d`. Packed positions outside of every sequence give zeros.
    """
    out_dtype = x.dtype
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, channels = x.shape
    width = weight.shape[1]
    x, weight = x.to(dtype), weight.to(dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, width - 1, channels)
    initial_state = initial_state.to(dtype)
    taps = torch.arange(width, device=x.device) - (width - 1)  # positions relative to t: -width+1 .. 0
    if cu_seqlens is None:
        rows = torch.cat([initial_state, x], 1)  # (batch, width - 1 + length, channels)
        y = sum((weight[:, k] * rows[:, k : k + length] for k in range(width)), start=x.new_zeros(()))
        final_state = rows[:, length:]
    else:
        bounds = cu_seqlens.long().clamp(0, length).cummax(0).values
        position = torch.arange(length, device=x.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), position, right=True).clamp(max=sequences - 1)
        y = _gather_rows(x, initial_state, bounds, sequence, position[:, None] + taps)  # (length, width, channels)
        y = torch.einsum("twc,cw->tc", y, weight)
        final_state = _gather_rows(
            x, initial_state, bounds, torch.arange(sequences, device=x.device), bounds[1:, None] + taps[:-1]
        )
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    if cu_seqlens is not None:
        covered = (position >= bounds[0]) & (position < bounds[-1])
        y = torch.where(covered[:, None], y, y.new_zeros(())).unsqueeze(0)
    return y.to(out_dtype), final_state


def _gather_rows(x: Tensor, initial_state: Tensor, bounds: Tensor, sequence: Tensor, wanted: Tensor) -> Tensor:
    """Rows of packed x (1, length, channels) at positions ``wanted`` (n, k), each n within its ``sequence[n]``.

    A position before the sequence's start is a row of its initial state. -> (n, k, channels)
    """
    history = initial_state.shape[1]
    ahead = wanted - bounds[:-1][sequence][:, None]  # negative: before the start of the sequence
    if history == 0:
        return x[0][wanted]
    # Rows that only the other branch uses are clamped into range: what they hold does not matter.
    from_state = initial_state[sequence[:, None], (ahead + history).clamp(0, history - 1)]
    if x.shape[1] == 0:
        return from_state
    from_x = x[0][wanted.clamp(0, x.shape[1] - 1)]
    return torch.where((ahead < 0).unsqueeze(-1), from_state, from_x)


def conv_step_reference(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """One position: ``state`` (batch, width - 1, channels) drops its oldest row and gains x, in place.

    -> y (batch, channels) in x's dtype.
    """
    y, final_state = conv_reference(x.unsqueeze(1), weight, bias, silu, state)
    state.copy_(final_state)
    return y.squeeze(1)
