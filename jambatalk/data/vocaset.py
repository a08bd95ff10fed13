"""The VOCASET release layout, read where it lies: vertices memory-mapped, pickles through a restricted unpickler.

A corpus folder holds, as in the release (60 frames per second, metres):

    data_verts.npy         float (rows, V, 3), every frame of every sequence
    subj_seq_to_idx.pkl    subject -> sequence -> {local frame: row of data_verts}; sequences and frames may be missing
    raw_audio_fixed.pkl    subject -> sequence -> {"audio": int16 (samples,), "sample_rate": 22000}
    templates.pkl          subject -> (V, 3), the neutral face

and, where `jambatalk.synthesize` wrote it, `splits.json`, `faces.npy`, `regions.npz` and `phones.json`, which are
preferred to VOCA's own names and splits.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soxr

CORPUS_FPS = 60
SAMPLING_RATE = 16000

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


class CorpusError(ValueError):
    """The folder is not a corpus in the VOCASET layout, in one clear line."""


class _PlainUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays; anything else in the pickle is refused before it is built."""

    ALLOWED = {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"refused to load {module}.{name}: a corpus holds arrays and plain containers only"
        )


def load_plain_pickle(path: Path):
    """A pickle of numpy arrays and plain containers (Python 2 ones too). Errors: `CorpusError`."""
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise CorpusError(f"{path.parent}: not a corpus in the VOCASET layout, {path.name} is missing") from None
    except Exception as error:
        raise CorpusError(f"{path}: cannot be read as a pickle of arrays ({error})") from None


@dataclass(frozen=True)
class Clip:
    """One sequence of one subject. `rows` are its frames' rows in `data_verts.npy`, at 60 frames per second."""

    subject: str
    sequence: str
    rows: np.ndarray
    samples: np.ndarray
    sampling_rate: int

    @property
    def name(self) -> str:
        return f"{self.subject}_{self.sequence}"

    @property
    def duration(self) -> Fraction:
        return Fraction(len(self.samples), self.sampling_rate)

    def audio(self) -> np.ndarray:
        """(samples,) float32 in [-1, 1], mono, 16 kHz."""
        samples = self.samples.astype(np.float32) / 32768.0
        if self.sampling_rate != SAMPLING_RATE:
            samples = soxr.resample(samples, self.sampling_rate, SAMPLING_RATE)
        return np.ascontiguousarray(samples, dtype=np.float32)


class Corpus:
    """A corpus folder. Sequences without frames or without audio are skipped and counted in `missing`."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CorpusError(f"{self.directory}: no such folder")
        try:
            self.vertices = np.load(self.directory / "data_verts.npy", mmap_mode="r")
        except FileNotFoundError:
            raise CorpusError(
                f"{self.directory}: not a corpus in the VOCASET layout, data_verts.npy is missing"
            ) from None
        except ValueError as error:
            raise CorpusError(f"{self.directory}/data_verts.npy: cannot be read ({error})") from None
        if self.vertices.ndim != 3 or self.vertices.shape[2] != 3:
            raise CorpusError(f"{self.directory}/data_verts.npy: expected (frames, V, 3), found {self.vertices.shape}")
        self._rows = load_plain_pickle(self.directory / "subj_seq_to_idx.pkl")
        self._audio = load_plain_pickle(self.directory / "raw_audio_fixed.pkl")
        self.templates = {
            subject: np.asarray(template, dtype=np.float32)
            for subject, template in load_plain_pickle(self.directory / "templates.pkl").items()
        }
        for subject, template in self.templates.items():
            if template.shape != self.vertices.shape[1:]:
                raise CorpusError(
                    f"{self.directory}/templates.pkl: template of {subject} is {template.shape}, "
                    f"data_verts.npy holds {self.vertices.shape[1:]} a frame"
                )
        self.missing: list[str] = []
        splits = self._json("splits.json") or {}
        self.splits: dict[str, list[str]] = {s: splits.get(s, VOCA_SPLITS[s]) for s in ("train", "val", "test")}
        self._sentences: dict[str, list[str]] = splits.get("sentences") or {
            split: [f"sentence{i:02d}" for i in numbers] for split, numbers in VOCA_SENTENCES.items()
        }
        self.phones: dict[str, dict[str, list]] | None = self._json("phones.json")
        faces = self.directory / "faces.npy"
        self.faces = np.load(faces).astype(np.int32) if faces.exists() else None
        regions = self.directory / "regions.npz"
        self.regions: dict[str, np.ndarray] = dict(np.load(regions)) if regions.exists() else {}

    def _json(self, name: str):
        path = self.directory / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise CorpusError(f"{path}: not valid JSON ({error})") from None

    def clips(self, split: str) -> list[Clip]:
        """The clips of "train", "val" or "test", in a fixed order."""
        found = list(self._clips(split))
        if not found:
            raise CorpusError(f"{self.directory}: the {split} split has no clip")
        return found

    def _clips(self, split: str) -> Iterator[Clip]:
        for subject in self.splits[split]:
            # A subject who has sequences of its own (a recorded speaker) is listed by name.
            for sequence in self._sentences.get(subject, self._sentences[split]):
                frames = self._rows.get(subject, {}).get(sequence)
                sound = self._audio.get(subject, {}).get(sequence)
                if not frames or sound is None:
                    self.missing.append(f"{subject}/{sequence}")
                    continue
                # The last frame present fixes the length; a hole repeats the frame before it.
                rows, row = [], frames[min(frames)]
                for i in range(max(frames) + 1):
                    row = frames.get(i, row)
                    rows.append(row)
                yield Clip(subject, sequence, np.asarray(rows), np.asarray(sound["audio"]), int(sound["sample_rate"]))

    def displacement(self, clip: Clip, step: int = 1) -> np.ndarray:
        """(frames, V, 3) float32 metres: every `step`-th frame of the clip less the subject's template."""
        return np.asarray(self.vertices[clip.rows[::step]], dtype=np.float32) - self.templates[clip.subject]

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
