"""The public rollout function: checks and backend choice. The definition is in `reference.py`."""

import torch
from torch import Tensor

from jambatalk_kernels import backends
from jambatalk_kernels.rollout import reference
from jambatalk_kernels.rollout.program import Program, RolloutState


def rollout(
    program: Program,
    inputs: Tensor,
    state: RolloutState | None = None,
    *,
    lengths: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, RolloutState]:
    """Run a decoder frame by frame, each frame's output fed back into the next (formula: `Program`).

    Args:
        program: the decoder as data.
        inputs: (batch, frames, d): audio, style and periodic encoding already added.
        state: where an earlier call stopped; None starts anew. It is not changed. Splitting a clip into calls at any
            point gives what one call gives.
        lengths: (batch,) integers: frames of each sequence; later ones are not computed (their hidden is zero) and
            leave that sequence's state alone.
        weights_dtype: round the matrices to this dtype first; arithmetic stays in the dtype of the inputs.

    Returns:
        hidden (batch, frames, d) after the final norm, and the state for the next call. No gradients.

    Cost per frame is constant where attention has a window; memory beyond the output is then constant too.

    Raises:
        TypeError, ValueError: a bad dtype, shape or state, naming the argument.
    """
    if not isinstance(program, Program):
        raise TypeError(f"program must be a Program, got {type(program).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TypeError(f"inputs must be a float tensor, got {getattr(inputs, 'dtype', type(inputs).__name__)}")
    if inputs.dim() != 3 or inputs.shape[2] != program.width:
        raise ValueError(f"inputs must be (batch, frames, {program.width}), got shape {tuple(inputs.shape)}")
    if program.final_norm.device != inputs.device:
        raise ValueError(
            f"inputs must be on the device of the program ({program.final_norm.device}), got {inputs.device}"
        )
    if program.final_norm.dtype != inputs.dtype:
        raise TypeError(f"inputs must have the dtype of the program ({program.final_norm.dtype}), got {inputs.dtype}")
    batch, frames = inputs.shape[:2]
    if state is not None:
        if not isinstance(state, RolloutState):
            raise TypeError(f"state must be a RolloutState, got {type(state).__name__}")
        if state.batch != batch:
            raise ValueError(f"state is for a batch of {state.batch}, but inputs have {batch}")
        if len(state.mixers) != len(program.layers):
            raise ValueError(f"state is for {len(state.mixers)} layers, but the program has {len(program.layers)}")
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError("lengths must be an integer tensor")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths must be ({batch},), got shape {tuple(lengths.shape)}")
    if weights_dtype is not None and not weights_dtype.is_floating_point:
        raise TypeError(f"weights_dtype must be a float dtype, got {weights_dtype}")
    backends.choose("rollout", backend, {"reference": None})
    with torch.no_grad():
        return reference.rollout(program.rounded(weights_dtype), inputs, state, lengths)
