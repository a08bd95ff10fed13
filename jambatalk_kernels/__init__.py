"""Mamba-1 selective scan, causal conv1d, mixture-of-experts dispatch, GQA attention with fused RoPE, and the whole
autoregressive loop: forward and backward, on CPU and GPU."""

# torch first: the native library links against it.
import torch  # noqa: F401

from jambatalk_kernels.attention.conversion import mean_pool_heads
from jambatalk_kernels.attention.op import KVCache, rope_attention, rope_attention_step, rotary_table
from jambatalk_kernels.backends import BackendUnavailable, native_library, use_backend
from jambatalk_kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from jambatalk_kernels.moe.op import Routing, load_balancing_loss, moe_mlp, moe_route
from jambatalk_kernels.rollout.op import rollout
from jambatalk_kernels.selective_scan.op import selective_scan, selective_scan_step

__all__ = [
    "BackendUnavailable",
    "KVCache",
    "Routing",
    "causal_conv1d",
    "causal_conv1d_step",
    "load_balancing_loss",
    "mean_pool_heads",
    "moe_mlp",
    "moe_route",
    "native_library",
    "rollout",
    "rope_attention",
    "rope_attention_step",
    "rotary_table",
    "selective_scan",
    "selective_scan_step",
    "use_backend",
]
