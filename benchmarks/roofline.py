"""The roofline plot of one result file, as SVG: operations per byte against the rate that was reached.

A kernel can be no faster than the machine's memory (a copy or reading, whichever is faster) times its operations per
byte, nor than the machine's matrix product: the roof, measured on that machine (`bench_machine.py`). Bytes and
operations are those that the formula needs, each tensor once: what comes out of a cache can lie above the slope.
"""

from __future__ import annotations

import math
from html import escape

from benchmarks.bench_machine import COPY, MATRIX, READ

LEFT, TOP, WIDTH, HEIGHT, LEGEND = 64, 40, 620, 380, 226  # of the plot's frame, and beside it, in pixels
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600; font-size: 14px }
.page { fill: #ffffff } .grid { stroke: #d8dee4 } .frame { fill: none; stroke: #8c959f }
.roof { fill: none; stroke: #24292f; stroke-width: 2 } .two { stroke-dasharray: 7 4 } .small { font-size: 11px }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .grid { stroke: #2a313a } .frame { stroke: #6e7681 }
.roof { stroke: #e6edf3 } }
"""
# What an op is called in the legend, its colour (legible on white and on black) and its mark.
FAMILIES = {
    "selective_scan": ("selective scan", "#d1760a", "circle"),
    "causal_conv1d": ("causal conv1d", "#3d94d6", "square"),
    "moe_mlp": ("mixture of experts", "#1a9b72", "diamond"),
    "rope_attention": ("attention", "#d9534f", "triangle"),
    "rollout": ("the loop", "#b36ad0", "cross"),
    "model": ("layers, training, inference", "#8a8f98", "bar"),
}


def family(op: str) -> str:
    """selective_scan_step is drawn as selective_scan; what is no op of jambatalk_kernels belongs to the model."""
    return next((name for name in FAMILIES if op.startswith(name)), "model")


def points(cases: list[dict]) -> list[tuple[str, float, float, dict]]:
    """(family, operations per byte, operations per second, case) of every case that counts both."""
    found = []
    for case in cases:
        count = sum(value for unit, value in case["operations"].items() if unit != "exp")
        if case["op"] != "machine" and count and case["bytes"]:
            found.append((family(case["op"]), count / case["bytes"], count / case["seconds"]["ours"], case))
    return found


def roofs(cases: list[dict]) -> dict[int, tuple[float, float]]:
    """threads -> (bytes per second, operations per second of a matrix product)."""
    found = {}
    for case in cases:
        if case["op"] == "machine":
            figures = {bar["what"]: bar["value"] for bar in case["bars"]}
            memory = max(figures[COPY], figures.get(READ, 0.0))
            found[case["facts"].get("threads", 1)] = (memory, figures[MATRIX])
    return dict(sorted(found.items()))


def draw(result: dict, title: str) -> str | None:
    """None where the machine's ceilings were not measured."""
    ceilings, dots = roofs(result["cases"]), points(result["cases"])
    if not ceilings or not dots:
        return None
    reach = [peak / memory for memory, peak in ceilings.values()]
    x = _Axis([at for _, at, _, _ in dots] + reach, LEFT, LEFT + WIDTH)
    heights = [rate for _, _, rate, _ in dots] + [peak for _, peak in ceilings.values()]
    y = _Axis(heights, TOP + HEIGHT, TOP)
    parts = [*_frame(title, x, y)]
    for index, (threads, (memory, peak)) in enumerate(ceilings.items()):
        corner = peak / memory
        path = f"M{x(x.low):.1f} {y(memory * x.low):.1f} L{x(corner):.1f} {y(peak):.1f} L{x(x.high):.1f} {y(peak):.1f}"
        parts.append(f'<path class="roof{" two" * (index > 0)}" clip-path="url(#plot)" d="{path}"/>')
        row = TOP + 10 + 36 * index
        who = f" with {_threads(threads)}" if len(ceilings) > 1 else ""
        parts.append(f'<path class="roof{" two" * (index > 0)}" d="M{LEFT + WIDTH + 14} {row - 4} h28"/>')
        parts.append(_text(LEFT + WIDTH + 50, row, f"the machine{who}:", "small"))
        parts.append(_text(LEFT + WIDTH + 50, row + 15, f"{_short(memory)}B/s, {_short(peak)}op/s", "small"))
    for name, at, rate, case in dots:
        threads = case["facts"].get("threads", 1)
        parts.append(_mark(name, x(at), y(rate), threads > 1, f"{case['name']}: {_short(rate)}op/s"))
    legend = [name for name in FAMILIES if any(dot[0] == name for dot in dots)]
    below = TOP + 36 * len(ceilings) + 20
    for index, name in enumerate(legend):
        parts.append(_mark(name, LEFT + WIDTH + 24, below + 24 * index, True))
        parts.append(_text(LEFT + WIDTH + 42, below + 4 + 24 * index, FAMILIES[name][0]))
    if len(ceilings) > 1:
        parts.append(_text(LEFT + WIDTH + 14, below + 24 * len(legend) + 8, "filled: two threads", "small"))
        parts.append(_text(LEFT + WIDTH + 14, below + 24 * len(legend) + 24, "hollow: one thread", "small"))
    size = (LEFT + WIDTH + LEGEND, TOP + HEIGHT + 54)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}">'
    clip = f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>'
    page = f'<rect class="page" width="{size[0]}" height="{size[1]}" rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", clip, page, *parts, "</svg>"]) + "\n"


class _Axis:
    """Logarithmic, with some room around the values."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = min(values) / 1.6, max(values) * 1.6
        self.start, self.scale = start, (end - start) / math.log10(self.high / self.low)

    def __call__(self, value: float) -> float:
        return self.start + self.scale * math.log10(value / self.low)

    @property
    def decades(self) -> list[float]:
        return [10.0**n for n in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]


def _frame(title: str, x: _Axis, y: _Axis) -> list[str]:
    lines = [_text(LEFT, 24, title, "title")]
    for value in x.decades:
        lines.append(f'<path class="grid" d="M{x(value):.1f} {TOP} v{HEIGHT}"/>')
        lines.append(_text(x(value), TOP + HEIGHT + 18, f"{value:g}", anchor="middle"))
    for value in y.decades:
        lines.append(f'<path class="grid" d="M{LEFT} {y(value):.1f} h{WIDTH}"/>')
        lines.append(_text(LEFT - 8, y(value) + 4, _short(value).strip(), anchor="end"))
    lines.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/>')
    lines.append(_text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "operations per byte", anchor="middle"))
    up = f"translate(18 {TOP + HEIGHT / 2}) rotate(-90)"
    lines.append(f'<text transform="{up}" text-anchor="middle">operations per second</text>')
    return lines


def _mark(name: str, x: float, y: float, filled: bool, title: str = "") -> str:
    _, colour, shape = FAMILIES[name]
    shapes = {
        "circle": "m-5 0 a5 5 0 1 0 10 0 a5 5 0 1 0 -10 0 z",
        "square": "m-4.5 -4.5 h9 v9 h-9 z",
        "diamond": "m0 -6 l6 6 l-6 6 l-6 -6 z",
        "triangle": "m0 -6 l5.5 10 h-11 z",
        "cross": "m-2 -6 h4 v4 h4 v4 h-4 v4 h-4 v-4 h-4 v-4 h4 z",
        "bar": "m-6 -3 h12 v6 h-12 z",
    }
    tip = f"<title>{escape(title)}</title>" if title else ""
    fill = colour if filled else "none"
    return f'<path d="M{x:.1f} {y:.1f} {shapes[shape]}" fill="{fill}" stroke="{colour}" stroke-width="1.8">{tip}</path>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _short(value: float) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "
