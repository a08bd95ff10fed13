"""Animations to files: one module per format, this registry, and the promise that a file is whole or not there.

    write(animation, "face.html")     the extension names the format: .html, .npz or .npy

Everything is written to a temporary file in the same folder, flushed to the disk, and renamed over the target at the end.
Whatever goes wrong on the way (a full disk, an interrupt, a NaN in the motion), the target is as it was before.
"""

from __future__ import annotations

import itertools
import os
from fractions import Fraction
from pathlib import Path
from typing import Iterable

import numpy as np

from jambatalk.animation import Animation
from jambatalk.export import html, npy, npz
from jambatalk.export.errors import ExportError

__all__ = ["ExportError", "FORMATS", "check", "write"]

# Each format is a module with EXTENSION, DESCRIPTION (for the command's help), LONGEST (seconds, or None) and
# write(animation, file), which writes to an open binary file and never holds all vertices in memory.
FORMATS = {module.EXTENSION: module for module in (html, npz, npy)}

_numbers = itertools.count()


def check(path: str | os.PathLike, duration: Fraction | float | None = None) -> None:
    """Raises ExportError if `path` cannot be written, as far as can be told without writing. For before the long work.

    duration: seconds of the animation, where known; some formats have a limit.
    """
    path = Path(path)
    module = _format_of(path)
    if duration is not None:
        _check_duration(path, module, duration)
    target = _target(path)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write {path}: no permission to write in the folder {target.parent}")


def write(animation: Animation, path: str | os.PathLike) -> Path:
    """Writes the animation in the format of the path's extension and returns the path. Raises ExportError."""
    path = Path(path)
    module = _format_of(path)
    _check_duration(path, module, animation.duration)
    if not np.isfinite(animation.coefficients).all():
        raise ExportError(f"cannot write {path}: the motion holds NaN or Inf")
    target = _target(path)
    # Not named after the target: a name may already be as long as the file system allows.
    temporary = target.parent / f".jambatalk-{os.getpid()}-{next(_numbers)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                module.write(animation, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _format_of(path: Path):
    module = FORMATS.get(path.suffix.lower())
    if module is None:
        named = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise ExportError(f"cannot write {path}: {named} names no known format; known: {_listed(FORMATS)}")
    return module


def _check_duration(path: Path, module, duration: Fraction | float) -> None:
    if module.LONGEST is not None and duration > module.LONGEST:
        others = _listed(extension for extension, other in FORMATS.items() if other.LONGEST is None)
        raise ExportError(f"cannot write {path}: {float(duration) / 60:.1f} minutes, and {module.EXTENSION} takes at most "
                          f"{module.LONGEST // 60}; write {others} instead")


def _target(path: Path) -> Path:
    """The file to replace: behind symbolic links, in a folder that exists. Raises ExportError."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {path.parent}")
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "not a regular file"
        raise ExportError(f"cannot write {path}: it is {what}")
    return target


def _listed(extensions: Iterable[str]) -> str:
    return ", ".join(extensions)
