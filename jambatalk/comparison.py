"""Predictions beside a ground truth: where both come from, and what `jambatalk.protocols` say of them.

A ground truth is a corpus folder (`jambatalk.data.vocaset.Corpus`): the clips of one split, with sound, templates and
regions; or a folder of `.npy`/`.npz` files, or one such file. Predictions are

- a checkpoint (a folder with `config.json`), which then speaks the sound of every clip: in the speaker's own style
  where it knows the speaker, as an unknown speaker otherwise, or in the style asked for;
- a folder with a file for each clip, named as the corpus names it, `<subject>_<sequence>.npy` or `.npz`; or, as
  FaceFormer writes them for unseen speakers, `<subject>_<sequence>_condition_<training subject>.npy`;
- one file, for a ground truth of one file.

`.npy`: (frames, V, 3) or (frames, 3 V) vertices in metres; `.npz`: as `jambatalk.infer` writes it. Both sides must show
the same moments: the truth's frame rate must be the predictions' or a multiple of it (VOCASET's 60 for 30: every other
frame is taken).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jambatalk.baselines.naive import MeanFace, NearestNeighbour
from jambatalk.data.vocaset import Corpus, CorpusError, load_plain_pickle
from jambatalk.protocols import FLAME_MOUTH, FLAME_VERTICES, Pair, Protocol

if TYPE_CHECKING:
    from jambatalk.talking_face import TalkingFace

SUFFIXES = (".npy", ".npz")
LENGTHS_DIFFER = 0.5  # seconds: more than that is another clip, or another frame rate


class ComparisonError(ValueError):
    """Predictions and ground truth cannot be compared; the message is one line that says why."""


@dataclass(frozen=True, eq=False)
class Truth:
    """One clip of the ground truth."""

    name: str
    subject: str
    read: Callable[[], np.ndarray]  # -> (frames, V, 3) metres, every frame there is
    fps: Fraction
    template: np.ndarray
    samples: np.ndarray | None  # 16 kHz, where there is a sound


@dataclass(frozen=True, eq=False)
class Prediction:
    condition: str
    vertices: np.ndarray
    fps: Fraction


# ---- ground truth


def ground_truth(path: Path, split: str, fps: Fraction | None, corpus: Corpus | None) -> Iterator[Truth]:
    """The clips to compare with. `fps`: of files that do not say theirs."""
    if corpus is not None:
        for clip in corpus.clips(split):
            yield Truth(clip.name, clip.subject, clip.read, Fraction(corpus.fps), corpus.templates[clip.subject],
                        clip.samples)  # fmt: skip
        return
    for file in _files(path):
        vertices, own_fps, template = read_vertices(file)
        if template is None:
            raise ComparisonError(f"{file}: has no template, which FDD needs; use an .npz or a corpus folder")
        yield Truth(file.stem, file.stem.rpartition("_")[0], partial(np.asarray, vertices), _rate(file, own_fps, fps),
                    template, None)  # fmt: skip


def open_corpus(
    path: Path, *, units: str | None = None, fps: int | None = None, skip_bad: bool = False
) -> Corpus | None:
    """The corpus in a folder, None where it is a file or a folder of vertices only. Errors: `CorpusError`."""
    is_corpus = (path / "templates.pkl").exists() or (path / "data_verts.npy").exists()
    if path.is_dir() and (is_corpus or not any(path.glob("*.np[yz]"))):
        return Corpus(path, units=units, fps=fps, skip_bad=skip_bad)
    if not path.exists():
        raise ComparisonError(f"{path}: there is no such file or folder")
    return None


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ComparisonError(f"{path}: holds no .npy or .npz file")
    return files


def read_vertices(path: Path) -> tuple[np.ndarray, Fraction | None, np.ndarray | None]:
    """-> vertices (frames, V, 3), frames per second and template where the file says them."""
    if path.suffix not in SUFFIXES:
        raise ComparisonError(f"{path}: expected an .npy or .npz file")
    fps = template = None
    try:
        found = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with found:
                vertices = found["vertices"]
                template = found["template"] if "template" in found else None
                fps = Fraction(str(found["fps"])).limit_denominator(1001) if "fps" in found else None
        else:
            vertices = found
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise ComparisonError(f"{path}: cannot be read as vertices ({' '.join(str(error).split())})") from None
    if vertices.ndim == 2 and vertices.shape[1] % 3 == 0:
        vertices = vertices.reshape(len(vertices), -1, 3)
    if vertices.ndim != 3 or vertices.shape[2] != 3 or vertices.dtype.kind != "f":
        raise ComparisonError(f"{path}: expected floats (frames, V, 3), found {vertices.dtype} {vertices.shape}")
    return vertices, fps, template


def _rate(path: Path, own: Fraction | None, given: Fraction | None) -> Fraction:
    rate = own or given
    if not rate:
        raise ComparisonError(f"{path}: does not say its frames per second: give --fps")
    return rate


# ---- predictions


class FromFiles:
    """Predictions that lie in files."""

    def __init__(self, path: Path, fps: Fraction | None):
        self.path, self.fps, self.files = path, fps, _files(path)

    def of(self, truth: Truth) -> list[Prediction]:
        if self.path.is_file():
            chosen = self.files
        else:
            chosen = [
                file for file in self.files
                if file.stem == truth.name or file.stem.startswith(f"{truth.name}_condition_")
            ]  # fmt: skip
        found = []
        for file in chosen:
            vertices, own, _ = read_vertices(file)
            condition = file.stem.partition("_condition_")[2]
            found.append(Prediction(condition, vertices, _rate(file, own, self.fps)))
        return found


class FromModel:
    """A checkpoint that speaks. style: "auto" (the speaker's own if known, else of an unknown speaker), "all" (every
    training identity's, as FaceFormer's protocol has it for unseen speakers), or what `TalkingFace.animate` takes."""

    def __init__(self, model: TalkingFace, style: str = "auto"):
        self.model, self.style = model, style

    def of(self, truth: Truth) -> list[Prediction]:
        if truth.samples is None:
            raise ComparisonError(f"{truth.name}: has no sound for a model to speak; give predictions as files")
        known = self.model.config.subjects
        if self.style == "all":
            styles = [truth.subject] if truth.subject in known else list(known)
        elif self.style == "auto":
            styles = [truth.subject if truth.subject in known else "unknown"]
        else:
            styles = [self.style]
        found = []
        for style in styles:
            animation = self.model.animate(truth.samples, subject=style)
            if len(animation.template) != len(truth.template):
                raise ComparisonError(
                    f"the model's face has {len(animation.template)} vertices, the ground truth's {len(truth.template)}"
                )
            # The speaker's own face carries the motion.
            moved = replace(animation, template=truth.template).vertices
            found.append(Prediction(style if self.style == "all" else "", moved, animation.fps))
        return found


class FromBaseline:
    """A predictor of `jambatalk.baselines.naive`."""

    def __init__(self, predictor: MeanFace | NearestNeighbour, fps: Fraction):
        self.predictor, self.fps = predictor, fps

    def of(self, truth: Truth) -> list[Prediction]:
        if truth.samples is None:
            raise ComparisonError(f"{truth.name}: has no sound for a baseline to hear")
        frames = round(Fraction(len(truth.samples), 16000) * self.fps)
        return [Prediction("", truth.template + self.predictor.predict(truth.samples, frames), self.fps)]


Predictor = FromFiles | FromModel | FromBaseline


# ---- both


def pairs(
    truths: Iterator[Truth], predictions: Predictor, regions: Mapping[str, np.ndarray], missing: list[str]
) -> Iterator[Pair]:
    """Every prediction of every clip beside its truth; clips without a prediction are listed in `missing`."""
    for truth in truths:
        found = predictions.of(truth)
        if not found:
            missing.append(truth.name)
            continue
        frames = truth.read()
        for prediction in found:
            step = truth.fps / prediction.fps
            if step.denominator != 1:
                raise ComparisonError(
                    f"{truth.name}: the truth has {truth.fps} frames/s, no multiple of the predicted {prediction.fps}"
                )
            shown = frames[:: int(step)]
            apart = abs(len(shown) - len(prediction.vertices)) / prediction.fps
            if apart > LENGTHS_DIFFER:
                raise ComparisonError(
                    f"{truth.name}: {len(prediction.vertices)} predicted frames for {len(shown)} true ones at "
                    f"{prediction.fps} frames/s: another clip, or another frame rate"
                )
            yield Pair(truth.name, prediction.vertices, shown, truth.template, float(prediction.fps), regions,
                       truth.subject, prediction.condition, frames)  # fmt: skip


def find_regions(given: Path | None, corpus: Corpus | None, vertices: int) -> dict[str, np.ndarray]:
    """The regions of the mesh, from the file or folder that the user gives, from the corpus, or from a
    `FLAME_masks.pkl` in the corpus folder.

    `given`: FLAME_masks.pkl; an .npz of index arrays; or a folder with `lve.txt` and `fdd.txt`, as CodeTalker ships for
    BIWI. Errors: `ComparisonError` for a file that cannot be read or names vertices that the mesh has not.
    """
    path = given
    if path is None and corpus is not None:
        if "lips" in corpus.regions:
            return dict(corpus.regions)
        places = (corpus.directory / sub / "FLAME_masks.pkl" for sub in ("", "templates"))
        path = next((place for place in places if place.exists()), None)
    if path is None:
        return {}
    try:
        if path.is_dir():
            found = {"lips": _numbers(path / "lve.txt"), "upper_face": _numbers(path / "fdd.txt")}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = dict(archive)
        else:
            masks = load_plain_pickle(path)
            found = {
                "lips": np.unique(masks["lips"]),
                "upper_face": np.union1d(masks["forehead"], masks["eye_region"]),
            }
            if vertices == FLAME_VERTICES:
                found["inner_lip_upper"], found["inner_lip_lower"] = (np.array([v]) for v in FLAME_MOUTH)
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, CorpusError):
            raise
        raise ComparisonError(f"{path}: cannot be read as regions ({' '.join(str(error).split())})") from None
    for name, index in found.items():
        index = np.asarray(index)
        if index.dtype.kind not in "iu" or (index.size and not 0 <= index.min() <= index.max() < vertices):
            raise ComparisonError(f"{path}: region {name!r} must hold vertex numbers below {vertices}")
    return found


def _numbers(path: Path) -> np.ndarray:
    return np.array([int(word) for word in path.read_text().replace(",", " ").split()], dtype=np.int64)


# ---- the report


@dataclass(frozen=True, eq=False)
class Setting:
    """What is compared with what."""

    path: Path
    truths: Callable[[], Iterator[Truth]]
    predictors: dict[str, FromFiles | FromModel | FromBaseline]  # by name, the one in question first
    regions: dict[str, np.ndarray]
    faces: np.ndarray | None
    bad: list[str]  # clips that were left out


def find(
    predictions: Path,
    truth: Path,
    *,
    split: str = "test",
    regions: Path | None = None,
    fps: str | None = None,
    baselines: bool = False,
    style: str = "auto",
    device: str = "cpu",
    units: str | None = None,
    data_fps: int | None = None,
    skip_bad: bool = False,
) -> Setting:
    """Finds out what the two paths are (see the top of this file).

    Errors: `ComparisonError`, `CorpusError`, jambatalk.audio.AudioError.
    """
    from jambatalk.audio import exact_fps

    rate = None if fps is None else exact_fps(fps)
    usual: Fraction | None
    corpus = open_corpus(truth, units=units, fps=data_fps, skip_bad=skip_bad)
    if corpus is not None:
        corpus.clips(split)  # checked before any model runs
        vertices = corpus.vertex_count
        usual = Fraction(corpus.fps, 2 if corpus.fps == 60 else 1)  # what models of that data set are trained at
    else:
        first, usual, _ = read_vertices(_files(truth)[0])
        vertices = first.shape[1]
    predictor: FromModel | FromFiles
    if (predictions / "config.json").exists():
        from jambatalk.talking_face import CheckpointError, TalkingFace

        try:
            predictor = FromModel(TalkingFace.from_pretrained(predictions), style)
        except CheckpointError as error:
            raise ComparisonError(str(error)) from None
        if style not in ("auto", "all", "mean", "unknown") and style not in predictor.model.config.subjects:
            known = ", ".join([*predictor.model.config.subjects, "mean", "unknown", "all"])
            raise ComparisonError(f"--subject {style}: this model knows {known}")
        try:
            predictor.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ComparisonError(f"--device {device}: {str(error).splitlines()[0]}") from None
        usual = Fraction(predictor.model.config.frame_rate)
    elif not predictions.exists():
        raise ComparisonError(f"{predictions}: there is no such file or folder")
    else:
        predictor = FromFiles(predictions, rate or usual)
    predictors: dict[str, Predictor] = {predictions.name or "prediction": predictor}
    if baselines:
        if corpus is None or usual is None:
            raise ComparisonError("--baselines needs a corpus to learn from as the ground truth")
        predictors["mean face"] = FromBaseline(MeanFace(corpus, usual), usual)
        predictors["nearest neighbour"] = FromBaseline(NearestNeighbour(corpus, usual), usual)
    return Setting(
        truth,
        lambda: ground_truth(truth, split, rate or usual, corpus),
        predictors,
        find_regions(regions, corpus, vertices),
        None if corpus is None else corpus.faces,
        [] if corpus is None else corpus.bad,
    )


def report(
    setting: Setting, protocols: Sequence[Protocol], progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Scores each predictor by each protocol. Every clip is predicted once and looked at by all protocols.

    Returns:
        {"ground_truth", "missing": clips without a prediction, "skipped": bad clips, "protocols": [{..., "predictors":
        {name: scores}}]}
    """
    results: dict[str, dict[str, dict]] = {}
    missing: list[str] = []
    for name, predictor in setting.predictors.items():
        scoring = [protocol.scoring() for protocol in protocols]
        for pair in pairs(setting.truths(), predictor, setting.regions, missing):
            for one in scoring:
                one.add(pair)
            if progress:
                progress(f"{name}: {pair.name}")
        results[name] = {protocol.name: one.result() for protocol, one in zip(protocols, scoring, strict=True)}
    return {
        "ground_truth": str(setting.path),
        "skipped": list(setting.bad),
        "missing": list(dict.fromkeys(missing)),
        "protocols": [
            {
                "protocol": protocol.name,
                "version": protocol.version,
                "source": protocol.source,
                "warning": protocol.warning,
                "units": {measure.name: measure.unit for measure in protocol.measures},
                "predictors": {name: results[name][protocol.name] for name in setting.predictors},
            }
            for protocol in protocols
        ],
    }


def table(report: Mapping) -> str:
    """A report for people to read."""
    lines = []
    for protocol in report["protocols"]:
        predictors = protocol["predictors"]
        first = next(iter(predictors.values()))
        lines.append(f"{protocol['protocol']} (version {protocol['version']}): {protocol['source']}")
        rows = [["", *predictors, ""]]
        for measure, unit in protocol["units"].items():
            rows.append([measure, *(_number(scores["scores"][measure]) for scores in predictors.values()), unit])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
            lines.append("  " + "  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
        lines += [f"  {first['clips']} clips, {first['frames']} frames", ""]
        if protocol["warning"]:
            lines.insert(-1, f"  warning: {protocol['warning']}")
    if report["missing"]:
        some = ", ".join(report["missing"][:4]) + (", ..." if len(report["missing"]) > 4 else "")
        lines.append(f"{len(report['missing'])} clips have no prediction and are left out: {some}")
    for why in report["skipped"]:
        lines.append(f"skipped: {why}")
    return "\n".join(lines).rstrip()


def _number(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.4g}"
