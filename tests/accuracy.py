"""The contract's rule of accuracy (DESIGN 3.2), in one place."""

import math

import torch
from torch import Tensor

ORACLE = 64 * torch.finfo(torch.float64).eps  # what float64 results may themselves be off by


def rms_ratio(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error, relative to that of what was wanted; absolute where only zeros were."""
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    error, scale = (x.square().mean().sqrt().item() for x in (got - want, want))
    return error / scale if scale > 0 else error


def spread_of(count: int) -> float:
    """How many times the root mean square of `count` errors their true spread may be, but for one case in a million.

    PyTorch's error is known from as many numbers as a tensor has: one that is nearly exact by luck, in two numbers,
    says nothing of how exact PyTorch is. The chi-square's quantile, by Wilson and Hilferty's formula; of fewer than
    six numbers nothing is known. 64: 1.7, 1000: 1.1.
    """
    variance = 2 / (9 * max(count, 1))
    root = 1 - variance - 4.753 * math.sqrt(variance)
    return root**-1.5 if root > 0 else math.inf


def assert_accurate(got: Tensor, exact: Tensor, peer: Tensor, bar: float, name: str = "y") -> None:
    """At most twice the error of PyTorch at the same precision (`peer`) against float64 (`exact`), plus the rounding of
    the exact result; and within `bar`, the contract's own."""
    assert got.shape == exact.shape, name
    rounding = rms_ratio(exact.to(got.dtype), exact)
    mine, theirs, spread = rms_ratio(got, exact), rms_ratio(peer, exact), spread_of(exact.numel())
    assert spread == math.inf or mine <= 2 * theirs * spread + 2 * rounding + ORACLE, (name, mine, theirs)
    assert mine <= max(bar, 2 * rounding), (name, mine)
