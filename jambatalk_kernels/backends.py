"""Which backend runs an op, and why. The only place that decides.

Four backends exist: ``reference`` (plain PyTorch, any device, the definition of every op), ``cpu`` (C++, the native
library), ``triton`` and ``cuda`` (GPU). Every op states, for the inputs at hand, which of them can run and why the
others cannot; :func:`choose` then applies the user's wish, in this order of precedence:

1. the op's ``backend=`` argument;
2. the innermost ``with use_backend(...)`` block;
3. the environment variable ``JAMBATALK_KERNELS_BACKEND`` ("cpu", or a list in order of preference, "cpu,reference");
4. otherwise the op's own order of preference.

A wish that cannot be met raises :class:`BackendUnavailable` and says why. An automatic fallback warns, once per op and
reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch  # noqa: F401  (the native library links against it)

__all__ = ["BACKENDS", "BackendUnavailable", "VALIDATED", "choose", "native_library", "use_backend"]

BACKENDS = ("reference", "cpu", "triton", "cuda")

ENVIRONMENT_VARIABLE = "JAMBATALK_KERNELS_BACKEND"
NATIVE_MODULE = "_jambatalk_native"
# Must equal JAMBATALK_NATIVE_VERSION in csrc/registration.cpp: a clone may run beside a library of older sources.
NATIVE_VERSION = 1

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


def choose(op: str, backend: str | None, candidates: Mapping[str, str | None]) -> str:
    """The backend that runs this call of ``op``.

    ``candidates`` lists the backends the op has, in order of preference: ``None`` when it can run these inputs,
    otherwise the reason why not, in one clause. An op puts the backends that belong to another device after the
    one that it falls back to, so that not using them counts as nobody's loss and warns nobody.

    Errors: ``ValueError`` for an unknown name, :class:`BackendUnavailable` when a wish cannot be met or when no
    candidate can run.
    """
    wish = _wish(backend, op)
    if not wish:
        passed_over = None
        for name, reason in candidates.items():
            if reason is None:
                if passed_over is not None:
                    _warn_once(op, name, *passed_over)
                return name
            if passed_over is None:
                passed_over = (name, reason)
        wish = tuple(candidates)
    reasons = []
    for name in wish:
        if name not in candidates:
            reasons.append(f"backend {name!r} does not exist for this op (it has {', '.join(candidates)})")
        elif candidates[name] is None:
            return name
        else:
            reasons.append(f"backend {name!r} cannot run this call: {candidates[name]}")
    raise BackendUnavailable(f"{op}: {'; '.join(reasons)}")


def _warn_once(op: str, used: str, skipped: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(
            f"{op}: running on backend {used!r} because {skipped!r} cannot: {reason}", RuntimeWarning, stacklevel=4
        )
