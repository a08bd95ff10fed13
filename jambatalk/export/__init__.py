"""Animations to files: one module per format, this registry, and the promise that a file is whole or not there.

    write(animation, "face.html")     the extension names the format: .html, .npz or .npy

Everything is written to a temporary file in the same folder, flushed to the disk, and renamed over the target at the
end. Whatever goes wrong on the way (a full disk, an interrupt, a NaN in the motion), the target is as it was before.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from jambatalk.animation import Animation
from jambatalk.export import html, npy, npz
from jambatalk.export.errors import ExportError

__all__ = ["ExportError", "FORMATS", "check", "write"]

# Each format is a module with EXTENSION, DESCRIPTION (for the command's help), LONGEST (seconds, or None) and
# write(animation, file), which writes to an open binary file and never holds all vertices in memory.
FORMATS: dict[str, ModuleType] = {module.EXTENSION: module for module in (html, npz, npy)}


def check(path: str | os.PathLike, duration: Fraction | float | None = None) -> None:
    """Raises ExportError if `path` cannot be written, as far as can be told beforehand. For before the long work.

    duration: seconds of the animation, where known; some formats have a limit.
    """
    path = Path(path)
    with _named(path):
        module = _format_of(path)
        if duration is not None:
            _check_duration(module, duration)
        with _replacing(_target(path), keep=False):  # trying is surer than asking for permissions
            pass


def write(animation: Animation, path: str | os.PathLike) -> Path:
    """Writes the animation in the format of the path's extension and returns the path. Raises ExportError."""
    path = Path(path)
    with _named(path):
        module = _format_of(path)
        _check_duration(module, animation.duration)
        if not np.isfinite(animation.coefficients).all():
            raise ExportError("the motion holds NaN or Inf")
        with _replacing(_target(path)) as file:
            module.write(animation, file)
    return path


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what went wrong into one line that names the file."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"cannot write {path}: {error}") from None
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _replacing(target: Path, keep: bool = True) -> Iterator[BinaryIO]:
    """A new file to write to; on a clean exit it takes the target's place, otherwise (or without `keep`) it goes."""
    # Not named after the target: a name may already be as long as the file system allows.
    temporary = target.parent / f".jambatalk-{secrets.token_hex(6)}.tmp"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if keep:
                os.fsync(file.fileno())
        if keep:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _format_of(path: Path) -> ModuleType:
    module = FORMATS.get(path.suffix.lower())
    if module is None:
        named = f"the extension {path.suffix!r}" if path.suffix else "a name without extension"
        raise ExportError(f"{named} stands for no known format; known: {_listed(FORMATS)}")
    return module


def _check_duration(module: ModuleType, duration: Fraction | float) -> None:
    if module.LONGEST is not None and duration > module.LONGEST:
        others = _listed(extension for extension, other in FORMATS.items() if other.LONGEST is None)
        raise ExportError(
            f"{float(duration) / 60:.1f} minutes, and {module.EXTENSION} takes at most "
            f"{module.LONGEST // 60}; write {others} instead"
        )


def _target(path: Path) -> Path:
    """The file to replace: behind symbolic links, in a folder that exists. Raises ExportError."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}")
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "not a regular file"
        raise ExportError(f"it is {what}")
    return target


def _listed(extensions: Iterable[str]) -> str:
    return ", ".join(extensions)
