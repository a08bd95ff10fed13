"""Mamba-1 selective scan, causal conv1d, mixture-of-experts dispatch, GQA attention with fused RoPE, and the whole
autoregressive loop: forward and backward, on CPU and GPU."""

# torch first: the native library links against it.
import torch  # noqa: F401

from jambatalk_kernels.backends import BackendUnavailable, native_library, use_backend
from jambatalk_kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from jambatalk_kernels.selective_scan.op import selective_scan, selective_scan_step

__all__ = [
    "BackendUnavailable",
    "causal_conv1d",
    "causal_conv1d_step",
    "native_library",
    "selective_scan",
    "selective_scan_step",
    "use_backend",
]
