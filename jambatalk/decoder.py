"""The decoder: Mamba, mixture-of-experts Mamba and attention layers, causal, with a state.

    M:  x += mamba(norm(x));      x += mlp(norm(x))
    E:  x += mamba(norm(x));      x += experts(norm(x))
    T:  x += attention(norm(x));  x += mlp(norm(x))

Layers follow Jamba (parity with transformers' is tested), except that attention has rotary positions. The order is the
paper's Fig. 3, see `config.ARRANGEMENTS`. Everything that later frames need of earlier ones is in a `DecoderState`: the
whole clip at once, chunks of any size and single frames give the same result. A batch with padding goes through the
layers packed, without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from jambatalk.config import JambaTalkConfig
from jambatalk.packing import Packing
from jambatalk_kernels import (
    KVCache,
    Routing,
    causal_conv1d,
    moe_mlp,
    moe_route,
    rope_attention,
    rotary_table,
    selective_scan,
)
from jambatalk_kernels.linear import Linear, linear
from jambatalk_kernels.norms import RMSNorm
from jambatalk_kernels.rollout import program as records
from jambatalk_kernels.rollout.program import MambaState, Program
from jambatalk_kernels.rollout.program import RolloutState as DecoderState

__all__ = ["Decoder", "DecoderState"]

INITIAL_DT = (1e-3, 1e-1)  # the range that the scan's time steps start in, log-uniform


class MambaMixer(nn.Module):
    """Mamba-1 with RMSNorm on dt, B and C, as Jamba. Names are those of transformers' JambaMambaMixer."""

    def __init__(self, config: JambaTalkConfig):
        super().__init__()
        inner, rank = config.expand * config.d_model, config.time_step_rank
        self.inner, self.rank, self.states = inner, rank, config.states
        self.in_proj = Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_width, groups=inner)  # holds weight and bias; never called
        self.x_proj = Linear(inner, rank + 2 * config.states, bias=False)
        self.dt_layernorm = RMSNorm(rank, config.norm_eps)
        self.b_layernorm = RMSNorm(config.states, config.norm_eps)
        self.c_layernorm = RMSNorm(config.states, config.norm_eps)
        self.dt_proj = Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, config.states + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, config.d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(dt) for dt in INITIAL_DT)
        dt = torch.empty(inner).uniform_(low, high).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    @property
    def A(self) -> Tensor:
        """(inner, states), negative, float32 or better."""
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())

    def forward(self, x: Tensor, state: MambaState | None = None, packing: Packing | None = None) -> Tensor:
        """x (batch, length, d) -> (batch, length, d); the state is read and advanced in place."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        weight = self.conv1d.weight[:, 0]
        cu_seqlens = None if packing is None else packing.cu_seqlens
        if state is None:
            u = causal_conv1d(u, weight, self.conv1d.bias, activation="silu", cu_seqlens=cu_seqlens)
        else:
            u, state.conv = causal_conv1d(
                u, weight, self.conv1d.bias, activation="silu", initial_state=state.conv, return_final_state=True
            )
        dt, B, C = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        # Under autocast the norms compute in the dtype of their weights, as transformers' Jamba does.
        dt, B, C = (
            norm(x.to(norm.weight.dtype)).to(x.dtype)
            for norm, x in ((self.dt_layernorm, dt), (self.b_layernorm, B), (self.c_layernorm, C))
        )
        delta = linear(dt, self.dt_proj.weight)
        arguments = dict(D=self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True)
        if state is None:
            y = selective_scan(u, delta, self.A, B, C, **arguments, cu_seqlens=cu_seqlens)
        else:
            y, state.scan = selective_scan(
                u, delta, self.A, B, C, **arguments, initial_state=state.scan, return_final_state=True
            )
        return self.out_proj(y)

    def record(self, norm: nn.RMSNorm) -> records.MambaMixer:
        return records.MambaMixer(
            norm=norm.weight,
            in_proj=self.in_proj.weight,
            conv_weight=self.conv1d.weight[:, 0],
            conv_bias=self.conv1d.bias,
            x_proj=self.x_proj.weight,
            dt_norm=self.dt_layernorm.weight,
            b_norm=self.b_layernorm.weight,
            c_norm=self.c_layernorm.weight,
            dt_proj=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A=self.A,
            D=self.D,
            out_proj=self.out_proj.weight,
        )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: JambaTalkConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.d_model // config.heads
        self.window, self.rope_base = config.attention_window, config.rope_base
        self.q_proj = Linear(config.d_model, config.heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.d_model, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(config.heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, cache: KVCache | None = None, packing: Packing | None = None) -> Tensor:
        """x (batch, length, d) -> (batch, length, d); the cache is read and appended to."""
        batch, length = x.shape[:2]
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        positions = torch.arange(length, device=x.device) if packing is None else packing.positions
        if cache is not None:  # each sequence at its own position
            positions = cache.position[:, None] + positions
        cos, sin = self.angles(positions, x.dtype)
        if cache is not None:
            cos, sin = cos[:, :, None], sin[:, :, None]
        cu_seqlens = None if packing is None else packing.cu_seqlens
        y = rope_attention(q, k, v, cos, sin, window=self.window, cu_seqlens=cu_seqlens, cache=cache)
        return self.o_proj(y.flatten(2))

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.rope_base is None:  # no rotation (Jamba's own attention)
            one = torch.ones(*positions.shape, self.head_dim // 2, dtype=dtype, device=positions.device)
            return one, torch.zeros_like(one)
        return rotary_table(positions, self.head_dim, self.rope_base, dtype)

    def record(self, norm: nn.RMSNorm) -> records.AttentionMixer:
        return records.AttentionMixer(
            norm.weight,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            self.o_proj.weight,
            self.heads,
            self.kv_heads,
            self.window,
            self.rope_base,
        )


class MLP(nn.Module):
    """Gated: W_out(silu(gate) * up); the gate rows of w_in come first."""

    def __init__(self, config: JambaTalkConfig):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * config.hidden, config.d_model))
        self.w_out = nn.Parameter(torch.empty(config.d_model, config.hidden))
        _uniform(self.w_in)
        _uniform(self.w_out)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        gate, up = linear(x, self.w_in).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.w_out), None

    def record(self, norm: nn.RMSNorm) -> records.DenseMLP:
        return records.DenseMLP(norm.weight, self.w_in, self.w_out)


class Experts(nn.Module):
    """A mixture of gated MLPs."""

    def __init__(self, config: JambaTalkConfig):
        super().__init__()
        self.top_k = config.top_k
        self.router = Linear(config.d_model, config.experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(config.experts, 2 * config.hidden, config.d_model))
        self.w_out = nn.Parameter(torch.empty(config.experts, config.d_model, config.hidden))
        _uniform(self.w_in)
        _uniform(self.w_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)
        routing = moe_route(self.router(tokens), self.top_k)
        return moe_mlp(tokens, routing, self.w_in, self.w_out).view_as(x), routing

    def record(self, norm: nn.RMSNorm) -> records.MoEMLP:
        return records.MoEMLP(norm.weight, self.router.weight, self.w_in, self.w_out, self.top_k)


class Layer(nn.Module):
    """One M, E or T layer."""

    def __init__(self, config: JambaTalkConfig, kind: str):
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Attention(config) if kind == "T" else MambaMixer(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = Experts(config) if kind == "E" else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, state: MambaState | KVCache | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.dropout(self.mixer(self.mixer_norm(x), state, packing))
        y, routing = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y), routing

    def record(self) -> records.Layer:
        return records.Layer(self.mixer.record(self.mixer_norm), self.mlp.record(self.mlp_norm))


class Decoder(nn.Module):
    """The stack of layers and the final norm."""

    def __init__(self, config: JambaTalkConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, state: DecoderState | None = None
    ) -> tuple[Tensor, list[Routing], DecoderState | None]:
        """x (batch, length, d), history already in it -> hidden (batch, length, d) after the final norm.

        valid: (batch, length) bool; padding, at the end of each sequence, neither costs nor counts in the balance of
        the experts, and its hidden is zero. Not together with a state.
        state: what earlier frames left (`new_state` for none); the advanced one is returned, the given one is not
        changed. Its `feedback` is the caller's affair.

        Returns hidden, the routing of each E layer, the state (None without one).
        """
        packing = None
        if valid is not None:
            if state is not None:
                raise ValueError("a decoder goes on from a state without padding: valid and state exclude each other")
            packing = Packing.of(valid)
            x = packing.pack(x)
        if state is not None:
            state = state.with_room(self.records(), x.shape[1])
        routings = []
        for index, layer in enumerate(self.layers):
            x, routing = layer(x, None if state is None else state.mixers[index], packing)
            if routing is not None:
                routings.append(routing)
        if state is not None:
            state.position += x.shape[1]
        hidden = self.norm(x)
        return hidden if packing is None else packing.unpack(hidden), routings, state

    def records(self) -> Sequence[records.Layer]:
        return tuple(cast(Layer, layer).record() for layer in self.layers)

    def new_state(self, batch: int, frames: int = 0) -> DecoderState:
        """The state before the first frame."""
        weight = self.norm.weight
        return DecoderState.empty(
            self.records(), weight.shape[0], batch, frames=frames, dtype=weight.dtype, device=weight.device
        )

    def program(self, feedback: Tensor | None, feedback_bias: Tensor | None) -> Program:
        """The decoder as data, for `jambatalk_kernels.rollout`; shares memory with the parameters."""
        return Program(tuple(self.records()), self.norm.weight, feedback, feedback_bias, self.eps)


def _uniform(weight: Tensor) -> None:
    """As nn.Linear: uniform in +- 1 / sqrt(inputs)."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
