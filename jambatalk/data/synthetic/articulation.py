"""From phones to 52 ARKit curves: what a mouth does while it says something.

Every phone has a target for a few articulators and a dominance, a bell around its span that falls off to both sides
(M. Cohen and D. Massaro, "Modeling coarticulation in synthetic visual speech", 1993). An articulator's value is the
average of the targets, weighted by dominance, so that a weak phone bends to its neighbours. On top of that

- the opening of the mouth grows with the loudness of the audio at that time and is zero in pauses;
- p, b and m close the lips and f and v bring the lower lip to the teeth, whatever the neighbours want;
- the height of the inner-lip gap is a controlled length: jaw and lips share it, and what the other units add to it (a
  funnel opens, a pucker closes) is taken out again through `mouthClose`, which is exact because units are linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d, maximum_filter1d

from jambatalk.data.synthetic.phones import Phone
from jambatalk.face.mesh import ARKIT_UNITS, Head
from jambatalk.face.mouth import inner_lip_gap

WIDEST = 0.0165  # metres: the inner-lip gap of a loud AA at amplitude 1
LABIODENTAL_GAP = 0.0012  # metres: f and v leave this much between the lips
PRESSED = 0.0008  # metres: soft lips pressed together in p, b and m overlap by this much
_OVERSAMPLE = 4  # curves are made at this multiple of the frame rate, so that smoothing is fine-grained


@dataclass(frozen=True)
class Style:
    """How someone speaks; all factors are 1 for the average speaker."""

    amplitude: float = 1.0  # of the opening
    jaw: float = 0.75  # share of the opening that the jaw makes, 0..1; the lips make the rest
    rounding: float = 1.0
    spreading: float = 1.0
    teeth: float = 1.0  # how much s, t, ... bare them
    pressing: float = 1.0  # how hard the lips meet in p, b, m
    loudness: float = 1.0  # how much louder means wider
    coarticulation: float = 1.0  # reach of a phone beyond its span
    smoothing: float = 0.018  # seconds, standard deviation
    asymmetry: float = 0.0  # -0.3..0.3, positive favours the left side
    brows: float = 1.0
    blinks: float = 16.0  # a minute


# What each phone asks for; a diphthong asks for two things in a row. Opening is a share of WIDEST, the others are unit
# weights. The last two columns are dominances, 1 being a sound that gets its way.
_TARGETS = """
phone  open pucker funnel spread smile  teeth  of the opening, of the lip shape
AA    0.95   0.00   0.00   0.05   0.00   0.00   1.00   0.50
AE    0.85   0.00   0.00   0.30   0.10   0.10   1.00   0.60
AH    0.60   0.00   0.00   0.05   0.00   0.00   0.80   0.30
AO    0.82   0.20   0.35   0.00   0.00   0.00   1.00   0.80
EH    0.64   0.00   0.00   0.25   0.05   0.05   1.00   0.50
ER    0.42   0.15   0.40   0.00   0.00   0.00   0.90   0.80
IH    0.46   0.00   0.00   0.25   0.05   0.10   0.80   0.40
IY    0.34   0.00   0.00   0.55   0.15   0.15   0.90   0.80
UH    0.42   0.40   0.25   0.00   0.00   0.00   0.80   0.80
UW    0.24   0.75   0.25   0.00   0.00   0.00   0.90   1.00
AW    0.92   0.00   0.05   0.10   0.00   0.00   1.00   0.50
AW    0.36   0.60   0.25   0.00   0.00   0.00   0.80   0.90
AY    0.95   0.00   0.00   0.10   0.00   0.00   1.00   0.50
AY    0.42   0.00   0.00   0.45   0.10   0.10   0.80   0.60
EY    0.66   0.00   0.00   0.30   0.05   0.05   1.00   0.60
EY    0.36   0.00   0.00   0.50   0.15   0.10   0.80   0.70
OW    0.70   0.30   0.30   0.00   0.00   0.00   1.00   0.90
OW    0.30   0.70   0.25   0.00   0.00   0.00   0.80   1.00
OY    0.78   0.30   0.35   0.00   0.00   0.00   1.00   0.90
OY    0.42   0.00   0.00   0.40   0.10   0.10   0.80   0.60
W     0.14   0.85   0.20   0.00   0.00   0.00   0.90   1.00
R     0.30   0.20   0.45   0.00   0.00   0.00   0.60   0.70
Y     0.30   0.00   0.00   0.35   0.05   0.05   0.60   0.50
L     0.42   0.00   0.00   0.10   0.00   0.10   0.50   0.20
HH    0.50   0.00   0.00   0.00   0.00   0.00   0.15   0.05
T     0.26   0.00   0.00   0.12   0.00   0.25   0.50   0.20
D     0.28   0.00   0.00   0.12   0.00   0.20   0.50   0.20
N     0.30   0.00   0.00   0.10   0.00   0.15   0.50   0.20
K     0.38   0.00   0.00   0.10   0.00   0.05   0.40   0.15
G     0.38   0.00   0.00   0.08   0.00   0.05   0.40   0.15
NG    0.36   0.00   0.00   0.10   0.00   0.05   0.40   0.15
S     0.20   0.00   0.00   0.35   0.05   0.45   0.90   0.60
Z     0.21   0.00   0.00   0.32   0.05   0.40   0.90   0.60
SH    0.24   0.15   0.65   0.00   0.00   0.25   0.90   1.00
ZH    0.24   0.15   0.60   0.00   0.00   0.25   0.90   1.00
CH    0.24   0.15   0.60   0.00   0.00   0.25   0.90   0.90
JH    0.25   0.15   0.55   0.00   0.00   0.25   0.90   0.90
TH    0.27   0.00   0.00   0.12   0.00   0.20   0.70   0.30
DH    0.27   0.00   0.00   0.10   0.00   0.15   0.50   0.20
F     0.10   0.00   0.00   0.12   0.00   0.10   0.70   0.50
V     0.10   0.00   0.00   0.10   0.00   0.10   0.70   0.50
P     0.22   0.00   0.00   0.00   0.00   0.00   0.35   0.15
B     0.22   0.00   0.00   0.00   0.00   0.00   0.35   0.15
M     0.20   0.00   0.00   0.00   0.00   0.00   0.35   0.15
"""
_T: dict[str, list[tuple[float, ...]]] = {}
for _phone, *_values in map(str.split, _TARGETS.strip().splitlines()[1:]):
    _T.setdefault(_phone, []).append(tuple(map(float, _values)))
_CLOSED_UNTIL = {"P": 0.72, "B": 0.85, "M": 1.0}  # share of the span after which the lips part: p, b burst


def loudness(samples: np.ndarray, rate: float, times: np.ndarray) -> np.ndarray:
    """Loudness (len(times),) of audio around each time, 1 at the clip's 95th percentile of spoken parts.

    samples (n,) float, times in seconds. Root mean square over a Gaussian window with a deviation of 20 ms.
    """
    step = max(int(round(rate / 1000)), 1)
    usable = len(samples) // step * step
    power = np.square(samples[:usable].astype(np.float64)).reshape(-1, step).mean(axis=1)  # about a value per ms
    smooth = np.sqrt(gaussian_filter1d(power, 0.020 * rate / step, mode="nearest"))
    top = np.percentile(smooth, 95)
    seconds = (np.arange(len(smooth)) + 0.5) * step / rate
    return np.interp(times, seconds, smooth) / max(top, 1e-6)


def articulate(
    phones: list[Phone],
    samples: np.ndarray,
    rate: float,
    frames: int,
    fps: int,
    style: Style,
    head: Head,
    rng: np.random.Generator,
) -> np.ndarray:
    """ARKit weights (frames, 52) float32 for speech; frame i shows the time i / fps.

    phones: abutting spans in seconds; samples (n,) float mono at `rate` Hz, the same clip; `rng` makes blinks and the
    idle motion of the brows. The lip gap of the result is that of the template in pauses, and less in p, b and m.
    """
    fine = fps * _OVERSAMPLE
    times = np.arange(frames * _OVERSAMPLE) / fine
    opening, shape = _dominance(phones, times, style)
    loud = loudness(samples, rate, times)
    speaking = _speaking(phones, times, before=0.07, inside=0.03, linger=0.05)
    shaping = _speaking(phones, times, before=0.16, inside=0.0, linger=0.12)
    audible = _audible(loud, fine)

    floor = np.clip(1.0 - 0.80 * style.loudness, 0.1, 0.9)
    opening = opening * (floor + (1 - floor) * np.clip(loud, 0, 1.3) ** 0.9)
    smoothing = style.smoothing * fine
    wanted = gaussian_filter1d(opening * speaking * audible, smoothing, mode="nearest") * WIDEST * style.amplitude
    shape = gaussian_filter1d(shape * shaping[:, None], smoothing, axis=0, mode="nearest")

    closed = _contact(phones, times, _CLOSED_UNTIL, approach=0.070 * style.coarticulation**0.5, release=0.065)
    bitten = _contact(phones, times, {"F": 0.9, "V": 0.9}, approach=0.07, release=0.06)
    gap = wanted * (1 - bitten) + np.minimum(LABIODENTAL_GAP, wanted + 0.0004) * bitten
    gap = gap * (1 - closed) - PRESSED * style.pressing * closed

    weights = _units(gap, wanted, shape, closed, bitten, style, head)
    coarse = weights.reshape(frames, _OVERSAMPLE, -1)[:, 0]
    _idle(coarse, loud[::_OVERSAMPLE], speaking[::_OVERSAMPLE], fps, style, rng)
    return np.clip(coarse, 0, 1).astype(np.float32)


def _dominance(phones: list[Phone], times: np.ndarray, style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Blended opening (T,) and lip shape (T, 5) before loudness, pauses and contacts."""
    segments = []
    for name, start, end in phones:
        targets = _T.get(name)
        if targets is None:  # pauses have no targets: see _speaking
            continue
        cuts = np.linspace(start, end, len(targets) + 1) if len(targets) > 1 else (start, end)
        segments += [(*target, a, b) for target, a, b in zip(targets, cuts[:-1], cuts[1:], strict=False)]
    if not segments:
        return np.zeros(len(times)), np.zeros((len(times), 5))
    table = np.array(segments, np.float64)
    starts, ends = table[:, 8], table[:, 9]
    core = 0.25 * (ends - starts)
    ahead = np.maximum(starts + core - times[:, None], 0) / (0.050 * style.coarticulation)
    past = np.maximum(times[:, None] - ends + core, 0) / (0.055 * style.coarticulation)
    open_bell = np.exp(-(ahead + past)) * table[:, 6]
    shape_bell = np.exp(-(ahead + past) * 0.7) * table[:, 7]  # lips round and spread earlier than jaws move
    opening = (open_bell @ table[:, 0]) / np.maximum(open_bell.sum(axis=1), 1e-12)
    shape = (shape_bell @ table[:, 1:6]) / np.maximum(shape_bell.sum(axis=1, keepdims=True), 1e-12)
    return opening, shape


def _ramp(x: np.ndarray) -> np.ndarray:
    """Smooth step: 0 below 0, 1 above 1, no corners."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _speaking(phones: list[Phone], times: np.ndarray, before: float, inside: float, linger: float) -> np.ndarray:
    """1 while someone speaks, 0 in pauses; rises from `before` s ahead of the first sound to `inside` s after its
    start, and falls around the last sound's end until `linger` s after it. Pauses shorter than that do not count."""
    value = np.zeros(len(times))
    runs: list[list[float]] = []
    for name, start, end in phones:
        if name == "SIL":
            continue
        if runs and start - runs[-1][1] < 0.08:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    for start, end in runs:
        rise = _ramp((times - (start - before)) / (before + inside))
        fall = _ramp((end + linger - times) / (linger + 0.05))
        value = np.maximum(value, rise * fall)
    return value


def _audible(loud: np.ndarray, fine: int) -> np.ndarray:
    """0 where the audio has been quiet for long, whatever the phone times say; 1 in speech, stops included."""
    recent = maximum_filter1d(loud, int(0.10 * fine) | 1, mode="nearest")
    return gaussian_filter1d(_ramp((recent - 0.03) / 0.12), 0.012 * fine, mode="nearest")


def _contact(
    phones: list[Phone], times: np.ndarray, until: dict[str, float], approach: float, release: float
) -> np.ndarray:
    """1 during the given phones (up to a share of their span), approached and released smoothly outside of it."""
    value = np.zeros(len(times))
    for name, start, end in phones:
        if name in until:
            hold = max(start + until[name] * (end - start), start + 0.035)  # at least two frames long
            meet = start - 0.01  # lips meet a little before the sound stops
            nearing, parting = _ramp((times - meet + approach) / approach), _ramp((hold + release - times) / release)
            value = np.maximum(value, nearing * parting)
    return value


def _units(
    gap: np.ndarray,
    wanted: np.ndarray,
    shape: np.ndarray,
    closed: np.ndarray,
    bitten: np.ndarray,
    style: Style,
    head: Head,
) -> np.ndarray:
    """Weights (T, 52) whose inner-lip gap above the template's is exactly `gap` (T,) in metres."""
    regions = head.regions
    rest = inner_lip_gap(head.template, regions["inner_lip_upper"], regions["inner_lip_lower"])
    effect = np.array(
        [
            inner_lip_gap(head.template + head.units[name], regions["inner_lip_upper"], regions["inner_lip_lower"])
            - rest
            for name in ARKIT_UNITS
        ]
    )
    weights = np.zeros((len(gap), len(ARKIT_UNITS)))

    def add(unit: str, value: np.ndarray) -> None:
        if unit in _INDEX:
            weights[:, _INDEX[unit]] += value
        else:
            weights[:, _INDEX[unit + "Left"]] += value * (1 + style.asymmetry)
            weights[:, _INDEX[unit + "Right"]] += value * (1 - style.asymmetry)

    pucker, funnel, spread, smile, bare = shape.T
    loose = 1 - closed
    add("mouthPucker", pucker * style.rounding * (1 - 0.3 * closed))
    add("mouthFunnel", funnel * style.rounding * (1 - 0.6 * closed))
    add("mouthStretch", spread * style.spreading * (1 - 0.3 * closed))
    add("mouthSmile", smile * style.spreading)
    add("mouthDimple", 0.3 * smile * style.spreading)
    lips = (1 - style.jaw) * gap / (2 * effect[_INDEX["mouthLowerDownLeft"]] + 2 * effect[_INDEX["mouthUpperUpLeft"]])
    add("mouthLowerDown", lips + 0.35 * bare * style.teeth * loose * (1 - bitten) * _ramp(gap / 0.002))
    add("mouthUpperUp", lips * 0.8 + 0.25 * bare * style.teeth * loose * _ramp(gap / 0.002) + 0.22 * bitten)
    add("mouthRollLower", 0.45 * bitten + 0.16 * closed * style.pressing)
    add("mouthRollUpper", 0.14 * closed * style.pressing)
    add("mouthPress", 0.30 * closed * style.pressing)
    # The jaw follows the vowel it comes from and goes to, and only half of a closure: the lips do the rest.
    jaw = style.jaw * (gap + 0.45 * np.maximum(wanted - gap, 0)) / effect[_INDEX["jawOpen"]]
    add("jawOpen", jaw)
    left_over = gap - weights @ effect
    add("mouthClose", np.maximum(-left_over, 0) / -effect[_INDEX["mouthClose"]])
    add("jawOpen", np.maximum(left_over, 0) / effect[_INDEX["jawOpen"]])
    return weights


_INDEX = {name: i for i, name in enumerate(ARKIT_UNITS)}


def _idle(
    weights: np.ndarray, loud: np.ndarray, speaking: np.ndarray, fps: int, style: Style, rng: np.random.Generator
) -> None:
    """Blinks and small brow motion, added in place to weights (frames, 52)."""
    frames = len(weights)
    times = np.arange(frames) / fps

    def add(units: str, value: np.ndarray) -> None:
        for unit in units.split():
            weights[:, _INDEX[unit]] += value

    emphasis = gaussian_filter1d(np.clip(loud - 0.6, 0, 1) * speaking, 0.12 * fps, mode="nearest")
    drift = sum(np.sin(2 * np.pi * (rate * times + rng.random())) for rate in (0.17, 0.31, 0.53)) / 3
    add("browInnerUp", style.brows * np.clip(0.30 * emphasis + 0.05 * (1 + drift), 0, 0.5))
    add("browOuterUpLeft browOuterUpRight", style.brows * np.clip(0.22 * emphasis + 0.02 * (1 - drift), 0, 0.4))
    lid = np.zeros(frames)
    at = rng.exponential(60 / style.blinks) * 0.6
    while at < frames / fps:
        lid = np.maximum(lid, _ramp((times - at) / 0.08) * _ramp((at + 0.28 - times) / 0.17))
        at += max(rng.gamma(4.0, 60 / style.blinks / 4), 0.5)
    add("eyeBlinkLeft eyeBlinkRight", lid)
    add("eyeSquintLeft eyeSquintRight", 0.15 * lid)
    add("cheekSquintLeft cheekSquintRight", 0.25 * weights[:, _INDEX["mouthSmileLeft"]])
