"""What the tables say, as Markdown and JSON, and a picture of quality against speed."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jambatalk.protocols import PROTOCOLS, Measure

# arXiv 2408.01627 v1, tables 1 and 2, VOCASET, as quoted.
PAPER = {
    "FaceFormer": ("1.9971", "25.352"),
    "CodeTalker": ("1.7992", "22.830"),
    "FaceDiffuser": ("1.8992", "3.1625"),
    "JambaTalk": ("1.7956", "0.2167"),
}
PAPER_ARRANGEMENTS = {
    "M-MoE": ("1.7586", "2.5431", "50"),
    "MoE-MoE": ("1.7956", "0.2167", "48"),
    "M-M": ("1.7481", "15.093", "41"),
    "MoE-M": ("2.0483", "21.183", "68"),
}
MAIN = "jambatalk-moe-moe"  # the paper's choice among its arrangements
TITLES = {
    "jambatalk": "JambaTalk",
    "faceformer": "FaceFormer",
    "codetalker": "CodeTalker",
    "facediffuser": "FaceDiffuser",
}
SCALES = {"m": ("mm", 1e3), "m^2": ("mm²", 1e6), "mm": ("mm", 1.0)}
COLOURS = ("#d9622b", "#6b7c93", "#2a9d8f", "#8d6cab")
SIZE = (720, 400)


def write(tables: Mapping, folder: Path) -> Path:
    """Writes tables.json, quality_speed.svg and tables.md into a folder, and returns the last."""
    (folder / "tables.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "quality_speed.svg").write_text(plot(tables), "utf-8")
    path = folder / "tables.md"
    path.write_text(markdown(tables), "utf-8")
    return path


def markdown(tables: Mapping) -> str:
    """The whole page."""
    methods = tables["methods"]
    compared = [name for name in methods if name == MAIN or not name.startswith("jambatalk")]
    arranged = [name for name in methods if name.startswith("jambatalk")]
    lines = ["# Methods on the same data, with the same time to learn", "", *_how(tables), ""]
    if compared:
        lines += ["## Methods", "", *_table(tables, compared, baselines=True), ""]
        lines += ["![LVE against frames a second](quality_speed.svg)", ""]
    if arranged:
        lines += ["## Arrangements of JambaTalk", "", *_table(tables, arranged, baselines=False), ""]
    lines += ["## What is measured", ""]
    for name in tables["protocols"]:
        lines.append(f"- `{name}`: {PROTOCOLS[name].source}.")
        lines += [f"  - {measure.name}: {measure.formula}." for measure in _measures(name)]
    lines += [
        "- Parameters: of the whole model, and in brackets without the audio encoder, which all share.",
        "- Time per epoch, peak memory: of one run, alone, over steps on the same clips for all methods.",
        "- Frames a second: from samples to motion, one clip at a time, one method alone.",
        "",
        *_paper(),
    ]
    return "\n".join(lines) + "\n"


def _how(tables: Mapping) -> list[str]:
    seconds = tables["seconds_per_run"]
    length = (
        "Every run has the same number of steps."
        if seconds is None
        else f"Every run trains for {_time(seconds)}: its steps are that time over the time per step, measured once."
    )
    lines = []
    if tables["synthetic"]:
        lines += [
            "**These figures are of a synthetic corpus** (`jambatalk.synthesize`): voices of speech synthesisers and "
            "faces moved by rules. They compare methods under equal conditions; they say nothing about recorded "
            "people, and cannot be compared with figures on VOCASET or BIWI.",
            "",
        ]
    seeds = tables["seeds"]
    spread = "mean ± standard deviation over the seeds" if seeds > 1 else "of one run each"
    return lines + [
        f"`{tables['data']}`, {tables['split']} split, `{tables['preset']}` preset, {seeds} seed{'s' * (seeds > 1)}, "
        f"{tables['batch']} clips a step. {length} Figures are {spread}. Measured on {tables['machine']}.",
        "",
        "All methods share the audio encoder, the data and its augmentation, the optimiser and the weights of the "
        "vertex error; what else they have is in the docstrings of `jambatalk/baselines/`.",
    ]


def _table(tables: Mapping, names: Sequence[str], baselines: bool) -> list[str]:
    columns = [(protocol, measure) for protocol in tables["protocols"] for measure in _measures(protocol)]
    head = ["", *(f"{measure.name} ({SCALES[measure.unit][0]}), `{protocol}`" for protocol, measure in columns)]
    head += ["parameters", "steps", "s/epoch", "peak memory", "frames/s"]
    rows = []
    if baselines:
        for name, scores in tables["baselines"].items():
            cells = [_figure([_scaled(scores, *column)]) for column in columns]
            rows.append([name, *cells, "", "", "", "", ""])
    for name in names:
        method = tables["methods"][name]
        rows.append([
            title(name),
            *(_figure([_scaled(run["scores"], *column) for run in method["runs"]]) for column in columns),
            f"{method['parameters'] / 1e6:.2f} M ({method['decoder_parameters'] / 1e6:.2f} M)",
            f"{method['steps']}",
            f"{method['seconds_per_epoch']:.3g}",
            f"{method['peak_memory'] / 2**30:.2f} GiB",
            _figure(method["frames_per_second"], 3),
        ])  # fmt: skip
    return [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *map(_row, rows)]


def title(name: str) -> str:
    model, _, arrangement = name.partition("-")
    shown = TITLES.get(model, model)
    words = [{"moe": "MoE", "m": "M"}.get(word, word) for word in arrangement.split("-")]
    return f"{shown}, {'-'.join(words)}" if arrangement else shown


def _measures(protocol: str) -> list[Measure]:
    """Those of a protocol that the paper's tables have: lip vertex error and upper-face dynamics deviation."""
    return [m for m in PROTOCOLS[protocol].measures if m.unit in SCALES and ("LVE" in m.name or "FDD" in m.name)]


def _scaled(scores: Mapping, protocol: str, measure: Measure) -> float:
    return scores[protocol][measure.name] * SCALES[measure.unit][1]


def _figure(values: Iterable[float], digits: int = 4) -> str:
    values = np.array([*values], dtype=np.float64)
    if len(values) == 1:
        return f"{values[0]:.{digits}g}"
    return f"{values.mean():.{digits}g} ± {values.std(ddof=1):.2g}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"


def _paper() -> list[str]:
    lines = [
        "## The paper's own figures",
        "",
        "arXiv 2408.01627 v1, tables 1 and 2, VOCASET, as quoted, in its units. Nothing above can be set against them: "
        "other data, other sizes, and it is not known how they were computed (the released script measures the left "
        "ear: `jambatalk-release` in `jambatalk.protocols`).",
        "",
        _row(["", "LVE (×1e-3 mm)", "FDD (×1e-5 mm)"]),
        _row(["---", "---:", "---:"]),
        *(_row([name, *figures]) for name, figures in PAPER.items()),
        "",
        _row(["arrangement", "LVE (×1e-3 mm)", "FDD (×1e-5 mm)", "s/epoch (RTX 4090)"]),
        _row(["---", "---:", "---:", "---:"]),
        *(_row([name, *figures]) for name, figures in PAPER_ARRANGEMENTS.items()),
    ]  # fmt: skip
    return lines


def plot(tables: Mapping) -> str:
    """An SVG: LVE (the paper's protocol, mm) over frames a second; one mark a method, a line for the spread."""
    width, height = SIZE
    points = {
        name: (
            float(np.mean(method["frames_per_second"])),
            [run["scores"]["jambatalk"]["LVE"] for run in method["runs"]],
        )
        for name, method in tables["methods"].items()
    }
    speeds = [speed for speed, _ in points.values()]
    errors = [error for _, values in points.values() for error in values]
    left, right = math.floor(math.log10(min(speeds)) * 2) / 2, math.ceil(math.log10(max(speeds)) * 2 + 0.2) / 2
    margin = 0.15 * (max(errors) - min(errors)) or 0.1 * max(errors) or 1.0
    step = _round_step((max(errors) - min(errors) + 2 * margin) / 5)
    low = max(0.0, math.floor((min(errors) - margin) / step) * step)
    high = math.ceil((max(errors) + margin) / step) * step
    x = lambda speed: 60 + (width - 230) * (math.log10(speed) - left) / (right - left)  # noqa: E731
    y = lambda error: height - 46 - (height - 70) * (error - low) / (high - low)  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="LVE against frames a second">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for speed in (m * 10.0**e for e in range(math.floor(left), math.ceil(right) + 1) for m in (1, 3)):
        if left <= math.log10(speed) <= right:
            parts.append(f'<path d="M{x(speed):.1f} 16V{height - 46}" stroke="#e2dfd8"/>')
            parts.append(f'<text x="{x(speed):.1f}" y="{height - 30}" text-anchor="middle">{speed:g}</text>')
    for error in np.arange(low, high + step / 2, step):
        parts.append(f'<path d="M60 {y(error):.1f}H{width - 170}" stroke="#e2dfd8"/>')
        parts.append(f'<text x="54" y="{y(error) + 4:.1f}" text-anchor="end">{error:.3g}</text>')
    models = list(dict.fromkeys(name.partition("-")[0] for name in points))
    below = -math.inf  # labels stand in a column on the right, each as high as its mark or under the one above
    for name, (speed, values) in sorted(points.items(), key=lambda point: -float(np.mean(point[1][1]))):
        colour = COLOURS[models.index(name.partition("-")[0]) % len(COLOURS)]
        at, middle = x(speed), y(float(np.mean(values)))
        below = max(middle, below + 14)
        parts.append(f'<path d="M{at:.1f} {y(min(values)):.1f}V{y(max(values)):.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="5" fill="{colour}"/>')
        parts.append(
            f'<path d="M{at:.1f} {middle:.1f}L{width - 160} {below:.1f}h8" fill="none" stroke="{colour}" '
            'stroke-opacity="0.4"/>'
        )
        parts.append(f'<text x="{width - 148}" y="{below + 4:.1f}" fill="{colour}">{html.escape(title(name))}</text>')
    parts.append(f'<text x="{width - 170}" y="{height - 10}" text-anchor="end">frames a second (more is better)</text>')
    parts.append('<text x="60" y="12">LVE, mm (less is better)</text></svg>')
    return "\n".join(parts) + "\n"


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten: the first that is not less."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
