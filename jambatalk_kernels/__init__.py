"""Mamba-1 selective scan, causal conv1d, mixture-of-experts dispatch, GQA attention with fused RoPE, and the whole
autoregressive loop: forward and backward, on CPU and GPU."""
