"""The definition of the autoregressive loop: an interpreter of a `Program`, one frame after another, in PyTorch.

It calls the step functions of the other ops, so their C++ versions serve it where they are built. `step` is also the
frame that `graph.py` captures, with the GPU's step functions (`StepOps`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from jambatalk_kernels.attention.reference import KVCache, rope_attention_step, rotary_table
from jambatalk_kernels.causal_conv1d.op import causal_conv1d_step
from jambatalk_kernels.moe.reference import activate, moe_mlp, moe_route
from jambatalk_kernels.rollout.program import (
    AttentionMixer,
    MambaMixer,
    MambaState,
    MoEMLP,
    Program,
    RolloutState,
)
from jambatalk_kernels.selective_scan.op import selective_scan_step

# Matrices this small are multiplied faster by one thread than by several that must meet after each; where other work
# shares the cores, much faster.
SMALL_MATRIX = 1 << 18
TABLE_FRAMES = 256  # frames of rotary angles computed at a time, so that memory does not grow with the clip

# (head_dim, base) -> cos and sin of an attention layer
Tables = dict[tuple[int, float | None], tuple[Tensor, Tensor]]


def rollout(
    program: Program, inputs: Tensor, state: RolloutState | None, lengths: Tensor | None
) -> tuple[Tensor, RolloutState]:
    batch, frames, width = inputs.shape
    if state is None:
        state = RolloutState.empty(
            program.layers, width, batch, frames=frames, dtype=inputs.dtype, device=inputs.device
        )
    else:
        state = state.with_room(program.layers, frames)
    hidden = torch.zeros_like(inputs)
    with one_thread_if_small(program, batch, inputs.device):
        run_lengths(program, inputs, state, lengths, hidden)
    return hidden, state


@contextmanager
def one_thread_if_small(program: Program, batch: int, device: torch.device) -> Iterator[None]:
    largest = max(
        (
            layer.mlp.w_in[0].numel() if isinstance(layer.mlp, MoEMLP) else layer.mlp.w_in.numel()
            for layer in program.layers
        ),
        default=0,
    )
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or batch * largest > SMALL_MATRIX:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_lengths(program: Program, inputs: Tensor, state: RolloutState, lengths: Tensor | None, hidden: Tensor) -> None:
    """Writes hidden and advances the state, both in place; each sequence up to its own length."""
    if lengths is None:
        return run(program, inputs, state, hidden)
    frames, width = inputs.shape[1:]
    # Between two consecutive ends the set of live sequences is fixed: run exactly those, and leave the others alone.
    start = 0
    for stop in sorted(set(lengths.clamp(0, frames).tolist()) - {0}):
        rows = (lengths >= stop).nonzero()[:, 0]
        live = state.select(rows)
        out = inputs.new_empty(rows.numel(), stop - start, width)
        run(program, inputs[rows, start:stop], live, out)
        hidden[rows, start:stop] = out
        state.put(rows, live)
        start = stop


def run(program: Program, inputs: Tensor, state: RolloutState, hidden: Tensor) -> None:
    """Writes hidden (batch, frames, d) and advances the state, both in place."""
    for begin in range(0, inputs.shape[1], TABLE_FRAMES):
        end = min(begin + TABLE_FRAMES, inputs.shape[1])
        positions = torch.arange(end - begin, device=inputs.device)[:, None] + state.position
        tables: Tables = {}  # cos, sin: (frames, batch, head_dim / 2)
        for layer in program.layers:
            if isinstance(layer.mixer, AttentionMixer):
                tables[layer.mixer.head_dim, layer.mixer.rope_base] = rotary_rows(layer.mixer, positions, inputs.dtype)
        for frame in range(begin, end):
            at = {key: (cos[frame - begin], sin[frame - begin]) for key, (cos, sin) in tables.items()}
            hidden[:, frame] = step(program, inputs[:, frame], state, at, REFERENCE)


def rotary_rows(mixer: AttentionMixer, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if mixer.rope_base is None:
        one = torch.ones(*positions.shape, mixer.head_dim // 2, dtype=dtype, device=positions.device)
        return one, torch.zeros_like(one)
    return rotary_table(positions, mixer.head_dim, mixer.rope_base, dtype)


class StepOps(NamedTuple):
    """What a frame is made of; see the functions of these names for what each computes."""

    linear: Callable[..., Tensor]
    norms: Callable[..., tuple[Tensor, ...]]
    conv: Callable[..., Tensor]
    scan: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    experts: Callable[[MoEMLP, Tensor, float], Tensor]


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + weight f(x) + bias, x (batch, in), weight (out, in).

    f is RMSNorm with the weight `norm`; or, `gated`, silu(first half of x) * second half; or nothing.
    """
    if norm is not None:
        x = rms_norm(x, norm.shape, norm, eps)
    if gated:
        gate, up = x.chunk(2, dim=-1)
        x = silu(gate) * up
    y = linear(x, weight, bias)
    return y if residual is None else residual + y


def norms_step(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """RMSNorm of neighbouring stretches of x's last axis, each with its own weight."""
    parts = x.split([weight.shape[0] for weight in weights], dim=-1)
    return tuple(rms_norm(part, weight.shape, weight, eps) for part, weight in zip(parts, weights, strict=True))


def experts_step(mlp: MoEMLP, x: Tensor, eps: float) -> Tensor:
    """x + the mixture of experts of norm(x)."""
    normed = rms_norm(x, mlp.norm.shape, mlp.norm, eps)
    if x.shape[0] == 1 and x.device.type == "cpu":
        return x + one_token(mlp, normed)
    return x + moe_mlp(normed, moe_route(linear(normed, mlp.router), mlp.top_k), mlp.w_in, mlp.w_out)


def step(program: Program, x: Tensor, state: RolloutState, tables: Tables, ops: StepOps) -> Tensor:
    """One frame: x (batch, d) -> hidden (batch, d). Changes the state in place."""
    x = x + state.feedback
    for layer, mixer_state in zip(program.layers, state.mixers, strict=True):
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, MambaMixer):
            assert isinstance(mixer_state, MambaState)  # `rollout` checks that the state fits the program
            x = mamba_step(mixer, x, mixer_state, program.eps, ops)
        else:
            assert isinstance(mixer_state, KVCache)
            cos, sin = tables[mixer.head_dim, mixer.rope_base]
            x = attention_step(mixer, x, mixer_state, cos, sin, program.eps, ops)
        if isinstance(mlp, MoEMLP):
            x = ops.experts(mlp, x, program.eps)
        else:
            both = ops.linear(x, mlp.w_in, norm=mlp.norm, eps=program.eps)
            x = ops.linear(both, mlp.w_out, gated=True, residual=x)
    (hidden,) = ops.norms(x, (program.final_norm,), program.eps)
    if program.feedback is not None:
        state.feedback.copy_(ops.linear(hidden, program.feedback, program.feedback_bias))
    state.position += 1
    return hidden


def mamba_step(mixer: MambaMixer, x: Tensor, state: MambaState, eps: float, ops: StepOps) -> Tensor:
    u, z = ops.linear(x, mixer.in_proj, norm=mixer.norm, eps=eps).chunk(2, dim=-1)
    u = ops.conv(state.conv, u, mixer.conv_weight, mixer.conv_bias, activation="silu")
    dt, B, C = ops.norms(ops.linear(u, mixer.x_proj), (mixer.dt_norm, mixer.b_norm, mixer.c_norm), eps)
    delta = ops.linear(dt, mixer.dt_proj)
    y = ops.scan(state.scan, u, delta, mixer.A, B, C, mixer.D, z, delta_bias=mixer.dt_bias, delta_softplus=True)
    return ops.linear(y, mixer.out_proj, residual=x)


def attention_step(
    mixer: AttentionMixer, x: Tensor, cache: KVCache, cos: Tensor, sin: Tensor, eps: float, ops: StepOps
) -> Tensor:
    (normed,) = ops.norms(x, (mixer.norm,), eps)
    q, k, v = (
        ops.linear(normed, weight).unflatten(1, (-1, mixer.head_dim))
        for weight in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    y = ops.attention(q, k, v, cos, sin, cache, window=mixer.window, scale=mixer.head_dim**-0.5)
    return ops.linear(y.flatten(1), mixer.o_proj, residual=x)


def one_token(mlp: MoEMLP, x: Tensor) -> Tensor:
    """moe_mlp(x, moe_route(...)) for a single token, x (1, d): with nothing to group, half of the calls are saved."""
    probabilities = linear(x, mlp.router).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))[0].tolist()
    total: Tensor | None = None
    # sorted() is stable: among equal probabilities the lowest index wins, as in moe_route.
    for expert in sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[: mlp.top_k]:
        out = linear(activate(linear(x, mlp.w_in[expert]), "swiglu"), mlp.w_out[expert])
        total = out * probabilities[expert] if total is None else total.add_(out, alpha=probabilities[expert])
    assert total is not None  # top_k is 1 or more
    return total


REFERENCE = StepOps(
    linear_step, norms_step, causal_conv1d_step, selective_scan_step, partial(rope_attention_step, interleaved=False),
    experts_step,
)  # fmt: skip
