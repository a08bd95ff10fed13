"""Animation: vertices on demand, exact resampling, checks."""

from fractions import Fraction

import numpy as np
import pytest

from jambatalk.animation import Animation
from jambatalk.audio import AudioError


def animation(frames=12, vertices=5, rank=3, fps=30, **fields):
    draw = np.random.default_rng(0).standard_normal
    faces = np.array([[0, 1, 2], [2, 3, 4]])
    return Animation(draw((frames, rank)), draw((3 * vertices, rank)), draw((vertices, 3)), faces, fps, **fields)


@pytest.mark.parametrize("offset", [False, True])
def test_vertices_are_what_the_docstring_says(offset):
    a = animation(offset=np.linspace(-1, 1, 15) if offset else None)
    for t in range(a.frames):
        flat = a.basis.astype(float) @ a.coefficients[t] + (a.offset if offset else 0)
        assert np.allclose(a.vertices[t], a.template + flat.reshape(-1, 3), atol=1e-5)
    assert a.vertices.dtype == np.float32 and a.vertices.shape == (12, 5, 3)
    assert np.array_equal(a.vertices_at(3)[0], a.vertices_at(slice(3, 4))[0])
    assert a.seconds["vertices"] > 0


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_chunks_join_to_the_whole(chunk):
    a = animation()
    pieces = list(a.iter_vertices(chunk))
    assert max(map(len, pieces)) <= chunk
    assert np.allclose(np.concatenate(pieces), a.vertices, atol=1e-6)


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk"):
        next(animation().iter_vertices(0))


def test_template_is_not_changed_by_asking():
    a = animation()
    before = a.template.copy()
    assert a.vertices.any()
    assert np.array_equal(a.template, before)


def test_resample_to_a_multiple_keeps_the_old_frames():
    a = animation(frames=30)
    b = a.resample(60)
    assert b.frames == 60 and b.fps == 60
    assert np.array_equal(b.coefficients[::2], a.coefficients)
    assert np.allclose(b.coefficients[1:-1:2], (a.coefficients[:-1] + a.coefficients[1:]) / 2, atol=1e-6)
    assert np.array_equal(b.coefficients[-1], a.coefficients[-1])  # holds still after the last frame
    assert np.array_equal(b.resample(30).coefficients, a.coefficients)


def test_resample_is_exact_after_an_hour():
    """25 of 30 frames a second: every fifth new frame is an old one, bit for bit, also the last."""
    a = animation(frames=108000, rank=1)
    b = a.resample(25)
    assert b.frames == 90000
    assert np.array_equal(b.coefficients[::5], a.coefficients[::6])


@pytest.mark.parametrize("fps", [1, 24, 25, 29.97, "30000/1001", 30, 50, 59.94, 120])
def test_resample_counts_by_the_exact_duration(fps):
    duration = Fraction(7, 3)
    a = animation(frames=70, duration=duration, audio=(np.zeros(37333, np.float32), 16000))
    exact = Fraction(str(fps))
    b = a.resample(fps)
    assert b.frames == round(duration * exact) and b.fps == exact and b.duration == duration
    times = np.arange(b.frames) / float(exact)
    expected = np.stack([np.interp(times, np.arange(70) / 30, column) for column in a.coefficients.T], 1)
    assert np.allclose(b.coefficients, expected, atol=1e-4)


def test_resample_to_nothing_is_refused():
    with pytest.raises(AudioError, match="too short"):
        animation(frames=3).resample(1)
    with pytest.raises(AudioError, match="fps"):
        animation().resample(0)


def test_duration_comes_from_the_sound_else_from_the_frames():
    assert animation(frames=12).duration == Fraction(12, 30)
    assert animation(audio=(np.zeros(6500, np.float32), 16000)).duration == Fraction(6500, 16000)
    assert animation(fps="30000/1001").fps == Fraction(30000, 1001)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"basis": np.zeros((14, 3))}, "basis"),
        ({"template": np.zeros((5, 2))}, "3 columns"),
        ({"faces": np.array([[0, 1, 5]])}, "faces"),
        ({"faces": np.array([[0, 1, -1]])}, "faces"),
        ({"offset": np.zeros(3)}, "offset"),
        ({"coefficients": np.zeros(3)}, "coefficients"),
        ({"fps": 0}, "fps"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    a = animation()
    fields = {
        "coefficients": a.coefficients,
        "basis": a.basis,
        "template": a.template,
        "faces": a.faces,
        "fps": 30,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        Animation(**fields)
