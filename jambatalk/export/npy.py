"""NumPy array of vertices: (frames, V, 3) float32 in metres, one frame every 1/fps seconds. Streamed, any length."""

from __future__ import annotations

from typing import IO

import numpy as np

from jambatalk.animation import Animation

EXTENSION = ".npy"
DESCRIPTION = "vertices (frames, V, 3) float32, metres"
LONGEST = None


def write(animation: Animation, file: IO[bytes]) -> None:
    write_header(file, (animation.frames, *animation.template.shape), "<f4")
    # Plain writes: a memory map would turn a full disk into a bus error.
    for vertices in animation.iter_vertices():
        file.write(np.ascontiguousarray(vertices, "<f4").data)


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
