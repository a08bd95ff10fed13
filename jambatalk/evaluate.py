"""How good is it? Against a ground truth, or on recordings of people without one.

    python -m jambatalk.evaluate PRED GT --protocol NAME       errors by named protocols (jambatalk.protocols)
    python -m jambatalk.evaluate --speech DIR                  mouth measures on any recording

PRED is a checkpoint or a folder of predicted vertices, GT a corpus or a folder of true ones (`jambatalk.comparison`
says how files are found and named). The rest of this page is about `--speech`.

It runs a checkpoint on every recording under DIR and prints the mouth measures of `jambatalk.metrics` as a table or
JSON:

- `opening_rms_correlation`: opening against the loudness of the speech; mean over clips;
- `opening_lag_ms`: how late the mouth is, the delay at which that mean is largest (in whole frames; negative: early);
- `silence_opening`: mean |opening| over the pauses of all clips;
- `bilabial_closure_20`: share of all p, b, m at which the opening falls to 0.2 or less; `bilabial_count` is how many;
- `other_closure_20`: the same share over all other sounds. A mouth that hardly opens closes everywhere: the one above
  means something only by its distance from this one;
- `opening_p95`: the 95th percentile of the opening over all frames (1 in the training corpus);
- `opening_jitter`: frame-to-frame changes of direction, mean over clips;
- `frames_exact`: every clip has exactly round(duration x fps) frames; `finite`: no NaN or Inf anywhere;
- `clips`, `aligned_clips`, `speakers`, `audio_seconds`.

**Transcripts** stand beside a recording as `<stem>.txt`, or in a CMU `transcription` (or `*.transcription`) file in the
same folder or in DIR, one line a clip: `text (stem)` or `<s> text </s> (stem)`. They are aligned by `pocketsphinx`
(extra `speech`). A clip without one, or with words that the dictionary lacks, is measured by what needs no text.

**Speakers** are counted by name: a clip in a sub-folder of DIR belongs to the speaker that the first sub-folder names;
one directly in DIR to the one that its stem names without the utterance number at its end (`reader_03-0870` ->
`reader_03`; LibriSpeech's `1089-134686-0000` -> `1089`). Clips that name nobody count as one speaker together.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jambatalk.animation import Animation
    from jambatalk.metrics import Phone
    from jambatalk.talking_face import TalkingFace

SUFFIXES = (".wav", ".flac", ".ogg")
LARGEST_LAG = 0.2  # seconds either way that `opening_lag_ms` looks at


class EvaluationError(ValueError):
    """The folder of recordings cannot be evaluated; the message is one line that says why."""


@dataclass(frozen=True)
class Clip:
    """One recording to evaluate on: its file, its name (relative to the folder), its speaker, its text if known."""

    path: Path
    name: str
    speaker: str
    text: str | None


def find_clips(directory: str | Path) -> list[Clip]:
    """The recordings (wav, flac, ogg) under a folder, sub-folders included, sorted by name, with what is known of each.

    Raises:
        EvaluationError: the folder does not exist, cannot be read, or holds no recording.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise EvaluationError(f"{directory} is not a folder")
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise EvaluationError(f"no {', '.join(SUFFIXES)} file under {directory}")
    tables: dict[Path, dict[str, str]] = {}
    clips = []
    for path in paths:
        text = _own_text(path)
        for folder in (path.parent, directory):
            if text is None:
                if folder not in tables:
                    tables[folder] = _read_transcriptions(folder)
                # A file id may be a path relative to its table's folder, without the extension.
                ids = (path.stem, path.relative_to(folder).with_suffix("").as_posix())
                text = next((tables[folder][name] for name in ids if name in tables[folder]), None)
        relative = path.relative_to(directory)
        clips.append(Clip(path, relative.as_posix(), speaker_of(relative), text))
    return clips


def speaker_of(relative: Path) -> str:
    """Who speaks in a recording, judged by its path relative to the folder of recordings (see the top of this file).
    The empty string where the path names nobody."""
    if len(relative.parts) > 1:
        return relative.parts[0]
    if librispeech := re.fullmatch(r"(\d+)-\d+-\d+", relative.stem):
        return librispeech[1]
    named = re.fullmatch(r"(.*?)[-_ .]+\d+", relative.stem)
    return named[1] if named else ""


def speech_report(
    model: TalkingFace,
    clips: Iterable[Clip],
    *,
    subject: str | None = None,
    alignment: bool = True,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a model on recordings and measure its mouth.

    Args:
        model: a TalkingFace, or anything with `animate(audio, subject=...) -> Animation`.
        clips: from `find_clips`.
        subject: speaking style, as `TalkingFace.animate` takes it.
        alignment: False leaves out what needs phone times, and then `pocketsphinx` is not needed.
        progress: called with each clip's row as it is done.

    Returns:
        The summary that the top of this file describes, with `clip_rows`, one dictionary a clip. Whatever could not be
        measured is None.

    Raises:
        AudioError: a recording cannot be read. EvaluationError: the model's mesh has no inner lip.
        SpeechPackageMissing: a clip has a text, and `pocketsphinx` is not installed.
    """
    import numpy as np

    from jambatalk import audio, metrics, speech

    rows, speakers = [], set()
    openings, paused, closures, others, correlations = [], [], [], [], []
    for clip in clips:
        recording = audio.load(clip.path)
        animation = model.animate(recording, subject=subject)
        fps, frames = animation.fps, animation.frames
        opening, finite = mouth_opening(animation)
        envelope = metrics.speech_envelope(recording.samples, speech.SAMPLING_RATE, fps, frames)
        quiet = metrics.pauses(envelope, fps)
        phones, why_not = _phones(clip, recording.samples) if alignment else (None, "not asked for")

        furthest = int(LARGEST_LAG * float(fps))
        lags = list(range(-furthest, furthest + 1))
        correlations.append((Fraction(fps), metrics.lagged_correlations(opening, envelope, lags)))
        openings.append(opening)
        paused.append(quiet)
        speakers.add(clip.speaker)
        row = {
            "clip": clip.name,
            "speaker": clip.speaker,
            "audio_seconds": float(recording.duration),
            "fps": float(fps),
            "frames": frames,
            "frames_exact": frames == round(recording.duration * Fraction(fps)),
            "finite": finite,
            "opening_rms_correlation": metrics.opening_rms_correlation(opening, envelope),
            "silence_opening": metrics.silence_opening(opening, quiet),
            "pause_frames": int(quiet.sum()),
            "opening_p95": float(np.percentile(opening, 95)),
            "opening_jitter": metrics.opening_jitter(opening),
            "bilabial_closure_20": None,
            "bilabial_count": None,
            "other_closure_20": None,
            "not_aligned": why_not,
        }
        if phones is not None:
            lips = metrics.bilabial_closures(opening, phones, fps)
            rest = metrics.phone_closures(opening, [p for p in phones if p[0] not in {*metrics.BILABIALS, "SIL"}], fps)
            closures.append(lips)
            others.append(rest)
            row["bilabial_closure_20"] = metrics.bilabial_closure_20(lips)
            row["bilabial_count"] = len(lips)
            row["other_closure_20"] = metrics.bilabial_closure_20(rest)
        rows.append(_plain(row))
        if progress:
            progress(rows[-1])
    if not rows:
        raise EvaluationError("no recordings")

    summary = {
        "clips": len(rows),
        "aligned_clips": len(closures),
        "speakers": len(speakers),
        "audio_seconds": sum(row["audio_seconds"] for row in rows),
        "opening_rms_correlation": _mean(row["opening_rms_correlation"] for row in rows),
        "opening_lag_ms": _lag_ms(correlations),
        "silence_opening": metrics.silence_opening(np.concatenate(openings), np.concatenate(paused)),
        "bilabial_closure_20": metrics.bilabial_closure_20(np.concatenate(closures)) if closures else None,
        "bilabial_count": sum(map(len, closures)),
        "other_closure_20": metrics.bilabial_closure_20(np.concatenate(others)) if others else None,
        "opening_p95": float(np.percentile(np.concatenate(openings), 95)),
        "opening_jitter": _mean(row["opening_jitter"] for row in rows),
        "frames_exact": all(row["frames_exact"] for row in rows),
        "finite": all(row["finite"] for row in rows),
    }
    return {**_plain(summary), "clip_rows": rows}


def mouth_opening(animation: Animation) -> tuple[np.ndarray, bool]:
    """The opening of the mouth in every frame of an animation, (frames,) float64, and whether all of its vertices are
    finite. The vertices are made a few at a time, so an hour is no problem.

    Raises:
        EvaluationError: the animation does not say where its inner lip is, or what opening counts as 1.
    """
    import numpy as np

    from jambatalk.face import mouth

    try:
        upper, lower = animation.regions["inner_lip_upper"], animation.regions["inner_lip_lower"]
    except KeyError as error:
        raise EvaluationError(f"the model's mesh has no region {error}, which mouth measures need") from None
    scale = float(animation.opening_scale)
    if not scale > 0:
        raise EvaluationError("the model does not say how wide open its mouth gets (opening_scale)")
    gaps, finite = [], True
    for vertices in animation.iter_vertices():
        finite = finite and bool(np.isfinite(vertices).all())
        gaps.append(np.asarray(mouth.inner_lip_gap(vertices, upper, lower), dtype=np.float64))
    rest = float(np.asarray(mouth.inner_lip_gap(np.asarray(animation.template)[None], upper, lower))[0])
    return np.asarray(mouth.opening(np.concatenate(gaps), rest, scale)), finite


def _phones(clip: Clip, samples: np.ndarray) -> tuple[list[Phone] | None, str | None]:
    """A clip's phones, or None and the reason why there are none."""
    from jambatalk import speech

    if clip.text is None:
        return None, "no transcript"
    try:
        return speech.align(samples, clip.text), None
    except speech.AlignmentError as error:
        print(f"{clip.name}: not aligned: {error}", file=sys.stderr)
        return None, str(error)


def _own_text(path: Path) -> str | None:
    """The text in `<stem>.txt` beside a recording, if there is one."""
    own = path.with_suffix(".txt")
    return " ".join(_read_text(own).split()) if own.is_file() else None


def _read_transcriptions(folder: Path) -> dict[str, str]:
    """File id -> text, from the CMU transcription files in a folder."""
    texts = {}
    for table in sorted({*folder.glob("transcription"), *folder.glob("*.transcription")}):
        for line in _read_text(table).splitlines():
            if match := re.fullmatch(r"\s*(?:<s>)?(.*?)(?:</s>)?\s*\(([^()]+)\)\s*", line):
                texts[match[2].strip()] = " ".join(match[1].split())
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as text: {error}") from None


def _lag_ms(correlations: list[tuple[Fraction, np.ndarray]]) -> float | None:
    """The delay, in milliseconds, at which the correlation is largest in the mean over clips."""
    import numpy as np

    values = np.array([value for _, value in correlations if np.isfinite(value).all()])
    if not len(values):
        return None
    return 1000 * (int(values.mean(0).argmax()) - values.shape[1] // 2) / float(correlations[0][0])


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of those values that exist."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: no NaN, which it has no word for."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(row)


def _table(report: dict[str, Any]) -> str:
    """A report for people to read."""

    def number(value: Any, digits: int = 3) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    columns = {
        "clip": lambda row: row["clip"],
        "seconds": lambda row: number(row["audio_seconds"], 2),
        "frames": lambda row: number(row["frames"]),
        "correlation": lambda row: number(row["opening_rms_correlation"]),
        "silence": lambda row: number(row["silence_opening"]),
        "closed p b m": lambda row: f"{number(row['bilabial_closure_20'], 2)} of {number(row['bilabial_count'])}",
        "others": lambda row: number(row["other_closure_20"], 2),
    }
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in report["clip_rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        )
        for line in lines
    ]
    summary = {key: number(value) for key, value in report.items() if key != "clip_rows"}
    text += ["", *(f"{key:<{max(map(len, summary))}}  {value}" for key, value in summary.items())]
    return "\n".join(text)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    from jambatalk.data.vocaset import add_arguments as add_corpus_arguments
    from jambatalk.protocols import PROTOCOLS

    parser = argparse.ArgumentParser(
        prog="python -m jambatalk.evaluate",
        description="Compare predicted motion with a ground truth, by named protocols; or (--speech) measure a model's "
        "mouth on recordings of people: loudness, pauses, closures at p, b and m.",
        epilog="What each figure means: --describe, and `python -m pydoc jambatalk.evaluate`.",
    )
    parser.add_argument("predictions", nargs="?", metavar="PRED", type=Path,
                        help="checkpoint folder, or folder of .npy/.npz vertices, one file a clip")  # fmt: skip
    parser.add_argument(
        "truth", nargs="?", metavar="GT", type=Path, help="corpus folder, or folder of .npy/.npz vertices"
    )
    parser.add_argument("--describe", action="store_true", help="say what every protocol computes, and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--subject", metavar="NAME",
                        help="style to speak in: a training identity, mean, unknown; with a GT also all (default: the "
                        "speaker's own where known, else unknown)")  # fmt: skip
    comparing = parser.add_argument_group("with PRED and GT")
    comparing.add_argument("--protocol", metavar="NAME", action="append",
                           help=f"{', '.join(PROTOCOLS)}; may be given again (default: jambatalk)")  # fmt: skip
    comparing.add_argument("--split", default="test", help="of the corpus (default: test)")
    comparing.add_argument("--regions", metavar="FILE", type=Path,
                           help="FLAME_masks.pkl, an .npz, or a folder with lve.txt and fdd.txt (default: the corpus' "
                           "own)")  # fmt: skip
    comparing.add_argument("--fps", metavar="N", help="frames per second of .npy files (default: 30, or the corpus's)")
    comparing.add_argument("--baselines", action="store_true",
                           help="score the mean face and the nearest neighbour by sound too")  # fmt: skip
    comparing.add_argument("--pictures", metavar="DIR", type=Path,
                           help="write pages there: errors over time, on the face, both side by side")  # fmt: skip
    add_corpus_arguments(comparing)
    speaking = parser.add_argument_group("with --speech")
    speaking.add_argument("--speech", metavar="DIR", help="folder of recordings (wav, flac, ogg), with transcripts "
                          "beside them: <stem>.txt, or a CMU file named `transcription`")  # fmt: skip
    speaking.add_argument("--model", metavar="DIR", help="checkpoint folder or hub id (default: the bundled demo)")
    speaking.add_argument("--no-align", action="store_true", help="leave out what needs transcripts and pocketsphinx")
    arguments = parser.parse_args(argv)
    if not arguments.describe and (arguments.speech is None) == (arguments.truth is None):
        parser.error("give PRED and GT, or --speech DIR")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 with one line on stderr for bad input."""
    arguments = _arguments(argv)
    if arguments.describe:
        from jambatalk.protocols import PROTOCOLS, describe

        print("\n\n".join(map(describe, PROTOCOLS.values())))
        return 0
    return _compare(arguments) if arguments.speech is None else _measure_speech(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from jambatalk import comparison
    from jambatalk.audio import AudioError
    from jambatalk.data.vocaset import CorpusError
    from jambatalk.export import ExportError
    from jambatalk.protocols import PROTOCOLS, ProtocolError

    try:
        chosen = list(dict.fromkeys(arguments.protocol or ["jambatalk"]))
        for name in chosen:
            if name not in PROTOCOLS:
                raise EvaluationError(f"--protocol {name}: known are {', '.join(PROTOCOLS)}")
        protocols = [PROTOCOLS[name] for name in chosen]
        for protocol in protocols:
            if protocol.warning:
                print(f"jambatalk.evaluate: warning: {protocol.warning}", file=sys.stderr)
        setting = comparison.find(
            arguments.predictions, arguments.truth, split=arguments.split, regions=arguments.regions,
            fps=arguments.fps, baselines=arguments.baselines, style=arguments.subject or "auto",
            device=arguments.device, units=arguments.units, data_fps=arguments.data_fps, skip_bad=arguments.skip_bad,
        )  # fmt: skip
        report = comparison.report(setting, protocols, _progress())
        if arguments.pictures:
            from jambatalk import pictures

            report["pictures"] = str(pictures.write(setting, report, arguments.pictures))
    except (EvaluationError, AudioError, CorpusError, ProtocolError, ExportError, comparison.ComparisonError) as error:
        return _refuse(error)
    print(json.dumps(_plain(report), indent=2) if arguments.json else comparison.table(report))
    return 0


def _progress() -> Callable[[str], None] | None:
    """What is being done, on the terminal only."""
    return (lambda text: print(text, file=sys.stderr)) if sys.stderr.isatty() else None


def _measure_speech(arguments: argparse.Namespace) -> int:
    try:
        clips = find_clips(arguments.speech)
        # Imported only now: --help and a mistyped folder should not wait for torch.
        from jambatalk.audio import AudioError
        from jambatalk.speech import SpeechPackageMissing
        from jambatalk.talking_face import CheckpointError, TalkingFace
    except EvaluationError as error:
        return _refuse(error)
    try:
        model = TalkingFace.from_pretrained(arguments.model)
        _place(model, arguments.device)
        if arguments.subject not in (None, "mean", "unknown") and arguments.subject not in model.config.subjects:
            known = ", ".join([*model.config.subjects, "mean", "unknown"])
            raise EvaluationError(f"--subject {arguments.subject}: this model knows {known}")
        done = 0

        def progress(row: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            if sys.stderr.isatty():
                print(f"{done}/{len(clips)} {row['clip']}", file=sys.stderr)

        report = speech_report(
            model, clips, subject=arguments.subject, alignment=not arguments.no_align, progress=progress
        )
    except SpeechPackageMissing as error:
        return _refuse(f"{error} (or leave those measures out with --no-align)")
    except (EvaluationError, AudioError, CheckpointError) as error:
        return _refuse(error)
    print(json.dumps(report, indent=2) if arguments.json else _table(report))
    return 0


def _place(model: TalkingFace, device: str) -> None:
    """Move a model to a device. Raises EvaluationError where there is no such device."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _refuse(why: object) -> int:
    print(f"jambatalk.evaluate: {' '.join(str(why).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
