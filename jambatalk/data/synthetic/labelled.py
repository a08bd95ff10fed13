"""Labelled recordings, as `jambatalk.data.synthetic.recordings` writes them, as clips of a corpus."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from jambatalk.data.synthetic.phones import PHONES, Phone, tidy

SHORTEST, LONGEST = 2.5, 5.0  # seconds: shorter recordings are joined until they are at least that long
GAP = (0.2, 0.5)  # seconds of silence between two that are joined
_FLOOR = 2e-4  # added silence is not digital zero: -74 dB, as the recordings' own ends


class LabelledError(ValueError):
    """The folder does not hold labelled recordings; one line."""


@dataclass(frozen=True)
class Recording:
    """A file and its phones, in seconds from its start."""

    path: Path
    phones: tuple[Phone, ...]
    seconds: float


@dataclass(frozen=True)
class Speaker:
    name: str
    licence: str
    source: str
    recordings: tuple[Recording, ...]


def load_speakers(folder: str | Path) -> list[Speaker]:
    """The speakers of a folder of labelled recordings, in the order of their names. Raises LabelledError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LabelledError(f"{folder}: no such folder")
    try:
        phones, manifest = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("phones", "manifest")
        )
    except FileNotFoundError as error:
        raise LabelledError(
            f"{folder}: not made by jambatalk.data.synthetic.recordings, {Path(error.filename).name} is missing"
        ) from None
    except ValueError as error:
        raise LabelledError(f"{folder}: not valid JSON ({error})") from None
    speakers = []
    for name in sorted(phones):
        recordings = []
        for clip, spans in sorted(phones[name].items()):
            path = folder / name / f"{clip}.wav"
            try:
                seconds = soundfile.info(path).duration
            except soundfile.SoundFileError as error:
                raise LabelledError(f"{path}: {' '.join(str(error).split())}") from None
            if unknown := {phone for phone, *_ in spans} - PHONES:
                raise LabelledError(
                    f"{folder}/phones.json: {name}/{clip} has unknown phones: {', '.join(sorted(unknown))}"
                )
            if any(phone != "SIL" for phone, *_ in spans):
                recordings.append(Recording(path, tuple((p, float(a), float(b)) for p, a, b in spans), seconds))
        about = manifest.get("speakers", {}).get(name, {})
        if recordings:
            licence, source = about.get("licence", "not stated"), about.get("source", name)
            speakers.append(Speaker(name, licence, source, tuple(recordings)))
    if not speakers:
        raise LabelledError(f"{folder}: holds no labelled recording")
    return speakers


def group(recordings: tuple[Recording, ...], rng: np.random.Generator) -> list[tuple[Recording, ...]]:
    """Each recording once, in groups that make clips of useful length: those of at least 2.5 s alone, shorter ones
    together with others, by chance, up to about 5 s."""
    groups: list[tuple[Recording, ...]] = [(recording,) for recording in recordings if recording.seconds >= SHORTEST]
    short = [recording for recording in recordings if recording.seconds < SHORTEST]
    waiting: list[Recording] = []
    for i in rng.permutation(len(short)):
        if waiting and sum(r.seconds for r in waiting) + short[i].seconds > LONGEST:
            groups.append(tuple(waiting))
            waiting = []
        waiting.append(short[i])
        if sum(r.seconds for r in waiting) >= rng.uniform(SHORTEST, LONGEST):
            groups.append(tuple(waiting))
            waiting = []
    return groups + ([tuple(waiting)] if waiting else [])


def join(recordings: tuple[Recording, ...], rng: np.random.Generator) -> tuple[np.ndarray, int, list[Phone]]:
    """The sound of a group: samples (n,) float64, their rate, and abutting phones from the first to the last sample.

    Between two recordings there are 0.2 to 0.5 s of silence, of their own as far as they have it. The beginning of the
    first and the end of the last are as they are.
    """
    sounds, phones, clock = [], [], 0.0
    gaps = rng.uniform(*GAP, size=len(recordings) - 1)
    rate = soundfile.info(recordings[0].path).samplerate
    for i, recording in enumerate(recordings):
        samples, own_rate = soundfile.read(recording.path, dtype="float64")
        if own_rate != rate or samples.ndim != 1:
            raise LabelledError(f"{recording.path}: expected mono at {rate} Hz as the others")
        spoken = [(start, end) for name, start, end in recording.phones if name != "SIL"]
        begin = spoken[0][0] - gaps[i - 1] / 2 if i > 0 else 0.0
        end = spoken[-1][1] + gaps[i] / 2 if i < len(gaps) else len(samples) / rate
        first, last = int(round(begin * rate)), int(round(end * rate))
        before, after = max(-first, 0), max(last - len(samples), 0)
        piece = samples[max(first, 0) : last]
        piece = np.concatenate([_silence(before, rng), piece, _silence(after, rng)])
        sounds.append(piece)
        shift = clock - first / rate
        clock += len(piece) / rate
        inside = [p for p in recording.phones if p[0] != "SIL" or spoken[0][0] < p[1] < spoken[-1][1]]
        phones += [(name, start + shift, stop + shift) for name, start, stop in inside]
    return np.concatenate(sounds), rate, _with_pauses(phones, clock)


def _silence(samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(samples) * _FLOOR


def _with_pauses(phones: list[Phone], seconds: float) -> list[Phone]:
    """Phones that cover everything: SIL from 0, between and up to `seconds`."""
    filled: list[Phone] = []
    clock = 0.0
    for name, start, end in phones:
        if start > clock + 1e-6:
            filled.append(("SIL", clock, start))
        filled.append((name, clock if start <= clock + 1e-6 else start, end))
        clock = end
    return tidy([*filled, ("SIL", clock, seconds)])
