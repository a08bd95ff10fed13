"""Builds csrc/ into one module, _jambatalk_native. Everything else is in pyproject.toml.

JAMBATALK_BUILD=auto|cpu|cuda|none says what to build:
  auto  the CPU kernels where there is a C++ compiler, and with them the CUDA kernels where there are nvcc and a torch
        with CUDA; otherwise nothing (the package works without, slower)
  cpu   the CPU kernels, or an error
  cuda  the CPU and CUDA kernels, or an error; torch's headers may be those of a CPU build
  none  nothing

TORCH_CUDA_ARCH_LIST ("9.0a", "8.0;8.9+PTX") says for which GPUs; by default for every one from 8.0 that nvcc knows.
CUDA_HOME says where CUDA is; otherwise nvcc is looked for in PATH. MAX_JOBS limits the number of compilers that run at
once. JAMBATALK_CXXFLAGS is appended to every compile and link of C++ (the sanitizer test uses it).

The library uses PyTorch's stable ABI and Python's limited API only: it is built against the headers of one torch and
runs on torch 2.11 and newer and on Python 3.10 and newer; with CUDA kernels it also loads beside a CPU build of torch.
CUDA's runtime is linked in, so the GPU's driver must be of the same major version as nvcc or newer, as it must for
torch. The build imports no torch and asks for no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/registration.cpp",
    "csrc/cpu/selective_scan.cpp",
    "csrc/cpu/causal_conv1d.cpp",
    "csrc/cpu/moe.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/rollout.cpp",
    "csrc/cpu/dropout.cpp",
    "csrc/cpu/norms.cpp",
    "csrc/cpu/tensors.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/kernels_plain.cpp",
    "csrc/cpu/kernels_wide.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
]
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# The files of one instruction set are compiled for it; every other file runs on any machine of the architecture.
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}


def what_to_build() -> str:
    wish = os.environ.get("JAMBATALK_BUILD", "auto").strip().lower()
    if wish not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"JAMBATALK_BUILD: expected auto, cpu, cuda or none, got {wish!r}")
    if wish == "cuda" and nvcc() is None:
        raise SystemExit("JAMBATALK_BUILD=cuda: nvcc was not found; set CUDA_HOME, or use auto or cpu")
    if wish != "auto":
        return wish
    if platform.system() == "Windows":
        print("JAMBATALK_BUILD=auto: the CPU kernels need GCC or Clang; building without them")
        return "none"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if not any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++")):
        print("JAMBATALK_BUILD=auto: no C++ compiler found; building without the CPU kernels")
        return "none"
    return "auto"


class Cuda(NamedTuple):
    """What the CUDA part of a build needs to know."""

    nvcc: str
    architectures: list[str]
    headers: str
    runtime: str  # the folder of libcudart_static.a


def find_cuda(torch: Path) -> Cuda | None:
    """None where CUDA is no part of this build."""
    compiler = nvcc()
    if WISH == "auto":
        release = torch_variable(torch, "cuda")
        if release is None or compiler is None:
            print(f"JAMBATALK_BUILD=auto: without CUDA ({'torch has none' if release is None else 'no nvcc'})")
            return None
        ours = re.search(r"release (\d+)\.", output_of(compiler, "--version"))
        if ours and int(ours[1]) > int(release.split(".")[0]):
            print(f"the CUDA kernels will need a driver for CUDA {ours[1]} (nvcc's); torch is content with {release}")
    elif WISH != "cuda":
        return None
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    architectures = cuda_architectures(listed, output_of(compiler, "--list-gpu-arch"))
    print(f"CUDA kernels for {';'.join(architectures)} by {compiler}")
    return Cuda(compiler, architectures, *cuda_toolkit(compiler))


def nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc")


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def cuda_toolkit(compiler: str) -> tuple[str, str]:
    """-> the folders of CUDA's headers and of its static runtime. nvcc may be a link or a script: it is asked."""
    top = re.search(r"^#\$ TOP=(.*)$", output_of(compiler, "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    home = Path(top[1].strip() if top else Path(compiler).resolve().parent.parent).resolve()
    headers = [
        path for path in (home / "include", *home.glob("targets/*/include")) if (path / "cuda_runtime.h").exists()
    ]
    folders = (home / "lib64", home / "lib", *home.glob("targets/*/lib"))
    libraries = [path for path in folders if (path / "libcudart_static.a").exists()]
    if not headers or not libraries:
        raise SystemExit(f"CUDA in {home}: cuda_runtime.h or libcudart_static.a is missing; set CUDA_HOME")
    return str(headers[0]), str(libraries[0])


def cuda_architectures(listed: str | None, known: str) -> list[str]:
    """What to compile for, as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "12.0+PTX".

    ``listed``: the user's choice, if any. ``known``: what `nvcc --list-gpu-arch` prints.
    """
    supported = {int(number) for number in re.findall(r"compute_(\d+)", known)}
    chosen = []
    for entry in re.split(r"[;,\s]+", (listed or DEFAULT_ARCHITECTURES).strip()):
        form = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if form is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        number = int(form[1] + form[2])
        if number < 80:
            print(f"TORCH_CUDA_ARCH_LIST: the kernels are written for 8.0 and newer; skipping {entry}")
        elif number in supported:
            chosen.append(entry)
        elif listed:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {entry}")
    if not chosen:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={listed}: nothing is left to compile for")
    return chosen


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for entry in architectures:
        number, ptx = entry.removesuffix("+PTX").replace(".", ""), entry.endswith("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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
            ("JAMBATALK_BUILT_WITH_TORCH", f'"{torch_variable(torch, "__version__")}"'),
        ]
        include_dirs = [*self.include_dirs, str(torch / "include"), str(ROOT / "csrc")]
        libraries, library_dirs = ["torch", "torch_cpu", "c10"], [str(torch / "lib")]
        # torch's CUDA library is found through libtorch, which must be there although no symbol of it is used.
        link_flags = ["-s", "-Wl,--no-as-needed"] if platform.system() == "Linux" else ["-s"]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        sources, nvcc_flags = list(ext.sources), []
        cuda = find_cuda(torch)
        if cuda is not None:
            sources = [*CUDA_SOURCES, "csrc/cuda/binding.cpp", *sources]  # first what takes longest
            nvcc_flags = [*NVCC_FLAGS, *architecture_flags(cuda.architectures), f"-I{ROOT / 'csrc'}"]
            nvcc_flags.append(f"--threads={max(1, jobs // len(CUDA_SOURCES))}")
            macros.append(("JAMBATALK_CUDA_ARCHITECTURES", f'"{";".join(cuda.architectures)}"'))
            include_dirs.append(cuda.headers)
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            library_dirs.append(cuda.runtime)
            # Ours must not answer torch's calls of the runtime, nor torch's ours.
            link_flags.append("-Wl,--exclude-libs,libcudart_static.a")
        if self.compiler.compiler_type != "unix":
            raise SystemExit("the CPU kernels need GCC or Clang; set JAMBATALK_BUILD=none to install without them")

        def compile_one(source: str) -> list[str]:
            if source.endswith(".cu"):
                target = Path(self.build_temp) / f"{source}.o"
                target.parent.mkdir(parents=True, exist_ok=True)
                self.spawn([cuda.nvcc, *nvcc_flags, "-c", source, "-o", str(target)])
                return [str(target)]
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=include_dirs,
                extra_postargs=flags + isa_flags(source) + extra,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(max(1, jobs)) as pool:
            objects = [name for names in pool.map(compile_one, sources) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            library_dirs=library_dirs,
            extra_preargs=link_flags,
            extra_postargs=extra,
            target_lang="c++",
        )


def isa_flags(source: str) -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []  # those files compile to nothing elsewhere
    return ISA_FLAGS.get(Path(source).name, [])


def torch_variable(torch: Path, name: str) -> str | None:
    """Read from torch/version.py, not imported: importing torch takes seconds. None where it is None or absent."""
    text = (torch / "version.py").read_text()
    found = re.search(rf"^{name}\b[^=\n]*=\s*['\"](.*)['\"]", text, re.M)
    return found[1] if found else None


WISH = what_to_build()
if WISH == "none":
    setup()
else:
    native = Extension("_jambatalk_native", SOURCES, depends=HEADERS, py_limited_api=True)
    setup(
        ext_modules=[native],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
