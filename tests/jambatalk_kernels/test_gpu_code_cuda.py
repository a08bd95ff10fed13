"""What nvcc makes of csrc/cuda/*.cu, without a GPU: every kernel within the budget that stands above it, no spills."""

import re

import gpu_code
import pytest

if gpu_code.nvcc() is None:
    pytest.skip("there is no nvcc on this machine, so the CUDA C++ kernels are not compiled", allow_module_level=True)
if gpu_code.missing_tools() is not None:
    pytest.skip(gpu_code.missing_tools(), allow_module_level=True)

SOURCES = sorted(f"csrc/cuda/{path.name}" for path in (gpu_code.ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
SCAN = "csrc/cuda/selective_scan.cu"
ROLLOUT = "csrc/cuda/rollout.cu"


def budgets(source):
    """Kernel -> (registers, spills, shared), from the lines above its ``__global__``. A variant that needs more than
    the others has a line of its own, by its template arguments: "// budget of <32, 8>: ..."."""
    text = (gpu_code.ROOT / source).read_text()
    table, above = {}, {}
    for line in text.splitlines():
        budget = re.fullmatch(r"// budget(?: of (<.*>))?: registers <= (\d+), spills (\d+), shared <= (\d+)", line)
        kernel = re.match(r"__global__\s+void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", line)
        if budget:
            above[budget[1] or ""] = tuple(int(number) for number in budget.groups()[1:])
        elif kernel:
            assert "" in above, f"{source}: {kernel[1]} has no budget"
            table |= {kernel[1] + variant: numbers for variant, numbers in above.items()}
            above = {}
        elif not line.startswith("template "):
            above = {}
    assert len({name.split("<")[0] for name in table}) == text.count("__global__"), f"{source}: a kernel was missed"
    return table


def check(source, architecture):
    table = budgets(source)
    codes = gpu_code.compile_cuda(source, architecture)
    compiled = {name.split("<")[0] for name in codes}
    assert compiled | set(codes) >= set(table), f"{source}: budgets for {set(table)}, compiled {set(codes)}"
    for name, code in codes.items():
        registers, spills, shared = table.get(name) or table[name.split("<")[0]]
        where = f"{name} on {architecture}"
        assert code.registers <= registers, f"{where}: {code.registers} registers, budget {registers}"
        assert code.spill_bytes <= spills, f"{where}: {code.spill_bytes} bytes spilled, budget {spills}"
        assert code.shared_bytes <= min(shared, gpu_code.SHARED_LIMIT[89]), f"{where}: {code.shared_bytes} bytes shared"
        if spills == 0:
            assert code.local_memory == 0 and code.stack_bytes == 0, f"{where}: an array lies in local memory"


def test_every_kernel_has_a_budget():
    assert sum(len(budgets(source)) for source in SOURCES) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_budgets(architecture):
    gpu_code.compile_cuda_at_once([(source, architecture) for source in SOURCES])
    for source in SOURCES:
        check(source, architecture)


def test_scan_forward_inner_loop():
    """For 16 states: two lanes of eight states, four positions at a time."""
    check(SCAN, "sm_90a")
    (code,) = (c for name, c in gpu_code.compile_cuda(SCAN, "sm_90a").items() if "scan_forward_kernel<2, 8" in name)
    loop = code.hot_loop(r"MUFU\.EX2")
    elements = 4 * 8 / 16  # four positions of half a channel
    # Of the exponentials a few may be polynomials, since the special-function unit would bind alone.
    assert elements * 14 <= loop.count(r"MUFU\.EX2") == loop.count(r"MUFU") <= elements * 16
    assert loop.count(r"FMUL|FFMA|FADD") <= elements * (16 * 4 + 20)
    assert loop.count(r"SHFL") <= elements * 3
    assert loop.count(r"BAR|LDG|STG") == 0, "no barrier and no global memory in a step"
    assert loop.count(r"LDS\.128") >= 0.8 * loop.count(r"LDS"), "shared memory is read 16 bytes at a time"
    assert len(loop.instructions) <= elements * 110
    # Tiles come by asynchronous copies of 16 bytes.
    assert code.count(r"LDGSTS.*\.128") > 0


@pytest.mark.slow
def test_the_persistent_rollout():
    """Teams meet by release and acquire, a block alone does not; weights come 16 bytes at a time, past the L1 cache."""
    check(ROLLOUT, "sm_90a")
    codes = gpu_code.compile_cuda(ROLLOUT, "sm_90a")
    assert len(codes) == 4
    for name, code in codes.items():
        together = "Several" in name
        assert (code.count(r"RED.*STRONG\.GPU") > 0) == (code.count(r"LDG.*STRONG\.GPU") > 0) == together, name
        assert code.count(r"ATOM") == 0, name
        products = [loop for loop in code.innermost_loops() if loop.count(r"LDG.*NA.*\.128") >= 4]
        assert len(products) >= 8, name
        for loop in products:
            assert loop.count(r"LDG") == loop.count(r"LDG.*NA.*\.128"), f"{name}: narrow loads among the weights'"
            assert loop.count(r"LDS\.128") == loop.count(r"LDS") and loop.count(r"BAR") == 0, name
            # An element of bfloat16 is a multiplication and half an instruction to unpack; the rest is addresses.
            assert len(loop.instructions) <= 3.5 * loop.count("FFMA"), name
