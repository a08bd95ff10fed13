"""Text to speech with the time of every phone, by engines that are packages: hibari (PyPI) and flite (Debian)."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jambatalk.data.synthetic.phones import Phone, from_flite, from_hibari, tidy
from jambatalk.face.mesh import MissingPackage

_HIBARI_MISSING = "the voice hibari/heart needs the package `hibari-tts`: pip install 'jambatalk[synthetic]'"
FLITE_VOICES = ("slt", "rms", "awb", "kal16")


@dataclass(frozen=True)
class Voice:
    """A way of sounding. `speed` is the tempo (1.0: the engine's own); `pitch` scales pitch and formants together, as a
    smaller or larger speaker would, and leaves the tempo alone."""

    engine: str  # "hibari" or "flite"
    name: str  # the engine's name of the voice
    speed: float = 1.0
    pitch: float = 1.0

    def __str__(self) -> str:
        return f"{self.engine}/{self.name} speed {self.speed:g} pitch {self.pitch:g}"


@dataclass(frozen=True)
class Speech:
    """samples (n,) float32 mono at `rate` Hz; phones: abutting spans in seconds from the first sample to the last."""

    samples: np.ndarray
    rate: float
    phones: list[Phone]


def check_voices(voices: list[Voice]) -> None:
    """Raise MissingPackage, naming what to install, if a voice cannot be used here."""
    engines = {voice.engine for voice in voices}
    if "hibari" in engines and importlib.util.find_spec("hibari") is None:
        raise MissingPackage(_HIBARI_MISSING)
    if "flite" in engines:
        have = _flite_voices()
        for voice in voices:
            if voice.engine == "flite" and voice.name not in have:
                raise MissingPackage(
                    f"the installed flite has no voice {voice.name!r} (it has: {', '.join(have)}); "
                    "Debian's has all that are used: apt-get install flite"
                )


def speak(text: str, voice: Voice, seed: int = 0) -> Speech:
    """Say `text`. The same arguments give the same samples. `rate` is not an integer where `voice.pitch` is not 1."""
    engine = {"hibari": _hibari, "flite": _flite}[voice.engine]
    # Played `pitch` times as fast as made, so it must be made that much slower to end up at the right tempo.
    made = engine(text, voice.name, voice.speed / voice.pitch, seed)
    phones = _end_with_sound(made)
    phones = [(name, start / voice.pitch, end / voice.pitch) for name, start, end in phones]
    return Speech(made.samples, made.rate * voice.pitch, phones)


def _end_with_sound(speech: Speech) -> list[Phone]:
    """The phones, where the one before a pause ends when it is no longer heard: engines hand it part of the silence."""
    step = int(speech.rate * 0.010)
    blocks = speech.samples[: len(speech.samples) // step * step].reshape(-1, step)
    level = np.sqrt(np.square(blocks, dtype=np.float64).mean(axis=1))
    heard = level > 0.03 * np.percentile(level, 95)
    phones = list(speech.phones)
    for i in range(len(phones) - 1):
        (name, start, end), (following, _, pause_end) = phones[i], phones[i + 1]
        if following == "SIL" and name != "SIL":
            last = np.flatnonzero(heard[: int(end * speech.rate / step)])
            sound = (last[-1] + 1) * step / speech.rate + 0.02 if len(last) else start
            end = min(max(sound, start + 0.04), end)
            phones[i], phones[i + 1] = (name, start, end), (following, end, pause_end)
    return phones


# ---------------------------------------------------------------------------------------------------------------- flite


def _flite_binary() -> str:
    path = shutil.which("flite")
    if path is None:
        raise MissingPackage("the voices slt, rms, awb and kal16 need the program `flite`: apt-get install flite")
    return path


@functools.lru_cache(maxsize=1)
def _flite_voices() -> list[str]:
    listed = subprocess.run([_flite_binary(), "-lv"], capture_output=True, text=True, check=True).stdout
    return listed.partition(":")[2].split()


def _flite(text: str, name: str, speed: float, seed: int) -> Speech:
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        command = [
            _flite_binary(),
            "-voice",
            name,
            "-psdur",
            "--setf",
            f"duration_stretch={1 / speed:.6f}",
            "-t",
            text,
            "-o",
            str(wav),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not wav.is_file():
            raise RuntimeError(f"flite failed on {text!r}: {done.stderr.strip() or done.returncode}")
        samples, rate = soundfile.read(wav, dtype="float32")
    seconds = len(samples) / rate
    phones, start = [], 0.0
    for item in done.stdout.split():
        symbol, _, end = item.rpartition(":")
        end = min(float(end), seconds)
        phones.append((from_flite(symbol), start, end))
        start = end
    if not phones:
        raise RuntimeError(f"flite gave no phone times for {text!r}")
    phones[-1] = (*phones[-1][:2], seconds)
    return Speech(samples, rate, tidy(phones))


# --------------------------------------------------------------------------------------------------------------- hibari

_UNIT = 0.025  # seconds a duration of 1 lasts
_LATE = 0.0625  # the durations run this much behind the sound; measured against forced alignment


@functools.lru_cache(maxsize=1)
def _hibari_engine() -> tuple[Any, Any]:  # neither package has types
    """The engine and an inference session that also gives the durations, which the graph computes but does not return.

    A protobuf message may be continued by appending bytes: the last output declared here is merged into the graph.
    """
    try:
        import hibari
        import onnxruntime
    except ImportError as error:
        raise MissingPackage(_HIBARI_MISSING) from error
    model = (Path(hibari.__file__).parent / "assets" / "hibari.onnx").read_bytes()
    tensor = b"/Clip_output_0"
    value_info = b"\x0a" + bytes([len(tensor)]) + tensor  # ValueInfoProto.name
    graph = b"\x62" + bytes([len(value_info)]) + value_info  # GraphProto.output
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # one order of additions: same bytes
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model + b"\x3a" + bytes([len(graph)]) + graph, options, providers=["CPUExecutionProvider"]
    )  # ModelProto.graph
    return hibari.Hibari(), session


def _hibari(text: str, name: str, speed: float, seed: int) -> Speech:
    from hibari import dsp

    engine, session = _hibari_engine()
    samples, symbols, durations = [], [], []
    rng = np.random.default_rng(seed)
    for part in engine.phonemize(text):
        ids = np.asarray([engine.ids(part)], np.int64)
        *spectrum, duration = session.run(None, {"ids": ids, "speed": np.asarray([speed], np.float32)})
        samples.append(dsp.synth(*[x[0] for x in spectrum], rng))
        symbols += [".", *[c for c in part if c in engine.vocab], "."]  # the pads at both ends are silent
        durations += duration.reshape(-1).round().astype(int).tolist()
    audio = np.concatenate(samples).astype(np.float32)
    return Speech(audio, dsp.SR, _hibari_phones(symbols, durations, len(audio) / dsp.SR))


def _hibari_phones(symbols: list[str], durations: list[int], seconds: float) -> list[Phone]:
    """Phones from the model's symbols (one character each) and their durations in units."""
    names: list[str] = []
    units: list[float] = []
    carried = 0.0  # time of marks that goes to the sound after them
    for i, (symbol, duration) in enumerate(zip(symbols, durations, strict=True)):
        name = from_hibari(symbol)
        following = symbols[i + 1] if i + 1 < len(symbols) else ""
        if name is None:
            # Stress marks and spaces have time of their own. Forced alignment puts the border of the sounds around them
            # in the middle (median error of starts 12 ms, bias 1 ms, over 24 sentences).
            if units:
                units[-1] += duration / 2
            carried += duration / 2 if units else duration
        else:
            if symbol == "ə" and following == "ɹ":
                name = "ER"
            names.append(name)
            units.append(duration + carried)
            carried = 0.0
    ends = np.clip(np.cumsum(units) * _UNIT - _LATE, 0.0, seconds)
    ends[-1] = seconds
    starts = np.concatenate([[0.0], ends[:-1]])
    spans = [(n, float(a), float(b)) for n, a, b in zip(names, starts, ends, strict=False)]
    return tidy(spans)
