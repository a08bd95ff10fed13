"""How the benchmarks time, and how they write their results."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jambatalk_kernels import doctor

RESULTS = Path(__file__).parent / "results"


def best_seconds(call: Callable[[], object], seconds: float = 0.5, least: int = 7) -> float:
    """The fastest of many calls: on a shared machine the others measure the neighbours."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def interleaved_seconds(calls: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """The fastest of ``rounds`` calls of each, taken in turns, so that a ratio of two compares like with like."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def peak_matmul_flops() -> float:
    """What one large float32 product reaches here and now, in flop per second: the ceiling beside a figure."""
    a = torch.randn(512, 512)
    return 2 * 512**3 / best_seconds(lambda: a @ a, seconds=0.2)


def machine() -> dict:
    facts = doctor.examine()
    return {
        "processor": facts["machine"]["processor"],
        "instruction_set": facts["native"].get("instruction_set"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str, figures: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    print(json.dumps({"machine": machine(), **figures}, indent=2))
