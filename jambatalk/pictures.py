"""Pictures of a comparison, as pages that need no server and no network.

    folder/index.html     the scores, and the error over time of three clips
    folder/<clip>.html    prediction and truth beside each other, and where the prediction is off

The three clips are those with the least, the median and the largest error. In a clip's page (the viewer of
`jambatalk.export.html`) three heads move: the prediction, the truth, and the truth painted with the prediction's mean
error at every vertex.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from jambatalk.animation import Animation
from jambatalk.comparison import Setting, Truth, pairs, table
from jambatalk.export import ExportError
from jambatalk.export import write as write_animation
from jambatalk.protocols import Pair, lip, vertex_error

LOSS = 2e-5  # metres: the most that compressing the motion of a page may move a vertex, root mean square
HEAT = ((0.16, 0.28, 0.56), (0.20, 0.55, 0.66), (0.90, 0.84, 0.55), (0.88, 0.47, 0.24), (0.62, 0.12, 0.14))
LINES = ("#d9622b", "#6b7c93", "#2a9d8f", "#8d6cab")
BELOW_LIPS = 0.09  # metres: where a picture of the head ends
PLOT = (760, 150)  # pixels of a chart


def write(setting: Setting, report: Mapping, folder: Path) -> Path:
    """Writes the pages and returns that of the scores. Errors: jambatalk.export.ExportError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write to {folder}: {error.strerror}") from None
    error_of = lip if "lips" in setting.regions else vertex_error
    what = "lip error (worst lip vertex)" if error_of is lip else "vertex error (mean)"
    charts = []
    for rank, name in _chosen(setting, error_of).items():
        truth, shown = _one(setting, name)
        page = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.html"
        curves = {who: 1e3 * error_of(pair) for who, pair in shown.items()}
        title = html.escape(name)
        if setting.faces is not None and len(setting.faces) > 0:
            write_animation(side_by_side(next(iter(shown.values())), setting.faces, truth.samples), page)
            title = f'<a href="{html.escape(page.name)}">{title}</a>'
        charts.append(f"<h2>{title} <small>{rank}</small></h2>\n" + chart(curves, next(iter(shown.values())).fps, what))
    index = folder / "index.html"
    try:
        index.write_text(_PAGE.format(table=html.escape(table(report)), charts="\n".join(charts)), "utf-8")
    except OSError as error:
        raise ExportError(f"cannot write {index}: {error.strerror}") from None
    return index


def _chosen(setting: Setting, error_of: Callable[[Pair], np.ndarray]) -> dict[str, str]:
    """The clips with the least, the median and the largest error, by what they are."""
    predictor = next(iter(setting.predictors.values()))
    errors = {
        pair.name: float(error_of(pair).mean()) for pair in pairs(setting.truths(), predictor, setting.regions, [])
    }
    order = sorted(errors, key=errors.__getitem__)
    ranks = {"least error": order[0], "median": order[len(order) // 2], "largest error": order[-1]}
    return {rank: name for rank, name in ranks.items() if list(ranks.values()).index(name) == list(ranks).index(rank)}


def _one(setting: Setting, name: str) -> tuple[Truth, dict[str, Pair]]:
    """A clip, and what every predictor makes of it (its first condition)."""
    truth = next(truth for truth in setting.truths() if truth.name == name)
    shown = {}
    for who, predictor in setting.predictors.items():
        pair = next(pairs(iter([truth]), predictor, setting.regions, []), None)
        if pair is not None:
            shown[who] = pair
    return truth, shown


def side_by_side(pair: Pair, faces: np.ndarray, samples: np.ndarray | None) -> Animation:
    """Three heads in a row: prediction, truth, and the truth painted with the mean error of each vertex."""
    predicted, truth = (x.astype(np.float32) for x in pair.both())
    count = len(pair.template)
    moved = np.concatenate([predicted - pair.template, truth - pair.template], axis=1).reshape(pair.frames, -1)
    coefficients, basis = compress(moved, LOSS)
    basis = np.concatenate([basis, basis[3 * count :]])  # the third head moves like the second
    if "lips" in pair.regions:  # without the shoulders, so that the heads stand close
        lowest = float(pair.template[pair.regions["lips"], 1].mean()) - BELOW_LIPS
        faces = faces[pair.template[faces, 1].min(axis=1) > lowest]
    width = 1.12 * float(np.ptp(pair.template[np.unique(faces), 0]))
    template = np.concatenate([pair.template + [shift * width, 0, 0] for shift in (-1, 0, 1)]).astype(np.float32)
    error = np.linalg.norm(predicted - truth, axis=-1).mean(0)
    largest = float(np.percentile(error, 99.5))
    colour = np.full((3 * count, 3), np.nan)
    colour[2 * count :] = heat(error / max(largest, 1e-9))
    return Animation(
        coefficients, basis, template, np.concatenate([faces + shift * count for shift in range(3)]),
        Fraction(pair.fps).limit_denominator(1001), audio=None if samples is None else (samples, 16000),
        regions={"colour": colour},
        subject=f"{pair.name}: prediction, truth, mean error 0 (blue) to {1e3 * largest:.2g} mm (red)",
    )  # fmt: skip


def compress(motion: np.ndarray, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """(frames, n) -> coefficients (frames, r), basis (n, r): the fewest principal directions whose product is within
    `loss`, root mean square, of the motion."""
    gram = motion.astype(np.float64) @ motion.T.astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    left = values.sum() - np.cumsum(values)
    rank = max(1, int(np.searchsorted(-left, -(loss**2) * motion.size)) + 1)
    root = np.sqrt(np.maximum(values[:rank], 1e-30))
    return (vectors[:, :rank] * root).astype(np.float32), (motion.T @ (vectors[:, :rank] / root)).astype(np.float32)


def heat(values: np.ndarray) -> np.ndarray:
    """(n,) in 0..1 -> (n, 3) colours, blue to red."""
    at = np.clip(values, 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(at, range(len(HEAT)), [colour[i] for colour in HEAT]) for i in range(3)], axis=1)


def chart(curves: Mapping[str, Sequence[float] | np.ndarray], fps: float, what: str) -> str:
    """An SVG of curves over time, millimetres."""
    width, height = PLOT
    longest = max(len(curve) for curve in curves.values())
    most = max(float(np.max(curve)) for curve in curves.values()) or 1.0
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if most / s <= 4)
    x = lambda frame: 44 + (width - 54) * frame / max(longest - 1, 1)  # noqa: E731
    y = lambda value: height - 22 - (height - 34) * value / most  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="{html.escape(what)} over time">']
    for i in range(int(most / step) + 1):
        parts.append(f'<path class="grid" d="M44 {y(i * step):.1f}H{width - 10}"/>')
        parts.append(f'<text x="38" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for second in range(int((longest - 1) / fps) + 1):
        parts.append(f'<text x="{x(second * fps):.1f}" y="{height - 6}" text-anchor="middle">{second} s</text>')
    for colour, curve in zip(LINES, curves.values(), strict=False):
        points = " ".join(f"{x(i):.1f},{y(float(value)):.1f}" for i, value in enumerate(curve))
        parts.append(f'<polyline points="{points}" stroke="{colour}"/>')
    left = 44
    for colour, who in zip(LINES, curves, strict=False):
        parts.append(f'<text x="{left}" y="{height + 12}" fill="{colour}">{html.escape(who)}</text>')
        left += 24 + 7 * len(who)
    parts.append(f'<text x="{width - 10}" y="{height + 12}" text-anchor="end">{html.escape(what)}, mm</text></svg>')
    return "".join(parts)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Prediction and ground truth</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d232b; background: #fbfaf8; max-width: 820px; margin: 2rem auto;
  padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .2rem }}
small {{ color: #6b7280; font-weight: 400 }}
pre {{ background: #f1efea; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: 13px }}
svg {{ width: 100%; font-size: 11px; fill: #4b5563 }} polyline {{ fill: none; stroke-width: 1.4 }}
.grid {{ stroke: #e2dfd8; stroke-width: 1 }} a {{ color: #b4501f }}
</style></head><body>
<h1>Prediction and ground truth</h1>
<pre>{table}</pre>
{charts}
</body></html>
"""
