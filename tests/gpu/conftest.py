"""Tests that need a GPU. They import torch, triton and pytest only, so that any GPU machine runs them.

JAMBATALK_GPU_TESTS=rehearse runs them on the CPU with the CPU's kernels: a check of the tests, where there is no GPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where it is not installed

from jambatalk_kernels import backends  # noqa: E402

REHEARSAL = os.environ.get("JAMBATALK_GPU_TESTS") == "rehearse"
HAVE_GPU = torch.cuda.is_available()


@pytest.fixture(scope="session")
def device():
    if REHEARSAL:
        return torch.device("cpu")
    if not HAVE_GPU:
        pytest.skip("torch sees no GPU (JAMBATALK_GPU_TESTS=rehearse runs these tests on the CPU)")
    return torch.device("cuda")


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device):
    """Each GPU backend that can run here; the CPU's where this is a rehearsal."""
    if REHEARSAL:
        if request.param == "cuda":
            pytest.skip("a rehearsal, with the CPU's kernels")
        return "cpu"
    for op in ("selective_scan", "causal_conv1d"):
        reason = backends.candidates(op, torch.empty(0, device=device))[request.param]
        reason = reason() if callable(reason) else reason
        if reason is not None:
            pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _exact_reference():
    """The float64 reference needs no tf32, and neither does its float32 peer."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
