"""What the compiler makes of every Triton kernel, without a GPU: no spills, memory of a small card, few instructions.

The cases are the modules' own ``ahead_of_time_cases()``: what a launch at a trained model's sizes compiles.
"""

import re

import gpu_code
import pytest

pytestmark = pytest.mark.skipif(gpu_code.missing_tools() is not None, reason=str(gpu_code.missing_tools()))

SCAN, CONV = "jambatalk_kernels.selective_scan.triton", "jambatalk_kernels.causal_conv1d.triton"
# Registers per thread that a kernel may use, by the first row whose pattern matches its name. 128 let 16 warps live on
# a multiprocessor, which hides the latency of a kernel that walks along time; 168 let 12; 255 are all that there are.
REGISTERS = {
    SCAN: {r"forward_(saving|many_states)": 168, r"forward": 128, r"backward": 255, r"": 96},
    CONV: {r"forward.*packed": 255, r"forward": 160, r"backward": 255, r"": 64},
}
# Compiled in the fast suite, for sm_90; everything else for every architecture in the slow one.
FAST = {
    SCAN: ("forward", "backward", "step"),
    CONV: ("forward, bf16, width 4", "backward, bf16, width 4", "step"),
}
STATES = 16


def check(module, capability, codes):
    for name, code in codes.items():
        where = f"{module} {name} on sm_{capability}"
        budget = next(limit for pattern, limit in REGISTERS[module].items() if re.match(pattern, name))
        assert code.registers <= budget, f"{where}: {code.registers} registers"
        assert code.local_memory == 0 and code.stack_bytes == 0, f"{where}: {code.stack_bytes} bytes in local memory"
        # The limit of the smallest card for all: a tile is chosen without knowing on which one it will run.
        assert code.shared_bytes <= gpu_code.SHARED_LIMIT[89], f"{where}: {code.shared_bytes} bytes of shared memory"


@pytest.mark.parametrize("module", [SCAN, CONV], ids=["scan", "conv"])
def test_budgets_on_one_architecture(module):
    codes = gpu_code.compile_triton(module, 90, FAST[module])
    assert set(codes) == set(FAST[module])
    check(module, 90, codes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("module", [SCAN, CONV], ids=["scan", "conv"])
def test_budgets_of_everything(module, capability):
    codes = gpu_code.compile_triton(module, capability)
    assert {name.split(",")[0].split("_")[0] for name in codes} >= {"forward", "backward", "step"}
    check(module, capability, codes)


def test_scan_forward_does_little_per_state():
    """What its speed rests on: exponentials are one instruction each, and the rest is not many more.

    Per state and position: one ex2, three products (delta A, decay h, drive) and two additions fused into them; per
    position a share of loads, softplus (two special functions), silu (two) and the sum over lanes.
    """
    code = gpu_code.compile_triton(SCAN, 90, FAST[SCAN])["forward"]
    loop = code.hot_loop(r"MUFU\.EX2")
    elements = elements_per_thread(code)
    assert loop.count(r"MUFU\.EX2") == elements * (STATES + 2)
    assert loop.count(r"MUFU") <= elements * (STATES + 5)
    assert loop.count(r"FMUL|FFMA|FADD") <= elements * (STATES * 5 + 25)
    assert loop.count(r"SHFL") <= elements * 12
    assert loop.count(r"BAR") == 0 and loop.count(r"LDS|STS") == 0, "no step waits for another warp"
    assert len(loop.instructions) <= elements * 250, "issue slots bind on an H200: 128 lanes a clock"
    # A lane's four states of B and of C are neighbours in memory: 8 bytes in one load.
    steps, states_per_lane = code.constants["STEPS"], code.constants["STATES_PER_LANE"]
    assert states_per_lane == 4 and loop.count(r"LDG\.E\.64") == 2 * steps


def elements_per_thread(code):
    """(channel, position) pairs of one pass of the loop by one thread."""
    c = code.constants
    return c["CHANNELS_PER_LANE"] * c["STEPS"] / c["LANES_N"]


def test_conv_reads_and_writes_16_bytes_at_once():
    codes = gpu_code.compile_triton(CONV, 90, FAST[CONV])
    loop = codes["forward, bf16, width 4"].hot_loop(r"STG")
    assert loop.count(r"LDG\.E\.128") == loop.count(r"LDG") > 0
    assert loop.count(r"STG\.E\.128") == loop.count(r"STG") == loop.count(r"LDG"), "every element is read once"
    # Eight elements in a load: 8 exp2 and 8 reciprocals for silu, width multiplications fused with additions.
    elements = 8 * loop.count(r"STG")
    assert loop.count(r"MUFU") == 2 * elements
    assert loop.count(r"FFMA|FMUL|FADD|HFMA2") <= elements * (4 + 5)
    assert loop.count(r"BAR|LDS|STS|SHFL") == 0
    backward = codes["backward, bf16, width 4"].hot_loop(r"STG")
    assert backward.count(r"LDG\.E\.(64|128)") == backward.count(r"LDG")
    assert backward.count(r"STG\.E\.(64|128)") == backward.count(r"STG")
