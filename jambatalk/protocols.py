"""Named, versioned ways of scoring motion against a ground truth, so that two numbers can be compared.

Papers print "LVE" and mean different things: squared or not, pooled over frames or over clips, of one set of vertices
or another, in units that are not the ones printed. A protocol here fixes all of that and has a name and a version; what
it computes never changes under the same version. `PROTOCOLS` lists them; `describe` says in words what one computes.

With p, g (frames, V, 3) the predicted and true vertices of a clip in metres, m its template, L the lip vertices, U
those of the upper face:

    lip_t   = max_{v in L} ||p_{t,v} - g_{t,v}||                          worst lip vertex of a frame
    dyn(x)  = mean_{v in U} std_t ||x_{t,v} - m_v||                       liveliness of the upper face (std: ddof 0)
    dyn2(x) = mean_{v in U} std_t ||x_{t,v} - m_v||^2
    o(x)_t  = height of the upper above the lower inner lip, mean over the pairs

**Clips** that differ in length are cut to the shorter one, as all published scripts do. A *condition* is the style that
an unseen speaker is given; "conditions" below means that all predictions of a clip count, each as a clip of its own.

**Regions** are index arrays: `lips`, `upper_face`, and the pairs `inner_lip_upper`, `inner_lip_lower`. Those of the
FLAME head come from the user's `FLAME_masks.pkl` (not redistributable): lips = `lips` without its repeated entries,
upper face = `forehead` and `eye_region`, as DiffSpeaker takes them. The synthetic head brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jambatalk.face.mouth import inner_lip_gap

FLAME_VERTICES = 5023
FLAME_MOUTH = (3546, 3504)  # middle of the upper and of the lower inner lip; 2151, also in use, lies in the neck
MTM_MOUTH = (3531, 3504)  # the pair that the MTM authors' script measures


class ProtocolError(ValueError):
    """A protocol cannot be applied to these clips; the message is one line that says why."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A clip as predicted and as it was. Vertices in metres, both at `fps`, of any lengths."""

    name: str
    predicted: np.ndarray  # (frames, V, 3)
    truth: np.ndarray  # (frames, V, 3)
    template: np.ndarray  # (V, 3)
    fps: float
    regions: Mapping[str, np.ndarray]
    subject: str = ""  # who speaks
    condition: str = ""  # whose style the prediction has; "" where there is only one
    full_truth: np.ndarray | None = None  # at the rate of the files on disk, where that is another

    @property
    def frames(self) -> int:
        return min(len(self.predicted), len(self.truth))

    def both(self, vertices: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true positions of some vertices, float64, cut to the shorter clip."""
        predicted, truth = (x[: self.frames, vertices].astype(np.float64) for x in (self.predicted, self.truth))
        return predicted, truth

    def region(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self.regions[name])
        except KeyError:
            raise ProtocolError(
                f"the mesh has no region {name!r}: give --regions FILE (FLAME_masks.pkl, or an .npz with lips, "
                "upper_face, inner_lip_upper, inner_lip_lower)"
            ) from None


@dataclass(frozen=True)
class Measure:
    """One column of a protocol: what each clip contributes, and how clips are pooled."""

    name: str
    formula: str
    unit: str
    values: Callable[[Pair], np.ndarray | float]  # (n,), one a frame; or one for the clip
    pooling: str  # "frames": mean over all frames of all clips; "clips": mean over clips of each clip's mean
    scale: float = 1.0  # from metres (or frames) to `unit`

    def pool(self, clips: Sequence[np.ndarray]) -> float:
        """The score of several clips, in `unit`; nan where nothing could be measured."""
        clips = [clip for clip in clips if len(clip)]
        if not clips:
            return float("nan")
        value = np.concatenate(clips).mean() if self.pooling == "frames" else np.mean([clip.mean() for clip in clips])
        return float(value) * self.scale


@dataclass(frozen=True)
class Protocol:
    name: str
    version: int
    source: str
    measures: tuple[Measure, ...]
    conditions: str = "all"  # "same": of several predictions of a clip only the speaker's own style counts
    warning: str = ""

    def score(self, pairs: Iterable[Pair]) -> dict[str, object]:
        """What `Scoring.result` says of these pairs. They are looked at one at a time."""
        scoring = self.scoring()
        for pair in pairs:
            scoring.add(pair)
        return scoring.result()

    def scoring(self) -> Scoring:
        return Scoring(self)


class Scoring:
    """A protocol at work: clips go in one at a time, so that none needs to be kept."""

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self.columns: dict[str, list[np.ndarray]] = {measure.name: [] for measure in protocol.measures}
        self.rows: list[dict[str, Any]] = []

    def add(self, pair: Pair) -> None:
        """Errors: `ProtocolError` for a clip without frames, with another number of vertices or with NaN, and for a
        mesh that lacks a region."""
        _check(pair)
        if self.protocol.conditions == "same" and pair.condition not in ("", pair.subject):
            return
        row: dict[str, Any] = {"clip": pair.name, "condition": pair.condition, "frames": pair.frames}
        for measure in self.protocol.measures:
            values = np.atleast_1d(np.asarray(measure.values(pair), dtype=np.float64))
            self.columns[measure.name].append(values)
            row[measure.name] = measure.pool([values])
        self.rows.append(row)

    def result(self) -> dict[str, object]:
        """-> {"clips", "frames", "scores": {measure: value}, "clip_rows"}. Errors: `ProtocolError` without any clip."""
        if not self.rows:
            same = " in the style of its own speaker" if self.protocol.conditions == "same" else ""
            raise ProtocolError(f"{self.protocol.name}: no clip to score{same}")
        return {
            "clips": len(self.rows),
            "frames": sum(row["frames"] for row in self.rows),
            "scores": {measure.name: measure.pool(self.columns[measure.name]) for measure in self.protocol.measures},
            "clip_rows": self.rows,
        }


def _check(pair: Pair) -> None:
    shapes = pair.predicted.shape, pair.truth.shape
    if pair.predicted.ndim != 3 or pair.predicted.shape[1:] != pair.truth.shape[1:]:
        raise ProtocolError(f"{pair.name}: predicted {shapes[0]} and true {shapes[1]} vertices do not agree")
    if pair.truth.shape[1:] != pair.template.shape:
        raise ProtocolError(f"{pair.name}: vertices {shapes[1]} and template {pair.template.shape} do not agree")
    if pair.frames == 0:
        raise ProtocolError(f"{pair.name}: no frame to compare")
    for what, x in (("predicted", pair.predicted), ("true", pair.truth)):
        if not np.isfinite(x[: pair.frames]).all():
            raise ProtocolError(f"{pair.name}: NaN or Inf in the {what} vertices")


# ---- what a clip contributes


def lip_squared(pair: Pair) -> np.ndarray:
    """(frames,) lip_t^2, square metres."""
    p, g = pair.both(pair.region("lips"))
    return np.square(p - g).sum(-1).max(-1)


def lip(pair: Pair) -> np.ndarray:
    """(frames,) lip_t, metres."""
    return np.sqrt(lip_squared(pair))


def vertex_error(pair: Pair) -> np.ndarray:
    """(frames,) mean over all vertices of ||p - g||, metres."""
    p, g = pair.both()
    return np.linalg.norm(p - g, axis=-1).mean(-1)


def _liveliness(pair: Pair, power: int) -> tuple[float, float]:
    """dyn (power 1) or dyn2 (power 2) of truth and prediction."""
    upper = pair.region("upper_face")
    p, g = (np.linalg.norm(x - pair.template[upper], axis=-1) ** power for x in pair.both(upper))
    return float(g.std(0).mean()), float(p.std(0).mean())


def upper_face_deviation(pair: Pair) -> float:
    """dyn(g) - dyn(p), metres."""
    truth, predicted = _liveliness(pair, 1)
    return truth - predicted


def upper_face_deviation_squared(pair: Pair) -> float:
    """dyn2(g) - dyn2(p), square metres."""
    truth, predicted = _liveliness(pair, 2)
    return truth - predicted


def mouth_opening_error(pair: Pair) -> np.ndarray:
    """(frames,) |o(p) - o(g)|, metres."""
    upper, lower = pair.region("inner_lip_upper"), pair.region("inner_lip_lower")
    return np.abs(np.subtract(*(inner_lip_gap(x, upper, lower) for x in pair.both())))


def temporal_misalignment(pair: Pair) -> np.ndarray:
    """(events,) seconds between the moments at which the predicted and the true mouth turn from opening to closing or
    back (mean temporal misalignment, arXiv 2503.20308).

    The distance of the inner lips' middle, smoothed (Gaussian, sigma 2 frames); its frame-to-frame changes are aligned
    by dynamic time warping; a pair of the path counts where both sides are extrema of the same kind and the predicted
    one lies between the neighbouring extrema of the truth.
    """
    try:
        from scipy.ndimage import gaussian_filter1d
        from scipy.signal import find_peaks
    except ImportError:
        raise ProtocolError("mtm needs scipy: pip install 'jambatalk[train]'") from None
    if pair.truth.shape[1] == FLAME_VERTICES:
        upper, lower = MTM_MOUTH
    else:
        upper, lower = (int(pair.region(f"inner_lip_{side}")[len(pair.region("inner_lip_upper")) // 2])
                        for side in ("upper", "lower"))  # fmt: skip
    curves = [
        gaussian_filter1d(np.linalg.norm(x[:, 0] - x[:, 1], axis=-1), 2.0) for x in pair.both(np.array([upper, lower]))
    ]
    changes = [np.diff(curve, prepend=curve[:1]) for curve in curves]
    kinds = []  # frame -> +1 at a maximum, -1 at a minimum
    for curve in curves:
        kinds.append({**dict.fromkeys(find_peaks(curve)[0], 1), **dict.fromkeys(find_peaks(-curve)[0], -1)})
    turns = np.array(sorted(kinds[1]))
    apart = []
    for i, j in _warping_path(*changes):
        if i in kinds[0] and kinds[0][i] == kinds[1].get(j):
            at = np.searchsorted(turns, j)
            before = turns[at - 1] if at > 0 else -1
            after = turns[at + 1] if at + 1 < len(turns) else len(curves[1])
            if before < i < after:
                apart.append(abs(i - j))
    return np.array(apart, dtype=np.float64) / pair.fps


def _warping_path(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest monotone alignment of two curves by absolute difference, from (0, 0) to the ends."""
    cost = np.full((len(a) + 1, len(b) + 1), np.inf)
    cost[0, 0] = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            cost[i + 1, j + 1] = abs(a[i] - b[j]) + min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
    i, j = len(a), len(b)
    path = []
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: cost[at])
    return path[::-1]


# What the released evaluation script of JambaTalk measures: it applies a mask of 192 rig controls to coordinates.
RELEASE_MOUTH = np.r_[94:114, 146:178, 183:192]
RELEASE_UPPER = np.setdiff1d(np.arange(192), RELEASE_MOUTH)


def _release_coordinates(pair: Pair, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth = pair.truth if pair.full_truth is None else pair.full_truth
    frames = min(len(truth), len(pair.predicted))
    if pair.truth.shape[1] * 3 < 192:
        raise ProtocolError("jambatalk-release reads 192 coordinates, and the mesh has fewer")
    p, g = (x[:frames].reshape(frames, -1)[:, columns].astype(np.float64) for x in (pair.predicted, truth))
    return p, g


def release_lip(pair: Pair) -> np.ndarray:
    p, g = _release_coordinates(pair, RELEASE_MOUTH)
    return np.linalg.norm(p - g, axis=-1)


def release_upper(pair: Pair) -> float:
    p, g = (np.square(x).sum(-1).std() for x in _release_coordinates(pair, RELEASE_UPPER))
    return float(g - p)


# ---- the protocols

_LVE = "mean over {} of lip_t"
_MM = 1e3

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "jambatalk", 1, "arXiv 2408.01627: LVE by its text (maximal L2 error, not squared), FDD by its Eq. 9",
            (
                Measure("LVE", _LVE.format("all frames of all clips"), "mm", lip, "frames", _MM),
                Measure("FDD", "mean over clips of dyn(g) - dyn(p), signed", "mm", upper_face_deviation, "clips", _MM),
                Measure("|FDD|", "mean over clips of |dyn(g) - dyn(p)|", "mm",
                        lambda pair: abs(upper_face_deviation(pair)), "clips", _MM),
            ),
        ),
        Protocol(
            "codetalker", 1, "CodeTalker's cal_metric.py (CVPR 2023); LVE is what torchmetrics calls LipVertexError",
            (
                Measure("LVE", _LVE.format("all frames of all clips") + "^2", "m^2", lip_squared, "frames"),
                Measure("LVE, distance", _LVE.format("all frames of all clips"), "mm", lip, "frames", _MM),
                Measure("FDD", "mean over clips of dyn2(g) - dyn2(p), signed", "m^2", upper_face_deviation_squared,
                        "clips"),
            ),
            conditions="same",
        ),
        Protocol(
            "facediffuser", 1, "FaceDiffuser (MIG 2023): CodeTalker's, with MVE, and FDD without cancellation",
            (
                Measure("MVE", "mean over all frames and vertices of ||p - g||", "mm", vertex_error, "frames", _MM),
                Measure("LVE", _LVE.format("all frames of all clips") + "^2", "m^2", lip_squared, "frames"),
                Measure("|FDD|", "mean over clips of |dyn2(g) - dyn2(p)|", "m^2",
                        lambda pair: abs(upper_face_deviation_squared(pair)), "clips"),
            ),
        ),
        Protocol(
            "diffspeaker", 1, "DiffSpeaker's losses (AAAI 2024): per clip and condition",
            (
                Measure("LVE", _LVE.format("a clip's frames") + "^2, then over clips", "m^2", lip_squared, "clips"),
                Measure("FDD", "mean over clips of dyn2(g) - dyn2(p), signed", "m^2", upper_face_deviation_squared,
                        "clips"),
            ),
        ),
        Protocol(
            "unitalker", 1, "UniTalker (ECCV 2024): per clip, squared and not",
            (
                Measure("LVE", _LVE.format("a clip's frames") + "^2, then over clips", "m^2", lip_squared, "clips"),
                Measure("LVE, distance", _LVE.format("a clip's frames") + ", then over clips", "mm", lip, "clips",
                        _MM),
            ),
        ),
        Protocol(
            "mouth", 1, "what is seen of the mouth: its opening, and when it turns (MTM: arXiv 2503.20308)",
            (
                Measure("MVE", "mean over all frames and vertices of ||p - g||", "mm", vertex_error, "frames", _MM),
                Measure("opening error", "mean over all frames of |o(p) - o(g)|", "mm", mouth_opening_error, "frames",
                        _MM),
                Measure("MTM", "mean over clips of the time between matched turns of the mouth", "ms",
                        temporal_misalignment, "clips", 1e3),
            ),
        ),
        Protocol(
            "jambatalk-release", 1, "the evaluation script of the released JambaTalk code, as it computes",
            (
                Measure("LVE", "mean over clips and frames of ||p - g|| over coordinates 94-113, 146-177, 183-191 of "
                        "the flattened vertices", "m", release_lip, "clips"),
                Measure("FDD", "mean over clips of std_t(sum of squared absolute coordinates), of the others of "
                        "0-191", "m^2", release_upper, "clips"),
            ),
            warning="jambatalk-release reads coordinates of 22 vertices of the left ear of the FLAME head, not of the "
            "lips, and compares frames at 30/s with frames at 60/s: its LVE and FDD measure neither; they are here to "
            "reproduce printed numbers only",
        ),
    )
}  # fmt: skip


def describe(protocol: Protocol) -> str:
    """What a protocol computes, in words."""
    lines = [f"{protocol.name} (version {protocol.version}): {protocol.source}"]
    lines += [f"  {measure.name}: {measure.formula} [{measure.unit}]" for measure in protocol.measures]
    if protocol.conditions == "same":
        lines.append("  of several predictions of a clip, only the one in the speaker's own style counts")
    if protocol.warning:
        lines.append(f"  warning: {protocol.warning}")
    return "\n".join(lines)
