"""One HTML file that shows and speaks the animation: no server, no network, any browser of 2023 or newer.

What moves is packed by the clip's own principal shapes. The animation is coefficients @ basis.T around a mean, so the
singular values of (frames x 3V) come from matrices of the basis' rank and no large one is ever formed:

    G = basis.T @ basis = U S U.T,   R = sqrt(S) U.T,   C = centred coefficients
    eigenvectors Z of R C.T C R.T    ->   shapes = basis U S^-1/2 Z  (3V, K),   weights = C R.T Z  (frames, K)

Shapes are quantised so that each costs at most the same error at its largest weight, weights to 16 bits; the fewest
shapes are kept that hold every vertex of every frame within ERROR of the animation. The error that was reached is
measured on the packed numbers and stored in the page. Arrays are zigzagged, split into byte planes and deflated.

Sound is 16-bit wav in the page: every browser plays it and seeks in it exactly. About 0.05 MB for a second of sound and
motion, on top of 0.3 MB of mesh and shapes; hence the limit of LONGEST.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jambatalk.animation import Animation
from jambatalk.export.errors import ExportError

EXTENSION = ".html"
DESCRIPTION = "one self-contained page with a viewer and the sound"
LONGEST = 30 * 60  # seconds; about 80 MB, all of which a browser decodes when the page opens

ERROR = 0.05e-3  # metres: the most that a vertex may be off
# metres: of the rounding of one shape at its largest weight; the first that does
_SHAPE_ERROR = (5e-6, 2.5e-6, 1e-6, 1e-7)
_BASE_STEP = 0.005  # millimetres; positions in the page are millimetres
_PROBE = 500  # frames looked at while choosing how many shapes to keep

_VIEWER = Path(__file__).with_name("viewer")

# The numbers of the region "part" (jambatalk.face.regions.PARTS): colour (sRGB), gloss 0..1.
_SKIN, _EYE_PARTS, _MOUTH_PARTS, _LIPS = 0, (1, 2, 3), (4, 5, 6), 7
_PAINT = {
    0: ((0.780, 0.605, 0.525), 0.24),
    1: ((0.850, 0.830, 0.815), 0.95),
    2: ((0.850, 0.830, 0.815), 0.95),
    3: ((0.850, 0.830, 0.815), 0.95),
    4: ((0.900, 0.870, 0.800), 0.60),
    5: ((0.880, 0.850, 0.780), 0.60),
    6: ((0.640, 0.360, 0.350), 0.50),
    7: ((0.715, 0.450, 0.425), 0.42),
}
_CLAY = ((0.745, 0.720, 0.695), 0.20)  # a mesh whose parts are not known


def write(animation: Animation, file: BinaryIO) -> None:
    if len(animation.faces) == 0:
        raise ExportError("there are no triangles to draw: the checkpoint has no faces; .npz and .npy need none")
    file.write(_page(animation).encode("utf-8"))


def _page(animation: Animation) -> str:
    packed = _Packer()
    base, shapes, weights, weight_steps, error = _pack_motion(animation)
    rest = base.reshape(-1, 3) * (_BASE_STEP / 1000)
    colours, surface, eyes = _surface(rest, animation.regions.get("part"))
    painted = animation.regions.get("colour")
    if painted is not None and len(painted) == len(colours):
        colours = np.where(np.isfinite(painted), painted, colours)
    light = _mouth_light(_ambient_light(rest, animation.faces), rest, animation.regions.get("part"))
    packed.add("faces", animation.faces.reshape(-1), "d32")
    packed.add("base", base, "d16" if np.abs(np.diff(base, prepend=0)).max(initial=0) < 1 << 15 else "d32")
    packed.add("shapes", shapes.T.reshape(-1), "i16")
    packed.add("weights", weights.reshape(-1), "i16")
    paint = np.concatenate([_soften(colours, animation), light[:, None]], axis=1)
    packed.add("paint", np.round(255 * paint).reshape(-1), "u8")
    packed.add("surface", surface.reshape(-1), "u8")
    opening = _opening(animation)
    if opening is not None:
        packed.add("opening", np.clip(np.round(opening * 1000), -9999, 9999), "i16")
    sound, rate = _wav(animation)
    facts = {
        "vertices": len(rest),
        "frames": animation.frames,
        "fps": float(animation.fps),
        "duration": float(animation.duration),
        "subject": animation.subject,
        "shapes": shapes.shape[1],
        "base_step": _BASE_STEP,
        "weight_steps": [float(f"{step:.7g}") for step in weight_steps],
        "error_mm": round(error * 1000, 6),
        "sound": rate,
        "view": _framing(rest, animation.faces, eyes),
        "eyes": None if eyes is None else [round(1000 * float(v), 3) for v in eyes],
        "arrays": packed.names,
    }
    page = (_VIEWER / "page.html").read_text("utf-8")
    for name, text in (
        ("style", (_VIEWER / "style.css").read_text("utf-8").strip()),
        ("facts", json.dumps(facts, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")),
        ("script", (_VIEWER / "viewer.js").read_text("utf-8").strip()),
        ("geometry", packed.text()),
        ("sound", base64.b64encode(sound).decode("ascii")),
    ):
        page = page.replace("{{" + name + "}}", text, 1)
    return page


class _Packer:
    """Arrays one after the other, in the form that viewer.js unpacks: u8; i16, i32 zigzagged; d16, d32 their
    differences."""

    def __init__(self) -> None:
        self.names: list[list] = []
        self._pieces: list[bytes] = []

    def add(self, name: str, values: np.ndarray, kind: str) -> None:
        values = np.asarray(values).astype(np.int64)
        self.names.append([name, kind, len(values)])
        if kind == "u8":
            assert values.min(initial=0) >= 0 and values.max(initial=0) < 256, name
            self._pieces.append(values.astype(np.uint8).tobytes())
            return
        if kind[0] == "d":
            values = np.diff(values, prepend=0)
        bits = int(kind[1:])
        zigzag = np.where(values < 0, -2 * values - 1, 2 * values)
        assert zigzag.max(initial=0) < 1 << bits, name
        self._pieces += [((zigzag >> shift) & 255).astype(np.uint8).tobytes() for shift in range(0, bits, 8)]

    def text(self) -> str:
        return base64.b64encode(zlib.compress(b"".join(self._pieces), 9)).decode("ascii")


# ---------------------------------------------------------------- motion


def _pack_motion(animation: Animation) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float], float]:
    """base (3V,) int in _BASE_STEP mm; shapes (3V, K) int16; weights (frames, K) int16; step of each weight (mm per
    unit of shape); the largest distance of a vertex from the animation's, metres."""
    basis = animation.basis.astype(np.float64)
    coefficients = animation.coefficients.astype(np.float64)
    mean = coefficients.mean(axis=0)
    centred = coefficients - mean
    middle = animation.template.reshape(-1) + basis @ mean
    if animation.offset is not None:
        middle = middle + animation.offset
    base = np.round(middle * (1000 / _BASE_STEP)).astype(np.int64)
    base_error = middle - base * (_BASE_STEP / 1000)

    gram_values, gram_vectors = np.linalg.eigh(basis.T @ basis)
    used = gram_values > gram_values.max(initial=0) * 1e-12
    root = np.sqrt(gram_values[used])[:, None] * gram_vectors[:, used].T  # R, without the directions that move nothing
    variance, turn = np.linalg.eigh(root @ (centred.T @ centred) @ root.T)
    variance, turn = variance[::-1], turn[:, ::-1]
    turn = turn[:, variance > variance.max(initial=0) * 1e-14]
    # eigh leaves the sign free; the largest number of each vector is made positive
    turn = turn * np.where(turn[np.abs(turn).argmax(axis=0), np.arange(turn.shape[1])] < 0, -1, 1)
    weights = centred @ root.T @ turn
    shapes = basis @ (gram_vectors[:, used] / np.sqrt(gram_values[used])) @ turn

    largest = np.abs(weights).max(axis=0, initial=0)
    peak = np.abs(shapes).max(axis=0, initial=0)
    keep = largest * peak > 1e-9  # a nanometre
    weights, shapes, largest, peak = weights[:, keep], shapes[:, keep], largest[keep], peak[keep]
    weight_unit = largest / 32767
    quantised_weights = np.round(weights / weight_unit).astype(np.int16)

    def packed(allowed: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Shapes rounded to within `allowed` metres at their largest weights, as few as do; their units; the error."""
        shape_step = np.maximum(2 * allowed / largest, peak / 32767)
        quantised = np.round(shapes / shape_step).astype(np.int16)
        unit = shape_step * weight_unit  # metres per (unit of weight x unit of shape)

        def error(count: int, frames: np.ndarray | slice) -> float:
            left = np.concatenate([weights[frames], -quantised_weights[frames, :count] * unit[:count]], axis=1)
            left = left.astype(np.float32)
            right = np.concatenate([shapes, quantised[:, :count]], axis=1).astype(np.float32).T
            worst = 0.0
            for start in range(0, len(left), 256):
                off = (left[start : start + 256] @ right + base_error.astype(np.float32)).reshape(-1, 3)
                worst = max(worst, float(np.einsum("ij,ij->i", off, off).max(initial=0)))
            return worst**0.5

        probe = np.unique(np.linspace(0, animation.frames - 1, min(animation.frames, _PROBE)).astype(int))
        low, high = 0, shapes.shape[1]
        while low < high:  # the error falls with the number of shapes, nearly always
            half = (low + high) // 2
            low, high = (low, half) if error(half, probe) <= ERROR else (half + 1, high)
        reached = error(low, slice(None))
        while reached > ERROR and low < shapes.shape[1]:
            low += 1
            reached = error(low, slice(None))
        return quantised[:, :low], unit[:low], reached

    for allowed in _SHAPE_ERROR:
        kept, unit, reached = packed(allowed)
        if reached <= ERROR:
            break
    count = kept.shape[1]
    return base, kept, quantised_weights[:, :count], list(1000 * unit), reached


def _opening(animation: Animation) -> np.ndarray | None:
    """How far the mouth is open in every frame (jambatalk.face.mouth), or None where the mesh does not say."""
    upper, lower = (animation.regions.get(f"inner_lip_{side}") for side in ("upper", "lower"))
    if upper is None or lower is None or not animation.opening_scale > 0:
        return None
    # The gap is linear in the vertices, so it needs the lips' rows of the basis only.
    rows = [3 * np.asarray(side) + 1 for side in (upper, lower)]
    direction = animation.basis[rows[0]].mean(axis=0) - animation.basis[rows[1]].mean(axis=0)
    gap = animation.coefficients @ direction
    if animation.offset is not None:
        gap = gap + (animation.offset[rows[0]].mean() - animation.offset[rows[1]].mean())
    return gap / animation.opening_scale


def _wav(animation: Animation) -> tuple[bytes, int]:
    """A wav file of 16-bit mono and its rate; nothing and 0 without sound."""
    if animation.audio is None:
        return b"", 0
    samples, rate = animation.audio
    data = np.round(np.clip(np.asarray(samples, np.float32), -1, 1) * 32767).astype("<i2").tobytes()
    numbers = [16, 1 | 1 << 16, rate, 2 * rate, 2 | 16 << 16]  # size; PCM, mono; rate; bytes/s; block, bits
    header = b"".join(number.to_bytes(4, "little") for number in numbers)
    body = b"WAVEfmt " + header + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body, int(rate)


# ---------------------------------------------------------------- looks


def _surface(rest: np.ndarray, part: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, list[float] | None]:
    """colours (V, 3) in 0..1; surface (V, 4) in 0..255: eye x, y, kind, gloss, as viewer.js reads it; middle and radius
    of each eye, or None.

    The iris is painted by the page from a vertex's place on its eye, so that it is round on any mesh and turns with the
    eye.
    """
    count = len(rest)
    surface = np.tile(np.array([128, 128, 1, 0], np.int64), (count, 1))
    if part is None or len(part) != count:
        surface[:, 3] = round(255 * _CLAY[1])
        return np.tile(np.array(_CLAY[0]), (count, 1)), surface, None
    part = np.asarray(part)
    colours = np.tile(np.array(_PAINT[_SKIN][0]), (count, 1))
    surface[:, 3] = round(255 * _PAINT[_SKIN][1])
    for label, (colour, gloss) in _PAINT.items():
        colours[part == label] = colour
        surface[part == label, 3] = round(255 * gloss)
    surface[np.isin(part, _MOUTH_PARTS), 2] = 0
    in_eye = np.isin(part, _EYE_PARTS)
    if not in_eye.any():
        return colours, surface, None
    described = []
    for right in (True, False):
        eye = np.flatnonzero(in_eye & ((rest[:, 0] < rest[in_eye, 0].mean()) == right))
        if len(eye) == 0:
            return colours, surface, None
        low, high = rest[eye].min(axis=0), rest[eye].max(axis=0)
        centre, radius = (low + high) / 2, (high[0] - low[0]) / 2
        iris = 0.48 * radius
        across = np.round((rest[eye, :2] - centre[:2]) / iris * 32 + 128)
        behind = rest[eye, 2] < centre[2]
        surface[eye, :2] = np.clip(np.where(behind[:, None], 255, across), 0, 255)
        surface[eye, 2] = 2
        described += [*centre, radius]
    return colours, surface, described


def _soften(colours: np.ndarray, animation: Animation) -> np.ndarray:
    """Colours averaged with the neighbours', so that the lips do not end in a saw of triangles."""
    return _diffuse(colours, animation.faces, 0.5, 2)


def _diffuse(values: np.ndarray, faces: np.ndarray, amount: float, times: int) -> np.ndarray:
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = np.concatenate([edges, edges[:, ::-1]])
    degree = np.maximum(np.bincount(edges[:, 0], minlength=len(values)), 1)
    for _ in range(times):
        around = np.stack([np.bincount(edges[:, 0], column[edges[:, 1]], len(values)) for column in values.T], axis=1)
        lonely = np.bincount(edges[:, 0], minlength=len(values)) == 0
        around = np.where(lonely[:, None], values, around / degree[:, None])
        values = (1 - amount) * values + amount * around
    return values


def _ambient_light(vertices: np.ndarray, faces: np.ndarray, directions: int = 96) -> np.ndarray:
    """(V,) in 0..1: how much of the sky each vertex sees, weighted by the cosine to its normal.

    For each direction the surface, as a cloud of points, is projected onto a grid that keeps the nearest; a vertex is
    lit if nothing is much nearer in its cell. Coarse, but smoothed over the mesh it is what tells a nostril from a
    cheek.
    """
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack([np.bincount(faces.reshape(-1), np.repeat(cross[:, i], 3), len(vertices)) for i in range(3)], 1)
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    size = float(np.ptp(vertices, axis=0).max())
    cell, bias = size / 64, size / 64
    cloud = _cloud(corners, 0.9 * cell).astype(np.float32)
    raised = (vertices + normals * (0.5 * bias)).astype(np.float32)
    seen, possible = np.zeros(len(vertices)), np.full(len(vertices), 1e-9)
    for i in range(directions // 2):  # a spiral of evenly spread directions over half the sphere, and their opposites
        height = (i + 0.5) / (directions // 2)
        angle, ring = i * np.pi * (3 - 5**0.5), (1 - height * height) ** 0.5
        toward = np.array([ring * np.cos(angle), height, ring * np.sin(angle)])
        side = np.cross(toward, [0, 1, 0] if height < 0.9 else [1, 0, 0])
        side /= np.linalg.norm(side)
        frame = np.stack([side / cell, np.cross(toward, side) / cell, toward], axis=1).astype(np.float32)
        # einsum: a BLAS library starts all its threads for this, and takes ten times as long
        points, mine = (np.einsum("ni,ij->nj", x, frame) for x in (cloud, raised))
        corner = points[:, :2].min(axis=0) - 2
        width = int(np.ptp(points[:, :2], axis=0).max()) + 6
        cells = (points[:, :2] - corner).astype(np.intp)
        cells = cells[:, 0] * width + cells[:, 1]
        here = np.clip((mine[:, :2] - corner).astype(np.intp), 0, width - 1)
        here = here[:, 0] * width + here[:, 1]
        for sign in (1, -1):
            nearest = np.full(width * width, -np.inf, np.float32)
            np.maximum.at(nearest, cells, sign * points[:, 2])
            cosine = np.maximum(normals @ (sign * toward), 0)
            seen += cosine * (nearest[here] <= sign * mine[:, 2] + bias)
            possible += cosine
    return np.clip(_diffuse((seen / possible)[:, None], faces, 0.6, 2)[:, 0], 0, 1)


def _cloud(corners: np.ndarray, spacing: float) -> np.ndarray:
    """(n, 3): points on triangles (F, 3, 3), at most `spacing` apart along their edges (or 64 to an edge)."""
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1).max(axis=1)
    parts = np.clip(np.ceil(longest / spacing), 1, 64).astype(int)
    points = []
    for count in np.unique(parts):
        i, j = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
        i, j = i[i + j <= count], j[i + j <= count]
        shares = np.stack([i, j, count - i - j], axis=1) / count
        points.append(np.einsum("pk,fkx->fpx", shares, corners[parts == count]).reshape(-1, 3))
    return np.concatenate(points)


def _mouth_light(light: np.ndarray, rest: np.ndarray, part: np.ndarray | None) -> np.ndarray:
    """Light (V,) with that of teeth and tongue replaced: a mouth at rest is closed and all dark, so it is their depth
    behind the front teeth that counts. The page dims it further while the mouth is closed."""
    if part is None or len(part) != len(light) or not (inside := np.isin(part, _MOUTH_PARTS)).any():
        return light
    depth = rest[inside, 2].max() - rest[inside, 2]
    return np.where(inside, 0, light) + np.bincount(np.flatnonzero(inside), np.exp(-depth / 0.016), len(light))


def _framing(rest: np.ndarray, faces: np.ndarray, eyes: list[float] | None) -> list[float]:
    """Middle of the view (x, y, z) and half of its width and height, millimetres: from the crown to the neck where the
    eyes are known, else the whole mesh; with a margin."""
    used = rest[np.unique(faces)]
    low, high = used.min(axis=0), used.max(axis=0)
    if eyes is not None:
        left, right = np.array(eyes[:3]), np.array(eyes[4:7])
        apart = np.linalg.norm(left - right)
        low[1] = (left[1] + right[1]) / 2 - 2.9 * apart
        low[0], high[0] = (left[0] + right[0]) / 2 - 1.7 * apart, (left[0] + right[0]) / 2 + 1.7 * apart
    centre, half = (low + high) / 2, (high - low) / 2
    return [round(1000 * float(v), 2) for v in (*centre, half[0] * 1.08, half[1] * 1.12)]
