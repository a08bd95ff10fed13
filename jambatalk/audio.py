"""Any audio, as a file or an array, to 16 kHz mono float32, or one clear line that says why not.

Files: whatever libsndfile reads (wav, flac, ogg, mp3, aiff, ...), any sample type, 4 kHz to 768 kHz, any number of
channels (mixed down by their mean). Files are read, checked and resampled in blocks, so the memory is that of the
result: 64 kB for a second of sound. The exact duration is kept beside the samples as a fraction, because the number of
frames of a clip is round(duration * fps) and a float would get the ties wrong.

No torch here: a bad file is refused before anything heavy is imported.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from jambatalk.audio_integrity import container_fault

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import ArrayLike
    from torch import Tensor

    # What `load` takes: a path, an array, a tensor, or what it gave.
    AudioLike: TypeAlias = str | os.PathLike[str] | ArrayLike | Tensor | "Audio"

SAMPLING_RATE = 16000
LOWEST_RATE, HIGHEST_RATE = 4000, 768000
_BLOCK = 1 << 16  # samples per channel read at once
_SEGMENT = 1 << 24  # samples kept in one piece: so large that an allocator gives its memory back at once


class AudioError(ValueError):
    """The audio cannot be used. The message is one line that names the audio and says why."""


@dataclass(frozen=True)
class Audio:
    """Sound that is ready for the model.

    samples: (n,) float32, mono, 16 kHz, finite; n = round(duration * 16000), at least 1.
    duration: exact seconds, the original number of samples over the original rate.
    original_rate: Hz. channels: how many were mixed down. name: the file's path, or "audio".
    """

    samples: np.ndarray
    duration: Fraction
    original_rate: int
    channels: int
    name: str = "audio"

    @property
    def sampling_rate(self) -> int:
        return SAMPLING_RATE


def load(source: AudioLike, sampling_rate: int | None = None) -> Audio:
    """Reads a file, or takes an array, as 16 kHz mono float32.

    source: a path; an array or a tensor (on any device) of shape (n,), or two-dimensional with channels along the
        shorter axis; or an `Audio`, which is returned as it is. Floating-point samples are taken as they are, integers
        are scaled to [-1, 1) by the range of their type.
    sampling_rate: of an array, in Hz; 16000 if not given. A file states its own, and this is ignored.

    Raises AudioError with one line: missing, a folder, unreadable, empty, truncated, corrupt, no samples, NaN or Inf
    samples, a rate or a shape that makes no sense.
    """
    if isinstance(source, Audio):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _load_file(os.fspath(source))
    return _load_array(source, SAMPLING_RATE if sampling_rate is None else sampling_rate)


def exact_fps(fps: int | float | str | Fraction) -> Fraction:
    """Frames per second as a fraction: 25, "30000/1001", 29.97 (= 2997/100, as written).

    Raises AudioError unless it is above 0 and at most 1000.
    """
    try:
        value = Fraction(repr(fps)) if isinstance(fps, float) else Fraction(fps)
    except (ValueError, TypeError, ZeroDivisionError):
        raise AudioError(f"fps must be a number such as 30 or 30000/1001, not {fps!r}") from None
    if not 0 < value <= 1000:
        raise AudioError(f"fps must be above 0 and at most 1000, not {fps}")
    return value


def frames_for(duration: Fraction, fps: int | float | str | Fraction) -> int:
    """round(duration * fps), exactly (ties to even, as Python rounds). Raises AudioError if that is no frame at all."""
    fps = exact_fps(fps)
    frames = round(Fraction(duration) * fps)
    if frames < 1:
        raise AudioError(
            f"the audio is too short for one frame: {float(duration) * 1000:.3g} ms, "
            f"and a frame at {float(fps):g} fps is {1000 / float(fps):.3g} ms"
        )
    return frames


def check_file(path: str | os.PathLike) -> None:
    """Raises AudioError for a file that is missing, empty, not a file or cut short: what can be told without
    decoding."""
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            raise AudioError(f"{path}: it is a folder, not a sound file")
        if not os.path.exists(path):
            raise AudioError(f"{path}: no such file")
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise AudioError(f"{path}: it is empty")
        if not os.path.isfile(path):
            raise AudioError(f"{path}: it is not a regular file")
        fault = container_fault(path)
    except AudioError:
        raise
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror or _one_line(error)}") from None
    except ValueError as error:  # a NUL in the name
        raise AudioError(f"{path!r}: {_one_line(error)}") from None
    if fault:
        raise AudioError(f"{path}: {fault}")


def _load_file(path: str) -> Audio:
    check_file(path)
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its libsndfile
        raise AudioError(f"reading audio files needs the soundfile package: {error}") from None
    try:
        # By its descriptor: by its name, soundfile would take the extension for the format (.raw).
        with open(path, "rb") as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            if file.frames == 0:
                raise AudioError(f"{path}: it holds no samples")
            converter = _Converter(file.samplerate, path)
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                converter.add(block)
            promised = file.frames
            if converter.length < promised < 1 << 62:  # a FLAC stream of unknown length promises the largest integer
                raise AudioError(
                    f"{path}: it is truncated: its header promises {promised} samples and it holds {converter.length}"
                )
            return converter.finish(file.channels)
    except AudioError:
        raise
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror or _one_line(error)}") from None
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise AudioError(f"{path}: it is corrupt or not a sound file ({_libsndfile_words(error)})") from None


def _load_array(source: Any, sampling_rate: int) -> Audio:
    if hasattr(source, "detach"):  # a tensor, without importing torch to ask
        source = source.detach().cpu()
        source = source.float().numpy() if source.is_floating_point() else source.numpy()
    try:
        array = np.asarray(source)
    except ValueError as error:  # rows of unequal length
        raise AudioError(f"audio: not an array of samples: {_one_line(error)}") from None
    if array.dtype.kind not in "fiu":
        raise AudioError(f"audio: samples must be floating-point or integer numbers, not {array.dtype}")
    if array.ndim not in (1, 2):
        raise AudioError(f"audio: expected shape (samples,) or (channels, samples), not {array.shape}")
    if array.size == 0:
        raise AudioError("audio: it holds no samples")
    if not np.isfinite(sampling_rate) or sampling_rate != int(sampling_rate):
        raise AudioError(f"audio: the sampling rate must be a whole number of Hz, not {sampling_rate}")
    channels_last = array[:, None] if array.ndim == 1 else array if array.shape[0] > array.shape[1] else array.T
    converter = _Converter(int(sampling_rate), "audio")
    for start in range(0, len(channels_last), _BLOCK):
        converter.add(_as_float(channels_last[start : start + _BLOCK]))
    return converter.finish(channels_last.shape[1])


def _as_float(samples: np.ndarray) -> np.ndarray:
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    centre = scale if samples.dtype.kind == "u" else 0.0
    return ((samples.astype(np.float64) - centre) / scale).astype(np.float32)


class _Converter:
    """Blocks of (n, channels) float32 at one rate in; one mono signal at 16 kHz out."""

    def __init__(self, rate: int, name: str):
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise AudioError(f"{name}: its sampling rate is {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} can be used")
        self.rate, self.name, self.length = rate, name, 0
        self._segments: deque[np.ndarray] = deque()
        self._filled = 0  # samples in all segments
        self._resampler = None
        if rate != SAMPLING_RATE:
            import soxr

            self._resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")

    def add(self, block: np.ndarray) -> None:
        finite = np.isfinite(block)
        if not finite.all():
            at = self.length + int(np.argmin(finite.all(axis=1)))
            raise AudioError(f"{self.name}: it holds NaN or Inf samples, the first at {at / self.rate:.3f} s")
        self.length += len(block)
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float64).astype(np.float32)
        self._append(mono if self._resampler is None else self._resampler.resample_chunk(mono))

    def _append(self, piece: np.ndarray) -> None:
        while len(piece):
            used = self._filled % _SEGMENT
            if not used:
                self._segments.append(np.empty(_SEGMENT, np.float32))
            fits = piece[: _SEGMENT - used]
            self._segments[-1][used : used + len(fits)] = fits
            self._filled += len(fits)
            piece = piece[len(fits) :]

    def finish(self, channels: int) -> Audio:
        if self.length == 0:
            raise AudioError(f"{self.name}: it holds no samples")
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        duration = Fraction(self.length, self.rate)
        # The resampler rounds the length its own way; the promise is round(duration * 16000), at least one sample.
        samples = np.zeros(max(1, round(duration * SAMPLING_RATE)), np.float32)
        start = 0
        while self._segments:  # one after the other, so that the clip is never there twice
            piece = self._segments.popleft()
            piece = piece[: min(self._filled - start, len(samples) - start)]
            samples[start : start + len(piece)] = piece
            start += len(piece)
        return Audio(samples, duration, self.rate, channels, self.name)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _libsndfile_words(error: BaseException) -> str:
    """libsndfile's reason without the Python object's name that soundfile puts before it."""
    words = getattr(error, "error_string", None) or _one_line(error)
    return words.removeprefix("Error : ").rstrip(".")
