"""How far a mouth is open: the one definition that the corpus, the model and the evaluation share (DESIGN 5)."""

from __future__ import annotations

import numpy as np


def inner_lip_gap(vertices: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Height of the upper inner lip above the lower one, averaged over the pairs.

    vertices: (..., V, 3) in metres, y up, the head not rotated; upper, lower: (pairs,) vertex indices, paired.
    Returns (...) in metres. The height is signed: lips pressed into each other give a slightly negative gap. That makes
    the gap linear in the vertices, so a gap is also a linear function of motion coefficients.
    """
    vertices = np.asarray(vertices)
    upper, lower = np.asarray(upper), np.asarray(lower)
    if upper.shape != lower.shape or upper.ndim != 1 or upper.size == 0:
        raise ValueError(f"upper and lower must be equally long lists of vertices, got {upper.shape} and {lower.shape}")
    if vertices.ndim < 2 or vertices.shape[-1] != 3:
        raise ValueError(f"vertices must be (..., V, 3), got {vertices.shape}")
    return (vertices[..., upper, 1] - vertices[..., lower, 1]).mean(axis=-1)


def opening(gap: np.ndarray, template_gap: float, scale: float) -> np.ndarray:
    """Opening o = (gap - template gap) / scale; 0 is the closed neutral mouth, 1 the corpus' 95th percentile.

    gap: (...) metres; template_gap: metres, of the speaker's neutral face; scale: metres, > 0.
    """
    if not scale > 0:
        raise ValueError(f"scale must be a positive length in metres, got {scale}")
    return (np.asarray(gap) - template_gap) / scale
