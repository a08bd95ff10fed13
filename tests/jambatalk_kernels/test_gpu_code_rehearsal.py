"""tests/gpu itself is right: it passes on the CPU, with the CPU's kernels in place of a GPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jambatalk_kernels import native_library

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not native_library()[0], reason="the CPU's kernels are not built")
def test_rehearsal_of_the_gpu_tests():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")],
        env={**environment, "JAMBATALK_GPU_TESTS": "rehearse"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
