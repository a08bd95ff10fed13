"""Tiles of the Triton attention kernels: pure functions of sizes, no device is asked."""

from __future__ import annotations

from typing import NamedTuple

from jambatalk_kernels.gpu import Device, next_power_of_2

__all__ = [
    "BackwardPlan",
    "Device",
    "ForwardPlan",
    "StepPlan",
    "Tile",
    "backward_plan",
    "forward_plan",
    "rotation_rows",
    "step_plan",
]

MAX_HEAD_DIM = 256
# Up to so many tiles of queries the keys are rotated by each of them while it loads them; beyond, once and for all in
# a launch of its own.
ROTATE_ON_LOAD_TILES = 2
# A tile of queries with so many features in all would not fit the registers while it is rotated.
ROTATED_FIRST = 128 * 256

_LARGE_SHARED = ((8, 0), (9, 0), (10, 0))  # more than 99 KB of shared memory for one program
_WARP_GROUPS = ((9, 0), (10, 0))  # matrix instructions that read both operands from shared memory


class Tile(NamedTuple):
    """block_m rows (positions times the query heads that share keys) against block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class ForwardPlan(NamedTuple):
    tile: Tile
    rotate_keys_on_load: bool
    rotate_queries_on_load: bool


class BackwardPlan(NamedTuple):
    queries: Tile  # of the kernel that gives dq: block_m rows held, block_n keys at a time
    keys: Tile  # of the kernel that gives dk and dv: block_n keys held, block_m rows at a time
    splits: int  # programs that share the query heads of a group, for dk and dv


def padded_head_dim(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _least_rows(rows: int, groups: int, block_m: int, device: Device) -> int:
    """block_m, halved while programs are fewer than multiprocessors; 16 at least (a matrix instruction's)."""
    while block_m > 32 and (_cdiv(rows, block_m) * groups < device.multiprocessors or block_m >= 2 * rows):
        block_m //= 2
    return max(16, min(block_m, next_power_of_2(rows)))


def forward_plan(
    length: int, capacity: int, group: int, groups: int, head_dim: int, itemsize: int, device: Device
) -> ForwardPlan:
    """`group` query heads share a key head; `groups` = batch * kv_heads. capacity: of the cache, 0 without one."""
    width = padded_head_dim(head_dim)
    large, warp_groups = device.capability in _LARGE_SHARED, device.capability in _WARP_GROUPS
    if itemsize == 4:  # no matrix instructions: registers bound the tile
        block_m, block_n, warps, stages = (
            (64, 32, 4, 2) if width <= 64 else (32, 32, 8, 1) if width == 128 else (16, 16, 8, 1)
        )
    elif width <= 64:
        block_m, block_n, warps, stages = (128, 128, 8, 2) if large else (128, 64, 8, 2)
    elif width == 128:
        block_m, block_n, warps, stages = (128, 64, 8, 3) if warp_groups else (128, 32, 8, 3 if large else 2)
    else:
        block_m, block_n, warps, stages = (128, 32, 8, 3) if warp_groups else (64, 32, 8, 2)
    chosen = _least_rows(length * group, groups, block_m, device)
    if chosen < block_m:
        warps = max(4 if width <= 128 else warps, warps * chosen // block_m)
    keys_on_load = capacity == 0 and _cdiv(length * group, chosen) <= ROTATE_ON_LOAD_TILES
    if keys_on_load:  # what a rotation reads takes registers
        block_n, stages = min(block_n, 32 if width <= 64 else 16), 1
    if capacity and itemsize == 4:  # and so does reading from a ring
        warps = 8
    tile = Tile(chosen, min(block_n, max(16, next_power_of_2(capacity + length))), warps, stages)
    return ForwardPlan(tile, keys_on_load, chosen * width < ROTATED_FIRST)


def backward_plan(
    length: int, capacity: int, group: int, groups: int, head_dim: int, itemsize: int, device: Device
) -> BackwardPlan:
    """As `forward_plan`."""
    width = padded_head_dim(head_dim)
    large, warp_groups = device.capability in _LARGE_SHARED, device.capability in _WARP_GROUPS
    if itemsize == 4:
        if width <= 64:
            queries, keys = Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)
        else:
            queries, keys = (Tile(32, 16, 8, 1),) * 2 if width == 128 else (Tile(16, 16, 8, 1),) * 2
    elif width <= 64:
        queries, keys = Tile(128, 64, 8, 2), Tile(64 if warp_groups else 32, 128, 8, 2)
    elif width == 128:
        queries = Tile(128, 64 if warp_groups else 32, 8, 2 if large else 1)
        keys = Tile(32, 128, 8, 2) if warp_groups else Tile(64, 64, 8, 1)
    else:
        queries, keys = Tile(128, 32, 8, 1) if warp_groups else Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    held = keys.block_n
    while held > 32 and (_cdiv(length, held) * groups * group < device.multiprocessors or held >= 2 * length):
        held //= 2
    held = max(16, min(held, next_power_of_2(length)))
    splits = 1
    programs = _cdiv(length, held) * groups
    for divisor in range(2, group + 1):
        if group % divisor == 0 and programs * splits < device.multiprocessors:
            splits = divisor
    keys = keys._replace(block_n=held, block_m=max(16, min(keys.block_m, next_power_of_2(length * group // splits))))
    queries = queries._replace(
        block_m=_least_rows(length * group, groups, queries.block_m, device),
        block_n=max(16, min(queries.block_n, next_power_of_2(capacity + length))),
    )
    return BackwardPlan(queries, keys, splits)


def rotation_rows(head_dim: int, length: int) -> int:
    """Positions of a tile that is rotated: 2048 elements, few for short clips."""
    return min(max(1, 2048 // padded_head_dim(head_dim)), next_power_of_2(length))


class StepPlan(NamedTuple):
    slots: int  # of the cache, read by one program
    splits: int
    block_n: int  # of these, at a time
    num_warps: int


def step_plan(capacity: int, groups: int, head_dim: int, itemsize: int, device: Device) -> StepPlan:
    """Programs of at least 64 slots each, about as many as multiprocessors, no more than 32 for one result."""
    block_n = max(16, min(64, 16384 // (padded_head_dim(head_dim) * itemsize), next_power_of_2(capacity)))
    most = min(_cdiv(capacity, 64), 32)
    splits = max(1, min(most, device.multiprocessors // max(groups, 1)))
    slots = _cdiv(_cdiv(capacity, splits), block_n) * block_n
    return StepPlan(slots, _cdiv(capacity, slots), block_n, 4)
