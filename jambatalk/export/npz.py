"""NumPy archive: vertices (frames, V, 3) float32 in metres, faces (F, 3) int32, template (V, 3) float32, fps float64.

What `numpy.savez` would write, but streamed, so any length works, and without the time of day: the same animation gives
the same bytes.
"""

from __future__ import annotations

import zipfile
from typing import IO, BinaryIO

import numpy as np

from jambatalk.animation import Animation
from jambatalk.export import npy

EXTENSION = ".npz"
DESCRIPTION = "vertices, faces, template, fps"
LONGEST = None


def write(animation: Animation, file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "vertices") as member:
            npy.write(animation, member)
        for name, array in (
            ("faces", animation.faces.astype("<i4")),
            ("template", animation.template.astype("<f4")),
            ("fps", np.array(float(animation.fps), "<f8")),
        ):
            with _member(archive, name) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=True)
