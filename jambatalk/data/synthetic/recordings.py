"""`python -m jambatalk.data.synthetic.recordings OUT [FOLDER ...]`: real voices for the synthetic corpus.

Recordings without transcripts get phones with times: `hama` (a phoneme recogniser) hears which phones are said,
`pocketsphinx` (forced alignment of just these) finds when. Clips whose labels are in doubt are left out. On recordings
whose text is known, the labels so made agree with the alignment of the text on 90 % of the 10 ms frames, and 28 of 29
p, b and m are within 60 ms of where the text's alignment has them.

    OUT/<speaker>/<name>.wav    16 kHz mono 16 bit
    OUT/phones.json             speaker -> name -> [[phone, start, end], ...] in seconds (ARPAbet, SIL), as in a corpus
    OUT/manifest.json           sources, licences, versions, what was left out and why

Nobody's recordings are part of this project: OUT is for training on the machine where it was made. Recordings that a
model is tested on must not be in it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jambatalk import metrics, speech
from jambatalk.audio import AudioError
from jambatalk.audio import load as load_audio
from jambatalk.data.synthetic.phones import BILABIALS, VOWELS, Phone
from jambatalk.face.mesh import MissingPackage

RATE = 16000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".g722")

ASTERISK = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
_ASTERISK_PACKAGE = "asterisk-core-sounds-en-g722"
_ASTERISK_LICENCE = "CC-BY-SA-3.0: Asterisk core sounds (en), (c) 2003-2010 Allison Smith, funded by Digium, Inc."
# Tones, jokes and unfinished prompts; single letters are too short for the recogniser to be trusted.
_ASTERISK_NOT_SPEECH = re.compile(r"silence/|beep|tone|tt-monkeys\.|tt-weasels-|vm-cust|ascending|letters/")

_EXTRA = "pip install 'jambatalk[speech]'"


class RecordingsError(ValueError):
    """The recordings cannot be used, or not be written where asked; one line."""


@dataclass(frozen=True)
class _Labelled:
    """One clip: samples (n,) float32 at 16 kHz, abutting phones from its first sample to its last, and why it is in
    doubt (None: it is not)."""

    name: str
    samples: np.ndarray
    phones: list[Phone]
    doubt: str | None


# ------------------------------------------------------------------------------------------------- which phones: hama

# The recogniser's IPA; marks that are no sound of their own are not in the table and dropped.
_IPA = {
    "a": "AA", "ä": "AA", "ɑ": "AA", "ɒ": "AA", "æ": "AE", "ɐ": "AH", "ə": "AH", "ʌ": "AH", "ɔ": "AO",
    "aʊ": "AW", "aɪ": "AY", "b": "B", "β": "B", "t͡ʃ": "CH", "t͡ɕ": "CH", "d": "D", "ɾ": "D", "ð": "DH",
    "ɛ": "EH", "eə": "EH", "ɚ": "ER", "ɝ": "ER", "ɜ": "ER", "e": "EY", "eɪ": "EY", "f": "F", "g": "G", "ɡ": "G",
    "h": "HH", "ɦ": "HH", "x": "HH", "ɪ": "IH", "ɨ": "IH", "ɪə": "IH", "i": "IY", "d͡ʒ": "JH", "k": "K",
    "kʰ": "K", "l": "L", "ɫ": "L", "m": "M", "ɱ": "M", "n": "N", "ɲ": "N", "ŋ": "NG", "o": "OW", "oʊ": "OW",
    "ɔɪ": "OY", "p": "P", "pʰ": "P", "r": "R", "ɹ": "R", "ɻ": "R", "s": "S", "ʃ": "SH", "ɕ": "SH", "t": "T",
    "tʰ": "T", "θ": "TH", "ʊ": "UH", "ɵ": "UH", "ɯ": "UH", "u": "UW", "ʉ": "UW", "y": "UW", "v": "V", "w": "W",
    "j": "Y", "ju": "Y UW", "z": "Z", "ʒ": "ZH",
}  # fmt: skip


def hear(samples: np.ndarray) -> tuple[list[list[str]], float]:
    """The words in a recording, each a list of ARPAbet phones, and how sure the recogniser is.

    samples (n,) float32 at 16 kHz. The confidence is the mean log-probability of the phone heard, over the frames where
    one is heard; -inf where none is. Raises MissingPackage.
    """
    model = _recogniser()
    waveform = {"waveform": samples[None].astype(np.float32), "waveform_lengths": np.array([len(samples)], np.int64)}
    scores, length = model.session.run(["log_probs", "out_lengths"], waveform)
    scores = np.asarray(scores[0])[: int(np.asarray(length).reshape(-1)[0])]
    handicapped = scores / np.float32(model.decode_cfg.temperature)  # the package decodes so: blanks win less often
    handicapped[:, model.blank_id] += np.float32(model.decode_cfg.blank_bias)
    best = handicapped.argmax(axis=1)
    said = best != model.blank_id
    # Connectionist temporal classification: a token lasts while it repeats, blanks part tokens.
    new = said & (np.diff(best, prepend=-1) != 0)
    words: list[list[str]] = [[]]
    for token in (model.decoder_tokens[i] for i in best[new]):
        if token == "<wb>":
            words.append([])
        else:
            words[-1] += _IPA.get(token, "").split()
    confidence = float(scores[said].max(axis=1).mean()) if said.any() else -np.inf
    return [word for word in words if word], confidence


@functools.cache
def _recogniser() -> Any:  # hama has no types
    check_packages()
    import hama

    model = hama.ASRModel()
    if not all(hasattr(model, name) for name in ("session", "decoder_tokens", "blank_id", "decode_cfg")):
        raise MissingPackage(f"this needs another release of the package `hama` (1.7): {_EXTRA}")
    return model


def check_packages(g722: bool = False) -> None:
    """Raise MissingPackage, in one line that says what to install, unless everything that labels recordings is here."""
    needed = {"hama": "hama", "pocketsphinx": "pocketsphinx"} | ({"av": "av"} if g722 else {})
    missing = [f"`{name}`" for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        word = "package" if len(missing) == 1 else "packages"
        why = "reading .g722 files" if missing == ["`av`"] else "labelling recordings"
        raise MissingPackage(f"{why} needs the {word} {', '.join(missing)}: {_EXTRA}")


# ---------------------------------------------------------------------------------------- labels, and whom to believe


def label(name: str, samples: np.ndarray) -> _Labelled:
    """Phones of one clip (n,) float32 at 16 kHz. Raises speech.AlignmentError where there is nothing to align."""
    words, confidence = hear(samples)
    phones = speech.align_phones(samples, words)
    return _Labelled(name, samples, _to_the_end(phones, len(samples) / RATE), doubt(samples, phones, confidence))


def _to_the_end(phones: list[Phone], seconds: float) -> list[Phone]:
    """The aligner stops a few hundredths before the end: what is left is pause."""
    name, start, _ = phones[-1]
    if name == "SIL":
        return [*phones[:-1], (name, start, seconds)]
    return [*phones, ("SIL", phones[-1][2], seconds)] if seconds - phones[-1][2] > 1e-3 else phones


def doubt(samples: np.ndarray, phones: list[Phone], confidence: float) -> str | None:
    """Why these labels of a clip are not to be trusted, or None.

    samples (n,) at 16 kHz. What is looked at: how sure the recogniser was, loud sound in what should be a pause,
    silence in what should be a vowel, and sounds longer than anyone makes.
    """
    frames = len(samples) // 160  # of 10 ms, like the aligner's
    seconds = len(samples) / RATE
    envelope = metrics.speech_envelope(samples, RATE, 100, frames)
    envelope = np.sqrt(np.convolve(envelope**2, np.ones(3) / 3, "same"))
    envelope /= max(np.percentile(envelope, 95), 1e-9)
    at = np.full(frames, "SIL", "U3")
    for name, start, end in phones:
        at[int(round(start * 100)) : int(round(end * 100))] = name
    within_pause = np.convolve(at == "SIL", np.ones(9), "same") > 8.5  # 40 ms away from any phone
    loud_pause = float((within_pause & (envelope > 0.3)).sum()) / 100
    silent_vowel = float((np.isin(at, list(VOWELS)) & (envelope < 0.05)).sum()) / 100
    lengths = [end - start for name, start, end in phones if name != "SIL"]
    if confidence < -0.45:
        return "the recogniser was unsure"
    if len(lengths) < 3:
        return "fewer than three sounds"
    if loud_pause > 0.08 + 0.01 * seconds:
        return "sound in a pause"
    if silent_vowel > 0.1 + 0.02 * seconds:
        return "silence in a vowel"
    if max(lengths) > 0.45:
        return "a sound of more than 0.45 s"
    return None


# ----------------------------------------------------------------------------------------------------- the recordings


def read(path: Path) -> np.ndarray:
    """(n,) float32 mono at 16 kHz of a file that libsndfile or, for .g722, PyAV reads.

    Raises AudioError, MissingPackage."""
    if path.suffix.lower() != ".g722":
        return load_audio(path).samples
    check_packages(g722=True)
    import av

    try:
        with av.open(str(path), format="g722") as file:
            blocks = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"{path}: {' '.join(str(error).split())}") from None
    if not blocks:
        raise AudioError(f"{path}: it holds no samples")
    return np.concatenate(blocks).astype(np.float32) / 32768


def with_room(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0.2 s of near silence on both sides: prompts begin and end at once, and both tools want a pause there."""
    samples = np.pad(samples, RATE // 5)
    return samples + rng.normal(size=len(samples)).astype(np.float32) * np.float32(2e-4)  # -74 dB


def pieces(samples: np.ndarray) -> list[np.ndarray]:
    """A recording of 9 s or more in pieces of about 5 s, cut in the middle of pauses: both tools lose their way in long
    ones. The pieces make up the recording."""
    if len(samples) < 9 * RATE:
        return [samples]
    frames = len(samples) // 160
    envelope = metrics.speech_envelope(samples, RATE, 100, frames)
    quiet = envelope < 0.08 * np.percentile(envelope, 95)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet.astype(np.int8), [0]])))
    made, start = [], 0
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        middle = int(first + last) * 80
        if last - first >= 20 and first > 50 and last < frames - 50 and middle - start >= 4 * RATE:
            made.append(samples[start:middle])
            start = middle
    return [*made, samples[start:]]


def find(folder: Path) -> list[Path]:
    """The sound files under a folder, in a fixed order. Raises RecordingsError where there is none."""
    if not folder.is_dir():
        if folder == ASTERISK:
            raise RecordingsError(
                f"{folder}: no such folder; the recordings that are used where none are named are in "
                f"Debian: apt-get install {_ASTERISK_PACKAGE}"
            )
        raise RecordingsError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise RecordingsError(f"{folder}: holds no recording ({', '.join(SUFFIXES)})")
    return found


def label_folder(folder: Path, progress: bool = True) -> tuple[list[_Labelled], dict[str, str]]:
    """Label all recordings of one speaker: the clips to be trusted, and name -> why for what is left out."""
    paths = find(folder)
    asterisk = any(path.suffix.lower() == ".g722" for path in paths)
    check_packages(g722=asterisk)
    kept: dict[str, _Labelled] = {}
    left_out: dict[str, str] = {}
    for number, path in enumerate(tqdm(paths, desc=folder.name, unit="file", disable=not progress)):
        relative = path.relative_to(folder)
        name = relative.with_suffix("").as_posix().replace("/", "_")
        if asterisk and _ASTERISK_NOT_SPEECH.search(relative.as_posix()):
            left_out[name] = "not speech, or a single letter"
            continue
        try:
            samples = read(path)
        except AudioError as error:
            left_out[name] = str(error).removeprefix(f"{path}: ")
            continue
        if len(samples) < RATE // 4:
            left_out[name] = "shorter than 0.25 s"
            continue
        parts = pieces(with_room(samples, np.random.default_rng(number)))
        for k, part in enumerate(parts):
            own = f"{name}-{k:02d}" if len(parts) > 1 else name
            if own in kept:
                left_out[relative.as_posix()] = "another recording has this name"
                continue
            try:
                clip = label(own, part)
            except speech.AlignmentError:
                left_out[own] = "nothing heard that could be aligned"
                continue
            if clip.doubt:
                left_out[own] = clip.doubt
            else:
                kept[own] = clip
    return list(kept.values()), left_out


def label_recordings(
    out: str | Path, folders: list[str | Path] | None = None, licence: str | None = None, progress: bool = True
) -> dict:
    """Label the recordings of some speakers, a folder each (Debian's Asterisk prompts where none is given), and write
    them into `out`, which must not exist or be empty; returns the manifest. The same recordings give the same files.

    licence: of the folders given, for the manifest.

    The folder appears when it is complete. Raises RecordingsError for folders and recordings that cannot be used,
    MissingPackage for what is not installed.
    """
    import soundfile

    out = Path(out).resolve()
    chosen = [Path(folder) for folder in folders] if folders else [ASTERISK]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordingsError(f"{out}: exists and is not an empty folder")
    names = [folder.resolve().name for folder in chosen]
    if len(set(names)) < len(names):
        raise RecordingsError("two folders have the same name, and a speaker is named after the folder")
    for folder in chosen:
        find(folder)
    check_packages()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        phones: dict[str, dict[str, list]] = {}
        speakers: dict[str, dict] = {}
        for name, folder in zip(names, chosen, strict=True):
            kept, left_out = label_folder(folder, progress)
            if not kept:
                reasons = Counter(left_out.values()).most_common(1)
                raise RecordingsError(f"{folder}: none of its recordings can be used ({reasons[0][0]})")
            (unfinished / name).mkdir()
            for clip in kept:
                soundfile.write(unfinished / name / f"{clip.name}.wav", clip.samples, RATE, subtype="PCM_16")
            phones[name] = {clip.name: [[p, round(a, 4), round(b, 4)] for p, a, b in clip.phones] for clip in kept}
            sounds = [phone for clip in kept for phone, *_ in clip.phones if phone != "SIL"]
            speakers[name] = {
                "source": _ASTERISK_PACKAGE if folder == ASTERISK else name,
                "licence": _ASTERISK_LICENCE if folder == ASTERISK else licence or "not stated",
                "clips": len(kept),
                "seconds": round(sum(len(clip.samples) for clip in kept) / RATE, 2),
                "phones": len(sounds),
                "bilabials": sum(phone in BILABIALS for phone in sounds),
                "left_out": dict(sorted(left_out.items())),
            }
        manifest = {
            "generator": "jambatalk.data.synthetic.recordings",
            "versions": {name: _version(name) for name in ("jambatalk", "hama", "pocketsphinx", "av", "numpy")},
            "sample_rate": RATE,
            "speakers": speakers,
        }
        for file, value in (("phones.json", phones), ("manifest.json", manifest)):
            (unfinished / file).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.chmod(unfinished, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# -------------------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code (2: one line on stderr says what is wrong)."""
    parser = argparse.ArgumentParser(
        prog="python -m jambatalk.data.synthetic.recordings",
        description="Give recordings of people phones with times, so that they can be part of a training corpus "
        "(python -m jambatalk.synthesize --recordings OUT). No transcripts are needed. "
        f"Needs: {_EXTRA}.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        help="recordings of one speaker, who is named after the folder "
        f"(default: those of Debian's {_ASTERISK_PACKAGE})",
    )
    parser.add_argument("--licence", help="licence of the recordings in FOLDER, for the manifest")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON line")
    options = parser.parse_args(arguments)
    try:
        manifest = label_recordings(
            options.out, options.folders, options.licence, progress=sys.stderr.isatty() or not options.json
        )
    except KeyboardInterrupt:
        print("recordings: interrupted, nothing written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"recordings: {error}", file=sys.stderr)
        return 2
    speakers = manifest["speakers"]
    if options.json:
        told = ("clips", "seconds", "phones", "bilabials")
        figures = {name: {key: about[key] for key in told} for name, about in speakers.items()}
        print(json.dumps({"output": options.out, "speakers": figures}))
        return 0
    for name, speaker in speakers.items():
        print(
            f"{options.out}/{name}: {speaker['clips']} clips, {speaker['seconds'] / 60:.1f} min, "
            f"{speaker['phones']} phones ({speaker['bilabials']} of p, b, m)"
        )
        for reason, count in Counter(speaker["left_out"].values()).most_common():
            print(f"  left out: {count} ({reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
