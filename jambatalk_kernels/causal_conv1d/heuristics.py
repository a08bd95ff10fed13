"""Tile sizes of the Triton kernels of causal_conv1d: pure functions of sizes, no device access."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Tile", "backward_tile", "forward_tile", "time_is_fastest"]

# Programs per multiprocessor that a launch should reach before its tiles are made larger.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Of a thread's 32-bit registers, those for what stays alive from position to position: weights, window, gradient sums.
REGISTERS = 72


# Positions whose loads are in flight together, where channels are fastest.
ROWS = 8


class Tile(NamedTuple):
    """What one program computes: ``groups`` runs of positions side by side, each for ``block_c`` channels.

    A run is walked in ``steps`` blocks of ``rows`` positions, whose loads are in flight together. ``positions`` are
    those of all runs that the program owns.
    """

    block_c: int
    groups: int
    rows: int
    steps: int
    warps: int
    time_fastest: bool
    positions: int


def time_is_fastest(stride_t: int, stride_c: int) -> bool:
    """Do neighbouring threads take neighbouring positions rather than channels? Where that makes accesses wide."""
    return stride_t == 1 and stride_c != 1


@lru_cache(maxsize=1024)
def forward_tile(
    batch: int, length: int, channels: int, width: int, itemsize: int, time_fastest: bool, multiprocessors: int
) -> Tile:
    """Alive per channel: the bias, ``width`` weights and as many inputs."""
    shapes = _time_fastest_shapes(itemsize)
    if not time_fastest:
        shapes = _channels_fastest_shapes(channels, 2 * width + 1, itemsize, steps=(8, 4, 2, 1))
    return _first_with_enough_programs(shapes, 0, batch, length, channels, time_fastest, multiprocessors)


@lru_cache(maxsize=1024)
def backward_tile(
    batch: int,
    length: int,
    channels: int,
    width: int,
    itemsize: int,
    time_fastest: bool,
    multiprocessors: int,
    edges: bool = False,
) -> Tile:
    """Alive as well: the last gradients and the sums for dweight and dbias; with ``edges`` (packed
    sequences, or states) what selects and loads at them.

    A run ends ``width - 1`` positions after those that it owns, and a program leaves ``width + 1`` sums per channel:
    long runs cost less.
    """
    history = width - 1
    if time_fastest:
        shapes = [shape[:3] + (steps, shape[4]) for steps in (4, 2, 1) for shape in _time_fastest_shapes(itemsize)]
        history = 0  # every step computes its neighbours' positions itself
    else:
        least = 1
        while least * ROWS <= history:
            least *= 2
        steps = tuple(s * least for s in (16, 8, 4, 2, 1))
        shapes = _channels_fastest_shapes(channels, (5 if edges else 4) * width + 2, itemsize, steps=steps)
    return _first_with_enough_programs(shapes, history, batch, length, channels, time_fastest, multiprocessors)


def _time_fastest_shapes(itemsize: int) -> list[tuple[int, int, int, int, int]]:
    """One channel per thread, so that only its weights are alive; a block of positions is one wide access."""
    rows = max(4, 16 // itemsize)
    return [(1, 32 * warps, rows, 1, warps) for warps in (4, 2, 1)]


def _channels_fastest_shapes(
    channels: int, alive: int, itemsize: int, steps: tuple[int, ...]
) -> list[tuple[int, int, int, int, int]]:
    """A thread takes as many neighbouring channels as a 16-byte access has, or as its registers allow."""
    per_thread = max(2, 16 // itemsize)
    while per_thread > 1 and per_thread * alive * max(1, itemsize // 4) > REGISTERS:
        per_thread //= 2
    block_c = min(32 * per_thread, 1 << max(0, channels - 1).bit_length())
    groups = 32 * per_thread // block_c  # of a warp: several where the channels are few
    shapes = [(block_c, 4 * groups, ROWS, count, 4) for count in steps]
    return shapes + [(block_c, warps * groups, ROWS, steps[-1], warps) for warps in (2, 1)]


def _first_with_enough_programs(
    shapes: list[tuple[int, int, int, int, int]],
    history: int,
    batch: int,
    length: int,
    channels: int,
    time_fastest: bool,
    multiprocessors: int,
) -> Tile:
    """The largest of ``shapes``, which fall, that gives every multiprocessor its programs; else the smallest."""
    for block_c, groups, rows, steps, warps in shapes:
        tile = Tile(block_c, groups, rows, steps, warps, time_fastest, groups * (rows * steps - history))
        programs = batch * -(-length // tile.positions) * -(-channels // block_c)
        if programs >= PROGRAMS_PER_MULTIPROCESSOR * multiprocessors:
            break
    return tile
