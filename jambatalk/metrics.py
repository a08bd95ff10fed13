"""What is measured on a moving face, on plain numpy arrays.

Two families:

- **Mouth measures**, which need no ground truth and so work on any recording: the opening of the mouth against the
  loudness of the speech, in its pauses, and at the sounds that lips must close for (p, b, m).
- **Vertex errors** against a ground truth, for validation. Named, versioned protocols that reproduce published tables
  are a later matter; the two forms here say what they compute and nothing more.

Conventions. Frame `t` of a clip stands at time `t / fps` seconds, as in VOCASET. The *opening* of a mouth is the mean
distance between paired vertices of the upper and lower inner lip, less that distance on the template (the face at
rest), divided by the 95th percentile of the same quantity in the training corpus: 0 is at rest (closed), 1 is wide open
for that corpus, and a little below 0 is pressed together. `jambatalk.face.mouth` computes it from vertices.

Lengths are in metres unless a name says mm. A quantity that does not exist for a clip (a correlation with something
constant, a mean over no frames) is `nan`, never a number that looks like a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Phone = tuple[str, float, float]
"""One aligned sound: its ARPAbet name without stress ("SIL" for silence), its start and its end in seconds."""

BILABIALS = frozenset({"P", "B", "M"})
"""The English sounds that are made by closing the lips."""

CLOSED = 0.2
"""A mouth whose opening is at most this counts as closed."""

CLOSURE_MARGIN = 0.050
"""Seconds before and after a phone's aligned span in which its closure may happen: aligners err by about that much."""

ENVELOPE_WINDOW = 2
"""Length of the window of `speech_envelope`, in animation frames."""

PAUSE_LEVEL = 0.1
"""Fraction of the clip's 95th percentile below which the envelope counts as quiet (-20 dB)."""

PAUSE_FLOOR = 1e-3
"""Envelope (full scale 1) below which any frame counts as quiet, whatever the rest of its clip is like (-60 dB)."""

PAUSE_LENGTH = 0.150
"""Shortest quiet stretch, in seconds, that is a pause: the silent phase of a stop consonant is shorter."""

PAUSE_MARGIN = 0.050
"""Seconds of a pause next to speech that are left out: a mouth closes after the sound and opens ahead of it."""


def speech_envelope(samples: np.ndarray, sampling_rate: int, fps: Fraction | float, frames: int) -> np.ndarray:
    """Loudness of the speech around each animation frame: the root mean square of the samples in a window two frames
    long, centred on the frame.

        e_t = sqrt(mean of x^2 over the samples from (t - 1) / fps to (t + 1) / fps)

    Linear (not decibels), with no other smoothing: at 30 frames/s the window is 67 ms, long enough to hold several
    periods of any voice (the envelope does not follow single pulses) and short against a syllable (about 200 ms).

    Args:
        samples: (n,) mono, full scale 1. Outside of it there is silence, and windows at the ends count it.
        sampling_rate: samples per second.
        fps: animation frames per second.
        frames: number of animation frames.

    Returns:
        (frames,) float64, in the units of `samples`.
    """
    samples = _vector(samples, "samples").astype(np.float64, copy=False)
    step = Fraction(sampling_rate) / Fraction(fps)
    if step <= 0:
        raise ValueError(f"sampling_rate and fps must be positive, got {sampling_rate} and {fps}")
    half = step * ENVELOPE_WINDOW / 2
    # Exact boundaries, then running sums: the cost does not depend on the window, and an hour does not drift.
    starts = np.array([round(t * step - half) for t in range(frames)], dtype=np.int64)
    ends = np.array([round(t * step + half) for t in range(frames)], dtype=np.int64)
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples))])
    inside = energy[np.clip(ends, 0, len(samples))] - energy[np.clip(starts, 0, len(samples))]
    return np.sqrt(np.maximum(inside, 0.0) / np.maximum(ends - starts, 1))


def opening_rms_correlation(opening: np.ndarray, envelope: np.ndarray) -> float:
    """Pearson correlation of the mouth's opening with the speech envelope over a clip, at no delay.

        r = sum (o - mean o)(e - mean e) / sqrt(sum (o - mean o)^2 * sum (e - mean e)^2)

    Both (frames,). In [-1, 1]; `nan` where either is constant (a still mouth, digital silence). People score about 0.5
    to 0.7 (C. Chandrasekaran et al., "The natural statistics of audiovisual speech", 2009), because loudness is only
    part of what moves a mouth: a close vowel is loud, and lips are shut in a voiced m.
    """
    opening, envelope = _vector(opening, "opening"), _vector(envelope, "envelope")
    if len(opening) != len(envelope):
        raise ValueError(
            f"opening and envelope must have one value a frame each, got {len(opening)} and {len(envelope)}"
        )
    if len(opening) == 0:
        return float("nan")
    o, e = opening - opening.mean(), envelope - envelope.mean()
    scale = float(np.sqrt(np.dot(o, o) * np.dot(e, e)))
    # Rounding leaves a constant array a spread of about one unit in the last place of its mean, which is not motion.
    if np.ptp(opening) <= 1e-9 * max(1.0, np.abs(opening).max()) or np.ptp(envelope) <= 1e-9 or not scale > 0:
        return float("nan")
    return float(np.dot(o, e) / scale)


def lagged_correlations(opening: np.ndarray, envelope: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """`opening_rms_correlation` with the mouth taken `lag` frames later than the sound, for each lag, over the frames
    that both have. The lag with the largest value is how late the mouth is (negative: early).

    Returns:
        (lags,) float64; `nan` as in `opening_rms_correlation`, or where fewer than two frames overlap.
    """
    opening, envelope = _vector(opening, "opening"), _vector(envelope, "envelope")
    values = np.full(len(lags), np.nan)
    for i, lag in enumerate(lags):
        overlap = len(opening) - abs(lag)
        if overlap >= 2:
            mouth = opening[lag:] if lag >= 0 else opening[:lag]
            sound = envelope[:overlap] if lag >= 0 else envelope[-lag:]
            values[i] = opening_rms_correlation(mouth, sound)
    return values


def pauses(envelope: np.ndarray, fps: Fraction | float) -> np.ndarray:
    """The frames of a clip in which nobody speaks and the mouth has no reason to move.

    A frame is quiet where the envelope is below 0.1 of the clip's own 95th percentile (20 dB below its loud vowels,
    whatever the recording level) or below 0.001 of full scale. A pause is a run of quiet frames of at least 150 ms.
    Of each pause, the 50 ms next to speech on either side are left out, because a mouth opens ahead of the sound and
    closes after it; at the ends of the clip nothing is left out.

    Args:
        envelope: (frames,) from `speech_envelope`.
        fps: animation frames per second.

    Returns:
        (frames,) bool.
    """
    envelope = _vector(envelope, "envelope")
    frames = len(envelope)
    found = np.zeros(frames, dtype=bool)
    if frames == 0:
        return found
    quiet = envelope < max(PAUSE_LEVEL * float(np.percentile(envelope, 95)), PAUSE_FLOOR)
    shortest = int(np.ceil(PAUSE_LENGTH * float(fps) - 1e-9))
    margin = int(np.ceil(PAUSE_MARGIN * float(fps) - 1e-9))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start >= shortest:
            found[start + (margin if start > 0 else 0) : end - (margin if end < frames else 0)] = True
    return found


def silence_opening(opening: np.ndarray, paused: np.ndarray) -> float:
    """Mean of |opening| over the pauses: how far the mouth is from rest while nobody speaks. `nan` without a pause.

    opening (frames,); paused (frames,) bool from `pauses`. Pool clips by joining their arrays.
    """
    opening, paused = _vector(opening, "opening"), np.asarray(paused, dtype=bool)
    if opening.shape != paused.shape:
        raise ValueError(f"opening and paused must have one value a frame each, got {opening.shape} and {paused.shape}")
    return float(np.abs(opening[paused]).mean()) if paused.any() else float("nan")


def phone_closures(opening: np.ndarray, phones: Sequence[Phone], fps: Fraction | float) -> np.ndarray:
    """How far the lips closed for each phone: the smallest opening among the frames within its aligned span, widened
    by 50 ms on either side.

    Args:
        opening: (frames,).
        phones: (name, start, end) in seconds, of any subset of a clip's phones.
        fps: animation frames per second.

    Returns:
        (phones,) float64; `nan` where no frame lies within the span (a phone beyond the end of the animation).
    """
    opening, rate = _vector(opening, "opening"), float(fps)
    closures = np.full(len(phones), np.nan)
    for i, (_, start, end) in enumerate(phones):
        first = max(int(np.ceil((start - CLOSURE_MARGIN) * rate - 1e-6)), 0)
        last = min(int(np.floor((end + CLOSURE_MARGIN) * rate + 1e-6)), len(opening) - 1)
        if first <= last:
            closures[i] = opening[first : last + 1].min()
    return closures


def bilabial_closures(opening: np.ndarray, phones: Sequence[Phone], fps: Fraction | float) -> np.ndarray:
    """`phone_closures` of the p, b and m of a clip, in order."""
    return phone_closures(opening, [phone for phone in phones if phone[0].rstrip("012") in BILABIALS], fps)


def bilabial_closure_20(closures: np.ndarray) -> float:
    """Share of p, b and m, from `bilabial_closures`, at which the opening fell to 0.2 or less. `nan` where there are
    none; a `nan` closure (the animation ends before the phone) counts as not closed.
    """
    closures = _vector(closures, "closures")
    return float((closures <= CLOSED).mean()) if len(closures) else float("nan")


def opening_jitter(opening: np.ndarray) -> float:
    """Mean of |o_{t+1} - 2 o_t + o_{t-1}|: how much the opening changes direction from frame to frame. 0 for a steady
    movement. `nan` below three frames. Compare at one frame rate only.
    """
    opening = _vector(opening, "opening")
    return float(np.abs(np.diff(opening, n=2)).mean()) if len(opening) >= 3 else float("nan")


def lip_vertex_error_mm(predicted: np.ndarray, truth: np.ndarray, lips: np.ndarray) -> float:
    """Lip vertex error in millimetres: the distance of the worst lip vertex of each frame, averaged over frames.

        1000 * mean_t max_{v in lips} ||p_{t,v} - g_{t,v}||_2

    Args:
        predicted, truth: (frames, V, 3) metres, absolute positions, the same number of frames.
        lips: (L,) int, the vertices that count as lips.
    """
    return float(1e3 * np.sqrt(_worst_lip_squared(predicted, truth, lips)).mean())


def lip_vertex_error_squared(predicted: np.ndarray, truth: np.ndarray, lips: np.ndarray) -> float:
    """The lip vertex error as CodeTalker and those after it compute it: the *squared* distance of the worst lip vertex
    of each frame, averaged over frames, in square metres. Papers print it without saying that it is squared.

        mean_t max_{v in lips} ||p_{t,v} - g_{t,v}||_2^2

    Arguments as `lip_vertex_error_mm`. Pool clips by their frames, not by their means.
    """
    return float(_worst_lip_squared(predicted, truth, lips).mean())


def _worst_lip_squared(predicted: np.ndarray, truth: np.ndarray, lips: np.ndarray) -> np.ndarray:
    """(frames,) largest squared distance among the lip vertices."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape or predicted.ndim != 3 or predicted.shape[-1] != 3:
        raise ValueError(
            f"predicted and truth must both be (frames, vertices, 3), got {predicted.shape} and {truth.shape}"
        )
    if len(predicted) == 0 or len(lips) == 0:
        return np.full(1, np.nan)
    difference = predicted[:, lips].astype(np.float64) - truth[:, lips].astype(np.float64)
    return np.square(difference).sum(-1).max(-1)


def _vector(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {values.shape}")
    return values if values.dtype == np.float32 and name == "samples" else values.astype(np.float64, copy=False)
