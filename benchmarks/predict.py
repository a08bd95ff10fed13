"""python -m benchmarks.predict [--card NAME]: how long the GPU kernels should take, from their machine code.

No measurement goes in: the hot loop of each kernel is compiled for the card's architecture and disassembled (the
harness of the tests does that, no GPU needed), and its instructions are counted. Per multiprocessor and clock a card
issues 128 lanes of instructions, 16 of them special functions, and so on (cards.py); with the bytes that the op must
move this gives a time for every unit, and the largest is the prediction. Where there are too few warps to hide
latencies, one warp's own pace counts: its loop is played through in order, each instruction waiting for its operands.

What the model leaves out: misses in the caches, bank conflicts, the tail of the last wave, clocks under load. It is a
bound with assumptions rather than an estimate, right to perhaps a third, and it is never called anything but predicted.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cards
from benchmarks.cards import Card
from jambatalk_kernels.attention import heuristics as attention
from jambatalk_kernels.causal_conv1d.heuristics import forward_tile
from jambatalk_kernels.selective_scan.heuristics import forward_layout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "jambatalk_kernels"))

import gpu_code  # noqa: E402
from gpu_code import Code, Instruction  # noqa: E402

# A kernel in a CUDA graph starts about this long after the one before (kernels.md 5: 1.3 us), and its first loads and
# last stores go to memory and back once (quack: 0.4 us each way) before and after the loop.
LAUNCH = 1.3e-6
RAMP = 0.8e-6

# Clocks from issue to result. Arithmetic: 4 since Volta. The others are round figures of published microbenchmarks for
# sm_80 to sm_90; a load counts as a hit in L2 (150 ns, quack's table), since what is read once per multiprocessor and
# step is shared by its neighbours.
LATENCY = {
    "MUFU": 22,
    "SHFL": 24,
    "LDS": 28,
    "LDG": 280,
    "LDL": 280,
    "BAR": 20,
    "S2R": 20,
    "F2F": 20,
    "I2F": 20,
    "F2I": 20,
}
FMA_PIPE = r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2|FSWZADD"
UNIFORM_PIPE = r"U[A-Z]"
OTHER_PIPES = rf"{FMA_PIPE}|{UNIFORM_PIPE}|MUFU|SHFL|LD|ST|BRA|BAR|EXIT|NOP|F2F|I2F|F2I"


@dataclass(frozen=True)
class Work:
    """What a launch does: ``warps`` each go ``iterations`` times through ``loop``; ``bytes`` go to and from memory."""

    loop: Code
    warps: float
    iterations: float
    bytes: float
    registers: int = 64
    straight: bool = False  # no loop: the whole kernel, once, its own loads and stores among its instructions
    products: float = 0  # operations of the matrix units, of all warps


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str

    def __str__(self) -> str:
        return f"{self.seconds * 1e6:.3g} us ({self.limit})"


def clocks(loop: Code, card: Card) -> dict[str, float]:
    """Clocks of one multiprocessor for one pass of one warp through ``loop``, by the unit that would bind."""
    shared = {"128": 4, "64": 2}
    data_path = sum(
        shared.get(each.opcode.rsplit(".", 1)[-1], 1)
        for each in loop.instructions
        if re.match("LDS|STS|SHFL|LDSM", each.opcode)
    )
    lanes = 32
    return {
        "instruction issue": len(loop.instructions) * lanes / cards.LANES_ISSUED_PER_CLOCK,
        "special functions": loop.count("MUFU") * lanes / cards.SPECIAL_PER_CLOCK,
        "float32": loop.count(FMA_PIPE) * lanes / card.float_per_clock,
        "integer and logic": loop.count(rf"(?!{OTHER_PIPES})") * lanes / 64,
        "shared memory and shuffles": data_path * lanes * 4 / cards.SHARED_BYTES_PER_CLOCK,
        "loads and stores": loop.count("LDG|STG"),
    }


def predict(work: Work, card: Card) -> Prediction:
    """One launch in a CUDA graph, its inputs in memory and not in a cache."""
    by_unit = clocks(work.loop, card)
    per_multiprocessor = work.warps / card.multiprocessors
    seconds = {
        unit: math.ceil(per_multiprocessor) * work.iterations * each / card.clock for unit, each in by_unit.items()
    }
    # A scheduler's resident warps run side by side; further ones wait for them.
    resident = min(64, 65536 // (32 * max(work.registers, 16))) / cards.SCHEDULERS
    waves = max(1.0, per_multiprocessor / cards.SCHEDULERS / resident)
    seconds["latency of one warp"] = waves * work.iterations * pace(work.loop, work.straight) / card.clock
    seconds["memory"] = work.bytes / card.copy_bandwidth
    seconds["matrix units"] = work.products / card.matrix
    limit = max(seconds, key=seconds.__getitem__)
    return Prediction(seconds[limit] + LAUNCH + (0 if work.straight else RAMP), limit)


def special_seconds(count: float, card: Card) -> float:
    """``count`` exponentials at the rate of the special-function units."""
    return count / card.special_rate


# ---- one warp alone -------------------------------------------------------------------------------------------------


def pace(loop: Code, once: bool = False) -> float:
    """Clocks per pass of one warp that has its scheduler for itself: in order, every operand waited for.

    ``once``: of a first pass until its last result is there, otherwise of one pass among many.
    """
    ready: dict[str, int] = {}
    clock, ends = 0, []
    operands = [(instruction, *_operands(instruction)) for instruction in loop.instructions]
    for _ in range(1 if once else 4):  # the last pass has settled
        for instruction, written, read in operands:
            clock = max([clock + 1, *(ready.get(register, 0) for register in read)])
            latency = LATENCY.get(instruction.opcode.split(".")[0], 6 if instruction.opcode.startswith("U") else 4)
            ready.update(dict.fromkeys(written, clock + latency))
        ends.append(clock)
    return max(ready.values()) if once else ends[-1] - ends[-2]


def _operands(instruction: Instruction) -> tuple[set[str], set[str]]:
    """-> the registers that it writes, and those that it reads."""
    text = instruction.text
    guard = re.match(r"@!?(U?P\d)\s+", text)
    fields = [part.strip() for part in text[guard.end() if guard else 0 :].split(None, 1)[-1].split(",")]
    base = instruction.opcode.split(".")[0]
    results = 0
    if base not in ("STG", "STS", "STL", "BRA", "EXIT", "BAR", "NOP", "RED", "WARPSYNC", "BSYNC", "BSSY"):
        results = 1
        if len(fields) > 1 and (re.fullmatch(r"U?P(\d|T)", fields[0]) or re.fullmatch(r"U?P(\d|T)", fields[1])):
            results = 2  # a compare's two predicates, a shuffle's flag and value, a sum and its carry
    wide = 4 if ".128" in instruction.opcode else 2 if re.search(r"\.64|\.WIDE|CS2R", instruction.opcode) else 1
    written = {name for part in fields[:results] for name in _registers(part, wide)}
    read = {name for part in fields[results:] for name in _registers(part, wide if base.startswith("ST") else 1)}
    if ".WIDE" in instruction.opcode:
        read |= _registers(fields[-1], 2)
    if guard:
        read.add(guard[1])
    return written, read


def _registers(text: str, wide: int) -> set[str]:
    names = set()
    for kind, number, pair in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", text):
        count = max(wide if kind in ("R", "UR") else 1, 2 if pair else 1)
        names |= {f"{kind}{int(number) + i}" for i in range(count)}
    return names


# ---- the cases of the benchmarks ------------------------------------------------------------------------------------

SCAN, CONV = "jambatalk_kernels.selective_scan.triton", "jambatalk_kernels.causal_conv1d.triton"
ATTENTION = "jambatalk_kernels.attention.ahead_of_time"
LARGE, SMALL = (4, 4096, 4096), (1, 600, 1024)
STATES = 16


@functools.cache
def _triton(module: str, capability: int) -> dict[str, Code]:
    wanted = {
        SCAN: ("forward", "forward_few_channels", "forward_ends", "forward_resumed", "step"),
        CONV: ("forward, bf16, width 4", "forward, bf16, width 16", "step"),
    }
    return gpu_code.compile_triton(module, capability, wanted[module])


def _scan_triton(shape: tuple[int, int, int], card: Card) -> Prediction:
    batch, length, channels = shape
    layout = forward_layout(batch, length, channels, STATES, card.multiprocessors)
    moved = batch * length * (4 * channels + 2 * STATES) * 2
    codes = _triton(SCAN, card.capability)
    warps = batch * layout.splits * math.ceil(channels / layout.channels) * layout.warps

    def launch(name: str) -> Prediction:
        code = codes[name]
        iterations = length / layout.splits / layout.steps
        return predict(Work(code.hot_loop(r"MUFU\.EX2"), warps, iterations, moved, code.registers), card)

    if layout.splits == 1:
        return launch("forward" if layout.warps > 1 else "forward_few_channels")
    parts = [launch("forward_ends"), launch("forward_resumed")]
    return Prediction(sum(part.seconds for part in parts) + LAUNCH + RAMP, parts[1].limit)


def _scan_cuda(shape: tuple[int, int, int], card: Card) -> Prediction:
    """The recurrence of two lanes of eight states, four positions a pass; what surrounds it runs beside it."""
    batch, length, channels = shape
    architecture = "sm_90a" if card.capability == 90 else f"sm_{card.capability}"
    codes = gpu_code.compile_cuda("csrc/cuda/selective_scan.cu", architecture)
    (code,) = (code for name, code in codes.items() if name.startswith("scan_forward_kernel<2, 8,"))
    moved = batch * length * (4 * channels + 2 * STATES) * 2
    work = Work(code.hot_loop(r"MUFU\.EX2"), batch * channels * 2 / 32, length / 4, moved, code.registers)
    result = predict(work, card)
    return Prediction(result.seconds, f"{result.limit}, in the recurrence alone")


def _conv_triton(shape: tuple[int, int, int], width: int, card: Card) -> Prediction:
    batch, length, channels = shape
    tile = forward_tile(batch, length, channels, width, 2, False, card.multiprocessors)
    code = _triton(CONV, card.capability)[f"forward, bf16, width {width}"]
    loop = code.hot_loop("STG")
    elements = batch * length * channels
    stored = sum(
        {"128": 8, "64": 4, "U16": 1}.get(i.opcode.rsplit(".", 1)[-1], 2)
        for i in loop.instructions
        if "STG" in i.opcode
    )
    warps = batch * math.ceil(length / tile.positions) * math.ceil(channels / tile.block_c) * tile.warps
    return predict(Work(loop, warps, elements / (warps * 32 * stored), 4 * elements, code.registers), card)


def _step_triton(module: str, moved: float, warps: float, card: Card) -> Prediction:
    code = _triton(module, card.capability)["step"]
    return predict(Work(code, warps, 1, moved, code.registers, straight=True), card)


# ---- mixture of experts ---------------------------------------------------------------------------------------------

ROUTE, EXPERTS = "jambatalk_kernels.moe.triton_route", "jambatalk_kernels.moe.triton_mlp"
MATRIX = r"HMMA|.*GMMA|UTC\w*MMA"
CLIP_LAYER, LARGE_LAYER = (600, 512, 1024), (4096, 1024, 1024)  # tokens, d, hidden; 8 experts, top 2


def _product(code: Code, grid: list[int], sizes: dict[str, int], card: Card) -> tuple[float, str]:
    """A grouped matrix product, every expert with as many rows as any. -> seconds between two launches, what binds.

    Blocks of one multiprocessor go one after the other, each unit as busy as the loop's instructions make it; what
    surrounds the loop is not hidden behind another block's loop.
    """
    c, kernel = code.constants, code.name.split()[0]
    experts, assignments = sizes["experts"], sizes.get("assignments", 0)
    operands = 2 if kernel == "first_product_kernel" and "swiglu" in code.name else 1
    rows = math.ceil(assignments / experts)
    if kernel == "weight_gradient_kernel":
        left, right = sizes["rows_left"], sizes["rows_right"]
        tiles, depth = math.prod(grid), math.ceil(rows / c["SPLITS"])
        elements = experts * left * right + assignments * (left + right)
    else:
        depth = sizes.get("features") or sizes.get("depth") or sizes["width"]
        columns = sizes["width"] if "depth" in sizes else sizes["hidden"]
        tiles = experts * math.ceil(rows / c["BLOCK_M"]) * sizes["columns"]
        # Read: rows and weights. Written: the result; beside it, of the hidden features, what backward needs.
        beside = {"first_product_kernel": operands, "hidden_gradient_kernel": 5}.get(kernel, 0)
        elements = experts * depth * columns * operands + assignments * (depth + (1 + beside) * columns)
    steps = math.ceil(depth / c["BLOCK_K"])
    loop = code.hot_loop(MATRIX)
    operations = 2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"] * operands
    narrow = loop.count(r"HMMA\.16816")  # one is 16 x 8 x 16; an unrolled loop has those of several steps
    passes = steps * operations / (narrow * 4096 * code.warps) if narrow else steps
    units = {unit: each * code.warps * passes for unit, each in clocks(loop, card).items()}
    units["matrix units"] = steps * operations / (card.matrix / card.multiprocessors / card.clock)
    around = (len(code.instructions) - len(loop.instructions)) * code.warps * 32 / cards.LANES_ISSUED_PER_CLOCK
    limit = max(units, key=units.__getitem__)
    seconds = math.ceil(tiles / card.multiprocessors) * (units[limit] + around) / card.clock
    if (moving := elements * 2 / card.copy_bandwidth) > seconds:
        seconds, limit = moving, "memory"
    return seconds + LAUNCH + RAMP, limit


def _experts_triton(shape: tuple[int, int, int], card: Card) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """The launches of forward (which saves for backward) and those of backward."""
    tokens, d, hidden = shape
    pattern = f"*bfloat16 swiglu, {tokens} tokens, 8 experts, top 2, {d} x {hidden}*"
    launches = sorted(
        (
            (launch["turn"], code, launch)
            for code in gpu_code.compile_triton(EXPERTS, card.capability, (pattern,)).values()
            for launch in code.launches
        ),
        key=lambda entry: entry[0],
    )
    parts: tuple[list, list] = ([], [])
    backward = False
    for _, code, launch in launches:
        sizes = launch["sizes"]
        backward |= code.name.startswith("hidden_gradient")
        if code.name.startswith("sum"):
            moved = sizes["rows"] * sizes["columns"] * (sizes["terms"] + 1) * (4 if sizes["rows"] == 1 else 2)
            parts[backward].append((moved / card.copy_bandwidth + LAUNCH + RAMP, "memory"))
        else:
            parts[backward].append(_product(code, launch["grid"], sizes, card))
    return parts


def _layer_triton(shape: tuple[int, int, int], backward: bool, card: Card) -> Prediction:
    """Router, routing and experts; the router's product (its two of backward) as launches that take no time else."""
    forward, gradients = _experts_triton(shape, card)
    launches = forward + (gradients if backward else [])
    seconds = sum(each for each, _ in launches) + _route_triton(card).seconds + LAUNCH + RAMP
    if backward:
        seconds += _route_triton(card, "choose_backward").seconds + 2 * (LAUNCH + RAMP)
    operations = (3 if backward else 1) * 6 * math.prod(shape) * 2
    limit = max(launches)[1]
    return Prediction(seconds, f"{limit} in the longest launch; {operations / seconds / 1e12:.0f} TFLOP/s")


def _route_triton(card: Card, *kernels: str) -> Prediction:
    """8192 tokens, 8 experts, top 2; each loop of the kernels counted once."""
    codes = gpu_code.compile_triton(ROUTE, card.capability, ("*8192 tokens, 8 experts, top 2",))
    total = 0.0
    for name in kernels or ("choose_kernel", "sort_kernel"):
        (code,) = (code for key, code in codes.items() if key.startswith(name))
        warps = math.prod(code.launches[0]["grid"]) * code.warps
        total += predict(Work(code, warps, 1, 8192 * 48, code.registers, straight=True), card).seconds
    return Prediction(total, "latency of one warp, and of the launches")


def _route_cuda(tokens: int, card: Card) -> Prediction:
    """8 experts, top 2, float32, a lane per token: up to 1024 in one block, more in blocks of 128 and two launches.

    Every branch counts as taken, that of one launch beside that of two: too much rather than too little.
    """
    architecture = "sm_90a" if card.capability == 90 else f"sm_{card.capability}"
    codes = gpu_code.compile_cuda("csrc/cuda/moe_route.cu", architecture)
    code, sort = codes["route_kernel<float, float, 1>"], codes["route_sort_kernel<float>"]
    if tokens <= 1024:  # on one multiprocessor
        warps = math.ceil(tokens / 32) * card.multiprocessors
        return predict(Work(code, warps, 1, tokens * 88, code.registers, straight=True), card)
    blocks = math.ceil(tokens / 128)
    first = predict(Work(code, blocks * 4, 1, tokens * 88, code.registers, straight=True), card)
    second = predict(Work(sort, blocks * 16, 1, tokens * 24, sort.registers, straight=True), card)
    return Prediction(first.seconds + second.seconds, f"{first.limit}, and of the launches")


# ---- the loop

# kernels.md 1.0 and 5: what an L2 delivers to one multiprocessor per clock and in all, in bytes; a barrier of the whole
# grid by others' kernels (0.7 to 1.7 us for a phase, its work included), one of a block.
L2_PER_CLOCK, L2_BANDWIDTH = 64, 5e12
GRID_BARRIER, BLOCK_BARRIER = 0.7e-6, 0.1e-6
MIXERS = {"moe-moe": "EMETEME", "m-m": "MEMTMEM"}
LOOPS = {
    "vocaset": dict(d=512, heads=8, head_dim=64, hidden=1024),
    "demo": dict(d=128, heads=4, head_dim=32, hidden=256),
}
TOP_K = 2
# Of the graph: a frame's own launches, and those of each kind of mixer and MLP (jambatalk_kernels/rollout/graph.py).
# Of the persistent kernel: meetings (csrc/cuda/rollout.cu).
LAUNCHES = {"frame": 9, "Mamba": 7, "attention": 8, "dense": 2, "experts": 6}
MEETINGS = {"frame": 1, "Mamba": 4, "attention": 3, "dense": 2, "experts": 2}


def active_weights(preset: str, arrangement: str) -> int:
    """Elements of the matrices that one frame reads."""
    d, hidden = LOOPS[preset]["d"], LOOPS[preset]["hidden"]
    inner, rank = 2 * d, -(-d // 16)
    mamba = 2 * inner * d + (rank + 2 * STATES) * inner + inner * rank + d * inner
    attention = (2 * LOOPS[preset]["heads"] + 2) * LOOPS[preset]["head_dim"] * d
    kinds = MIXERS[arrangement]
    mlps = len(kinds) + (TOP_K - 1) * kinds.count("E")
    return d * d + attention + mamba * (len(kinds) - kinds.count("T")) + 3 * hidden * d * mlps


def _events(counts: dict[str, int], arrangement: str) -> int:
    kinds = MIXERS[arrangement]
    mixers = sum(counts["attention" if kind == "T" else "Mamba"] for kind in kinds)
    return counts["frame"] + mixers + sum(counts["experts" if kind == "E" else "dense"] for kind in kinds)


def _loop_graph(preset: str, arrangement: str, card: Card) -> Prediction:
    """One frame: every launch with its ramp, and the bfloat16 weights, from L2 where they fit there."""
    moved = 2 * active_weights(preset, arrangement)
    bandwidth = L2_BANDWIDTH if moved < 0.8 * card.cache else card.copy_bandwidth
    launches = _events(LAUNCHES, arrangement)
    seconds = {f"{launches} launches": launches * (LAUNCH + RAMP), "reading the weights": moved / bandwidth}
    return Prediction(sum(seconds.values()), max(seconds, key=seconds.__getitem__))


def _loop_persistent(preset: str, arrangement: str, card: Card) -> Prediction:
    """One frame: meetings, two loads from L2 one after the other in each phase, and the weights."""
    alone = LOOPS[preset]["d"] <= 128
    blocks = 1 if alone else min(128, card.multiprocessors)
    moved = 2 * active_weights(preset, arrangement)
    shared = L2_BANDWIDTH if moved < 0.8 * card.cache else card.copy_bandwidth
    bandwidth = min(blocks * L2_PER_CLOCK * card.clock, shared)
    meetings = _events(MEETINGS, arrangement)
    loads = (1 if alone else 2) * LATENCY["LDG"] / card.clock
    seconds = {
        f"{meetings} meetings": meetings * ((BLOCK_BARRIER if alone else GRID_BARRIER) + loads),
        "reading the weights": moved / bandwidth,
    }
    return Prediction(sum(seconds.values()), max(seconds, key=seconds.__getitem__))


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention_pieces(shape: tuple[int, int, int, int, int], card: Card, backward: bool) -> Prediction:
    """Causal attention in bfloat16, launch after launch: rotation, products, rotation back."""
    batch, length, heads, kv_heads, head_dim = shape
    group, groups = heads // kv_heads, batch * kv_heads
    device = attention.Device(divmod(card.capability, 10), card.multiprocessors)
    sizes = (length, 0, group, groups, head_dim, 2, device)
    label = f"bfloat16, {batch}, {length}, {heads}, {kv_heads}, {head_dim}, {{'causal': True}}"
    codes = gpu_code.compile_triton(ATTENTION, card.capability, (f"*_kernel {label}*",))
    element = batch * length * head_dim * 2  # bytes of one head's q, in bfloat16

    def tiled(name: str, tile: attention.Tile, tiles: int, pairs: float, products: int) -> Prediction:
        """`pairs` of tiles of rows and keys in all, by `tiles` programs."""
        code = codes[f"{name} {label}"]
        operations = products * 2 * pairs * tile.block_m * tile.block_n * attention.padded_head_dim(head_dim)
        work = Work(
            code.hot_loop(MATRIX), tiles * tile.num_warps, pairs / tiles, 4 * heads * element,
            code.registers, products=operations,
        )  # fmt: skip
        return predict(work, card)

    def streamed(bytes_: float) -> Prediction:
        return Prediction(bytes_ / card.copy_bandwidth + LAUNCH + RAMP, "memory")

    def by_queries(name: str, tile: attention.Tile, products: int) -> Prediction:
        tiles = math.ceil(length * group / tile.block_m)
        ends = (min(length, math.ceil((i + 1) * tile.block_m / group)) for i in range(tiles))
        pairs = sum(math.ceil(end / tile.block_n) for end in ends)
        return tiled(name, tile, tiles * groups, pairs * groups, products)

    if not backward:
        tile = attention.forward_plan(*sizes).tile
        parts = [streamed(2 * kv_heads * element), by_queries("forward_kernel", tile, 2)]
        return Prediction(sum(part.seconds for part in parts), parts[1].limit)
    plan = attention.backward_plan(*sizes)
    rows = group // plan.splits
    tiles = math.ceil(length / plan.keys.block_n)
    pairs = sum(math.ceil((length - i * plan.keys.block_n) * rows / plan.keys.block_m) for i in range(tiles))
    programs = groups * plan.splits
    parts = [
        streamed(4 * heads * element),
        streamed(2 * kv_heads * element),
        by_queries("query_gradient_kernel", plan.queries, 3),
        tiled("key_gradient_kernel", plan.keys, tiles * programs, pairs * programs, 4),
        streamed((4 * heads + 4 * kv_heads * plan.splits) * element),
    ]
    return Prediction(sum(part.seconds for part in parts), parts[3].limit)


def _attention(shape: tuple[int, int, int, int, int], card: Card, what: str) -> Prediction:
    forward = _attention_pieces(shape, card, False)
    if what == "forward":
        return forward
    backward = _attention_pieces(shape, card, True)
    return Prediction(forward.seconds + backward.seconds, backward.limit)


def _attention_step(positions: int, heads: int, kv_heads: int, head_dim: int, card: Card) -> Prediction:
    """One sequence: the programs' loops over their share of the cache, then the sum of the parts."""
    device = attention.Device(divmod(card.capability, 10), card.multiprocessors)
    plan = attention.step_plan(positions, kv_heads, head_dim, 2, device)
    label = f"bfloat16, 1, {heads}, {kv_heads}, {head_dim}, {positions}, None"
    codes = gpu_code.compile_triton(ATTENTION, card.capability, (f"*_kernel {label}",))
    code, moved = codes[f"step_kernel {label}"], 4 * positions * kv_heads * head_dim
    warps = kv_heads * plan.splits * plan.num_warps
    passes = math.ceil(plan.slots / plan.block_n)
    whole = predict(Work(code, warps, 1, moved, code.registers, straight=True), card)
    loop = code.hot_loop(r"MUFU\.EX2")
    more = (passes - 1) * pace(loop) / card.clock if loop is not code else 0.0
    combine = codes.get(f"combine_kernel {label}")
    last = 0.0 if combine is None else predict(Work(combine, heads * 4, 1, 0, straight=True), card).seconds
    return Prediction(whole.seconds + more + last, whole.limit)


# By the name that the benchmark has: see bench_selective_scan.py, bench_causal_conv1d.py, bench_moe.py,
# bench_attention.py and, for one frame, bench_rollout.py.
CASES: dict[str, Callable[[Card], Prediction]] = {
    **{
        f"selective_scan forward {shape} N 16 bfloat16, triton": lambda card, shape=shape: _scan_triton(shape, card)
        for shape in (LARGE, SMALL)
    },
    f"selective_scan forward {LARGE} N 16 bfloat16, cuda": lambda card: _scan_cuda(LARGE, card),
    "selective_scan_step (1, 1024) N 16 bfloat16, triton": lambda card: _step_triton(
        SCAN, 1024 * (STATES * 12 + 8), 128, card
    ),
    **{
        f"causal_conv1d forward {LARGE} width {width} bfloat16, triton": (
            lambda card, width=width: _conv_triton(LARGE, width, card)
        )
        for width in (4, 16)
    },
    f"causal_conv1d forward {SMALL} width 4 bfloat16, triton": lambda card: _conv_triton(SMALL, 4, card),
    "causal_conv1d_step (1, 1024) width 4 bfloat16 cached, triton": lambda card: _step_triton(
        CONV, 1024 * (4 * 6 + 12), 32, card
    ),
    "moe_route (8192, 8) top 2 float32, triton": lambda card: _route_triton(card),
    **{
        f"moe_route ({tokens}, 8) top 2 float32, cuda": lambda card, tokens=tokens: _route_cuda(tokens, card)
        for tokens in (600, 8192)
    },
    **{
        f"moe {what} {shape} 8 experts top 2 bfloat16, triton": (
            lambda card, shape=shape, what=what: _layer_triton(shape, what != "forward", card)
        )
        for shape in (CLIP_LAYER, LARGE_LAYER)
        for what in ("forward", "forward and backward")
    },
    **{
        f"rollout {preset} {arrangement} step bfloat16, {backend}": (
            lambda card, how=how, preset=preset, arrangement=arrangement: how(preset, arrangement, card)
        )
        for preset, arrangement in (("vocaset", "moe-moe"), ("vocaset", "m-m"), ("demo", "moe-moe"))
        for backend, how in (("triton", _loop_graph), ("cuda", _loop_persistent))
    },
    **{
        f"rope_attention {what} {shape} bfloat16, triton": lambda card, shape=shape, what=what: _attention(
            shape, card, what
        )
        for shape in ((4, 2048, 16, 4, 64), (4, 2048, 16, 4, 128))
        for what in ("forward", "forward and backward")
    },
    **{
        f"rope_attention_step at 600 positions (1, 8, {kv_heads}, 64) bfloat16, triton": (
            lambda card, kv_heads=kv_heads: _attention_step(600, 8, kv_heads, 64, card)
        )
        for kv_heads in (8, 1)
    },
}


def cases(card: Card) -> dict[str, Prediction]:
    """Every prediction for a card; CUDA C++ only where there is an nvcc."""
    skipped = "cuda" if gpu_code.nvcc() is None else "none"
    return {name: case(card) for name, case in CASES.items() if not name.endswith(skipped)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted times of the GPU kernels; nothing here was measured.")
    parser.add_argument("--card", default="", help="part of a card's name; all by default")
    wanted = parser.parse_args().card.lower()
    for card in cards.CARDS:
        if wanted in card.name.lower():
            print(f"{card.name} (predicted)")
            for name, prediction in cases(card).items():
                print(f"  {name}: {prediction}")


if __name__ == "__main__":
    main()
