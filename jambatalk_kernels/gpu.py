"""What the heuristics of every op's GPU kernels share: pure Python, no device is asked."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Device", "next_power_of_2"]


class Device(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
