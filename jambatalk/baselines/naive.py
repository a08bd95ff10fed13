"""Two predictors that understand nothing of speech: a face that stands still, and one that repeats what it has heard.

Both answer `predict(samples, frames) -> (frames, V, 3)`: displacements from a template in metres, which anybody's face
can carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jambatalk.data.vocaset import SAMPLING_RATE, Clip, Corpus

MEL_BANDS = 40
CONTEXT = 3  # frames either side of a frame that its sound is compared with


class MeanFace:
    """The mean displacement of all training frames, in every frame: the best guess without any sound."""

    def __init__(self, corpus: Corpus, fps: Fraction):
        total: np.ndarray | float = 0.0
        frames = 0
        for clip in corpus.clips("train"):
            moved = corpus.displacement(clip, _step(corpus, fps))
            total, frames = total + moved.sum(0, dtype=np.float64), frames + len(moved)
        self.displacement = np.asarray(total / frames, dtype=np.float32)

    def predict(self, samples: np.ndarray, frames: int) -> np.ndarray:
        return np.broadcast_to(self.displacement, (frames, *self.displacement.shape))


class NearestNeighbour:
    """For each frame, the displacement of the training frame whose sound is most alike.

    Alike: least squared distance between log-mel spectra (40 bands, each of mean 0 and deviation 1 over the training
    frames) of the frame and of the three before and after it. Memory: one row of 280 numbers for each training frame;
    vertices stay on the disk.
    """

    def __init__(self, corpus: Corpus, fps: Fraction):
        self.corpus, self.fps, self.step = corpus, fps, _step(corpus, fps)
        self.clips: Sequence[Clip] = corpus.clips("train")
        spectra, self.places = [], []
        for index, clip in enumerate(self.clips):
            frames = len(range(0, len(clip.rows), self.step))
            spectra.append(log_mel(clip.samples, frames, fps))
            self.places += [(index, frame) for frame in range(frames)]
        bands = np.concatenate(spectra)
        self.mean, self.deviation = bands.mean(0), bands.std(0) + 1e-6
        self.sounds = np.concatenate([self._neighbourhoods(spectrum) for spectrum in spectra])
        self.lengths = np.einsum("ij,ij->i", self.sounds, self.sounds)

    def _neighbourhoods(self, spectrum: np.ndarray) -> np.ndarray:
        spectrum = (spectrum - self.mean) / self.deviation
        padded = np.pad(spectrum, ((CONTEXT, CONTEXT), (0, 0)), mode="edge")
        return np.concatenate([padded[i : i + len(spectrum)] for i in range(2 * CONTEXT + 1)], axis=1)

    def predict(self, samples: np.ndarray, frames: int) -> np.ndarray:
        asked = self._neighbourhoods(log_mel(samples, frames, self.fps))
        out = np.empty((frames, self.corpus.vertex_count, 3), np.float32)
        for start in range(0, frames, 64):  # the distances of an hour to an hour would be many GB
            distance = self.lengths - 2 * asked[start : start + 64] @ self.sounds.T
            for at, nearest in enumerate(distance.argmin(1), start):
                index, frame = self.places[nearest]
                clip = self.clips[index]
                moved = clip.read(np.array([frame * self.step])) - self.corpus.templates[clip.subject]
                out[at] = moved[0]
        return out


def log_mel(samples: np.ndarray, frames: int, fps: Fraction) -> np.ndarray:
    """(frames, 40) float32: log10 of the mel spectrum around the time t / fps of each frame, 50 ms windows."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    window, hop = 800, 160
    filters = mel_filter_bank(1 + 1024 // 2, MEL_BANDS, 50.0, 8000.0, SAMPLING_RATE)
    padded = np.pad(np.asarray(samples, np.float64), (0, window))
    mel = spectrogram(
        padded, window_function(window, "hann"), window, hop, fft_length=1024, mel_filters=filters, log_mel="log10",
        mel_floor=1e-5,
    ).T  # fmt: skip
    at = np.array([round(t * Fraction(SAMPLING_RATE, hop) / fps) for t in range(frames)], dtype=np.int64)
    return mel[np.minimum(at, len(mel) - 1)].astype(np.float32)


def _step(corpus: Corpus, fps: Fraction) -> int:
    step = Fraction(corpus.fps) / fps
    if step.denominator != 1:
        raise ValueError(f"{corpus.directory}: {corpus.fps} frames/s are no multiple of {fps}")
    return int(step)
