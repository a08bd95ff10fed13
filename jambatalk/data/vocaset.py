"""Corpora of talking faces, read where they lie: vertices memory-mapped, pickles through a restricted unpickler.

`Corpus(folder)` knows two layouts by what is in the folder. The VOCASET release (60 frames/s):

    data_verts.npy         float (rows, V, 3), every frame of every sequence
    subj_seq_to_idx.pkl    subject -> sequence -> {local frame: row of data_verts}; sequences and frames may be missing
    raw_audio_fixed.pkl    subject -> sequence -> {"audio": int16 (samples,), "sample_rate": 22000}
    templates.pkl          subject -> (V, 3), the neutral face

and the one that FaceFormer made common, of VOCASET (60 frames/s) or of BIWI (25 frames/s):

    vertices_npy/<subject>_<sequence>.npy    float (frames, 3 V) or (frames, V, 3)
    wav/<subject>_<sequence>.wav
    templates.pkl

Either may have `splits.json`, `faces.npy`, `regions.npz` and `phones.json` beside it, as `jambatalk.synthesize` writes
them; they are preferred to the names and splits of VOCA and BIWI. Triangles are else taken from the mesh that the data
sets' own tools come with (`MESHES`), where it lies in the folder or in its `templates/`.

What comes out is in metres. `python -m jambatalk.data.vocaset DIR` checks a folder and prints what it holds.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jambatalk import audio

SAMPLING_RATE = audio.SAMPLING_RATE
RELEASE, PROCESSED, BIWI = "VOCASET release", "VOCASET as FaceFormer prepares it", "BIWI as FaceFormer prepares it"

# VOCA's split (its config parser); the order of the training subjects is the order of their style embeddings.
VOCA_SPLITS = {
    "train": [
        "FaceTalk_170728_03272_TA", "FaceTalk_170904_00128_TA", "FaceTalk_170725_00137_TA", "FaceTalk_170915_00223_TA",
        "FaceTalk_170811_03274_TA", "FaceTalk_170913_03279_TA", "FaceTalk_170904_03276_TA", "FaceTalk_170912_03278_TA",
    ],
    "val": ["FaceTalk_170811_03275_TA", "FaceTalk_170908_03277_TA"],
    "test": ["FaceTalk_170809_00138_TA", "FaceTalk_170731_00024_TA"],
}  # fmt: skip
VOCA_SENTENCES = {"train": range(1, 41), "val": range(21, 41), "test": range(21, 41)}

# CodeTalker's split of BIWI: test is its BIWI-Test-A (people heard in training), test-b is BIWI-Test-B (others).
BIWI_SPLITS = {
    "train": ["F2", "F3", "F4", "M3", "M4", "M5"],
    "val": ["F2", "F3", "F4", "M3", "M4", "M5"],
    "test": ["F2", "F3", "F4", "M3", "M4", "M5"],
    "test-b": ["F1", "F5", "F6", "F7", "F8", "M1", "M2", "M6"],
}
BIWI_SENTENCES = {"train": range(1, 33), "val": range(33, 37), "test": range(37, 41), "test-b": range(37, 41)}
BIWI_NAME = re.compile(r"[FM]\d_e?\d\d")

# Metres in a unit. "biwi": vertices over the square root of the face's area, as CodeTalker prepares BIWI; 0.2 is
# UniTalker's factor for it.
UNITS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "biwi": 0.2}
MESHES = ("FLAME_sample.ply", "BIWI_topology.obj", "BIWI.ply")
HEAD = (0.1, 0.9)  # metres: the diagonal of a face's or a head's bounding box lies between
LENGTHS_DIFFER = 0.5  # seconds that sound and motion of a clip may differ; the longer one is cut
FAR = 0.1  # of the head's diagonal: frames whose vertices lie so far from the template on average are not that face's
MOST_HOLES = 10  # a sequence has at least one frame in so many
SKIP = "--skip-bad goes on without it"


class CorpusError(ValueError):
    """The folder is not a corpus that can be used, in one clear line."""


class _PlainUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays; anything else in the pickle is refused before it is built."""

    ALLOWED = {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"refused to load {module}.{name}: a corpus holds arrays and plain containers only"
        )


def load_plain_pickle(path: Path) -> Any:
    """A pickle of numpy arrays and plain containers (Python 2 ones too). Errors: `CorpusError`."""
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise CorpusError(f"{path.parent}: not a corpus in the VOCASET layout, {path.name} is missing") from None
    except Exception as error:
        raise CorpusError(f"{path}: cannot be read as a pickle of arrays ({_one_line(error)})") from None


@dataclass(frozen=True, eq=False)
class Clip:
    """One sequence of one subject; its frames are `rows` of `vertices`, which stays on the disk."""

    subject: str
    sequence: str
    vertices: np.ndarray  # (any, V, 3), memory-mapped
    rows: np.ndarray  # (frames,)
    fps: int
    scale: float  # metres in a unit of `vertices`
    sound: audio.Audio
    holes: int  # frames that were missing and repeat the one before

    @property
    def name(self) -> str:
        return f"{self.subject}_{self.sequence}"

    @property
    def duration(self) -> Fraction:
        """Seconds of the sound."""
        return self.sound.duration

    @property
    def samples(self) -> np.ndarray:
        """(samples,) float32 in [-1, 1], mono, 16 kHz."""
        return self.sound.samples

    def read(self, frames: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(frames, V, 3) float32 metres: these frames of the clip."""
        vertices = np.asarray(self.vertices[self.rows[frames]], dtype=np.float32)
        return vertices if self.scale == 1 else vertices * np.float32(self.scale)


class Corpus:
    """A corpus folder.

    units: of the vertices, a name from `UNITS`; found out by default, metres or (BIWI) "biwi", anything else must be
        said. fps: frames per second of the vertices, where they are not the data set's own.
    skip_bad: leave out clips and subjects that cannot be used, and list why in `bad`, instead of raising.

    Sequences without frames or without sound are normal (VOCASET has two): they are listed in `missing`.
    """

    def __init__(
        self, directory: str | Path, *, units: str | None = None, fps: int | None = None, skip_bad: bool = False
    ):
        self.directory, self.skip_bad = Path(directory), skip_bad
        if not self.directory.is_dir():
            raise CorpusError(f"{self.directory}: no such folder")
        self.missing: list[str] = []
        self.bad: list[str] = []
        self._clips: dict[str, list[Clip]] = {}
        if (self.directory / "vertices_npy").is_dir() and not (self.directory / "data_verts.npy").exists():
            self._files: _ProcessedFiles | _ReleaseFiles = _ProcessedFiles(self.directory)
        else:
            self._files = _ReleaseFiles(self.directory)
        self.layout = self._files.layout
        self.fps = fps or (25 if self.layout == BIWI else 60)
        templates = self._templates(load_plain_pickle(self.directory / "templates.pkl"))
        self.vertex_count = len(next(iter(templates.values())))
        self.units = self._find_units(templates, units)
        self.scale = UNITS[self.units]
        self.templates = {name: template * np.float32(self.scale) for name, template in templates.items()}
        self.sizes = {name: _diagonal(template) for name, template in templates.items()}  # in the units of the files
        self._read_splits()
        self.phones: dict[str, dict[str, list]] | None = self._json("phones.json")
        self.regions: dict[str, np.ndarray] = self._regions()
        self.faces = self._faces()

    # What stands beside the clips

    def _templates(self, found: object) -> dict[str, np.ndarray]:
        path = self.directory / "templates.pkl"
        if not isinstance(found, dict) or not found:
            raise CorpusError(f"{path}: expected a dictionary of templates by subject")
        templates: dict[str, np.ndarray] = {}
        for subject, value in found.items():
            value = np.asarray(value)
            if value.dtype.kind != "f":
                raise CorpusError(f"{path}: template of {subject} is {value.dtype}, not floating point")
            value = value.astype(np.float32)
            if value.ndim == 1 and value.size % 3 == 0:
                value = value.reshape(-1, 3)
            if value.ndim != 2 or value.shape[1] != 3 or not len(value):
                raise CorpusError(f"{path}: template of {subject} is {value.shape}, not (V, 3)")
            if self._files.vertex_count not in (None, len(value)):
                raise CorpusError(
                    f"{path}: template of {subject} is {value.shape}, data_verts.npy holds "
                    f"({self._files.vertex_count}, 3) a frame"
                )
            if templates and len(value) != len(next(iter(templates.values()))):
                raise CorpusError(
                    f"{path}: template of {subject} has {len(value)} vertices, others have another number"
                )
            if not np.isfinite(value).all():
                raise CorpusError(f"{path}: NaN or Inf in the template of {subject}")
            templates[str(subject)] = value
        return templates

    def _find_units(self, templates: dict[str, np.ndarray], units: str | None) -> str:
        size = float(np.median([_diagonal(template) for template in templates.values()]))
        fitting = [name for name, metres in UNITS.items() if HEAD[0] <= size * metres <= HEAD[1]]
        if units is not None:
            if units not in UNITS:
                raise CorpusError(f"units must be one of {', '.join(UNITS)}, not {units!r}")
            chosen = units
        else:
            chosen = "biwi" if self.layout == BIWI and "m" not in fitting else "m"
        if chosen not in fitting:
            maybe = [name for name in fitting if name != "biwi" or self.layout == BIWI]
            hint = f"; they fit {maybe[0]}: say --units {maybe[0]}" if maybe else ""
            raise CorpusError(
                f"{self.directory / 'templates.pkl'}: faces are {size:.4g} {chosen} across, and a head is {HEAD[0]} to "
                f"{HEAD[1]} m{hint} (in wrong units a model learns a face that does not move)"
            )
        return chosen

    def _read_splits(self) -> None:
        written = self._json("splits.json") or {}
        names, numbers = (BIWI_SPLITS, BIWI_SENTENCES) if self.layout == BIWI else (VOCA_SPLITS, VOCA_SENTENCES)
        self.splits: dict[str, list[str]] = {split: written.get(split, names[split]) for split in names}
        if isinstance(self._files, _ProcessedFiles) and self.layout == BIWI:
            # "e01" (the emotional half, as CodeTalker) or "01"
            prefix = "e" if any("_e" in stem for stem in self._files.stems) else ""
            sentences = {split: [f"{prefix}{i:02d}" for i in numbers[split]] for split in names}
        else:
            sentences = {split: [f"sentence{i:02d}" for i in numbers[split]] for split in names}
        self._sentences: dict[str, list[str]] = written.get("sentences") or sentences
        lists = [*self.splits.values(), *self._sentences.values()] if isinstance(self._sentences, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            raise CorpusError(f"{self.directory / 'splits.json'}: expected lists of names, by split")
        if absent := [split for split in self.splits if split not in self._sentences]:
            raise CorpusError(f"{self.directory / 'splits.json'}: no sentences of {absent[0]}")

    def _faces(self) -> np.ndarray | None:
        path = self.directory / "faces.npy"
        if path.exists():
            faces = _load_array(path)
        else:
            places = (self.directory / sub / name for sub in ("", "templates") for name in MESHES)
            found = next((place for place in places if place.exists()), None)
            if found is None:
                return None
            path, faces = found, _triangles(found)
        if faces.ndim != 2 or faces.shape[1] != 3 or not len(faces) or faces.dtype.kind not in "iu":
            raise CorpusError(f"{path}: expected whole numbers (F, 3), found {faces.dtype} {faces.shape}")
        if faces.size and not (0 <= faces.min() and faces.max() < self.vertex_count):
            raise CorpusError(f"{path}: triangles name vertices beyond the {self.vertex_count} there are")
        faces = faces.astype(np.int32)
        if len(faces) >= self.vertex_count:  # a whole mesh: its edges are short, unless the vertices are out of order
            template = next(iter(self.templates.values()))
            edge = np.linalg.norm(template[faces[:, 0]] - template[faces[:, 1]], axis=1).mean()
            if edge > FAR * _diagonal(template):
                raise CorpusError(
                    f"{path}: does not fit templates.pkl: its edges are {edge * 1000:.0f} mm long on average; "
                    "the vertices are in another order (an export by way of a 3D program reorders them)"
                )
        return faces

    def _regions(self) -> dict[str, np.ndarray]:
        path = self.directory / "regions.npz"
        if not path.exists():
            return {}
        try:
            return dict(np.load(path))
        except (ValueError, OSError, pickle.UnpicklingError) as error:
            raise CorpusError(f"{path}: cannot be read ({_one_line(error)})") from None

    def _json(self, name: str) -> dict | None:
        path = self.directory / name
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise CorpusError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise CorpusError(f"{path}: expected a JSON object, found {type(value).__name__}")
        return value

    # Clips

    def clips(self, split: str) -> list[Clip]:
        """The clips of "train", "val" or "test" (BIWI: and "test-b"), in a fixed order, every one of them checked:
        finite, of its template's size and vertex order, as long as its sound.

        Raises CorpusError for the first bad clip (with `skip_bad`, lists it in `bad`), or where there is none at all.
        """
        if split not in self.splits:
            raise CorpusError(f"{self.directory}: no split {split!r}, only {', '.join(self.splits)}")
        if split not in self._clips:
            self._clips[split] = [clip for subject in self.splits[split] for clip in self._of_subject(subject, split)]
        if not self._clips[split]:
            why = f": {self.bad[0]}" if self.bad else ""
            raise CorpusError(f"{self.directory}: the {split} split has no clip{why}")
        return self._clips[split]

    def _of_subject(self, subject: str, split: str) -> Iterable[Clip]:
        # A subject who has sequences of its own (a recorded speaker) is listed by name.
        sequences = self._sentences.get(subject, self._sentences[split])
        present = [sequence for sequence in sequences if self._files.has(subject, sequence)]
        absent = [f"{subject}/{sequence}" for sequence in sequences if sequence not in present]
        others = any(self._files.has(other, s) for other in self.splits[split] for s in self._sentences[split])
        if not present and others:
            return self._refuse(f"{self._files.index}: no sequence of {subject}, who is in the {split} split")
        self.missing += [name for name in absent if name not in self.missing]
        if present and subject not in self.templates:
            return self._refuse(
                f"{self.directory / 'templates.pkl'}: no template of {subject}, who is in the {split} split"
            )
        clips = []
        for sequence in present:
            try:
                clips.append(self._clip(subject, sequence))
            except CorpusError as error:
                self._refuse(str(error))
        return clips

    def _refuse(self, why: str) -> list[Clip]:
        if not self.skip_bad:
            raise CorpusError(f"{why} ({SKIP})")
        if why not in self.bad:
            self.bad.append(why)
        return []

    def _clip(self, subject: str, sequence: str) -> Clip:
        vertices, rows, holes, path = self._files.motion(subject, sequence)
        name = f"{subject}/{sequence}"
        if vertices.shape[1] != self.vertex_count:
            raise CorpusError(f"{path}: {name} has {vertices.shape[1]} vertices, templates.pkl {self.vertex_count}")
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(vertices):
            raise CorpusError(
                f"{self._files.index}: {name} names rows that {path.name} does not have ({len(vertices)} rows)"
            )
        sound, where = self._files.sound(subject, sequence)
        clip = Clip(subject, sequence, vertices, rows, self.fps, self.scale, sound, holes)
        moved = len(rows) / self.fps
        if abs(moved - float(sound.duration)) > LENGTHS_DIFFER:
            raise CorpusError(
                f"{where}: {name} has {float(sound.duration):.2f} s of sound and {moved:.2f} s of motion "
                f"({len(rows)} frames at {self.fps}/s)"
            )
        self._check_vertices(clip, path)
        return clip

    def _check_vertices(self, clip: Clip, path: Path) -> None:
        raw = np.asarray(clip.vertices[clip.rows], dtype=np.float32)
        name = f"{clip.subject}/{clip.sequence}"
        finite = np.isfinite(raw).all(axis=(1, 2))
        if not finite.all():
            raise CorpusError(f"{path}: NaN or Inf vertices in {name}, first in frame {int(np.argmin(finite))}")
        size, middle = self.sizes[clip.subject], raw[len(raw) // 2]
        ratio = _diagonal(middle) / size
        if not 0.5 < ratio < 2:
            raise CorpusError(
                f"{path}: faces of {name} are {ratio:.3g} times as large as the template in templates.pkl"
            )
        away = np.linalg.norm(middle - self.templates[clip.subject] / np.float32(self.scale), axis=1).mean()
        if away > FAR * size:
            raise CorpusError(
                f"{path}: vertices of {name} lie {away / size:.0%} of the head's size from those of its template on "
                "average: another vertex order, or a head that is turned or shifted"
            )

    def displacement(self, clip: Clip, step: int = 1) -> np.ndarray:
        """(frames, V, 3) float32 metres: every `step`-th frame of the clip less the subject's template."""
        return clip.read(slice(None, None, step)) - self.templates[clip.subject]

    def frame_phones(self, clip: Clip, times: np.ndarray, inventory: dict[str, int]) -> np.ndarray | None:
        """(frames,) int64 phone index at each time in seconds, -100 where unknown; None where nothing is labelled."""
        if self.phones is None or clip.sequence not in self.phones.get(clip.subject, {}):
            return None
        spans = self.phones[clip.subject][clip.sequence]
        starts = np.array([start for _, start, _ in spans])
        ends = np.array([end for _, _, end in spans])
        labels = np.array([inventory.get(phone, -100) for phone, _, _ in spans], dtype=np.int64)
        at = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, None)
        silence = inventory.get("SIL", -100)
        return np.where((times >= starts[at]) & (times < ends[at]), labels[at], silence)


class _ReleaseFiles:
    """Motion and sound of the release: one array, one index, one pickle of sound."""

    layout = RELEASE

    def __init__(self, directory: Path):
        self.path, self.index = directory / "data_verts.npy", directory / "subj_seq_to_idx.pkl"
        if not self.path.exists():
            raise CorpusError(
                f"{directory}: not a corpus in the VOCASET layout, data_verts.npy is missing (and vertices_npy)"
            )
        self.vertices = _load_array(self.path, floating=True)
        if self.vertices.ndim != 3 or self.vertices.shape[2] != 3:
            raise CorpusError(f"{self.path}: expected (frames, V, 3), found {self.vertices.shape}")
        self.vertex_count = self.vertices.shape[1]
        self.rows = _dictionary(self.index)
        self.sounds = _dictionary(directory / "raw_audio_fixed.pkl")

    def has(self, subject: str, sequence: str) -> bool:
        rows, sound = self.rows.get(subject) or {}, self.sounds.get(subject) or {}
        return bool(rows.get(sequence)) and sound.get(sequence) is not None

    def motion(self, subject: str, sequence: str) -> tuple[np.ndarray, np.ndarray, int, Path]:
        frames = self.rows[subject][sequence]
        try:
            # The last frame present fixes the length; a hole repeats the frame before it.
            rows, row, last = [], frames[min(frames)], int(max(frames))
            if last >= MOST_HOLES * len(frames):
                raise ValueError
            for i in range(last + 1):
                row = frames.get(i, row)
                rows.append(int(row))
        except (TypeError, ValueError, AttributeError):
            raise CorpusError(
                f"{self.index}: {subject}/{sequence} must be rows by frame number, at least one in {MOST_HOLES} there"
            ) from None
        return self.vertices, np.asarray(rows, dtype=np.int64), last + 1 - len(frames), self.path

    def sound(self, subject: str, sequence: str) -> tuple[audio.Audio, Path]:
        path = self.index.with_name("raw_audio_fixed.pkl")
        try:
            found = self.sounds[subject][sequence]
            samples = np.asarray(found["audio"])
            if samples.ndim != 1:
                raise ValueError(f"samples of shape {samples.shape}")
            return audio.load(samples, int(found["sample_rate"])), path
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{path}: sound of {subject}/{sequence} cannot be used ({_one_line(error)})") from None


class _ProcessedFiles:
    """Motion and sound in FaceFormer's layout: one .npy and one .wav a clip."""

    vertex_count: int | None = None  # every file has its own

    def __init__(self, directory: Path):
        self.directory, self.index = directory, directory / "vertices_npy"
        self.stems = {path.stem for path in self.index.glob("*.npy")}
        if not self.stems:
            raise CorpusError(f"{self.index}: holds no .npy file")
        if not (directory / "wav").is_dir():
            raise CorpusError(f"{directory}: not a corpus in FaceFormer's layout, the folder wav is missing")
        self.layout = BIWI if all(BIWI_NAME.fullmatch(stem) for stem in self.stems) else PROCESSED

    def has(self, subject: str, sequence: str) -> bool:
        return f"{subject}_{sequence}" in self.stems and self._wav(subject, sequence).exists()

    def _wav(self, subject: str, sequence: str) -> Path:
        return self.directory / "wav" / f"{subject}_{sequence}.wav"

    def motion(self, subject: str, sequence: str) -> tuple[np.ndarray, np.ndarray, int, Path]:
        path = self.index / f"{subject}_{sequence}.npy"
        vertices = _load_array(path, floating=True)
        if vertices.ndim == 2 and vertices.shape[1] % 3 == 0:
            vertices = vertices.reshape(len(vertices), vertices.shape[1] // 3, 3)
        if vertices.ndim != 3 or vertices.shape[2] != 3:
            raise CorpusError(f"{path}: expected (frames, 3 V) or (frames, V, 3), found {vertices.shape}")
        return vertices, np.arange(len(vertices)), 0, path

    def sound(self, subject: str, sequence: str) -> tuple[audio.Audio, Path]:
        path = self._wav(subject, sequence)
        try:
            return audio.load(path), path
        except audio.AudioError as error:
            raise CorpusError(str(error)) from None


def _load_array(path: Path, floating: bool = False) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read ({_one_line(error)})") from None
    if floating and array.dtype.kind != "f":
        raise CorpusError(f"{path}: vertices are {array.dtype}, not floating point")
    return array


def _triangles(path: Path) -> np.ndarray:
    try:
        import trimesh
    except ImportError:
        raise CorpusError(f"{path}: reading it needs the package trimesh: pip install 'jambatalk[train]'") from None
    try:
        # Without these it would merge, reorder and leave out vertices.
        return np.asarray(trimesh.load_mesh(path, process=False, maintain_order=True).faces)
    except Exception as error:  # whatever its readers raise, it is this file that cannot be read
        raise CorpusError(f"{path}: cannot be read as a mesh ({_one_line(error)})") from None


def _dictionary(path: Path) -> dict:
    found = load_plain_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise CorpusError(f"{path}: expected a dictionary of dictionaries, by subject and sequence")
    return found


def _diagonal(vertices: np.ndarray) -> float:
    return float(np.linalg.norm(np.ptp(vertices, axis=0)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# python -m jambatalk.data.vocaset


def inspect(corpus: Corpus) -> str:
    """What a corpus holds, as text: layout, units, and for every split its subjects, sequences, hours and gaps."""
    mesh = "no triangles" if corpus.faces is None else f"{len(corpus.faces)} triangles"
    regions = ", ".join(sorted(corpus.regions)) or "none"
    across = np.median(list(corpus.sizes.values())) * corpus.scale
    lines = [
        f"{corpus.directory}: {corpus.layout}",
        f"  faces      {corpus.vertex_count} vertices, {mesh}, regions: {regions}",
        f"  units      {corpus.units} (a head is {across * 100:.1f} cm across)",
        f"  motion     {corpus.fps} frames/s",
        f"  labels     {'phones.json' if corpus.phones else 'none'}",
        f"  splits     {'splits.json' if (corpus.directory / 'splits.json').exists() else 'by name'}",
    ]
    for split, subjects in corpus.splits.items():
        try:
            clips = corpus.clips(split)
        except CorpusError:
            if not corpus.skip_bad:
                raise
            clips = []
        people = len({clip.subject for clip in clips})
        hours = float(sum(clip.duration for clip in clips)) / 3600
        holes = sum(clip.holes for clip in clips)
        lines.append(
            f"  {split:10} {people} of {len(subjects)} subjects, {len(clips)} sequences, {hours:.2f} h, "
            f"{sum(len(clip.rows) for clip in clips)} frames, {holes} of them missing"
        )
    some = ", ".join(corpus.missing[:4]) + (", ..." if len(corpus.missing) > 4 else "")
    lines.append(f"  missing    {len(corpus.missing)} sequences{f': {some}' if corpus.missing else ''}")
    lines += [f"  bad        {len(corpus.bad)} clips or subjects"] + [f"    {why}" for why in corpus.bad]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 with one line on stderr for each thing that is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m jambatalk.data.vocaset",
        description="Check a corpus in the layout of the VOCASET release or of FaceFormer (VOCASET, BIWI) and print "
        "what it holds. Reads every frame.",
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of the corpus")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        corpus = Corpus(args.data, units=args.units, fps=args.data_fps, skip_bad=True)
        print(inspect(corpus))
    except CorpusError as error:
        print(f"jambatalk: error: {error}", file=sys.stderr)
        return 2
    if not any(corpus._clips.get(split) for split in corpus.splits):
        print(f"jambatalk: error: {args.data}: no clip that can be used", file=sys.stderr)
        return 2
    if corpus.bad and not args.skip_bad:
        for why in corpus.bad:
            print(f"jambatalk: error: {why}", file=sys.stderr)
        return 2
    return 0


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The options that say how a corpus is to be read."""
    parser.add_argument("--units", choices=tuple(UNITS), help="of the vertices (default: m; BIWI: found out)")
    parser.add_argument("--data-fps", type=int, metavar="N", help="frames/s of the vertices (default: 60; BIWI: 25)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out clips that cannot be used, and count them")


if __name__ == "__main__":
    sys.exit(main())
