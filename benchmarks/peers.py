"""The other implementations: what can be imported here, and why the rest cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
