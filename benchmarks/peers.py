"""The other implementations: what can be imported here, and why the rest cannot."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jambatalk_kernels.rollout.program import AttentionMixer, Layer, MambaMixer, MoEMLP, Program


def why_absent(name: str) -> str | None:
    """None where the peer can be imported."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"needs {error.name}, which is not installed"
    except Exception as error:  # a peer built for another torch fails in its own ways: the result says how
        return f"does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def scan(device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """Selective scans of u, delta, A, B, C, D, z (softplus included) by peer, and why the others are absent."""
    calls: dict[str, Callable] = {}
    absent = {"transformers": "has no such op by itself: see bench_mamba_mixer.py"}
    for name in ("mambapy", "mamba_ssm"):
        reason = why_absent(name)
        if reason is None and name == "mamba_ssm" and device == "cpu":
            reason = "CUDA only"
        if reason:
            absent[name] = reason
        else:
            calls[name] = globals()[f"_{name}_scan"]()
    return calls, absent


def _mambapy_scan() -> Callable:
    from mambapy.mamba import MambaBlock

    def call(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return MambaBlock.selective_scan(None, u, F.softplus(delta), A, B, C, D) * F.silu(z)

    return call


def _mamba_ssm_scan() -> Callable:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def call(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        # Its layout is (batch, channels, length), which the inputs of its contest are stored in: see channel_first.
        swap = [t.transpose(1, 2) for t in (u, delta, B, C, z)]
        y = selective_scan_fn(swap[0], swap[1], A, swap[2], swap[3], D, swap[4], delta_softplus=True)
        return y.transpose(1, 2)

    return call


def conv(device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """Causal convolutions with bias and silu by peer; ``transformers`` is its path without kernels, F.conv1d."""
    calls: dict[str, Callable] = {"transformers": _transformers_conv}
    absent = {}
    for name in ("causal_conv1d", "fla"):
        reason = why_absent(name)
        if reason is None and device == "cpu":
            reason = "CUDA only"
        if reason:
            absent[name] = reason
        else:
            calls[name] = globals()[f"_{name}_conv"]()
    return calls, absent


def _transformers_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What MambaMixer.slow_forward does: nn.Conv1d with padding on both sides, cut, then silu."""
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def _causal_conv1d_conv() -> Callable:
    from causal_conv1d import causal_conv1d_fn

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return call


def _fla_conv() -> Callable:
    from fla.modules.conv import causal_conv1d

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result = causal_conv1d(x, weight, bias, activation="silu", backend="triton")
        return result[0] if isinstance(result, tuple) else result

    return call


def channel_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, stored (batch, channels, length): the layout that mamba_ssm is fast in."""
    return {name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for name, t in inputs.items()}


def experts(device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """Layers of swiglu experts by peer, called with x, routing weights, chosen experts, w_in and w_out.

    ``grouped_mm`` is torch's own product composed as one would; transformers' layer is in bench_moe.py.
    """
    calls: dict[str, Callable] = {"grouped_mm": grouped_mm_experts}
    absent = {}
    for name in ("liger_kernel", "scattermoe", "vllm"):
        reason = why_absent(name)
        if reason is None and device == "cpu":
            reason = "CUDA only"
        if reason:
            absent[name] = reason
        else:
            calls[name] = globals()[f"_{name}_experts"]
    return calls, absent


def grouped_mm_experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Sort by expert, gather, multiply, activate, multiply, weight, put back, add: nothing is read on the host."""
    top_k, experts = weights.shape[1], w_in.shape[0]
    sorted_experts, order = chosen.flatten().sort(stable=True)
    ends = (sorted_experts[:, None] <= torch.arange(experts, device=x.device)).sum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], w_in.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return rows[order.argsort()].view(*weights.shape, -1).sum(1)


def _liger_kernel_experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w_in, w_out, chosen, weights)


def _scattermoe_experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Its halves are up and gate, not gate and up, which costs the same."""
    from scattermoe.mlp import GLUMLP

    with torch.device("meta"):
        mlp = GLUMLP(x.shape[1], w_out.shape[2], w_in.shape[0], weights.shape[1])
    held = {"experts.weight": w_in, "output_experts.weight": w_out}
    return torch.func.functional_call(mlp, held, (x, weights.to(x.dtype), chosen.long()))


def _vllm_experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    from vllm.model_executor.layers.fused_moe import fused_experts

    return fused_experts(x, w_in, w_out, weights, chosen)


def attention(device: str, gradients: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """Causal attention by peer, called with q, k, v (batch, length, heads or kv_heads, head_dim) and the rotary tables
    cos, sin (length, head_dim / 2). All but flashinfer rotate in calls of their own, as their users do.
    """
    calls: dict[str, Callable] = {"sdpa": sdpa_attention}
    absent = {}
    for name, package in (
        ("flex_attention", "torch.nn.attention.flex_attention"),
        ("flash_attn",) * 2,
        ("flashinfer",) * 2,
    ):
        reason = why_absent(package)
        if reason is None and device == "cpu":
            reason = "needs a compiler at run time, and has no backward on a CPU" if name[:4] == "flex" else "CUDA only"
        if reason is None and name == "flashinfer" and gradients:
            reason = "has no backward"
        if reason:
            absent[name] = reason
        else:
            calls[name] = globals()[f"_{name}_attention"]
    return calls, absent


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split pairs, composed as transformers does."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@functools.cache
def _flex_parts(length: int, device: str) -> tuple:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    return torch.compile(flex_attention), mask


def _flex_attention_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attend, mask = _flex_parts(q.shape[1], str(q.device))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def _flash_attn_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from flash_attn import flash_attn_func
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return flash_attn_func(apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v, causal=True)


def _flashinfer_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """It makes its own angles, from position and base: the same work."""
    from flashinfer import single_prefill_with_kv_cache

    return torch.stack(
        [
            single_prefill_with_kv_cache(*each, causal=True, pos_encoding_mode="ROPE_LLAMA")
            for each in zip(q, k, v, strict=True)
        ]
    )


def jamba_loop(program: Program) -> Callable[[Tensor], Tensor]:
    """transformers' Jamba with the program's layers, weights and feedback, one frame a call over its own cache: what a
    user of that library would write. x (1, frames, d) -> hidden (1, frames, d).

    Its attention has no rotation; the best of its attention and expert paths for single tokens on a CPU are taken.
    """
    from transformers import DynamicCache, JambaConfig, JambaModel

    layers = program.layers
    mamba = next(layer.mixer for layer in layers if isinstance(layer.mixer, MambaMixer))
    at = next(i for i, layer in enumerate(layers) if isinstance(layer.mixer, AttentionMixer))
    moe = next(layer.mlp for layer in layers if isinstance(layer.mlp, MoEMLP))
    sparse = [i for i, layer in enumerate(layers) if isinstance(layer.mlp, MoEMLP)]
    inner, width = mamba.conv_weight.shape
    config = JambaConfig(
        hidden_size=program.width, intermediate_size=moe.w_out.shape[2], num_hidden_layers=len(layers),
        num_attention_heads=layers[at].mixer.heads, num_key_value_heads=layers[at].mixer.kv_heads,
        mamba_d_state=mamba.A.shape[1], mamba_d_conv=width, mamba_expand=inner // program.width,
        mamba_dt_rank=mamba.dt_norm.shape[0], num_experts=moe.w_in.shape[0], num_experts_per_tok=moe.top_k,
        attn_layer_period=len(layers), attn_layer_offset=at, expert_layer_period=sparse[1] - sparse[0],
        expert_layer_offset=sparse[0], rms_norm_eps=program.eps, vocab_size=1, pad_token_id=0,
        attn_implementation="sdpa", experts_implementation="eager",
    )  # fmt: skip
    model = JambaModel(config).eval()
    with torch.no_grad():
        model.final_layernorm.weight.copy_(program.final_norm)
        for theirs, ours in zip(model.layers, layers, strict=True):
            theirs.load_state_dict(_jamba_weights(ours))

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        cache, fed, hidden = DynamicCache(config=config), 0, torch.empty_like(x)
        for frame in range(x.shape[1]):
            given = x[:, frame : frame + 1] + fed
            now = model(inputs_embeds=given, past_key_values=cache, use_cache=True).last_hidden_state
            hidden[:, frame : frame + 1] = now
            fed = F.linear(now, program.feedback, program.feedback_bias)
        return hidden

    return call


def _jamba_weights(layer: Layer) -> dict[str, Tensor]:
    """By the names of its layers; tests/jambatalk/test_parity.py has them from the other side."""
    mixer, mlp = layer.mixer, layer.mlp
    weights = {"input_layernorm.weight": mixer.norm, "pre_ff_layernorm.weight": mlp.norm}
    if isinstance(mixer, MambaMixer):
        named = {
            "in_proj.weight": mixer.in_proj, "conv1d.weight": mixer.conv_weight[:, None],
            "conv1d.bias": mixer.conv_bias, "x_proj.weight": mixer.x_proj, "dt_layernorm.weight": mixer.dt_norm,
            "b_layernorm.weight": mixer.b_norm, "c_layernorm.weight": mixer.c_norm, "dt_proj.weight": mixer.dt_proj,
            "dt_proj.bias": mixer.dt_bias, "A_log": (-mixer.A).log(), "D": mixer.D, "out_proj.weight": mixer.out_proj,
        }  # fmt: skip
        weights |= {f"mamba.{name}": tensor for name, tensor in named.items()}
    else:
        for name in mixer.MATRICES:
            weights[f"self_attn.{name}.weight"] = getattr(mixer, name)
    if isinstance(mlp, MoEMLP):
        weights["feed_forward.router.weight"] = mlp.router
        weights |= {"feed_forward.experts.gate_up_proj": mlp.w_in, "feed_forward.experts.down_proj": mlp.w_out}
    else:
        gate, up = mlp.w_in.chunk(2)
        weights |= {"feed_forward.gate_proj.weight": gate, "feed_forward.up_proj.weight": up}
        weights["feed_forward.down_proj.weight"] = mlp.w_out
    return weights


class FaceFormerLoop(torch.nn.Module):
    """Autoregressive generation as FaceFormer's paper describes it (arXiv 2112.05329, section 3): motion of all earlier
    frames embedded, a style added, periodic positions; one Transformer decoder layer whose self-attention is causal and
    biased by how many periods back a frame is, and whose attention to the audio sees the frame's own feature; then to
    vertices. Every frame takes the whole prefix through all of it again, to vertices too, as the published code does.
    Written from the paper, random weights.
    """

    def __init__(self, vertices: int, d: int = 64, heads: int = 4, period: int = 30, most: int = 600) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerDecoderLayer(d, heads, 2 * d, dropout=0.0, batch_first=True)
        self.embed, self.out = torch.nn.Linear(3 * vertices, d), torch.nn.Linear(d, 3 * vertices)
        self.style = torch.nn.Parameter(torch.randn(d))
        place = torch.arange(most)
        angle = (place % period)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        slopes = 2.0 ** (-8 * (torch.arange(heads) + 1) / heads)
        back = place[:, None] - place
        bias = -slopes[:, None, None] * back.div(period, rounding_mode="floor")
        self.register_buffer("bias", bias.masked_fill(back < 0, -torch.inf))
        self.register_buffer("alignment", torch.full((most, most), -torch.inf).fill_diagonal_(0))

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """audio (1, frames, d) -> (1, frames, 3 vertices)"""
        embedded, motion = self.style[None, None], audio.new_empty((1, 0, self.out.out_features))
        for n in range(1, audio.shape[1] + 1):
            hidden = self.layer(
                embedded + self.positions[:n], audio[:, :n], self.bias[:, :n, :n], self.alignment[:n, :n]
            )
            motion = self.out(hidden)
            embedded = torch.cat([embedded, self.embed(motion[:, -1:]) + self.style], dim=1)
        return motion
