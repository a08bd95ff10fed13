"""What the compiler makes of every Triton kernel, without a GPU: no spills, memory of a small card, few instructions.

The cases are the modules' own ``ahead_of_time_cases()``: what a launch at a trained model's sizes compiles.
"""

import re

import gpu_code
import pytest

pytestmark = pytest.mark.skipif(gpu_code.missing_tools() is not None, reason=str(gpu_code.missing_tools()))

SCAN, CONV = "jambatalk_kernels.selective_scan.triton", "jambatalk_kernels.causal_conv1d.triton"
ROUTE, EXPERTS = "jambatalk_kernels.moe.triton_route", "jambatalk_kernels.moe.triton_mlp"
LOOP = "jambatalk_kernels.rollout.triton"
CAPABILITIES = (80, 89, 90, 100, 120)
# Registers per thread that a kernel may use, by the first row whose pattern matches its name. 128 let 16 warps live on
# a multiprocessor, which hides the latency of a kernel that walks along time; 168 let 12; 255 are all that there are.
REGISTERS = {
    SCAN: {r"forward_(saving|many_states)": 168, r"forward": 128, r"backward": 255, r"": 96},
    CONV: {r"forward.*packed": 255, r"forward": 160, r"backward": 255, r"": 64},
    LOOP: {r"": 128},
    ROUTE: {r"choose_kernel.* 256 experts": 168, r"": 96},
    EXPERTS: {r"sum": 64, r"\w+_vector": 96, r".*float32": 168, r"": 255},
}
# Compiled in the fast suite, for sm_90; everything else for every architecture in the slow one.
FAST = {
    SCAN: ("forward", "backward", "step"),
    CONV: ("forward, bf16, width 4", "backward, bf16, width 4", "step"),
}
# Where not everything is compiled.
SLOW = {(CONV, capability): ("*bf16, width 4*", "*fp32*", "step") for capability in (80, 120)}
PRODUCTS = {
    "first_product_kernel", "grouped_product_kernel", "all_experts_product_kernel", "hidden_gradient_kernel",
    "weight_gradient_kernel", "first_vector_kernel", "second_vector_kernel", "sum_kernel",
}  # fmt: skip
MATRIX = r"HMMA|.*GMMA|UTC\w*MMA"
STATES = 16


def check(module, capability, codes):
    # Tiles of the products are chosen for the card; the others without knowing on which one they will run.
    shared = gpu_code.SHARED_LIMIT[capability if module == EXPERTS else 89]
    for name, code in codes.items():
        where = f"{module} {name} on sm_{capability}"
        budget = next(limit for pattern, limit in REGISTERS[module].items() if re.match(pattern, name))
        assert code.registers <= budget, f"{where}: {code.registers} registers"
        if name.startswith("hidden_gradient_kernel float32"):
            # To stay at 96 registers ptxas may put one value aside, outside of the loop.
            assert code.stack_bytes <= 8 and code.hot_loop("FFMA").local_memory == 0, f"{where}: spills"
        elif name.startswith("choose_kernel") and "256 experts" in name:
            # The same at 80 registers on sm_80; the picks are made in the loop with the shuffles.
            assert code.stack_bytes <= 8 and code.hot_loop("SHFL").local_memory == 0, f"{where}: spills"
        else:
            assert code.local_memory == 0 and code.stack_bytes == 0, f"{where}: {code.stack_bytes} bytes spilled"
        assert code.shared_bytes <= shared, f"{where}: {code.shared_bytes} bytes of shared memory"


@pytest.mark.parametrize("module", [SCAN, CONV], ids=["scan", "conv"])
def test_budgets_on_one_architecture(module):
    codes = gpu_code.compile_triton(module, 90, FAST[module])
    assert set(codes) == set(FAST[module])
    check(module, 90, codes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("module", [SCAN, CONV, ROUTE, EXPERTS, LOOP], ids=["scan", "conv", "route", "experts", "loop"])
def test_budgets_of_everything(module, capability):
    codes = gpu_code.compile_triton(module, capability, SLOW.get((module, capability), ()))
    if module == EXPERTS:
        assert {name.split()[0] for name in codes} == PRODUCTS
    elif module == ROUTE:
        assert len(codes) == 11
    elif module == LOOP:
        assert {name.split()[0] for name in codes} == {"linear_kernel", "norms_kernel", "keep_kernel"}
        products = [
            code for name, code in codes.items() if name.startswith("linear_kernel x float32, weights bfloat16")
        ]
        assert all(code.count(r"LDG\.E\.128") for code in products), "weights come 16 bytes at a time"
    else:
        assert {re.split("[,_]", name)[0] for name in codes} >= {"forward", "backward", "step"}
    check(module, capability, codes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_run_on_matrix_units(capability):
    codes = gpu_code.compile_triton(EXPERTS, capability)
    for name, code in codes.items():
        if "vector" in name or name.startswith("sum") or "float32" in name:
            assert code.count(MATRIX) == 0, name  # float32 is IEEE
            if "bfloat16" in name:
                assert code.count(r"LDG.*\.128") >= 4, f"{name}: weights, and what is summed, come 16 bytes at a time"
            continue
        assert code.count(MATRIX) > 0, name
        if "bfloat16" in name and capability != 100:
            # The tiles come by asynchronous copies of 16 bytes, and on Hopper warp groups multiply them. (A weight's
            # gradient has a narrow copy too, of which rows to load.)
            loop = code.hot_loop(MATRIX)
            wide = loop.count(r"LDGSTS.*\.128")
            assert wide >= 4 and loop.count(r"LDGSTS") - wide == name.startswith("weight_gradient"), name
            assert code.count(r".*GMMA") > 0 or capability != 90, name


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
