"""How the benchmarks time: competitors in turns, inputs in rotation, the best of many rounds.

In turns, so that a ratio of two compares like with like on a machine that changes; in rotation, so that no input is
still in a cache from the call before; the best, since on a shared machine the others measure the neighbours.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CUDA_CAP = 24 * 2**30  # bytes of a card's memory that the suite may allocate: what a consumer card has

Inputs = dict[str, torch.Tensor]
Call = Callable[[Inputs], object]


def cpu_cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)


def rotation(make: Callable[[int], Inputs], device: str = "cpu", most: int = 48) -> list[Inputs]:
    """As many inputs as it takes to exceed the last cache twice, ``make(0)``, ``make(1)`` and so on."""
    cache = cpu_cache_bytes() if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, torch.Tensor))
    count = min(most, max(2, math.ceil(2 * cache / max(1, size))))
    return [first, *(make(seed) for seed in range(1, count))]


class CpuContestant:
    """One call per round, or ``calls`` of them where one is too short to time."""

    def __init__(self, call: Call, inputs: Sequence[Inputs], calls: int = 1, threads: int = 1) -> None:
        self.call, self.calls, self.threads, self.turn = call, calls, threads, itertools.cycle(inputs)
        self.best = math.inf
        call(inputs[0])

    def run(self) -> None:
        call, inputs = self.call, next(self.turn)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if self.threads > 1:
            call(next(self.turn))  # threads that slept through the others' turns wake up
        start = time.perf_counter()
        for _ in range(self.calls):
            call(inputs)
        self.best = min(self.best, (time.perf_counter() - start) / self.calls)


class CudaContestant:
    """One replay per round of a CUDA graph that calls every input once and keeps every output.

    Kept outputs lie in memory of their own, so that writes too reach memory instead of a cache.
    """

    def __init__(self, call: Call, inputs: Sequence[Inputs]) -> None:
        self.calls = len(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call(each) for each in inputs]
        self.best = math.inf
        self.run()  # the first replay uploads the graph
        self.best = math.inf

    def run(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.best = min(self.best, start.elapsed_time(end) / 1e3 / self.calls)


def copy_bandwidth(megabytes: int = 1024) -> float:
    """Bytes per second, read and written, of a copy on the card: the ceiling of what is bound by its memory."""
    x = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda").random_()
    contestant = CudaContestant(lambda inputs: inputs["x"].clone(), [{"x": x}])
    for _ in range(20):
        contestant.run()
    return 2 * x.numel() / contestant.best


def peak_matmul_flops() -> float:
    """What one large float32 product reaches here and now on one thread, in flop per second."""
    a = torch.randn(512, 512)
    contestant = CpuContestant(lambda inputs: a @ a, [{}])
    for _ in range(40):
        contestant.run()
    return 2 * 512**3 / contestant.best
