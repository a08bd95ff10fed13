"""A moving face, kept small: per-frame coefficients and the shapes that they weigh.

    vertices[t] = template + (basis @ coefficients[t] + offset).reshape(V, 3)

An hour at 30 frames/s is 108000 frames: 28 MB of coefficients against 6.6 GB of vertices. So vertices are computed
where they are asked for, and `iter_vertices` hands them to a writer a few at a time.

Numpy only: an animation can be read, resampled and written where there is no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from jambatalk.audio import exact_fps, frames_for


@dataclass
class Animation:
    """Metres, y up, the face looking to +z. Frame t shows the time t / fps.

    coefficients: (frames, r) float32.
    basis: (3V, r) float32, xyz of a vertex in a row of three. Need not be orthonormal.
    template: (V, 3) float32, the face at rest. faces: (F, 3) int32, counter-clockwise seen from outside.
    fps: frames per second, kept as a Fraction (25, "30000/1001" and 29.97 are taken too).
    offset: (3V,) float32 added to every frame, or None.
    audio: (samples (n,) float32, rate in Hz) that the face speaks, or None.
    regions: named arrays over the mesh: "part" (V,) int64 labels, "lips", "inner_lip_upper", ... vertex indices;
        "colour" (V, 3) sRGB in 0..1, what a picture paints a vertex with (NaN: as it would otherwise).
    opening_scale: the mouth's inner-lip gap above the template's that counts as open, metres; 0 where unknown.
    subject: the identity in whose style it speaks.
    seconds: what each stage took; "vertices" grows with every vertex that is computed.
    duration: exact seconds of the sound; from `audio`, else from the frames, if not given.
    """

    coefficients: np.ndarray
    basis: np.ndarray
    template: np.ndarray
    faces: np.ndarray
    fps: Fraction
    offset: np.ndarray | None = None
    audio: tuple[np.ndarray, int] | None = None
    regions: dict[str, np.ndarray] = field(default_factory=dict)
    opening_scale: float = 0.0
    subject: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    duration: Fraction = None  # type: ignore[assignment]  # never None afterwards: __post_init__ works it out

    if TYPE_CHECKING:  # it takes more than it keeps

        def __init__(
            self,
            coefficients: np.ndarray,
            basis: np.ndarray,
            template: np.ndarray,
            faces: np.ndarray,
            fps: Fraction | float | str,
            offset: np.ndarray | None = None,
            audio: tuple[np.ndarray, int] | None = None,
            regions: dict[str, np.ndarray] = ...,
            opening_scale: float = 0.0,
            subject: str = "",
            seconds: dict[str, float] = ...,
            duration: Fraction | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        self.fps = exact_fps(self.fps)
        self.coefficients = _array("coefficients", self.coefficients, np.float32, 2)
        self.basis = _array("basis", self.basis, np.float32, 2)
        self.template = _array("template", self.template, np.float32, 2)
        self.faces = _array("faces", self.faces, np.int32, 2)
        numbers = self.template.size
        if self.template.shape[1] != 3 or self.faces.shape[1] != 3:
            raise ValueError(f"template {self.template.shape} and faces {self.faces.shape} must have 3 columns")
        if self.basis.shape != (numbers, self.coefficients.shape[1]):
            raise ValueError(
                f"basis must be {(numbers, self.coefficients.shape[1])} for template {self.template.shape} "
                f"and coefficients {self.coefficients.shape}, not {self.basis.shape}"
            )
        if self.offset is not None:
            self.offset = _array("offset", self.offset, np.float32, 1)
            if self.offset.shape != (numbers,):
                raise ValueError(f"offset must be {(numbers,)}, not {self.offset.shape}")
        if self.faces.size and not 0 <= self.faces.min() <= self.faces.max() < len(self.template):
            raise ValueError(f"faces must index the {len(self.template)} vertices of the template")
        if self.duration is None:
            self.duration = (
                Fraction(self.frames) / self.fps
                if self.audio is None
                else Fraction(len(self.audio[0]), int(self.audio[1]))
            )

    @property
    def frames(self) -> int:
        return len(self.coefficients)

    @property
    def vertices(self) -> np.ndarray:
        """(frames, V, 3) float32, metres. Computed anew each time: 61 kB a frame for 5085 vertices."""
        return self.vertices_at(slice(None))

    def vertices_at(self, frames: slice | int | np.ndarray) -> np.ndarray:
        """(n, V, 3) float32 of the chosen frames."""
        start = time.perf_counter()
        coefficients = np.atleast_2d(self.coefficients[frames])
        vertices = (coefficients @ self.basis.T).reshape(len(coefficients), -1, 3)
        vertices += self._rest()
        self.seconds["vertices"] = self.seconds.get("vertices", 0.0) + time.perf_counter() - start
        return vertices

    def iter_vertices(self, chunk: int = 256) -> Iterator[np.ndarray]:
        """The same vertices in order, (at most `chunk`, V, 3) at a time."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        for start in range(0, self.frames, chunk):
            yield self.vertices_at(slice(start, start + chunk))

    def _rest(self) -> np.ndarray:
        return self.template if self.offset is None else self.template + self.offset.reshape(-1, 3)

    def resample(self, fps: int | float | str | Fraction) -> Animation:
        """The same motion at another frame rate: round(duration * fps) frames, straight lines between the old ones.

        Times are exact fractions, so frames that fall on an old frame are that frame, bit for bit, however long the
        clip. After the last old frame the face holds still. Raises AudioError where no frame would be left.
        """
        fps = exact_fps(fps)
        frames = frames_for(self.duration, fps)
        if fps == self.fps and frames == self.frames:
            return replace(self, seconds=dict(self.seconds))
        step = self.fps / fps  # old frames per new frame, exact
        position = np.arange(frames, dtype=np.int64) * step.numerator
        before, weight = np.divmod(position, step.denominator)
        weight = (weight / step.denominator).astype(np.float32)[:, None]
        last = self.frames - 1
        here, there = self.coefficients[np.minimum(before, last)], self.coefficients[np.minimum(before + 1, last)]
        mixed = np.where(weight == 0, here, (1 - weight) * here + weight * there)
        return replace(self, coefficients=mixed, fps=fps, seconds=dict(self.seconds))

    def save(self, path: str | os.PathLike) -> None:
        """Writes .html, .npz or .npy, by the extension. Raises jambatalk.export.ExportError."""
        from jambatalk import export  # here: export needs this module

        export.write(self, path)


def _array(name: str, value: np.ndarray, dtype: type, ndim: int) -> np.ndarray:
    array: np.ndarray = np.asarray(value, dtype)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {array.shape}")
    return array
