"""Block sizes and grids of the mixture-of-experts Triton kernels: pure functions of sizes, no device is asked."""

from __future__ import annotations

from typing import NamedTuple

MAX_EXPERTS = 256
MAX_TOP_K = 16
MATRIX_VECTOR_ASSIGNMENTS = 16  # up to here the forward pass streams weights and has no use for matrix instructions


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


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
    if tokens <= room:
        return RoutePlan(next_power_of_2(tokens), 1, 1, 1, 4)
    block = min(room, 64)
    blocks = _cdiv(tokens, block)
    blocks_per_program = _cdiv(blocks, _ROUTE_PROGRAMS)
    programs = _cdiv(blocks, blocks_per_program)
    return RoutePlan(block, programs, blocks_per_program, min(room, next_power_of_2(programs)), 4)
