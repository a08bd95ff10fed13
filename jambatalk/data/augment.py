"""Audio augmentation for training: other rooms, microphones, levels and background noise; timing is never changed.

Synthetic voices are clean and few. What must carry over to a real recording is the phonetic content, so everything
else is varied. Speed (with pitch and formants, as on a tape) is varied by the caller, which warps the motion with it.
"""

from __future__ import annotations

import numpy as np

SAMPLING_RATE = 16000


def _shaped(spectrum: np.ndarray, rng: np.random.Generator, frequencies: np.ndarray) -> np.ndarray:
    """A random smooth equaliser (+-9 dB at seven points, linear in log frequency) and a random band limit."""
    points = np.array([60, 150, 400, 1000, 2500, 5000, 8000.0])
    decibels = np.interp(np.log(np.maximum(frequencies, 30)), np.log(points), rng.uniform(-9, 9, len(points)))
    gain = 10 ** (decibels / 20)
    if rng.random() < 0.3:  # telephone and cheap microphones
        gain *= 1 / (1 + (frequencies / rng.uniform(3000, 7500)) ** 8)
    if rng.random() < 0.5:
        gain *= frequencies**2 / (frequencies**2 + rng.uniform(40, 200) ** 2)
    return spectrum * gain


def _room(rng: np.random.Generator) -> np.ndarray:
    """A room's impulse response: the direct sound, then exponentially decaying noise."""
    decay = rng.uniform(0.05, 0.5)  # seconds to -60 dB
    t = np.arange(int(decay * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / decay)
    tail *= 10 ** (-rng.uniform(3, 18) / 20) / np.sqrt(np.sum(tail**2) + 1e-9)
    tail[: int(0.002 * SAMPLING_RATE)] = 0
    tail[0] = 1
    return tail


def _noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """Coloured noise of unit power, from white to brown, now and then swelling slowly."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequencies = np.fft.rfftfreq(n, 1 / SAMPLING_RATE)
    noise = np.fft.irfft(spectrum / np.maximum(frequencies, 40) ** rng.uniform(0, 1), n)
    if rng.random() < 0.3:
        noise *= 1 + 0.8 * np.sin(
            np.arange(n) * (2 * np.pi * rng.uniform(0.2, 2) / SAMPLING_RATE) + rng.uniform(0, 6.3)
        )
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-9)


def augment(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) float32 at 16 kHz -> (n,) float32: random room, equaliser, level, noise and clipping."""
    n = len(samples)
    size = 1 << (n + SAMPLING_RATE // 2 - 1).bit_length()
    spectrum = np.fft.rfft(samples, size)
    if rng.random() < 0.5:
        spectrum = spectrum * np.fft.rfft(_room(rng), size)
    if rng.random() < 0.8:
        spectrum = _shaped(spectrum, rng, np.fft.rfftfreq(size, 1 / SAMPLING_RATE))
    samples = np.fft.irfft(spectrum, size)[:n]
    level = np.sqrt(np.mean(samples**2)) + 1e-9
    if rng.random() < 0.85:
        samples = samples + _noise(n, rng) * level * 10 ** (-rng.uniform(8, 45) / 20)
    # Loudness of recordings differs by 25 dB; the encoder's input gain is fixed, so it must meet all of them.
    samples = samples * (10 ** (rng.uniform(-34, -12) / 20) / level)
    if rng.random() < 0.1:
        limit = rng.uniform(0.3, 0.9) * np.max(np.abs(samples))
        samples = np.clip(samples, -limit, limit)
    return np.clip(samples, -1, 1).astype(np.float32)
