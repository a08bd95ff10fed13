"""python benchmarks/call_overhead.py [--save NAME]: what a call of an op costs before any work, beside an empty op.

Tensors of one position and eight channels, so that the arithmetic is nothing. One thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from timing import save  # noqa: E402

from jambatalk_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step  # noqa: E402


def measure(calls: int = 2000, rounds: int = 7) -> dict:
    import time

    torch.set_num_threads(1)
    u, A, B, D = torch.randn(1, 1, 8), -torch.rand(8, 4), torch.randn(1, 1, 4), torch.randn(8)
    weight, state, history = torch.randn(8, 4), torch.zeros(1, 8, 4), torch.zeros(1, 3, 8)
    row, B_row = u[:, 0], B[:, 0]
    leaf = u.clone().requires_grad_()
    empty = torch.ops.jambatalk.empty_op.default
    grad_off = {
        "empty_op": lambda: empty(u),
        "torch_add": lambda: torch.add(u, u),
        "selective_scan": lambda: selective_scan(u, u, A, B, B, D, u),
        "causal_conv1d": lambda: causal_conv1d(u, weight),
        "selective_scan_step": lambda: selective_scan_step(state, row, row, A, B_row, B_row, D, row),
        "causal_conv1d_step": lambda: causal_conv1d_step(history, row, weight),
    }
    grad_on = {
        "selective_scan": lambda: selective_scan(leaf, u, A, B, B, D, u),
        "causal_conv1d": lambda: causal_conv1d(leaf, weight),
    }
    figures: dict = {}
    for title, enabled, table in (("microseconds", False, grad_off), ("microseconds_with_grad", True, grad_on)):
        best = dict.fromkeys(table, float("inf"))
        with torch.set_grad_enabled(enabled):
            for _ in range(rounds):  # in turns, so that all see the same machine
                for name, call in table.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        call()
                    best[name] = min(best[name], (time.perf_counter() - start) / calls)
        figures[title] = {name: round(value * 1e6, 2) for name, value in best.items()}
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", default="call_overhead_cpu", help="results/NAME.json")
    save(parser.parse_args().save, measure())
