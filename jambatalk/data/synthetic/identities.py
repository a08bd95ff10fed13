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
    male: float                                 # 0 female .. 1 male
    old: float = 0.0                            # 0 young adult .. 1 very old
    ancestry: tuple[float, float, float] = (0.0, 0.0, 1.0)      # MakeHuman's african, asian, caucasian; sums to 1
    weight: float = 0.0                         # -1 thin .. 1 heavy
    details: tuple[tuple[str, float], ...] = ()


# Eight for training, two for validation, two for testing. Every engine's voice is heard in training; the held-out
# people speak with voices shifted to where no training voice is, so that they are strangers.
_CAST: list[tuple[_Body, Voice, Style]] = [
    (_Body(0.0), Voice("hibari", "heart"), Style()),
    (_Body(1.0, .25, (0, 0, 1), .2, (("head/head-square", .5), ("chin/chin-width-incr", .5))),
     Voice("flite", "rms", 1.0, 1.0), Style(amplitude=.95, jaw=.85, rounding=.9, smoothing=.022, brows=.7, blinks=12)),
    (_Body(0.1, .1, (.9, 0, .1), 0, (("mouth/mouth-scale-horiz-incr", .4), ("nose/nose-scale-horiz-incr", .4))),
     Voice("flite", "slt", 1.0, 1.0), Style(amplitude=1.1, jaw=.7, spreading=1.2, asymmetry=.08, blinks=20)),
    (_Body(1.0, 0, (0, 1, 0), -.3, (("head/head-round", .5),)),
     Voice("hibari", "heart", 1.0, .84), Style(amplitude=1.0, jaw=.75, rounding=1.15, coarticulation=1.15, brows=1.2)),
    (_Body(.9, .6, (.2, 0, .8), .5, (("head/head-rectangular", .6), ("cheek/l-cheek-volume-incr", .5),
                                     ("cheek/r-cheek-volume-incr", .5))),
     Voice("flite", "awb", .95, 1.0), Style(amplitude=.85, jaw=.8, teeth=.6, smoothing=.024, asymmetry=-.1, blinks=10)),
    (_Body(0.0, .5, (0, .5, .5), .3, (("head/head-oval", .6), ("chin/chin-height-decr", .4))),
     Voice("hibari", "heart", .9, .93), Style(amplitude=1.15, jaw=.65, rounding=1.1, teeth=1.2, brows=1.4, blinks=18)),
    (_Body(1.0, .1, (.6, .2, .2), 0, (("head/head-triangular", .4), ("forehead/forehead-scale-vert-incr", .4))),
     Voice("flite", "kal16", 1.0, 1.04), Style(amplitude=.9, jaw=.8, loudness=1.15, pressing=1.3, smoothing=.02)),
    (_Body(0.2, 0, (.1, .6, .3), -.5, (("head/head-invertedtriangular", .5), ("mouth/mouth-scale-horiz-decr", .3))),
     Voice("hibari", "heart", 1.12, 1.1), Style(amplitude=1.05, jaw=.7, coarticulation=.9, smoothing=.015, blinks=22)),
    (_Body(0.0, .2, (.4, 0, .6), .1, (("head/head-diamond", .5), ("nose/nose-scale-vert-incr", .3))),
     Voice("flite", "slt", 1.08, .92), Style(amplitude=1.0, jaw=.78, asymmetry=.05, blinks=15)),
    (_Body(1.0, .4, (0, .3, .7), -.2, (("head/head-fat-decr", .5), ("chin/chin-prominent-incr", .4))),
     Voice("hibari", "heart", .95, .88), Style(amplitude=.95, jaw=.8, rounding=1.05, smoothing=.021, brows=.8)),
    (_Body(0.1, .7, (0, 0, 1), .4, (("head/head-round", .5), ("cheek/l-cheek-bones-incr", .4),
                                    ("cheek/r-cheek-bones-incr", .4))),
     Voice("hibari", "heart", 1.05, 1.04), Style(amplitude=1.08, jaw=.72, spreading=1.1, blinks=17)),
    (_Body(.95, 0, (1, 0, 0), .2, (("head/head-oval", .4), ("chin/chin-width-incr", .3))),
     Voice("flite", "rms", .96, 1.08), Style(amplitude=.92, jaw=.82, teeth=.8, asymmetry=-.06, blinks=13)),
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
        amount = float(np.clip(rng.normal(0, .22), -.5, .5))
        for name in names:
            add(f"{name}-{'incr' if amount > 0 else 'decr'}", abs(amount))
    return targets


_VARIATION = [("nose/nose-scale-horiz",), ("nose/nose-scale-vert",), ("nose/nose-scale-depth",), ("nose/nose-volume",),
              ("chin/chin-width",), ("chin/chin-prominent",), ("chin/chin-height",), ("mouth/mouth-scale-horiz",),
              ("mouth/mouth-scale-vert",), ("head/head-scale-horiz",), ("head/head-scale-vert",),
              ("head/head-scale-depth",), ("forehead/forehead-temple",),
              ("eyes/l-eye-scale", "eyes/r-eye-scale"), ("cheek/l-cheek-bones", "cheek/r-cheek-bones"),
              ("cheek/l-cheek-volume", "cheek/r-cheek-volume"), ("ears/l-ear-scale", "ears/r-ear-scale")]


def _someone(rng: np.random.Generator) -> tuple[_Body, Voice, Style]:
    male = float(rng.random() < .5)
    ancestry = rng.dirichlet([.6, .6, .6])
    body = _Body(male, float(rng.uniform(0, .7)), tuple(ancestry.tolist()), float(rng.uniform(-.5, .5)))
    if rng.random() < .5:
        pitch = rng.uniform(.84, .93) if male else rng.uniform(.95, 1.1)
        voice = Voice("hibari", "heart", float(rng.uniform(.85, 1.2)), float(pitch))
    else:
        name = FLITE_VOICES[int(rng.integers(1, 4))] if male else "slt"
        voice = Voice("flite", name, float(rng.uniform(.9, 1.15)), float(rng.uniform(.92, 1.1)))
    style = Style(amplitude=float(rng.uniform(.82, 1.15)), jaw=float(rng.uniform(.62, .85)),
                  rounding=float(rng.uniform(.85, 1.15)), spreading=float(rng.uniform(.8, 1.2)),
                  teeth=float(rng.uniform(.5, 1.2)), pressing=float(rng.uniform(.7, 1.3)),
                  loudness=float(rng.uniform(.85, 1.15)), coarticulation=float(rng.uniform(.85, 1.2)),
                  smoothing=float(rng.uniform(.015, .024)), asymmetry=float(rng.uniform(-.12, .12)),
                  brows=float(rng.uniform(.6, 1.4)), blinks=float(rng.uniform(10, 22)))
    return body, voice, style
