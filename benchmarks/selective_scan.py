"""python benchmarks/selective_scan.py [--save NAME]: the CPU scan, one thread, at (1, 600, 1024, N = 16) float32.

The ceiling: per channel and position, 16 states of 10 fused multiply-adds or products each (7 for the exponential, 3
for recurrence and output) and 7 additions, which other units take. At F fused operations per second (all lanes) that is
F / 160 channel-steps a second; F is measured here as half of the flop rate that a matrix product reaches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import interleaved_seconds, peak_matmul_flops, save  # noqa: E402

from jambatalk_kernels import causal_conv1d, selective_scan, selective_scan_step  # noqa: E402

BATCH, LENGTH, CHANNELS, STATES = 1, 600, 1024, 16


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "u": torch.randn(BATCH, LENGTH, CHANNELS),
        "delta": torch.rand(BATCH, LENGTH, CHANNELS) * 0.1,
        "A": -torch.exp(torch.randn(CHANNELS, STATES) * 0.5),
        "B": torch.randn(BATCH, LENGTH, STATES),
        "C": torch.randn(BATCH, LENGTH, STATES),
        "D": torch.randn(CHANNELS),
        "z": torch.randn(BATCH, LENGTH, CHANNELS),
    }


def measure() -> dict:
    torch.set_num_threads(1)
    named = tensors()
    leaves = {k: v.clone().requires_grad_() for k, v in named.items()}
    y = selective_scan(**leaves, delta_softplus=True)
    grad = torch.randn_like(y)
    weight, bias = torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    row = {k: v[:, 0].contiguous() if v.dim() == 3 else v for k, v in named.items()}
    state = torch.zeros(BATCH, CHANNELS, STATES)

    def without_grad(call):
        def run():
            with torch.no_grad():
                return call()

        return run

    seconds = interleaved_seconds(
        {
            "forward": without_grad(lambda: selective_scan(**named)),
            "forward_softplus": without_grad(lambda: selective_scan(**named, delta_softplus=True)),
            "backward": lambda: torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True),
            "step": without_grad(lambda: selective_scan_step(state, **row, delta_softplus=True)),
            "conv": without_grad(lambda: causal_conv1d(named["u"], weight, bias, activation="silu")),
            "clone": without_grad(lambda: named["u"].clone()),
        }
    )
    steps = BATCH * LENGTH * CHANNELS
    peak = peak_matmul_flops()
    return {
        "shape": [BATCH, LENGTH, CHANNELS, STATES],
        "milliseconds": {name: round(value * 1e3, 4) for name, value in seconds.items()},
        "forward_channel_steps_per_second": steps / seconds["forward"],
        "backward_over_forward": seconds["backward"] / seconds["forward_softplus"],
        "matmul_gflops": peak / 1e9,
        "forward_share_of_fma_ceiling": steps / seconds["forward"] / (peak / 2 / 160),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", default="selective_scan_cpu", help="results/NAME.json")
    save(parser.parse_args().save, measure())
