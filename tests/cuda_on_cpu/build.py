"""csrc/cuda compiled as plain C++ and loaded: the CUDA kernels' results without a GPU (see cuda_runtime.h)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# Kept between sessions, named after what they were made of.
BUILT = ROOT / "build" / "cuda_on_cpu"


def load() -> SimpleNamespace:
    """-> the ops (selective_scan, moe_route and so on: the schemas of csrc/schemas.h) on CPU tensors, the library
    itself, ``order(backwards)``, which turns the order of threads and blocks around, and ``lose_block(number)``: that
    block of a cooperative launch never begins (-1: all do)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the CUDA kernels cannot be compiled for the host")
    return _load()


@functools.cache
def _load() -> SimpleNamespace:
    import torch

    path = build(*shlex.split(os.environ.get("CUDA_ON_CPU_FLAGS", "")))
    torch.ops.load_library(str(path))
    ops = torch.ops.jambatalk_cuda_on_cpu
    kinds = {"selective_scan": ("", "_backward", "_step"), "causal_conv1d": ("", "_backward", "_step")}
    kinds |= {"moe_route": ("", "_backward")}
    functions = {name + kind: getattr(ops, name + kind).default for name in kinds for kind in kinds[name]}
    library = ctypes.CDLL(str(path))
    return SimpleNamespace(
        **functions,
        rollout=ops.rollout.default,
        library=library,
        order=lambda backwards: library.cuda_on_cpu_order(int(backwards)),
        lose_block=library.cuda_on_cpu_lose_block,
    )


def build(*flags: str) -> Path:
    """Compile everything with g++ (what has changed since the last time); -> the library.

    ``flags`` are added to every compile and link.
    """
    torch = Path(importlib.util.find_spec("torch").origin).parent
    sources = [
        *sorted(CSRC.glob("cuda/*.cu")),
        CSRC / "cuda" / "binding.cpp",
        *sorted([*HERE.glob("*.cpp"), *HERE.glob("*.cu")]),
    ]
    options = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    options += [
        "-Wno-unused-parameter",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Werror",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    options += ["-DJAMBATALK_CUDA_ON_CPU", f"-I{HERE}", f"-I{CSRC}", f"-isystem{torch / 'include'}", *flags]
    libraries = [*flags, f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    headers = [*CSRC.glob("cuda/*.h"), *CSRC.glob("common/*.h"), CSRC / "cpu" / "ops.h", CSRC / "schemas.h"]
    common = repr((options, compiler, (torch / "version.py").read_text()))
    common += "".join(path.read_text() for path in sorted([*headers, *HERE.glob("*.h")]))
    BUILT.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = _place(source.stem, ".o", common + source.read_text())
        return _make(target, "g++", *options, "-x", "c++", "-c", str(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    return _make(_place("cuda_on_cpu", ".so", repr(objects)), "g++", "-shared", *objects, *libraries)


def _place(name: str, suffix: str, made_of: str) -> Path:
    return BUILT / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}{suffix}"


def _make(target: Path, *command: str) -> Path:
    if target.exists():
        target.touch()
        return target
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        done = subprocess.run([*command, "-o", f"{folder}/done"], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        os.replace(f"{folder}/done", target)
    for old in sorted(BUILT.glob("*.*"), key=lambda path: path.stat().st_mtime)[:-64]:
        old.unlink(missing_ok=True)
    return target
