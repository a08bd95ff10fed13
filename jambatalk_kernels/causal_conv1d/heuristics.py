"""Tile sizes of the Triton kernels of causal_conv1d: pure functions of sizes, no device access."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Tile", "backward_tile", "forward_tile", "time_is_fastest"]

# Programs per multiprocessor that a launch should reach before tiles are made larger.
PROGRAMS_PER_MULTIPROCESSOR = 4
# 32-bit registers per thread for what is alive across positions: weights, window, gradient sums.
REGISTERS = 96


class Tile(NamedTuple):
    """What one program computes: ``steps`` times ``groups`` runs of ``rows`` positions, each for ``block_c`` channels.

    A thread walks along a run with the window in registers; ``groups`` runs side by side fill the threads. Where time
    is the fastest axis, ``rows`` is what one wide load brings.
    """

    block_c: int
    groups: int
    rows: int
    steps: int
    warps: int
    time_fastest: bool

    @property
    def positions(self) -> int:
        return self.groups * self.rows * self.steps


def time_is_fastest(stride_t: int, stride_c: int) -> bool:
    """Do neighbouring threads take neighbouring positions rather than channels? Where that makes accesses wide."""
    return stride_t == 1 and stride_c != 1


@lru_cache(maxsize=1024)
def forward_tile(
    batch: int, length: int, channels: int, width: int, itemsize: int, time_fastest: bool, multiprocessors: int
) -> Tile:
    """Alive per channel and position: ``width`` weights and as many inputs."""
    return _tile(batch, length, channels, 2 * width, itemsize, time_fastest, multiprocessors)


@lru_cache(maxsize=1024)
def backward_tile(
    batch: int, length: int, channels: int, width: int, itemsize: int, time_fastest: bool, multiprocessors: int
) -> Tile:
    """Alive as well: the window of gradients and the sums for dweight and dbias."""
    tile = _tile(batch, length, channels, 4 * width + 1, itemsize, time_fastest, multiprocessors)
    # A tile leaves width + 1 partial sums per channel: longer tiles leave fewer, as long as every processor has work.
    steps = tile.steps
    while (
        steps < 32
        and tile.positions // tile.steps * steps * 2 <= length
        and _programs(batch, length, channels, tile._replace(steps=steps * 2))
        >= 2 * PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    ):
        steps *= 2
    return tile._replace(steps=steps)


def _tile(
    batch: int, length: int, channels: int, alive: int, itemsize: int, time_fastest: bool, multiprocessors: int
) -> Tile:
    wide = max(2, 16 // itemsize)  # elements of one 16-byte access
    registers = alive * (2 if itemsize == 8 else 1)
    if time_fastest:
        # One channel per thread, so that only its own weights are alive; a run is one wide access.
        tile = Tile(1, 128, max(4, wide), 1, 4, True)
        smaller = [tile, tile._replace(groups=64, warps=2), tile._replace(groups=32, warps=1)]
    else:
        per_thread = wide
        while per_thread > 1 and per_thread * registers > REGISTERS:
            per_thread //= 2
        block_c = min(32 * per_thread, _power_of_two(channels))
        groups = 32 * per_thread // block_c  # few channels: a warp takes several runs
        tile = Tile(block_c, 4 * groups, 16, 1, 4, False)
        smaller = [
            tile,
            tile._replace(rows=8),
            Tile(block_c, 2 * groups, 8, 1, 2, False),
            Tile(block_c, groups, 8, 1, 1, False),
            Tile(block_c, groups, 4, 1, 1, False),
        ]
    enough = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    for tile in smaller:
        if _programs(batch, length, channels, tile) >= enough:
            return tile
    return smaller[-1]


def _programs(batch: int, length: int, channels: int, tile: Tile) -> int:
    return batch * -(-length // tile.positions) * -(-channels // tile.block_c)


def _power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
