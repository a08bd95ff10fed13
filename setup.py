"""Builds csrc/ into one module, _jambatalk_native. Everything else is in pyproject.toml.

JAMBATALK_BUILD=auto|cpu|cuda|none says what to build:
  auto  the CPU library where there is a C++ compiler, otherwise nothing (the package works without, slower)
  cpu   the CPU library, or an error
  cuda  an error for now: csrc/cuda is not written yet
  none  nothing

MAX_JOBS limits the number of compilers that run at once. JAMBATALK_CXXFLAGS is appended to every compile and link
(the sanitizer test uses it).

The library uses PyTorch's stable ABI and Python's limited API only: it is built against the headers of one torch and
runs on torch 2.11 and newer and on Python 3.10 and newer. The build imports neither torch nor a GPU driver.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/registration.cpp",
    "csrc/cpu/selective_scan.cpp",
    "csrc/cpu/causal_conv1d.cpp",
    "csrc/cpu/tensors.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/kernels_plain.cpp",
    "csrc/cpu/kernels_wide.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
]
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

# The files of one instruction set are compiled for it; every other file runs on any machine of the architecture.
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}


def what_to_build() -> str:
    wish = os.environ.get("JAMBATALK_BUILD", "auto").strip().lower()
    if wish not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"JAMBATALK_BUILD: expected auto, cpu, cuda or none, got {wish!r}")
    if wish == "cuda":
        raise SystemExit("JAMBATALK_BUILD=cuda: the CUDA kernels are not written yet; use auto or cpu")
    if wish != "auto":
        return wish
    if platform.system() == "Windows":
        print("JAMBATALK_BUILD=auto: the CPU kernels need GCC or Clang; building without them")
        return "none"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if not any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++")):
        print("JAMBATALK_BUILD=auto: no C++ compiler found; building without the CPU kernels")
        return "none"
    return "cpu"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "building the native kernels needs torch's headers: run `pip install .` with build isolation, "
            "or install torch first, or set JAMBATALK_BUILD=none"
        )
    return Path(spec.origin).parent


class BuildNative(build_ext):
    """Compiles each file with the flags of its instruction set, several at once."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        extra = shlex.split(os.environ.get("JAMBATALK_CXXFLAGS", ""))
        flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
        flags += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
        flags += [f"-ffile-prefix-map={ROOT.resolve()}/="]  # no path of the building machine in error messages
        macros = [
            ("TORCH_TARGET_VERSION", "0x020b000000000000ULL"),  # the oldest torch that it runs on: 2.11
            ("Py_LIMITED_API", "0x030A0000"),
            ("JAMBATALK_BUILT_WITH_TORCH", f'"{torch_version(torch)}"'),
        ]
        include_dirs = [*self.include_dirs, str(torch / "include"), str(ROOT / "csrc")]
        if self.compiler.compiler_type != "unix":
            raise SystemExit("the CPU kernels need GCC or Clang; set JAMBATALK_BUILD=none to install without them")

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=include_dirs,
                extra_postargs=flags + isa_flags(source) + extra,
                depends=ext.depends,
            )

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch", "torch_cpu", "c10"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=["-s", *extra],
            target_lang="c++",
        )


def isa_flags(source: str) -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []  # those files compile to nothing elsewhere
    return ISA_FLAGS.get(Path(source).name, [])


def torch_version(torch: Path) -> str:
    """Read, not imported: importing torch takes seconds."""
    for line in (torch / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=", 1)[1].strip().strip("'\"")
    return "unknown"


if what_to_build() == "none":
    setup()
else:
    native = Extension("_jambatalk_native", SOURCES, depends=HEADERS, py_limited_api=True)
    setup(
        ext_modules=[native],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
