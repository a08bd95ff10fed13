"""Which backend runs an op, and why. The only place that decides.

Four backends exist: ``reference`` (plain PyTorch, any device, the definition of every op), ``cpu`` (C++, the native
library), ``triton`` (GPU; anywhere in Triton's interpreter) and ``cuda`` (C++ for GPUs, in the native library).
:func:`candidates` tells for the inputs at hand which of them can run and why the others cannot; :func:`choose` then
applies the user's wish, in this order of precedence:

1. the op's ``backend=`` argument;
2. the innermost ``with use_backend(...)`` block;
3. the environment variable ``JAMBATALK_KERNELS_BACKEND`` ("cpu", or a list in order of preference, "cpu,reference");
4. otherwise the op's own order of preference.

A wish that cannot be met raises :class:`BackendUnavailable` and says why. An automatic fallback warns, once per op and
reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch  # before the native library, which links against it
from torch import Tensor

__all__ = [
    "BACKENDS", "BackendUnavailable", "VALIDATED", "candidates", "choose", "native_library", "native_on_cpu",
    "use_backend", "without_step_gradients",
]  # fmt: skip

BACKENDS = ("reference", "cpu", "triton", "cuda")

ENVIRONMENT_VARIABLE = "JAMBATALK_KERNELS_BACKEND"
NATIVE_MODULE = "_jambatalk_native"
# Must equal JAMBATALK_NATIVE_VERSION in csrc/registration.cpp: a clone may run beside a library of older sources.
NATIVE_VERSION = 5

# (op, backend, architecture) -> the file in benchmarks/results/ that shows the kernel running there. A GPU kernel
# without a row is chosen only when forced. The CPU kernels are not listed: the test suite runs them wherever it runs.
VALIDATED: dict[tuple[str, str, str], str] = {}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run these inputs; the message names op, backend and reason."""


class _Preference(threading.local):
    """The stack of ``use_backend`` blocks of this thread."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, ...]] = []


_preference = _Preference()
_warned: set[tuple[str, str]] = set()


def _load_native() -> tuple[bool, str]:
    try:
        spec = importlib.util.find_spec(NATIVE_MODULE)
    except (ImportError, ValueError) as error:
        return False, f"{NATIVE_MODULE} could not be looked up: {error}"
    if spec is None:
        return False, "the native library is not installed (run `pip install .`; a C++ compiler is needed)"
    try:
        module = importlib.import_module(NATIVE_MODULE)
    except (ImportError, OSError) as error:
        return False, f"the native library at {spec.origin} does not load: {error}"
    version = getattr(module, "VERSION", None)
    if version != NATIVE_VERSION:
        return False, (
            f"the native library at {spec.origin} is version {version} and these sources need {NATIVE_VERSION} "
            "(run `pip install .` again)"
        )
    return True, f"loaded from {spec.origin}"


# Loading registers the ops with torch, so it happens once, when the package is imported.
_NATIVE = _load_native()


def native_library() -> tuple[bool, str]:
    """Is the C++ library loaded? -> (loaded, where it was loaded from or why it was not)."""
    return _NATIVE


def native_on_cpu(x: Tensor) -> bool:
    """Can a function that is native on a CPU and PyTorch's everywhere else run natively?"""
    on_cpu = x.device.type == "cpu" and x.is_floating_point()
    return on_cpu and native_library()[0] and not torch.compiler.is_compiling()


# Why a backend cannot run, or None when it can; a function where finding out costs time that few calls need.
Reason = str | None | Callable[[], str | None]


def _why_no_interpreter() -> str | None:
    """Triton's kernels run on CPU tensors in its interpreter only, which tests use."""
    if not _TRITON_IS_INSTALLED:
        return "triton is not installed"
    # What triton took from the environment, once it is imported; a compiler that traces cannot look into it.
    triton = None if torch.compiler.is_compiling() else sys.modules.get("triton")
    interprets = triton.knobs.runtime.interpret if triton else os.environ.get("TRITON_INTERPRET", "0") == "1"
    return None if interprets else "the inputs are on the CPU (TRITON_INTERPRET=1 would interpret the kernels there)"


_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_ON_CPU: Mapping[str, Reason] = {
    "cpu": None if _NATIVE[0] else _NATIVE[1],
    "reference": None,
    "triton": _why_no_interpreter,
    "cuda": "the inputs are on the CPU",
}


def candidates(op: str, tensor: object) -> Mapping[str, Reason]:
    """The backends of ``op`` for inputs like ``tensor``, best first, for an op that is written for all of them.

    Something that is not a tensor counts as one on the CPU: the op's checks refuse it in words.
    """
    device = tensor.device if isinstance(tensor, Tensor) else None
    if device is None or device.type == "cpu":
        return _ON_CPU
    if device.type == "cuda":
        return _on_gpu(op, device.index)
    return {"reference": None, **dict.fromkeys(("cpu", "triton", "cuda"), f"the inputs are on {device}")}


@functools.cache
def _on_gpu(op: str, index: int) -> Mapping[str, Reason]:
    capability = torch.cuda.get_device_capability(index)
    architectures = getattr(sys.modules.get(NATIVE_MODULE), "CUDA_ARCHITECTURES", "")
    validated = (op, "cuda", f"sm_{capability[0]}{capability[1]}") in VALIDATED
    return gpu_candidates(capability, _TRITON_IS_INSTALLED, architectures, validated)


def gpu_candidates(
    capability: tuple[int, int], triton: bool, architectures: str, validated: bool
) -> Mapping[str, Reason]:
    """The backends on a GPU, best first.

    A CUDA C++ kernel goes before Triton's where a card of this kind has shown it to be right (``validated``), and
    otherwise runs only when forced.

    Args:
        capability: of the GPU. triton: is it installed? architectures: what the native library was built for, as in
            TORCH_CUDA_ARCH_LIST ("8.0;9.0a;12.0+PTX"; empty without CUDA). validated: has this kernel a row in
            :data:`VALIDATED` for this GPU?
    """
    name = f"sm_{capability[0]}{capability[1]}"
    cuda: str | None = None
    if not architectures:
        cuda = "the native library was built without CUDA"
    elif not any(_covers(entry, capability) for entry in architectures.split(";")):
        cuda = f"the native library was built for {architectures}, and this GPU is {name}"
    why_no_triton: str | None = None
    if not triton:
        why_no_triton = "triton is not installed"
    elif capability < (8, 0):
        why_no_triton = f"the Triton kernels need a GPU of sm_80 or newer, and this one is {name}"
    elsewhere = {"cpu": f"the inputs are on a GPU ({name})"}
    if validated and cuda is None:
        return {"cuda": None, "triton": why_no_triton, "reference": None, **elsewhere}
    return {"triton": why_no_triton, "reference": None, "cuda": cuda, **elsewhere}


def _covers(entry: str, capability: tuple[int, int]) -> bool:
    """Does code for ``entry`` ("9.0", "9.0a", "12.0+PTX") run on a GPU of ``capability``?"""
    number, _, ptx = entry.partition("+")
    specific = number.endswith(("a", "f"))
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if specific:
        return (major, minor) == capability
    return (major == capability[0] and minor <= capability[1]) or (bool(ptx) and (major, minor) <= capability)


def without_step_gradients(options: Mapping[str, Reason]) -> Mapping[str, Reason]:
    """``options`` for a step that needs gradients, which only ``reference`` has."""
    return {
        name: (reason() if callable(reason) else reason)
        or (None if name == "reference" else "steps have no gradients there and this call needs them")
        for name, reason in options.items()
    }


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Prefer the named backends, in this order, for the ops called inside the block (in this thread).

    One name forces that backend: an op that it cannot run raises :class:`BackendUnavailable`. With several names the
    first that can run is taken, and the error comes when none can.

    Errors: ``ValueError`` for no name or a name that is not in :data:`BACKENDS`.
    """
    if not names:
        raise ValueError("use_backend: expected at least one backend name, got none")
    for name in names:
        _check_name(name, "use_backend")
    # Rebinding, not appending: torch.compile guards on the value.
    outer = _preference.stack
    _preference.stack = [*outer, tuple(names)]
    try:
        yield
    finally:
        _preference.stack = outer


def _check_name(name: object, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")


def _wish(backend: str | None, op: str) -> tuple[str, ...]:
    """The backends that the user asked for, in order of preference; empty when the op may choose."""
    if backend is not None:
        _check_name(backend, op)
        return (backend,)
    if _preference.stack:
        return _preference.stack[-1]
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if not text:
        return ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        _check_name(name, ENVIRONMENT_VARIABLE)
    return names


def choose(op: str, backend: str | None, options: Mapping[str, Reason]) -> str:
    """The backend that runs this call of ``op``.

    ``options`` lists the backends the op has, in order of preference: ``None`` when it can run these inputs, otherwise
    the reason why not, in one clause. Backends that belong to another device come after the one that it falls back
    to, so that not using them counts as nobody's loss and warns nobody.

    Errors: ``ValueError`` for an unknown name, :class:`BackendUnavailable` when a wish cannot be met or when no
    candidate can run.
    """
    wish = _wish(backend, op)
    if not wish:
        passed_over = None
        for name, reason in options.items():
            if reason is None or (callable(reason) and (reason := reason()) is None):
                if passed_over is not None:
                    _warn_once(op, name, *passed_over)
                return name
            if passed_over is None:
                passed_over = (name, reason)
        wish = tuple(options)
    reasons = []
    for name in wish:
        if name not in options:
            reasons.append(f"backend {name!r} does not exist for this op (it has {', '.join(options)})")
            continue
        reason = options[name]
        if callable(reason):
            reason = reason()
        if reason is None:
            return name
        reasons.append(f"backend {name!r} cannot run this call: {reason}")
    raise BackendUnavailable(f"{op}: {'; '.join(reasons)}")


def _warn_once(op: str, used: str, skipped: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(
            f"{op}: running on backend {used!r} because {skipped!r} cannot: {reason}", RuntimeWarning, stacklevel=4
        )
