"""The native library is there, is the one that is used, and holds what it should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jambatalk_kernels import native_library

ROOT = Path(__file__).resolve().parents[2]
NONE = os.environ.get("JAMBATALK_BUILD") == "none"

# Runs the public op with nothing forced, and says which backend took it and where the library came from.
PROBE = """
import torch, jambatalk_kernels
from jambatalk_kernels import backends
chosen = []
original = backends.choose
def record(op, backend, candidates):
    chosen.append(original(op, backend, candidates))
    return chosen[-1]
import jambatalk_kernels.selective_scan.op, sys
sys.modules["jambatalk_kernels.selective_scan.op"].choose = record
sys.modules["jambatalk_kernels.causal_conv1d.op"].choose = record
one = torch.ones(1, 2, 3)
jambatalk_kernels.selective_scan(one, one, -torch.ones(3, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
jambatalk_kernels.causal_conv1d(one, torch.ones(3, 4))
import _jambatalk_native
print(chosen, _jambatalk_native.__file__, jambatalk_kernels.__file__, sep="|")
"""


def _probe(cwd, *flags, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAMBATALK_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *flags, "-c", PROBE],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env | environment,
        timeout=300,
    )


@pytest.mark.skipif(NONE, reason="JAMBATALK_BUILD=none: no native library is wanted")
def test_the_native_library_is_installed():
    loaded, reason = native_library()
    assert loaded, f"{reason}. `make test` installs it; by hand: pip install ."


@pytest.mark.skipif(NONE, reason="JAMBATALK_BUILD=none: no native library is wanted")
def test_it_is_what_runs_from_the_clones_own_folder():
    done = _probe(ROOT)
    assert done.returncode == 0, done.stderr
    chosen, library, package = done.stdout.strip().split("|")
    assert chosen == "['cpu', 'cpu']"
    assert Path(package).is_relative_to(ROOT), "the clone's Python runs"
    assert not Path(library).parent == ROOT, "the library is the installed one, not something left in the clone"


@pytest.mark.skipif(NONE, reason="JAMBATALK_BUILD=none: no native library is wanted")
def test_it_is_what_runs_from_the_installed_package(tmp_path):
    done = _probe(tmp_path)
    assert done.returncode == 0, done.stderr + "\n(is the package installed? pip install .)"
    chosen, _, package = done.stdout.strip().split("|")
    assert chosen == "['cpu', 'cpu']"
    assert not Path(package).is_relative_to(ROOT / "jambatalk_kernels"), "the installed Python runs"


def test_without_it_everything_still_works_and_says_so(tmp_path):
    """As after JAMBATALK_BUILD=none, or without a compiler: the reference runs, with a warning."""
    code = (
        "import sys; sys.modules['_jambatalk_native'] = None\n"
        "import torch, jambatalk_kernels as jk\n"
        "assert not jk.native_library()[0]\n"
        "jk.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4))\n"
        "jk.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4))\n"
        "try: jk.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend='cpu')\n"
        "except jk.BackendUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "'cpu' cannot run this call" in done.stdout
    assert done.stderr.count("running on backend 'reference' because 'cpu' cannot") == 1


@pytest.mark.skipif(NONE, reason="JAMBATALK_BUILD=none: no native library is wanted")
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512"])
def test_the_environment_forces_an_instruction_set(name, tmp_path):
    import _jambatalk_native as native

    code = "import torch, _jambatalk_native as n; print(n.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env=os.environ | {"JAMBATALK_CPU_ISA": name},
    )  # fmt: skip
    if name in native.supported_cpu_isas():
        assert done.stdout.strip() == name
    else:
        assert f"this processor does not run '{name}'" in done.stderr
        pytest.skip(f"this processor has no {name}: only the refusal was tested")


@pytest.mark.skipif(NONE, reason="JAMBATALK_BUILD=none: no native library is wanted")
def test_only_stable_symbols_are_imported():
    """One file for torch 2.11 and newer and Python 3.10 and newer: no C++ symbol of torch, only limited Python API."""
    import _jambatalk_native as native

    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    assert native.__file__.endswith(".abi3.so")
    table = subprocess.run(["objdump", "-T", native.__file__], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in table.splitlines() if "*UND*" in line}
    mangled = {
        name for name in undefined if name.startswith("_ZN") and ("2at" in name or "c10" in name or "5torch" in name)
    }
    assert not mangled
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("objdump"), reason="needs g++ and objdump")
@pytest.mark.parametrize(
    "name, register, other", [("avx512", "%zmm", None), ("avx2", "%ymm", "%zmm"), ("plain", "%xmm", "%ymm")]
)
def test_machine_code_of_the_scan(name, register, other, tmp_path):
    """What the speed rests on: full-width vectors, no call and no scalar exponential in the hot loop."""
    import ast
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86 instruction sets")
    setup = ast.parse((ROOT / "setup.py").read_text())  # read, not run
    (flags,) = (
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "ISA_FLAGS"
    )
    source = f"kernels_{name}.cpp"
    target = tmp_path / "kernels.o"
    subprocess.run(
        ["g++", "-std=c++20", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-Wno-psabi", *flags.get(source, []), f"-I{ROOT / 'csrc'}", "-c",
         str(ROOT / "csrc" / "cpu" / source), "-o", str(target)],
        check=True,
    )  # fmt: skip
    text = subprocess.run(
        ["objdump", "-d", "-r", "-C", "--no-show-raw-insn", str(target)], capture_output=True, text=True, check=True
    ).stdout
    loops = [
        f
        for f in text.split("\n\n")
        if f"{name}::scan_tile" in f.split(">:")[0] and "Lanes<float>, 4" in f.split(">:")[0]
    ]
    assert loops, "the tile of four states is a function of its own"
    for loop in loops:
        assert loop.count(register) > 50
        assert "call" not in loop and "expf" not in loop
        if other:
            assert other not in loop
        if name != "plain":
            assert loop.count("vfmadd") + loop.count("vfnmadd") >= 4 * 8, "polynomial and recurrence are fused"
    # Code for this instruction set must not be a symbol that another file could share: all in its own namespace.
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
    ).stdout
    for line in symbols.splitlines():
        kind, symbol = line.split(maxsplit=2)[1:] if line[0] != " " else line.split(maxsplit=1)
        if kind in "WVu" and not symbol.startswith("DW.ref."):  # a pointer to the C++ runtime, not code
            assert f"jambatalk::{name}::" in symbol, symbol


def _setup_functions():
    """setup.py's names without its run."""
    code = (ROOT / "setup.py").read_text().split("\nWISH =")[0]
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(code, "setup.py", "exec"), names)
    return SimpleNamespace(**names)


KNOWN = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\ncompute_100\ncompute_120\n"


def test_cuda_architectures():
    setup = _setup_functions()
    assert setup.cuda_architectures(None, KNOWN) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    assert setup.cuda_architectures(None, "compute_80\ncompute_90") == ["8.0", "9.0"], "as far as nvcc knows them"
    assert setup.cuda_architectures("9.0a", KNOWN) == ["9.0a"]
    assert setup.cuda_architectures("7.5 8.0;8.9+PTX", KNOWN) == ["8.0", "8.9+PTX"], "older ones are skipped"
    for listed, message in (
        ("Hopper", "got 'Hopper'"),
        ("13.7", "does not compile for 13.7"),
        ("7.0", "nothing is left"),
    ):
        with pytest.raises(SystemExit, match=message):
            setup.cuda_architectures(listed, KNOWN)
    assert setup.architecture_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_torchs_version_is_read(tmp_path):
    setup = _setup_functions()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    assert setup.torch_variable(tmp_path, "__version__") == "2.13.0+cu130"
    assert setup.torch_variable(tmp_path, "cuda") == "13.0"
    assert setup.torch_variable(tmp_path, "hip") is None and setup.torch_variable(tmp_path, "xpu") is None


def test_auto_builds_cuda_where_nvcc_and_torch_have_it(tmp_path, monkeypatch, capsys):
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "bin" / "nvcc").write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\n"
        "  --list-gpu-arch) echo compute_89; echo compute_90;;\n"
        f"  --dryrun) echo '#$ TOP={tmp_path}/bin/..' >&2;;\n"
        "esac\n"
    )
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    setup = _setup_functions()
    found = (str(tmp_path / "bin" / "nvcc"), ["8.9", "9.0"], str(tmp_path / "include"), str(tmp_path / "lib64"))
    for wish, release, expected, words in (
        ("auto", "'13.0'", found, "CUDA kernels for 8.9;9.0"),
        ("auto", "'12.8'", found, "will need a driver for CUDA 13"),
        ("auto", "None", None, "torch has none"),
        ("cuda", "None", found, "CUDA kernels for 8.9;9.0"),
        ("cpu", "'13.0'", None, ""),
    ):
        (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {release}\n")
        setup.find_cuda.__globals__["WISH"] = wish
        assert setup.find_cuda(tmp_path) == expected, wish
        assert words in capsys.readouterr().out
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    setup.find_cuda.__globals__["WISH"] = "auto"
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert setup.find_cuda(tmp_path) is None and "no nvcc" in capsys.readouterr().out


def test_setup_refuses_what_it_cannot_build(tmp_path):
    for name in ("g++", "python3"):  # a machine without nvcc
        if shutil.which(name):
            (tmp_path / name).symlink_to(shutil.which(name))
    for wish, message in (("cuda", "nvcc was not found"), ("everything", "expected auto, cpu, cuda or none")):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=300,
            env={k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
            | {"JAMBATALK_BUILD": wish, "PATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode != 0 and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, "one clear line"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine: the CUDA library is not built")
def test_the_library_with_cuda_loads_without_a_gpu(tmp_path):
    """Built against any torch; beside a CPU build of torch, its CPU ops run and its CUDA ops are registered."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAMBATALK_", "TORCH_"))}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "o")],
        cwd=ROOT, capture_output=True, text=True, timeout=3000,
        env=environment | {"JAMBATALK_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"},
    )  # fmt: skip
    assert build.returncode == 0, build.stderr[-4000:]
    code = (
        "import torch, _jambatalk_native as n\n"
        "print(n.CUDA_ARCHITECTURES, n.__file__)\n"
        "x = torch.ones(1, 5, 4)\n"
        "torch.ops.jambatalk.causal_conv1d(x, torch.ones(4, 3), None, None, None, False)\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('jambatalk::causal_conv1d', 'CUDA'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=environment | {"PYTHONPATH": str(tmp_path / "lib")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"9.0a {tmp_path}") and second == "True"
    (library,) = (tmp_path / "lib").glob("*.so")
    table = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" cuda[A-Z]\w+$", table, re.M), "CUDA's runtime is inside, and stays there"
    needed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"NEEDED\s+libtorch\.so", needed), "through which torch's CUDA library is found"
    assert "libcudart" not in needed and "libtorch_cuda" not in needed
