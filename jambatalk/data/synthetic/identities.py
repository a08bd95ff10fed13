"""The people of the corpus: what their heads look like, how they sound and how they move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jambatalk.data.synthetic.articulation import Style
from jambatalk.data.synthetic.speech import FLITE_VOICES, Voice


@dataclass(frozen=True)
class Identity:
    """A synthetic person, or a recorded one with a synthetic head (`voice` is then the speaker's name). `shape` maps
    shape targets of the head to amounts (see jambatalk.face.load_head)."""

    name: str
    shape: dict[str, float]
    voice: Voice | str
    style: Style


@dataclass(frozen=True)
class _Body:
    male: float  # 0 female .. 1 male
    old: float = 0.0  # 0 young adult .. 1 very old
    ancestry: tuple[float, float, float] = (0.0, 0.0, 1.0)  # MakeHuman's african, asian, caucasian; sums to 1
    weight: float = 0.0  # -1 thin .. 1 heavy
    details: tuple[tuple[str, float], ...] = ()


# Eight for training, two for validation, two for testing. Every engine's voice is heard in training; the held-out
# people speak with voices shifted to where no training voice is, so that they are strangers.
_CAST: list[tuple[_Body, Voice, Style]] = [
    (_Body(0.0), Voice("hibari", "heart"), Style()),
    (
        _Body(1.0, 0.25, (0, 0, 1), 0.2, (("head/head-square", 0.5), ("chin/chin-width-incr", 0.5))),
        Voice("flite", "rms", 1.0, 1.0),
        Style(amplitude=0.95, jaw=0.85, rounding=0.9, smoothing=0.022, brows=0.7, blinks=12),
    ),
    (
        _Body(0.1, 0.1, (0.9, 0, 0.1), 0, (("mouth/mouth-scale-horiz-incr", 0.4), ("nose/nose-scale-horiz-incr", 0.4))),
        Voice("flite", "slt", 1.0, 1.0),
        Style(amplitude=1.1, jaw=0.7, spreading=1.2, asymmetry=0.08, blinks=20),
    ),
    (
        _Body(1.0, 0, (0, 1, 0), -0.3, (("head/head-round", 0.5),)),
        Voice("hibari", "heart", 1.0, 0.84),
        Style(amplitude=1.0, jaw=0.75, rounding=1.15, coarticulation=1.15, brows=1.2),
    ),
    (
        _Body(
            0.9,
            0.6,
            (0.2, 0, 0.8),
            0.5,
            (("head/head-rectangular", 0.6), ("cheek/l-cheek-volume-incr", 0.5), ("cheek/r-cheek-volume-incr", 0.5)),
        ),
        Voice("flite", "awb", 0.95, 1.0),
        Style(amplitude=0.85, jaw=0.8, teeth=0.6, smoothing=0.024, asymmetry=-0.1, blinks=10),
    ),
    (
        _Body(0.0, 0.5, (0, 0.5, 0.5), 0.3, (("head/head-oval", 0.6), ("chin/chin-height-decr", 0.4))),
        Voice("hibari", "heart", 0.9, 0.93),
        Style(amplitude=1.15, jaw=0.65, rounding=1.1, teeth=1.2, brows=1.4, blinks=18),
    ),
    (
        _Body(
            1.0, 0.1, (0.6, 0.2, 0.2), 0, (("head/head-triangular", 0.4), ("forehead/forehead-scale-vert-incr", 0.4))
        ),
        Voice("flite", "kal16", 1.0, 1.04),
        Style(amplitude=0.9, jaw=0.8, loudness=1.15, pressing=1.3, smoothing=0.02),
    ),
    (
        _Body(
            0.2,
            0,
            (0.1, 0.6, 0.3),
            -0.5,
            (("head/head-invertedtriangular", 0.5), ("mouth/mouth-scale-horiz-decr", 0.3)),
        ),
        Voice("hibari", "heart", 1.12, 1.1),
        Style(amplitude=1.05, jaw=0.7, coarticulation=0.9, smoothing=0.015, blinks=22),
    ),
    (
        _Body(0.0, 0.2, (0.4, 0, 0.6), 0.1, (("head/head-diamond", 0.5), ("nose/nose-scale-vert-incr", 0.3))),
        Voice("flite", "slt", 1.08, 0.92),
        Style(amplitude=1.0, jaw=0.78, asymmetry=0.05, blinks=15),
    ),
    (
        _Body(1.0, 0.4, (0, 0.3, 0.7), -0.2, (("head/head-fat-decr", 0.5), ("chin/chin-prominent-incr", 0.4))),
        Voice("hibari", "heart", 0.95, 0.88),
        Style(amplitude=0.95, jaw=0.8, rounding=1.05, smoothing=0.021, brows=0.8),
    ),
    (
        _Body(
            0.1,
            0.7,
            (0, 0, 1),
            0.4,
            (("head/head-round", 0.5), ("cheek/l-cheek-bones-incr", 0.4), ("cheek/r-cheek-bones-incr", 0.4)),
        ),
        Voice("hibari", "heart", 1.05, 1.04),
        Style(amplitude=1.08, jaw=0.72, spreading=1.1, blinks=17),
    ),
    (
        _Body(0.95, 0, (1, 0, 0), 0.2, (("head/head-oval", 0.4), ("chin/chin-width-incr", 0.3))),
        Voice("flite", "rms", 0.96, 1.08),
        Style(amplitude=0.92, jaw=0.82, teeth=0.8, asymmetry=-0.06, blinks=13),
    ),
]


def cast(count: int, seed: int) -> list[Identity]:
    """The first `count` identities: twelve that are written down, then any number that `seed` makes up."""
    people = []
    for number in range(count):
        rng = np.random.default_rng([seed, 1, number])
        body, voice, style = _CAST[number] if number < len(_CAST) else _someone(rng)
        people.append(Identity(f"Synthetic_{number + 1:02d}", _shape(body, rng), voice, style))
    return people


def recorded(number: int, speaker: str, seed: int) -> Identity:
    """Head and style, made up by `seed`, of recorded speaker `number` (from 0)."""
    rng = np.random.default_rng([seed, 4, number])
    body, _, style = _someone(rng)
    return Identity(f"Recorded_{number + 1:02d}", _shape(body, rng), speaker, style)


def _shape(body: _Body, rng: np.random.Generator) -> dict[str, float]:
    """Shape targets of a body, with a little of everything besides, so that no two faces are related."""
    targets: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        if amount:
            targets[f"mpfb2/targets/{name}"] = targets.get(f"mpfb2/targets/{name}", 0.0) + float(amount)

    thin, heavy = max(-body.weight, 0.0), max(body.weight, 0.0)
    for sex, is_sex in (("female", 1 - body.male), ("male", body.male)):
        for age, is_age in (("young", 1 - body.old), ("old", body.old)):
            for race, share in zip(("african", "asian", "caucasian"), body.ancestry, strict=True):
                add(f"macrodetails/{race}-{sex}-{age}", is_sex * is_age * share)
            for build, share in (("averageweight", 1 - thin - heavy), ("minweight", thin), ("maxweight", heavy)):
                add(f"macrodetails/universal-{sex}-{age}-averagemuscle-{build}", is_sex * is_age * share)
    for name, amount in body.details:
        add(name, amount)
    for names in _VARIATION:
        amount = float(np.clip(rng.normal(0, 0.22), -0.5, 0.5))
        for name in names:
            add(f"{name}-{'incr' if amount > 0 else 'decr'}", abs(amount))
    return targets


_VARIATION = [
    ("nose/nose-scale-horiz",),
    ("nose/nose-scale-vert",),
    ("nose/nose-scale-depth",),
    ("nose/nose-volume",),
    ("chin/chin-width",),
    ("chin/chin-prominent",),
    ("chin/chin-height",),
    ("mouth/mouth-scale-horiz",),
    ("mouth/mouth-scale-vert",),
    ("head/head-scale-horiz",),
    ("head/head-scale-vert",),
    ("head/head-scale-depth",),
    ("forehead/forehead-temple",),
    ("eyes/l-eye-scale", "eyes/r-eye-scale"),
    ("cheek/l-cheek-bones", "cheek/r-cheek-bones"),
    ("cheek/l-cheek-volume", "cheek/r-cheek-volume"),
    ("ears/l-ear-scale", "ears/r-ear-scale"),
]


def _someone(rng: np.random.Generator) -> tuple[_Body, Voice, Style]:
    male = float(rng.random() < 0.5)
    ancestry = rng.dirichlet([0.6, 0.6, 0.6])
    body = _Body(male, float(rng.uniform(0, 0.7)), tuple(ancestry.tolist()), float(rng.uniform(-0.5, 0.5)))
    if rng.random() < 0.5:
        pitch = rng.uniform(0.84, 0.93) if male else rng.uniform(0.95, 1.1)
        voice = Voice("hibari", "heart", float(rng.uniform(0.85, 1.2)), float(pitch))
    else:
        name = FLITE_VOICES[int(rng.integers(1, 4))] if male else "slt"
        voice = Voice("flite", name, float(rng.uniform(0.9, 1.15)), float(rng.uniform(0.92, 1.1)))
    style = Style(
        amplitude=float(rng.uniform(0.82, 1.15)),
        jaw=float(rng.uniform(0.62, 0.85)),
        rounding=float(rng.uniform(0.85, 1.15)),
        spreading=float(rng.uniform(0.8, 1.2)),
        teeth=float(rng.uniform(0.5, 1.2)),
        pressing=float(rng.uniform(0.7, 1.3)),
        loudness=float(rng.uniform(0.85, 1.15)),
        coarticulation=float(rng.uniform(0.85, 1.2)),
        smoothing=float(rng.uniform(0.015, 0.024)),
        asymmetry=float(rng.uniform(-0.12, 0.12)),
        brows=float(rng.uniform(0.6, 1.4)),
        blinks=float(rng.uniform(10, 22)),
    )
    return body, voice, style
