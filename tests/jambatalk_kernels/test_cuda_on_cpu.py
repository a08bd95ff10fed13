"""CUDA on the host (tests/cuda_on_cpu) finds what it is there to find; and the kernels under AddressSanitizer."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build

ROOT = Path(__file__).resolve().parents[2]


def run(mistake):
    """-> the error of the flawed kernel's launch, and what it wrote (see tests/cuda_on_cpu/mistakes.cu)."""
    function = build.load().library.cuda_on_cpu_mistake
    function.restype = ctypes.c_char_p
    source, out = torch.arange(256, dtype=torch.float32), torch.zeros(64)
    error = function(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), mistake)
    return error.decode() if error else None, out


def test_a_kernel_without_mistake_runs():
    error, out = run(0)
    i = torch.arange(64)
    part = (63 - i) * 5.0
    assert error is None and torch.equal(out, part + part[i ^ 1] + 16)


@pytest.mark.parametrize(
    "mistake, message",
    [
        (1, r"parted: thread \(0, 0, 0\).*__syncthreads.*has ended"),
        (3, r"parted: .*__syncthreads at .*mistakes.cu:\d+; thread \(\d+, 0, 0\).*__syncthreads at .*mistakes.cu:\d+"),
        (7, r"parted: .*a shuffle at .*; .*a vote at .*"),
        (8, "the mask does not name the caller"),
        (9, "invalid configuration argument"),
    ],
)
def test_threads_that_part_are_an_error(mistake, message):

    error, _ = run(mistake)
    assert error is not None and re.search(message, error), error
    assert run(0)[0] is None, "and the next launch is sound"


@pytest.mark.parametrize("mistake", [2, 4])
def test_what_was_not_written_is_nan(mistake):
    """Shared memory that nobody wrote, and a copy that nobody waited for."""
    error, out = run(mistake)
    assert error is None and out.isnan().any()


def test_a_missing_barrier_depends_on_the_order():
    ops = build.load()
    results = []
    for backwards in (False, True):
        ops.order(backwards)
        try:
            results.append(run(5)[1])
        finally:
            ops.order(False)
    assert any(result.isnan().any() for result in results)
    assert not torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))


def _library(name):
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


SANITIZED = ("-DCUDA_ON_CPU_ASAN", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def _under_sanitizers(*arguments):
    preload = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in preload:
        pytest.skip("GCC's sanitizer libraries are not installed")
    build.build(*SANITIZED)  # here: the preloaded sanitizer would watch the compiler too
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env={k: v for k, v in os.environ.items() if not k.startswith("JAMBATALK_")} | {
            "CUDA_ON_CPU_FLAGS": " ".join(SANITIZED),
            "LD_PRELOAD": " ".join(preload),
            # Python and torch keep memory until the end; a fiber's stack is none that the sanitizer knows.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )  # fmt: skip


needs_gcc = pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("gcc"), reason="needs GCC on Linux")


@pytest.mark.slow
@needs_gcc
def test_the_kernels_are_clean_under_sanitizers():
    files = [f"tests/jambatalk_kernels/test_{op}_cuda.py" for op in ("causal_conv1d", "selective_scan", "moe_route")]
    # Memory is moved alike in both short dtypes; accuracy is measured elsewhere.
    chosen = "not (accuracy_rule and (bfloat16 or float16))"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen)
    done = _under_sanitizers("-m", "pytest", *options, *files)
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, output
    assert " passed" in done.stdout and "runtime error" not in output


@pytest.mark.slow
@needs_gcc
def test_the_rollout_is_clean_under_sanitizers():
    """Sizes that are a multiple of nothing; blocks in turns, one of them lost."""
    chosen = "heads_of_other or mixers_of_other or lengths_are or never_comes"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen)
    done = _under_sanitizers("-m", "pytest", *options, "tests/jambatalk_kernels/test_rollout_cuda.py")
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, output
    assert " passed" in done.stdout and "runtime error" not in output


@pytest.mark.slow
@needs_gcc
def test_an_access_beyond_shared_memory_is_found():
    code = "import sys; sys.path[:0] = ['tests', 'tests/jambatalk_kernels']; import test_cuda_on_cpu as t; t.run(6)"
    done = _under_sanitizers("-c", code)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
