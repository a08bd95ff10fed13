"""What the compilers make of the GPU kernels, read without a GPU: registers, spills, shared memory, machine code.

Triton kernels are compiled ahead of time (``triton.compile`` with a ``GPUTarget``), in a process of their own: here
triton may have been imported for its interpreter. ``csrc/cuda/*.cu`` go through nvcc. Both end in cubins, which the
disassembler of Triton's wheel turns into SASS. Everything is compiled once per session and architecture.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What one block may use of shared memory, in bytes, by compute capability (CUDA programming guide, technical
# specifications per compute capability; 1 KiB per block is the system's).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    text: str


@dataclass(frozen=True)
class Code:
    """One kernel (or a stretch of one) as machine instructions, with what the compiler says that it needs."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    constants: dict[str, int] = field(default_factory=dict)  # of a Triton kernel: its integer constexprs
    launches: tuple[dict, ...] = ()  # of a Triton kernel: see jambatalk_kernels/triton_launches.py

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins with ``pattern``, a regular expression: ``LDG.*\\.128``, ``MUFU\\.EX2``."""
        matches = re.compile(pattern).match
        return sum(1 for each in self.instructions if matches(each.opcode))

    def histogram(self) -> Counter[str]:
        return Counter(each.opcode.split(".")[0] for each in self.instructions)

    def innermost_loops(self) -> list[Code]:
        """Every stretch that a backward branch repeats and that holds no other such stretch."""
        spans = set()
        for each in self.instructions:
            target = re.search(r"BRA\S*\s.*?\(?(\.L_x_\w+)\)?", each.text)
            if target and self.labels.get(target[1], each.address) < each.address:
                spans.add((self.labels[target[1]], each.address))

        return [
            Code(self.name, tuple(i for i in self.instructions if start <= i.address <= end))
            for start, end in sorted(spans)
            if not any(other != (start, end) and start <= other[0] and other[1] <= end for other in spans)
        ]

    def hot_loop(self, pattern: str) -> Code:
        """The innermost loop with the most instructions of ``pattern``; the whole kernel where no loop has any."""
        best = max(
            self.innermost_loops(), key=lambda loop: (loop.count(pattern), -len(loop.instructions)), default=self
        )
        return best if best.count(pattern) else self

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spilled registers and arrays that found no registers."""
        return self.count(r"LDL|STL")


def missing_tools() -> str | None:
    """Why no cubin can be read here, or None."""
    try:
        disassembler()
    except FileNotFoundError as error:
        return str(error)
    return None


@functools.cache
def disassembler() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("triton is not installed (its wheel carries nvdisasm)")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not path.exists():
        raise FileNotFoundError("this triton carries no nvdisasm")
    return path


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def disassemble(cubin: Path) -> dict[str, Code]:
    """-> the kernels in a cubin, by name."""
    text = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Code] = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        name, body = part.split(":", 1)
        body = body.split("\t.section", 1)[0]
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        waiting: list[str] = []
        for line in body.splitlines():
            label = re.match(r"(\.L_x_\w+):", line)
            code = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)
            if label:
                waiting.append(label[1])
            elif code:
                address = int(code[1], 16)
                labels.update(dict.fromkeys(waiting, address))
                waiting = []
                opcode = re.sub(r"^@!?U?P\w+\s+", "", code[2]).split()[0]
                instructions.append(Instruction(address, opcode, code[2]))
        kernels[name] = Code(name, tuple(instructions), labels)
    return kernels


# ---- Triton ---------------------------------------------------------------------------------------------------------


@functools.cache
def compile_triton(module: str, capability: int, only: tuple[str, ...] = ()) -> dict[str, Code]:
    """The cases that ``module.ahead_of_time_cases(capability)`` lists, compiled for it (90: sm_90); by name.

    ``only``: the names of those wanted, where not all, or patterns of them ("*4096 tokens*"). A module whose launches
    are the same everywhere may list them without the argument.
    A case is a dict: ``name``; ``kernel``, the jitted function; ``signature``, the type of every parameter, ":16" where
    a launch sees a multiple of 16; ``constexprs``; ``num_warps`` and ``num_stages``.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # The default of today's Triton, said aloud, since it warns that it will change.
        environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        done = subprocess.run(
            [sys.executable, __file__, module, str(capability), folder, *only],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"{module} does not compile for sm_{capability}:\n{done.stderr[-4000:]}")

        def read(facts: dict) -> Code:
            cubin = Path(folder) / facts["cubin"]
            (code,) = disassemble(cubin).values()
            usage = resource_usage(cubin)[code.name]
            return Code(
                facts["name"], code.instructions, code.labels, usage["REG"], usage["STACK"],
                shared_bytes=facts["shared"], warps=facts["warps"], constants=facts["constants"],
                launches=tuple(facts["launches"]),
            )  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = pool.map(read, json.loads((Path(folder) / "cases.json").read_text()))
            return {code.name: code for code in codes}


def resource_usage(cubin: Path) -> dict[str, dict[str, int]]:
    tool = disassembler().with_name("cuobjdump")
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
        for name, facts in re.findall(r"Function (\S+):\s*\n\s*(REG.*)", text)
    }


def _compile_cases(module: str, capability: int, folder: Path, only: list[str]) -> None:
    """In the process of its own: write the cubins and what the launcher would ask for. A process per core compiles."""
    list_cases = importlib.import_module(module).ahead_of_time_cases
    _cases.extend(list_cases(capability) if inspect.signature(list_cases).parameters else list_cases())
    wanted = [
        index
        for index, case in enumerate(_cases)
        if not only or any(fnmatch.fnmatchcase(case["name"], pattern) for pattern in only)
    ]
    compile_one = functools.partial(_compile_case, capability, folder)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        (folder / "cases.json").write_text(json.dumps(list(pool.map(compile_one, wanted))))


_cases: list[dict] = []  # forked processes inherit them; kernels would not go through a pipe


def _compile_case(capability: int, folder: Path, index: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = _cases[index]
    constexprs = dict(case["constexprs"])
    signature, attributes = {}, {}
    for position, name in enumerate(case["kernel"].arg_names):
        kind, _, multiple = case["signature"].get(name, "constexpr").partition(":")
        signature[name] = "constexpr" if name in constexprs else kind
        if multiple and name not in constexprs:
            attributes[(position,)] = [["tt.divisibility", int(multiple)]]
    compiled = triton.compile(
        ASTSource(case["kernel"], signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.get("num_warps", 4), "num_stages": case.get("num_stages", 2)},
    )
    cubin = folder / f"{index}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    constants = {name: value for name, value in constexprs.items() if type(value) is int}
    return {
        "name": case["name"], "cubin": cubin.name, "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps, "constants": constants, "launches": case.get("launches", []),
    }  # fmt: skip


# ---- nvcc -----------------------------------------------------------------------------------------------------------


@functools.cache
def setup_constant(name: str) -> list[str]:
    """A list that setup.py names, such as the flags that the kernels are built with; setup.py itself would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py assigns no {name}")


@functools.cache
def compile_cuda(source: str, architecture: str) -> dict[str, Code]:
    """One .cu file, its path from the root, for "sm_89" and so on; -> its kernels by name with template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "code.cubin"
        command = [
            nvcc(), *setup_constant("NVCC_FLAGS"), "-cubin", f"-arch={architecture}", "-Xptxas", "-v",
            f"-I{ROOT / 'csrc'}", str(ROOT / source), "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{source} does not compile for {architecture}:\n{done.stderr[-4000:]}")
        report = ptxas_report(done.stderr)
        codes = {}
        for mangled, code in disassemble(cubin).items():
            name = kernel_name(mangled)
            codes[name] = Code(name, code.instructions, code.labels, **report[mangled])
        return codes


def compile_cuda_at_once(work: list[tuple[str, str]]) -> None:
    """Compile several (source, architecture) side by side; afterwards compile_cuda has them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda each: compile_cuda(*each), work))


def ptxas_report(text: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spills and static shared memory of every kernel, from ``-Xptxas -v``."""
    report = {}
    for name, facts in re.findall(r"Compiling entry function '(\S+)'.*?\n(.*?Used \d+ registers.*?)\n", text, re.S):

        def number(pattern, facts=facts):
            found = re.search(pattern, facts)
            return int(found[1]) if found else 0

        report[name] = {
            "registers": number(r"Used (\d+) registers"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return report


def kernel_name(mangled: str) -> str:
    """scan_forward_kernel<4, 4, 16>"""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise FileNotFoundError("c++filt (binutils) is not installed")
    name = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").split("(")[0]
    found = re.search(r"(\w+)(<.*>)?$", name)
    assert found, name
    return found[0]


if __name__ == "__main__":
    _compile_cases(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
