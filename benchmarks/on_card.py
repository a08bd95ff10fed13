"""python benchmarks/on_card.py [--seconds N]: everything that a machine with a GPU is for, in one command.

Builds the native library for this card, runs tests/gpu, the memory checker on a part of them, and the GPU benchmarks
under their cap; writes the logs, the result file and summary.json to $OUT (or ./on-card). Each part is cut off where it
would overrun, and no part stops the next. Needs a checkout, nvcc, torch, triton and pytest; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "test_accuracy and cuda and float32 and 130 or test_packed and cuda and bfloat16 and 190"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=560, help="stop after this long")
    end = time.monotonic() + parser.parse_args().seconds
    out = Path(os.environ.get("OUT", "on-card"))
    out.mkdir(parents=True, exist_ok=True)
    work = Path("/tmp/jambatalk-on-card")
    python = sys.executable
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(work / "lib"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "JAMBATALK_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": capability(python),
    }
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parts = {  # name -> command, share of the time that is left
        "build": (
            [python, "setup.py", "-q", "build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work / "o")],
            0.5,
        ),
        "doctor": ([python, "-m", "jambatalk_kernels.doctor"], 0.2),
        "tests": ([*pytest, "tests/gpu"], 0.5),
        "benchmarks": ([*pytest, "benchmarks", "-k", "cuda", "--results", str(out)], 0.7),
        "sanitizer": (["compute-sanitizer", "--error-exitcode", "9", *pytest, "tests/gpu", "-k", SANITIZED], 0.9),
    }
    summary = {}
    for name, (command, share) in parts.items():
        if shutil.which(command[0]) is None:
            summary[name] = {"result": f"{command[0]} is not on this machine"}
            continue
        start = time.monotonic()
        with open(out / f"{name}.log", "w") as log:
            try:
                limit = max(1.0, (end - start) * share)
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                result = "passed" if code == 0 else f"failed with code {code}"
            except subprocess.TimeoutExpired:
                result = f"cut off after {limit:.0f} s"
        summary[name] = {"result": result, "seconds": round(time.monotonic() - start, 1)}
        print(f"==== {name}: {summary[name]}")
        print("\n".join((out / f"{name}.log").read_text(errors="replace").splitlines()[-25:]), flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def capability(python: str) -> str:
    """9.0, as TORCH_CUDA_ARCH_LIST wants it; asked in another process, so that this one holds no GPU."""
    code = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
