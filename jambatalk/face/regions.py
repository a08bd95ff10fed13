"""Named parts and regions of the head mesh.

Vertex numbers named `*_BASE*` are those of MakeHuman's base mesh (hm08), which have been stable for a decade. The
lips of that mesh are concentric edge loops around the mouth, each with 38 vertices: two on the midline and 18 a side,
so that a loop gives an upper and a lower lip of equal length.
"""

from __future__ import annotations

import numpy as np

PARTS = ("skin", "eye white", "iris", "pupil", "upper teeth", "lower teeth", "tongue", "lip skin")
"""Meaning of the integers in the region `part`."""

# The loop through this midline vertex is the contact line: of all loops it is the one whose upper and lower half
# touch in the neutral face. The loops are numbered from the skin above the lip to the inside of the mouth.
INNER_LIP_BASE = 520
VERMILION_BASE = (362, 455, 466, 467, 509, 468, 474, 520)
# Along the contact line the lower half is sampled wider than the upper one. These positions, counted from the midline,
# lie opposite each other (x = 0, 5 and 10 mm) and cover the middle of the mouth, where an opening is read.
INNER_LIP_PAIRS = ((0, 0), (2, 1), (4, 2))


def edge_loop(quads: list[list[int]], start: int, second: int) -> list[int]:
    """The closed loop of edges that goes straight on from start -> second, in a mesh of quads.

    At a vertex where four quads meet, straight on is the one edge that shares no quad with the edge one came from.
    Raises ValueError where the walk meets a vertex with another valence.
    """
    neighbours: dict[int, set[int]] = {}
    quads_of: dict[int, set[int]] = {}
    for i, quad in enumerate(quads):
        for a, b in zip(quad, quad[1:] + quad[:1], strict=False):
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
            quads_of.setdefault(a, set()).add(i)
    loop = [start, second]
    while True:
        before, here = loop[-2:]
        beside = set().union(*(quads[i] for i in quads_of[here] if before in quads[i]))
        ahead = neighbours[here] - beside
        if len(neighbours[here]) != 4 or len(ahead) != 1:
            raise ValueError(f"the edge loop from vertex {start} does not go on at vertex {here}")
        step = ahead.pop()
        if step == start:
            return loop
        loop.append(step)


def lip_loop(quads: list[list[int]], vertices: np.ndarray, midline: int) -> tuple[list[int], list[int]]:
    """Upper and lower half of the lip loop through `midline`, both from the right corner of the mouth to the left.

    Each half has an odd length with its midline vertex in the middle; halves[i] of both belong to one another.
    """
    beside = {v for q in quads if midline in q for v in (q[q.index(midline) - 1], q[(q.index(midline) + 1) % len(q)])}
    second = max(beside, key=lambda v: vertices[v, 0])
    loop = edge_loop(quads, midline, second)
    quarter = (len(loop) - 2) // 4  # vertices between the midline and the corner
    lower_middle = len(loop) // 2
    upper = [loop[i] for i in range(-quarter, quarter + 1)]
    lower = [loop[lower_middle - i] for i in range(-quarter, quarter + 1)]
    return upper, lower


def middle_pairs(upper: list[int], lower: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The facing pairs of the contact line: indices (pairs,) int64 of the upper and of the lower inner lip."""
    middle = len(upper) // 2
    offsets = [(-up, -low) for up, low in INNER_LIP_PAIRS[:0:-1]] + list(INNER_LIP_PAIRS)
    return (
        np.array([upper[middle + u] for u, _ in offsets], np.int64),
        np.array([lower[middle + low] for _, low in offsets], np.int64),
    )


def seal(vertices: np.ndarray, contact: tuple[np.ndarray, np.ndarray], lips: np.ndarray) -> np.ndarray:
    """Vertical shift (V,) in metres of every vertex that closes the slit between the lips of a neutral face.

    The base mesh rests with the lips parted by up to three millimetres beside the middle, which shows the teeth. Upper
    and lower lip each come half of the way; skin follows less the farther it is from the contact line.

    vertices: (V, 3) metres; contact: upper and lower half of the contact line; lips: (V,) bool, the red of the lips.
    """
    upper, lower = (vertices[half][np.argsort(vertices[half, 0])] for half in contact)
    x = vertices[:, 0]
    corner = min(upper[-1, 0], lower[-1, 0], -upper[0, 0], -lower[0, 0])
    upper_y, lower_y = np.interp(x, upper[:, 0], upper[:, 1]), np.interp(x, lower[:, 0], lower[:, 1])
    slit = np.where(np.abs(x) < corner, 1.3 * np.maximum(upper_y - lower_y, 0.0), 0.0)  # lips are soft: they overlap
    middle = (upper_y + lower_y) / 2
    z = np.interp(x, lower[:, 0], lower[:, 2])
    distance = np.hypot(vertices[:, 1] - middle, np.minimum(vertices[:, 2] - z, 0) / 2)
    reach = np.exp(-((np.maximum(distance - np.abs(slit) / 2, 0) / 0.007) ** 2))
    side = np.where(vertices[:, 1] > middle, -0.5, 0.5)
    return np.where(lips | (reach > 0.05), slit * side * reach, 0.0)
