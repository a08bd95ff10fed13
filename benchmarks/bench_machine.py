"""The machine's own ceilings, measured like everything else: what its memory gives, what a matrix product reaches.

They are the roofs of the plots in README.md (`roofline.py`). A copy counts the bytes read and the bytes written;
reading alone can be faster, since a processor reads the lines that it will write.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.results import Case
from benchmarks.timing import cpu_cache_bytes

SIZE = {"cpu": 1024, "cuda": 8192}  # of a square product
COPY, READ, MATRIX = "copy, bytes/s", "reading, bytes/s", "matrix product, operations/s"


def machine_case(name, device, dtype, **facts):
    size = SIZE[device]
    return Case(
        f"machine {name}", "machine", device, bytes=3 * size**2 * dtype.itemsize, operations={"products": 2 * size**3},
        limit="matrix products", facts={"size": size, "dtype": str(dtype).removeprefix("torch."), **facts},
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings(contest, one_thread, threads):
    """float32 by the fastest that PyTorch has: its own choice (MKL, where it is built in) or oneDNN, asked directly."""
    if len(os.sched_getaffinity(0)) < threads:
        pytest.skip("this process may use one core: two threads have nothing to run on")
    case = machine_case(f"{threads} thread{'s' * (threads > 1)}", "cpu", torch.float32, threads=threads)
    size = SIZE["cpu"]
    source = torch.ones(8 * cpu_cache_bytes(), dtype=torch.uint8)
    target = torch.ones_like(source)
    inputs = {"a": torch.randn(size, size), "b": torch.randn(size, size)}
    numbers = source.view(torch.float32)
    others = {"copy": lambda i: target.copy_(source), "reading": lambda i: numbers.sum()}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and onednn is not None:
        others["product by oneDNN"] = lambda i: onednn(i["a"], i["b"], None, "none", [], "")
    names = ["ours", *others]
    contest(case, lambda i: i["a"] @ i["b"], [inputs], others, threads=dict.fromkeys(names, threads), rounds=20)
    seconds = case.seconds
    case.note(COPY, 2 * source.numel() / seconds["copy"])
    case.note(READ, source.numel() / seconds["reading"])
    fastest = min(seconds[name] for name in names if name not in ("copy", "reading"))
    case.note(MATRIX, case.record["operations"]["products"] / fastest)


def test_cuda_ceilings(contest):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = machine_case("bfloat16", "cuda", torch.bfloat16)
    size = SIZE["cuda"]
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    matrices = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    contest(
        case, lambda i: i["a"] @ i["b"], [{"a": matrices[0], "b": matrices[1]}], {"copy": lambda i: i["x"].clone()},
        peer_inputs={"copy": [{"x": source}]}, rounds=20,
    )  # fmt: skip
    case.note(COPY, 2 * source.numel() / case.seconds["copy"])
    case.note(MATRIX, case.record["operations"]["products"] / case.seconds["ours"])
