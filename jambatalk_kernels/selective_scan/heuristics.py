"""How the Triton scan is laid out over a card: pure functions of sizes, so that tests need no card."""

from __future__ import annotations

import functools
from typing import NamedTuple

from jambatalk_kernels.gpu import next_power_of_2

__all__ = ["CHUNK", "SCRATCH_ELEMENTS", "Layout", "backward_layout", "chunk_length", "forward_layout", "step_layout"]

LANES = 32  # of a warp
CHUNK = 64
# A card hides latency well with this many warps on each multiprocessor, which has four schedulers.
ENOUGH_WARPS = 8
FEWEST_WARPS = 4
# Of the states that backward keeps between its two walks over a chunk; sequences beyond it take turns.
SCRATCH_ELEMENTS = 1 << 25


class Layout(NamedTuple):
    """Who computes what. State n of a channel is register n % states_per_lane of one of ``lanes_n`` lanes; a warp has
    32 / lanes_n groups of ``channels_per_lane`` channels."""

    states_per_lane: int
    channels_per_lane: int
    warps: int
    lanes_n: int
    steps: int  # positions in a tile: read at once, walked without a branch
    splits: int  # stretches of time that run side by side

    @property
    def channels(self) -> int:
        """Channels of one program."""
        return self.channels_per_lane * self.warps * LANES // self.lanes_n

    def constants(self) -> tuple[int, int, int, int]:
        """Those that every kernel takes."""
        return self.states_per_lane, self.channels_per_lane, self.warps, self.lanes_n


def chunk_length(states: int) -> int:
    """Positions between two saved states: saves 4 * states / chunk bytes per input element, 4 at most."""
    return max(CHUNK, next_power_of_2(states))


def forward_layout(sequences: int, length: int, channels: int, states: int, multiprocessors: int) -> Layout:
    """Where there is much to do, channels share a lane, and with it the reading of B and C. Where there is little,
    more lanes per channel first, since they cost little; then splits of time, which compute every decay twice.

    ``length``: of the longest sequence that there can be.
    """
    padded = max(4, next_power_of_2(states))
    lanes_n = max(4, min(LANES, padded // 4))
    enough = ENOUGH_WARPS * multiprocessors

    def warps_in_all(channels_per_lane: int = 1) -> int:
        return sequences * -(-channels * lanes_n // (LANES * channels_per_lane))

    if warps_in_all() >= enough:
        # More channels per lane are more independent work per warp, so somewhat fewer warps do; 16 states in a lane at
        # most, or registers run out.
        per_lane = 1
        while per_lane * padded // lanes_n < 16 and warps_in_all(2 * per_lane) >= enough * 3 // 4:
            per_lane *= 2
        return _layout(padded, per_lane, lanes_n, channels, warps=4)
    while lanes_n < min(LANES, padded) and warps_in_all() < enough:
        lanes_n *= 2
    splits = 1
    if warps_in_all() * 2 <= FEWEST_WARPS * multiprocessors:
        chunks = -(-length // chunk_length(states))
        # Below four chunks each, the two extra launches cost more than the walk that they save.
        splits = max(1, min(chunks // 4, -(-FEWEST_WARPS * multiprocessors // max(1, warps_in_all()))))
    return _layout(padded, 1, lanes_n, channels, warps=1, splits=splits)


def backward_layout(
    sequences: int, length: int, channels: int, states: int, multiprocessors: int, capability: int
) -> Layout:
    """As :func:`forward_layout`, with as many warps per program as leave three programs for four multiprocessors: the
    wider a program, the fewer partial sums of dB and dC. Two channels per lane take all registers that there are;
    compiled for sm_100 and sm_120 (``capability`` 100, 120) some would spill."""
    padded = max(4, next_power_of_2(states))
    lanes_n = max(4, min(LANES, padded // 4))
    enough = FEWEST_WARPS * multiprocessors

    def warps_in_all(channels_per_lane: int = 1) -> int:
        return sequences * -(-channels * lanes_n // (LANES * channels_per_lane))

    while lanes_n < min(LANES, padded) and warps_in_all() < enough:
        lanes_n *= 2
    two = capability < 100 and padded // lanes_n <= 4 and warps_in_all(2) >= ENOUGH_WARPS * multiprocessors * 3 // 4
    per_lane = 2 if two else 1
    splits = 1
    if warps_in_all() * 2 <= enough:
        chunks = -(-length // chunk_length(states))
        splits = max(1, min(chunks // 4, -(-enough // max(1, warps_in_all()))))
    warps = 8
    while warps > 1 and warps_in_all(per_lane) * splits * 4 < multiprocessors * warps * 3:
        warps //= 2
    layout = _layout(padded, per_lane, lanes_n, channels, warps, splits)
    return layout._replace(steps=min(layout.steps, 4))


@functools.cache
def step_layout(batch: int, channels: int, states: int) -> Layout:
    """One position: as many lanes per channel as let a lane read 16 bytes of a float32 state."""
    padded = max(4, next_power_of_2(states))
    return _layout(padded, 1, max(4, min(LANES, padded // 4)), channels, warps=4 if batch * channels >= 16384 else 1)


def _layout(padded: int, per_lane: int, lanes_n: int, channels: int, warps: int, splits: int = 1) -> Layout:
    states_per_lane = padded // lanes_n
    # Rows of B and C for the whole tile are held in registers: steps * states_per_lane of each.
    steps = min(lanes_n, max(2, 16 // states_per_lane))
    while warps > 1 and (warps // 2) * LANES // lanes_n * per_lane >= channels:
        warps //= 2
    return Layout(states_per_lane, per_lane, warps, lanes_n, steps, splits)
