"""Block sizes and grids of the mixture-of-experts Triton kernels: pure functions of sizes, no device is asked."""

from __future__ import annotations

from typing import NamedTuple

from jambatalk_kernels.gpu import Device, next_power_of_2

MAX_EXPERTS = 256
MAX_TOP_K = 16
MATRIX_VECTOR_ASSIGNMENTS = 16  # up to here the forward pass streams weights and has no use for matrix instructions


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class RoutePlan(NamedTuple):
    block_tokens: int  # rows of logits that a program holds at once
    programs: int
    blocks_per_program: int
    block_counts: int  # rows of the programs' table of picks that the second kernel reads at once
    num_warps: int


# The second routing kernel has every program read the picks of all programs: a table of this many rows at most.
_ROUTE_PROGRAMS = 512
_ROUTE_ELEMENTS = 2048  # of logits, held by one program: 16 registers in each of 128 threads


def route_plan(tokens: int, experts: int) -> RoutePlan:
    """One program, and so one launch, where one block holds all tokens; else many short blocks."""
    room = _ROUTE_ELEMENTS // next_power_of_2(experts)
    num_warps = 8 if experts > 128 else 4  # sums over the tokens, one per expert, are held beside the logits
    if tokens <= room:
        return RoutePlan(next_power_of_2(tokens), 1, 1, 1, num_warps)
    block = min(room, 64)
    blocks = _cdiv(tokens, block)
    blocks_per_program = _cdiv(blocks, _ROUTE_PROGRAMS)
    programs = _cdiv(blocks, blocks_per_program)
    return RoutePlan(block, programs, blocks_per_program, min(room, next_power_of_2(programs)), num_warps)


class TilePlan(NamedTuple):
    """Tiles of a matrix product: block_m x block_n of the result, block_k of what is summed over at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# What one block may use of shared memory (CUDA programming guide), less what the compiler adds to the pipeline's tiles.
_SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
_SHARED_ELSEWHERE = 99 * 1024
_SHARED_RESERVE = 3 * 1024


def product_plan(
    rows: int,
    columns: int,
    depth: int,
    experts: int,
    itemsize: int,
    device: Device,
    *,
    even: bool = False,
    operands: int = 1,
    long_epilogue: bool = False,
) -> TilePlan:
    """Tiles for `experts` products (rows, depth) x (depth, columns), where `rows` is what an expert has on average.

    As near to square as registers allow, and smaller where that would leave processors idle or fill tiles by less than
    three quarters. float32 runs on the FMA units (or in TF32), with smaller tiles.

    even: every expert has just `rows`.
    operands: matrices on the right that share the left one and have an accumulator each (swiglu's gate and up: 2).
    long_epilogue: what follows the product needs registers too, so each thread has a smaller part of the tile.
    """
    half = itemsize == 2
    warp_groups = half and device.capability[0] in (9, 10)  # wgmma or newer, and 227 KB of shared memory
    fitting = next_power_of_2(rows) if even else next_power_of_2(rows + 1) // 4  # the last tile: half full on average
    block_m = min(max(fitting, 16), 128 if half else 64)
    block_n = (256 if warp_groups and block_m == 128 and not long_epilogue else 128 if half else 64) // operands
    block_n = min(block_n, max(next_power_of_2(columns), 16))
    while experts * _cdiv(rows, block_m) * _cdiv(columns, block_n) < device.multiprocessors:
        if block_n > 32 and (block_n * operands >= block_m or block_m <= 32):
            block_n //= 2
        elif block_m > 32:
            block_m //= 2
        else:
            break
    tile = block_m * block_n * operands
    block_k = 16 if not half else 64 if warp_groups or tile <= 64 * 64 else 32
    block_k = min(block_k, max(next_power_of_2(depth), 16))
    # 128 registers per thread for the accumulators, or 64.
    num_warps = 8 if tile > 128 * 128 or (tile == 128 * 128 and long_epilogue) else 4
    room = _SHARED.get(device.capability, _SHARED_ELSEWHERE) - _SHARED_RESERVE
    stages = min(4 if half else 3, room // ((block_m + block_n * operands) * block_k * itemsize))
    return TilePlan(block_m, block_n, block_k, num_warps, stages)


def weight_gradient_plan(
    rows: int, left: int, right: int, experts: int, itemsize: int, device: Device
) -> tuple[TilePlan, int]:
    """Tiles for (left, rows) x (rows, right) per expert, `rows` on average, and in how many parts the rows are summed.

    What would leave processors idle is cut up: many rows in parts, for few the tiles.
    """
    many = rows >= 1024
    aim = device._replace(multiprocessors=1) if many else device
    tile = product_plan(left, right, rows, experts, itemsize, aim, even=True)
    # Which rows to load is loaded first. Triton's pipeline is as deep for such loads as half its stages.
    tile = tile._replace(num_stages=2 * tile.num_stages - 1)
    programs = experts * _cdiv(left, tile.block_m) * _cdiv(right, tile.block_n)
    splits = min(device.multiprocessors // programs, rows // 256) if many else 1
    return tile, max(splits, 1)


def all_experts_in_one_product(tokens: int, width: int, experts: int, device: Device) -> bool:
    """Where every token has a row of every expert: sum over the experts inside one product? Not if it is too small to
    employ the whole GPU; then the experts run side by side and are summed after."""
    return experts == 1 or _cdiv(tokens, 64) * _cdiv(width, 64) >= device.multiprocessors


def max_tiles(assignments: int, experts: int, block_m: int) -> int:
    """A bound that needs no offsets: full tiles, and one that is not full per expert that can have any."""
    return assignments // block_m + min(experts, assignments)


class VectorPlan(NamedTuple):
    block_n: int  # rows of the weights per program
    block_k: int  # of each row at a time
    num_warps: int


def vector_plan(columns: int, depth: int, operands: int = 1) -> VectorPlan:
    """Matrix times vector: a program holds 4096 weights (32 registers of 128 threads) and so many bytes in flight."""
    block_k = min(max(next_power_of_2(depth), 16), 1024)
    block_n = min(4096 // operands // block_k, next_power_of_2(columns), 16)
    return VectorPlan(max(block_n, 1), block_k, 4)
