"""Each measure against a case that can be worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest

from jambatalk import metrics


def test_envelope_of_a_constant_is_its_size_and_the_ends_count_silence():
    envelope = metrics.speech_envelope(np.full(16000, -0.5, np.float32), 16000, 30, 30)
    assert envelope.shape == (30,) and envelope.dtype == np.float64
    np.testing.assert_allclose(envelope[1:-1], 0.5, rtol=1e-6)
    # Half of the first window lies before the clip: sqrt(0.25 / 2). The last ends with the clip.
    assert envelope[0] == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)
    assert envelope[-1] == pytest.approx(0.5, rel=1e-6)


def test_envelope_window_is_two_frames_centred_on_the_frame():
    samples = np.zeros(1000, np.float32)
    samples[500] = 1.0  # at 100 samples/s and 10 frames/s, frame 50 stands on sample 500
    envelope = metrics.speech_envelope(samples, 100, 10, 100)
    # A window is 20 samples, [10 t - 10, 10 t + 10): sample 500 is in the middle of frame 50's and the first of 51's.
    assert np.flatnonzero(envelope).tolist() == [50, 51]
    assert envelope[50] == pytest.approx(np.sqrt(1 / 20))


def test_envelope_keeps_time_at_a_rate_that_does_not_divide():
    """A click in the last second of ten minutes is where it belongs at 30000/1001 frames/s."""
    fps, rate = Fraction(30000, 1001), 16000
    samples = np.zeros(600 * rate, np.float32)
    samples[599 * rate] = 1.0
    frames = round(600 * fps)
    loud = np.flatnonzero(metrics.speech_envelope(samples, rate, fps, frames))
    assert 1 <= len(loud) <= 3
    assert np.abs(loud / float(fps) - 599).max() <= 1 / float(fps) + 1e-9


def test_envelope_beyond_the_samples_is_silence_and_an_empty_clip_has_no_frames():
    assert metrics.speech_envelope(np.ones(100), 100, 10, 20)[15:].tolist() == [0.0] * 5
    assert metrics.speech_envelope(np.zeros(0), 16000, 30, 0).shape == (0,)
    with pytest.raises(ValueError, match="samples must have one dimension"):
        metrics.speech_envelope(np.zeros((10, 2)), 16000, 30, 1)


def test_correlation_is_pearsons():
    opening, envelope = np.array([0.0, 0.2, 0.9, 0.4]), np.array([0.1, 0.1, 0.5, 0.4])
    assert metrics.opening_rms_correlation(opening, envelope) == pytest.approx(np.corrcoef(opening, envelope)[0, 1])
    assert metrics.opening_rms_correlation(opening, -3 * opening + 7) == pytest.approx(-1)
    assert metrics.opening_rms_correlation([0, 1, 0, 0], [0, 0, 1, 1]) == pytest.approx(-1 / np.sqrt(3))


@pytest.mark.parametrize("still", [np.zeros(50), np.full(50, 0.1), np.full(50, 1e6)])
def test_a_still_mouth_has_no_correlation(still):
    assert np.isnan(metrics.opening_rms_correlation(still, np.random.default_rng(0).random(50)))
    assert np.isnan(metrics.opening_rms_correlation(np.random.default_rng(0).random(50), np.zeros(50)))


def test_correlation_refuses_different_lengths():
    with pytest.raises(ValueError, match="3 and 4"):
        metrics.opening_rms_correlation(np.zeros(3), np.zeros(4))


def test_lagged_correlation_finds_a_late_mouth():
    envelope = np.random.default_rng(0).random(200)
    late = np.concatenate([np.zeros(3), envelope[:-3]])
    lags = list(range(-6, 7))
    values = metrics.lagged_correlations(late, envelope, lags)
    assert lags[int(values.argmax())] == 3 and values.max() == pytest.approx(1)
    early = np.concatenate([envelope[2:], np.zeros(2)])
    assert lags[int(metrics.lagged_correlations(early, envelope, lags).argmax())] == -2
    assert values[6] == pytest.approx(metrics.opening_rms_correlation(late, envelope))
    assert np.isnan(metrics.lagged_correlations(np.arange(3.0), np.arange(3.0), [2])).all()


def test_pauses_are_long_quiet_and_away_from_speech():
    fps = 30
    envelope = np.full(100, 0.5)
    envelope[:10] = 0.01  # at the start of the clip: its end next to speech loses 50 ms = 2 frames
    envelope[30:34] = 0.01  # 4 frames = 133 ms: the silence of a stop, not a pause
    envelope[50:55] = 0.01  # 5 frames = 167 ms: a pause, less 2 frames at either end
    envelope[90:] = 0.06  # not below a tenth of 0.5
    assert np.flatnonzero(metrics.pauses(envelope, fps)).tolist() == [*range(8), 52]


def test_pauses_do_not_depend_on_the_recording_level():
    envelope = np.random.default_rng(1).random(300) ** 4
    assert metrics.pauses(envelope, 30).any()
    np.testing.assert_array_equal(metrics.pauses(envelope, 30), metrics.pauses(envelope * 0.05, 30))


def test_all_silence_is_all_pause():
    assert metrics.pauses(np.zeros(60), 30).all()
    assert metrics.pauses(np.full(60, 5e-4), 30).all()  # -66 dB of hum
    assert not metrics.pauses(np.full(60, 0.1), 30).any()
    assert metrics.pauses(np.zeros(0), 30).shape == (0,)


def test_silence_opening_counts_both_signs_in_pauses_only():
    paused = np.array([True, True, False, True])
    assert metrics.silence_opening([0.1, -0.3, 0.9, 0.2], paused) == pytest.approx(0.2)
    assert np.isnan(metrics.silence_opening(np.ones(3), np.zeros(3, bool)))


def test_closure_is_the_smallest_opening_within_50_ms_of_the_span():
    opening = np.full(30, 0.8)
    opening[10] = 0.1  # at 1/3 s
    closures = metrics.phone_closures(
        opening, [("P", 0.2, 0.28), ("P", 0.2, 0.29), ("B", 0.383, 0.4), ("B", 0.39, 0.4)], 30
    )
    np.testing.assert_allclose(closures, [0.8, 0.1, 0.1, 0.8])


def test_a_phone_beyond_the_animation_is_not_closed():
    closures = metrics.phone_closures(np.zeros(30), [("M", 0.0, 0.1), ("M", 2.0, 2.1)], 30)
    assert closures[0] == 0 and np.isnan(closures[1])
    assert metrics.bilabial_closure_20(closures) == 0.5


def test_bilabials_are_p_b_and_m():
    phones = [("P", 0.0, 0.1), ("AA1", 0.1, 0.4), ("M", 0.5, 0.6), ("B", 0.7, 0.8), ("SIL", 0.9, 1.0), ("F", 0.4, 0.5)]
    opening = np.full(30, 0.5)
    opening[0], opening[16], opening[22] = 0.0, 0.2, 0.21
    closures = metrics.bilabial_closures(opening, phones, 30)
    np.testing.assert_allclose(closures, [0.0, 0.2, 0.21])
    assert metrics.bilabial_closure_20(closures) == pytest.approx(2 / 3)
    assert np.isnan(metrics.bilabial_closure_20(np.zeros(0)))


def test_jitter_is_the_mean_second_difference():
    assert metrics.opening_jitter(np.linspace(0, 1, 11)) == pytest.approx(0, abs=1e-12)
    assert metrics.opening_jitter([0, 1, 0, 1]) == pytest.approx(2)
    assert np.isnan(metrics.opening_jitter([0, 1]))


def test_lip_vertex_error_takes_the_worst_lip_vertex_of_each_frame():
    truth = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    predicted = truth.copy()
    predicted[0, 1] += np.array([0.003, 0, 0.004], np.float32)  # 5 mm
    predicted[0, 2] += np.array([0.001, 0, 0], np.float32)  # 1 mm, not the worst
    predicted[1, 2] += np.array([0, -0.002, 0], np.float32)  # 2 mm
    predicted[:, 4] += 1.0  # not a lip
    lips = np.array([1, 2])
    assert metrics.lip_vertex_error_mm(predicted, truth, lips) == pytest.approx((5 + 2) / 2, rel=1e-4)
    assert metrics.lip_vertex_error_squared(predicted, truth, lips) == pytest.approx((25e-6 + 4e-6) / 2, rel=1e-3)
    assert np.isnan(metrics.lip_vertex_error_mm(predicted[:0], truth[:0], lips))
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and \(1, 5, 3\)"):
        metrics.lip_vertex_error_mm(predicted, truth[:1], lips)
