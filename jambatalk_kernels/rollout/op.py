"""The public rollout function: checks and backend choice. The definition is in `reference.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jambatalk_kernels.attention.op import MAX_TRITON_HEAD_DIM
from jambatalk_kernels.attention.reference import KVCache
from jambatalk_kernels.backends import Reason, candidates, choose, native_library
from jambatalk_kernels.moe.heuristics import MAX_EXPERTS, MAX_TOP_K
from jambatalk_kernels.rollout import cpu, cuda, graph, reference
from jambatalk_kernels.rollout.program import (
    AttentionMixer,
    MambaMixer,
    MambaState,
    MoEMLP,
    Program,
    RolloutState,
)

MOST_TAPS = 16  # of the convolution, on `cpu`


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
        state: where an earlier call stopped; None starts anew. It is not changed, also when the call is interrupted.
            Splitting a clip into calls at any point gives what one call gives. `save` and `load` keep it in a file.
        lengths: (batch,) integers: frames of each sequence; later ones are not computed (their hidden is zero) and
            leave that sequence's state alone.
        weights_dtype: round the matrices to this dtype first (the router never); arithmetic stays in the dtype of the
            inputs, and so it does under autocast. bfloat16 is also how they are stored: on `cpu` and `cuda`, and on
            `triton` for up to 8 sequences.

    Returns:
        hidden (batch, frames, d) after the final norm, and the state for the next call. No gradients.

    On a GPU `triton` replays a CUDA graph of the step kernels (float32, bfloat16 or float16; the first call with a
    program, batch and dtypes captures it; a state of attention without a window is asked for its position, which
    waits for the device; nothing else does). `cuda` runs all frames in one persistent kernel (float32), one block per
    sequence up to d 128, otherwise all blocks of the card; it waits for the device every 2048 frames, when Ctrl-C is
    heard and its watchdog is read: blocks that do not meet within 4 seconds are a RuntimeError.

    Cost: on `cpu` a frame reads every matrix that it needs once (of the experts only the chosen ones), for all of a
    batch together where they are large; that reading binds: 4 bytes a weight, 2 in bfloat16. The first call with a
    program copies its matrices into the order in which they are read and keeps the copy as long as the program lives
    (made again when they change in place). Threads share each product where the weights are large, otherwise the
    sequences; the same bytes with any number of them. Ctrl-C is heard a few times a second. Cost per frame is constant
    where attention has a window; memory beyond the output is then constant too.

    Raises:
        TypeError, ValueError: a bad dtype, shape or state, naming the argument.
    """
    _check(program, inputs, state, lengths, weights_dtype)
    chosen = choose("rollout", backend, _options(program, inputs, state))
    with torch.no_grad():
        if chosen == "cpu":
            return cpu.rollout(_NATIVE, program, inputs, state, lengths, weights_dtype)
        if chosen == "cuda":
            return cuda.rollout(_NATIVE, program, inputs, state, lengths, weights_dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            if chosen == "triton":
                return graph.rollout(program, inputs, state, lengths, weights_dtype)
            return reference.rollout(program.rounded(weights_dtype), inputs, state, lengths)


def _options(program: Program, inputs: Tensor, state: RolloutState | None) -> Mapping[str, Reason]:
    options = dict(candidates("rollout", inputs))
    if options["cpu"] is None:
        options["cpu"] = _why_not_native(program, inputs, state)
    if options["triton"] is None or callable(options["triton"]):
        other = options["triton"]
        options["triton"] = lambda: _why_not_triton(program, inputs, state) or (other() if callable(other) else other)
    if options["cuda"] is None:
        options["cuda"] = _why_not_cuda(program, inputs, state)
    return options


def _why_not_native(program: Program, inputs: Tensor, state: RolloutState | None) -> str | None:
    if inputs.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, and the inputs are {inputs.dtype}"
    return _too_many_taps(program) or _other_dtype(inputs, state)


def _why_not_triton(program: Program, inputs: Tensor, state: RolloutState | None) -> str | None:
    if inputs.dtype == torch.float64:
        return "it computes in float32, and the inputs are torch.float64"
    for layer in program.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, AttentionMixer) and mixer.head_dim > MAX_TRITON_HEAD_DIM:
            return f"its attention has head_dim up to {MAX_TRITON_HEAD_DIM}"
        if isinstance(mlp, MoEMLP) and (mlp.router.shape[0] > MAX_EXPERTS or mlp.top_k > MAX_TOP_K):
            return f"it has up to {MAX_EXPERTS} experts and top_k {MAX_TOP_K}"
    return _too_many_taps(program) or _other_dtype(inputs, state)


def _why_not_cuda(program: Program, inputs: Tensor, state: RolloutState | None) -> str | None:
    if inputs.dtype != torch.float32:
        return f"it computes in float32, and the inputs are {inputs.dtype}"
    if len(program.layers) > cuda.MOST_LAYERS:
        return f"it has up to {cuda.MOST_LAYERS} layers"
    for layer in program.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, AttentionMixer) and mixer.head_dim > cuda.MOST_HEAD_DIM:
            return f"its attention has head_dim up to {cuda.MOST_HEAD_DIM}"
        if isinstance(mlp, MoEMLP) and (mlp.router.shape[0] > cuda.MOST_EXPERTS or mlp.top_k > cuda.MOST_SLOTS):
            return f"it has up to {cuda.MOST_EXPERTS} experts and top_k {cuda.MOST_SLOTS}"
    if cuda.vector_bytes(program) > cuda.MOST_VECTOR_BYTES:
        return f"a sequence's vectors must fit into {cuda.MOST_VECTOR_BYTES >> 10} KB (those of d 1024 do)"
    return _too_many_taps(program) or _other_dtype(inputs, state)


def _too_many_taps(program: Program) -> str | None:
    for layer in program.layers:
        if isinstance(layer.mixer, MambaMixer) and layer.mixer.conv_weight.shape[1] > MOST_TAPS:
            return f"its convolutions have at most {MOST_TAPS} taps"
    return None


def _other_dtype(inputs: Tensor, state: RolloutState | None) -> str | None:
    if state is None:
        return None
    dtype, wide = inputs.dtype, torch.promote_types(inputs.dtype, torch.float32)
    pairs = [(state.feedback, dtype)]
    for mixer in state.mixers:
        if isinstance(mixer, MambaState):
            pairs += [(mixer.conv, dtype), (mixer.scan, wide)]
        else:
            pairs += [(mixer.k, dtype), (mixer.v, dtype)]
    for tensor, expected in pairs:
        if tensor.dtype != expected:
            return f"the state holds {tensor.dtype} and the inputs are {inputs.dtype}"
    return None


def _check(
    program: Program,
    inputs: Tensor,
    state: RolloutState | None,
    lengths: Tensor | None,
    weights_dtype: torch.dtype | None,
) -> None:
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
    batch = inputs.shape[0]
    if state is not None:
        _check_state(program, inputs, state)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError("lengths must be an integer tensor")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths must be ({batch},), got shape {tuple(lengths.shape)}")
    if weights_dtype is not None and not weights_dtype.is_floating_point:
        raise TypeError(f"weights_dtype must be a float dtype, got {weights_dtype}")


def _check_state(program: Program, inputs: Tensor, state: RolloutState) -> None:
    if not isinstance(state, RolloutState):
        raise TypeError(f"state must be a RolloutState, got {type(state).__name__}")
    batch = inputs.shape[0]
    if state.batch != batch:
        raise ValueError(f"state is for a batch of {state.batch}, but inputs have {batch}")
    if len(state.mixers) != len(program.layers):
        raise ValueError(f"state is for {len(state.mixers)} layers, but the program has {len(program.layers)}")
    expected = {"feedback": (state.feedback, (batch, program.width)), "position": (state.position, (batch,))}
    for index, (layer, mine) in enumerate(zip(program.layers, state.mixers, strict=True)):
        mixer, name = layer.mixer, f"mixers[{index}]"
        if isinstance(mixer, MambaMixer):
            if not isinstance(mine, MambaState):
                raise TypeError(f"state.{name} must be a MambaState, got {type(mine).__name__}")
            inner, taps = mixer.conv_weight.shape
            expected[f"{name}.conv"] = (mine.conv, (batch, taps - 1, inner))
            expected[f"{name}.scan"] = (mine.scan, (batch, inner, mixer.A.shape[1]))
        else:
            if not isinstance(mine, KVCache):
                raise TypeError(f"state.{name} must be a KVCache, got {type(mine).__name__}")
            capacity = mine.k.shape[1] if mine.k.dim() > 1 else 0
            if capacity < (mixer.window or 1):
                raise ValueError(f"state.{name} must have room for {mixer.window or 1} positions, got {capacity}")
            expected[f"{name}.k"] = (mine.k, (batch, capacity, mixer.kv_heads, mixer.head_dim))
            expected[f"{name}.v"] = (mine.v, (batch, capacity, mixer.kv_heads, mixer.head_dim))
            expected[f"{name}.position"] = (mine.position, (batch,))
    device = inputs.device
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"state.{name} must be {shape}, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"state.{name} must be on {device}, got {tensor.device}")
        if name.endswith("position") and tensor.dtype != torch.int64:
            raise TypeError(f"state.{name} must be int64, got {tensor.dtype}")


def _fake_rollout(plan, storage, inputs, lengths, hidden, state, begin, end, eps, group, workers):
    """Changes hidden and state in place."""


if native_library()[0]:
    torch.library.register_fake("jambatalk::rollout", _fake_rollout)
    _NATIVE = torch.ops.jambatalk.rollout.default
