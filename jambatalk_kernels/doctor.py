"""python -m jambatalk_kernels.doctor [--json]: what is built, what runs where, and why not.

Exit code 0 when the native library is loaded, 1 when every op runs on the slow reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

import torch

from jambatalk_kernels import backends

# Which backends each op has been written for. What is missing here does not exist yet, on any machine.
WRITTEN: dict[str, tuple[str, ...]] = {
    "selective_scan": ("cpu", "triton", "cuda", "reference"),
    "selective_scan_step": ("cpu", "triton", "cuda", "reference"),
    "causal_conv1d": ("cpu", "triton", "cuda", "reference"),
    "causal_conv1d_step": ("cpu", "triton", "cuda", "reference"),
    "moe_route": ("cpu", "triton", "cuda", "reference"),
    "load_balancing_loss": ("reference",),
    "moe_mlp": ("cpu", "triton", "reference"),
    "rope_attention": ("cpu", "triton", "reference"),
    "rope_attention_step": ("cpu", "triton", "reference"),
    "rollout": ("cpu", "triton", "cuda", "reference"),
}

ENVIRONMENT = {
    "JAMBATALK_KERNELS_BACKEND": "forces backends, in order of preference",
    "JAMBATALK_KERNELS_CHECK": "1: validates values, fills new outputs with NaN",
    "JAMBATALK_CPU_ISA": "forces avx512, avx2 or plain (or wide, for tests)",
    "JAMBATALK_BUILD": "at build time: auto, cpu, cuda or none",
    "TORCH_CUDA_ARCH_LIST": "at build time: the GPUs to compile for, 8.0;9.0a;12.0+PTX",
    "TRITON_INTERPRET": "1: Triton kernels are interpreted, on CPU tensors",
}


def examine() -> dict:
    """Everything the doctor knows, as plain data (see --json)."""
    return {
        "package": _package(),
        "native": _native(),
        "machine": {
            "processor": _processor(),
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cuda_capability": _capability(),
            "torch_cuda": torch.version.cuda,
        },
        "backends": _backends(),
        "ops": {op: _op(op, written) for op, written in WRITTEN.items()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _package() -> dict:
    """Where the Python sources run from: a clone's own folder, or the installed package."""
    folder = Path(__file__).resolve().parent.parent
    clone = (folder / "setup.py").is_file() and (folder / "csrc").is_dir()
    installed = None
    for distribution in importlib.metadata.distributions(name="jambatalk"):
        where = Path(str(distribution.locate_file(""))).resolve()
        if not (clone and where == folder):  # a build leaves metadata in the clone, which is not an installation
            installed = {"version": distribution.version, "folder": str(where)}
            break
    return {"folder": str(folder), "runs_from": "clone" if clone else "installed package", "installed": installed}


def _native() -> dict:
    loaded, reason = backends.native_library()
    result: dict = {"loaded": loaded, "reason": reason}
    spec = importlib.util.find_spec(backends.NATIVE_MODULE)
    if spec is None or spec.origin is None:
        return result
    library = Path(spec.origin)
    result["file"] = str(library)
    sources = Path(__file__).resolve().parent.parent / "csrc"
    if sources.is_dir():
        newest = max((path.stat().st_mtime for path in sources.rglob("*") if path.is_file()), default=0.0)
        result["sources_are_newer"] = newest > library.stat().st_mtime
    if loaded:
        module = sys.modules[backends.NATIVE_MODULE]
        result |= {
            "version": module.VERSION,
            "compiler": module.COMPILER,
            "built_with_torch": module.BUILT_WITH_TORCH,
            "cuda_architectures": getattr(module, "CUDA_ARCHITECTURES", ""),
            "instruction_sets": [name for name in module.supported_cpu_isas() if name != "wide"],
        }
        try:
            result["instruction_set"] = module.cpu_isa()
        except RuntimeError as error:  # JAMBATALK_CPU_ISA names one that this processor does not have
            result["instruction_set"] = None
            result["reason"] = str(error)
    return result


def _capability() -> str | None:
    """The GPU's, as "sm_90"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _cuda_architectures() -> str:
    return getattr(sys.modules.get(backends.NATIVE_MODULE), "CUDA_ARCHITECTURES", "")


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> dict[str, str]:
    """Backend -> "runs", on what, or why it does not."""
    loaded, reason = backends.native_library()
    version, architectures, gpu = _triton_version(), _cuda_architectures(), _capability()
    triton = "not installed" if version is None else f"{version}, {f'runs on {gpu}' if gpu else 'no GPU here'}"
    cuda = "the native library was built without CUDA" if loaded else reason
    if architectures:
        cuda = f"built for {architectures}, " + ("no GPU here" if gpu is None else f"GPU here: {gpu}")
        shown = sorted(op for op, backend, name in backends.VALIDATED if backend == "cuda" and name == gpu)
        if gpu is not None:
            cuda += f", validated there: {', '.join(shown) or 'nothing; chosen only when forced'}"
    return {"reference": "runs", "cpu": "runs" if loaded else reason, "triton": triton, "cuda": cuda}


def _op(op: str, written: tuple[str, ...]) -> dict:
    """What this op runs on for CPU tensors and for GPU tensors when nothing is forced (without a GPU here: what one of
    sm_80 would run), and on which GPUs its CUDA kernel has been shown to be right."""
    on_cpu = "cpu" if "cpu" in written and backends.native_library()[0] else "reference"
    if torch.cuda.is_available():
        options = backends.candidates(op, torch.empty(0, device="cuda"))
    else:
        options = backends.gpu_candidates((8, 0), _triton_version() is not None, _cuda_architectures(), False)
    on_gpu = next(name for name, reason in options.items() if name in written and reason is None)
    shown = sorted(name for row, backend, name in backends.VALIDATED if (row, backend) == (op, "cuda"))
    return {"written_for": list(written), "cpu_tensors": on_cpu, "gpu_tensors": on_gpu, "cuda_validated_on": shown}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def report(facts: dict) -> str:
    """The facts of :func:`examine` for a person."""
    package, native, machine = facts["package"], facts["native"], facts["machine"]
    lines = [f"Python sources    {package['folder']} ({package['runs_from']})"]
    installed = package["installed"]
    lines.append(
        f"installed package {installed['version']} in {installed['folder']}" if installed else "installed package none"
    )
    lines.append(f"native library    {'loaded' if native['loaded'] else 'NOT loaded'}: {native['reason']}")
    if native["loaded"]:
        lines.append(f"  built by        {native['compiler']}, with the headers of torch {native['built_with_torch']}")
        lines.append(
            f"  instructions    {native['instruction_set']} "
            f"(this processor runs {', '.join(native['instruction_sets'])})"
        )
        lines.append(f"  CUDA            {native['cuda_architectures'] or 'no CUDA kernels in it'}")
    if native.get("sources_are_newer"):
        lines.append("  STALE           csrc/ has changed since it was built: run `pip install .` again")
    lines.append(
        f"machine           {machine['processor']}, {machine['threads']} threads, Python {machine['python']}, "
        f"torch {machine['torch']}, GPU: {machine['cuda_device'] or 'none'}"
    )
    lines.append("backends")
    lines += [f"  {name:15} {state}" for name, state in facts["backends"].items()]
    lines.append("ops               CPU tensors run on; GPU tensors run on")
    lines += [f"  {op:21} {row['cpu_tensors']}; {row['gpu_tensors']}" for op, row in facts["ops"].items()]
    lines.append("environment")
    for name, meaning in ENVIRONMENT.items():
        lines.append(f"  {name:27} {facts['environment'].get(name, 'not set')}  ({meaning})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jambatalk_kernels.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options = parser.parse_args(arguments)
    facts = examine()
    print(json.dumps(facts, indent=2) if options.json else report(facts))
    return 0 if facts["native"]["loaded"] else 1


if __name__ == "__main__":
    sys.exit(main())
