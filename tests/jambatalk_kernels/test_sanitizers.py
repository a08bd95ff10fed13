"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: built with both into a folder of its own, then
the tests that move most memory run on that build."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = "strides or float64 or packed or wild or nothing or steps_are or step_of or mixed or extreme or whole or halves"
# Arbitrary shapes, layouts and dtypes; the fast part.
PROPERTIES = "any_scan or any_convolution or any_attention or any_routing or any_mlp"


def _library(name):
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("JAMBATALK_BUILD") == "none", reason="JAMBATALK_BUILD=none: nothing native is wanted"
)
@pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("gcc"), reason="needs GCC on Linux")
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    preload = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in preload:
        pytest.skip("GCC's sanitizer libraries are not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAMBATALK_")}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "o")],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env=environment | {
            "JAMBATALK_BUILD": "cpu",
            "JAMBATALK_CXXFLAGS": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        },
    )  # fmt: skip
    assert build.returncode == 0, build.stderr[-4000:]
    (library,) = (tmp_path / "lib").glob("_jambatalk_native*.so")
    needed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True).stdout
    assert "libasan" in needed, "the build must really be sanitized"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-k", f"({TESTS} or {PROPERTIES}) and not random",
         "tests/jambatalk_kernels/test_selective_scan.py", "tests/jambatalk_kernels/test_causal_conv1d.py",
         "tests/jambatalk_kernels/test_attention_native.py", "tests/jambatalk_kernels/test_moe_native.py",
         "tests/jambatalk_kernels/test_norms.py", "tests/jambatalk_kernels/test_dropout.py",
         "tests/jambatalk_kernels/test_properties.py", "tests/jambatalk_kernels/test_properties_moe.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env=environment | {
            "PYTHONPATH": str(library.parent),  # before the installed library
            "LD_PRELOAD": " ".join(preload),
            # Python and torch keep memory until the end; only what the kernels touch is of interest.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )  # fmt: skip
    output = run.stdout[-4000:] + run.stderr[-4000:]
    assert run.returncode == 0, output
    assert " passed" in run.stdout and "runtime error" not in output
