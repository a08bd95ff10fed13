"""Each protocol against cases that can be worked out by hand, and against the library that defines one of them."""

import numpy as np
import pytest

from jambatalk import protocols
from jambatalk.protocols import PROTOCOLS, Pair, ProtocolError, describe

LIPS, UPPER = np.array([0, 2]), np.array([1, 3])
REGIONS = {"lips": LIPS, "upper_face": UPPER, "inner_lip_upper": np.array([0]), "inner_lip_lower": np.array([2])}


def pair(predicted, truth, template=None, **options):
    predicted, truth = np.asarray(predicted, np.float32), np.asarray(truth, np.float32)
    template = np.zeros(truth.shape[1:], np.float32) if template is None else template
    return Pair(**{"name": "a_1", "fps": 30.0, "regions": REGIONS, **options}, predicted=predicted, truth=truth,
                template=template)  # fmt: skip


def clip(seed, frames=6, vertices=70, size=0.01):
    return np.random.default_rng(seed).normal(scale=size, size=(frames, vertices, 3)).astype(np.float32)


def scores(name, *pairs):
    return PROTOCOLS[name].score(pairs)["scores"]


def test_lip_error_is_the_worst_lip_vertex_squared_or_not_pooled_by_frames_or_by_clips():
    still = np.zeros((1, 4, 3))
    off = lambda *lengths: np.array([[[length, 0, 0], [9, 9, 9], [0, length / 2, 0], [9, 9, 9]] for length in lengths])  # noqa: E731
    one, two = pair(off(0.003), still), pair(off(0.001, 0.001, 0.001), np.zeros((3, 4, 3)), name="a_2")
    squares, distances = [9e-6, 1e-6, 1e-6, 1e-6], [3.0, 1.0, 1.0, 1.0]
    assert scores("codetalker", one, two)["LVE"] == pytest.approx(np.mean(squares))
    assert scores("jambatalk", one, two)["LVE"] == pytest.approx(np.mean(distances))
    assert scores("diffspeaker", one, two)["LVE"] == pytest.approx((9e-6 + 1e-6) / 2)
    assert scores("unitalker", one, two)["LVE"] == pytest.approx((9e-6 + 1e-6) / 2)
    assert scores("unitalker", one, two)["LVE, distance"] == pytest.approx(2.0)


def test_upper_face_deviation_is_of_the_deviation_over_time_from_the_template():
    """A vertex that swings by 3 mm about 10 mm from its template, and a truth that swings by 1 mm about 20 mm."""
    template = np.zeros((4, 3), np.float32)

    def swinging(middle, by):
        x = np.zeros((4, 4, 3))
        x[:, UPPER, 0] = middle + by * np.array([1, -1, 1, -1])[:, None]
        return x

    clips = pair(swinging(0.010, 0.003), swinging(0.020, 0.001), template)
    assert scores("jambatalk", clips)["FDD"] == pytest.approx(1 - 3)
    assert scores("jambatalk", clips)["|FDD|"] == pytest.approx(2)
    # squared norms (m +- d)^2 deviate by 2 m d
    assert scores("codetalker", clips)["FDD"] == pytest.approx(2 * 0.020 * 0.001 - 2 * 0.010 * 0.003)
    other = pair(swinging(0.020, 0.001), swinging(0.010, 0.003), template, name="a_2")
    assert scores("jambatalk", clips, other)["FDD"] == pytest.approx(0, abs=1e-6)  # signed: cancels
    assert scores("jambatalk", clips, other)["|FDD|"] == pytest.approx(2)
    shifted = pair(clips.predicted + 1, clips.truth + 1, template + 1)
    assert scores("jambatalk", shifted)["FDD"] == pytest.approx(
        -2, rel=1e-4
    )  # the template cancels; float32 near 1: 6e-8 of 1e-3


def test_mean_vertex_error_and_opening_error():
    truth = np.zeros((2, 4, 3))
    predicted = truth.copy()
    predicted[0, 0, 1] = 0.004  # the upper lip rises: 4 mm wider open, one of four vertices off by 4 mm
    assert scores("facediffuser", pair(predicted, truth))["MVE"] == pytest.approx(0.5)
    assert scores("mouth", pair(predicted, truth))["opening error"] == pytest.approx(2.0)


def test_temporal_misalignment_is_the_delay_of_a_late_mouth():
    pytest.importorskip("scipy", reason="MTM needs scipy")
    t = np.arange(90) / 30
    gap = lambda late: 0.01 * (1 - np.cos(2 * np.pi * 1.5 * (t - late)))  # noqa: E731

    def mouth(late):
        x = np.zeros((90, 4, 3))
        x[:, 0, 1] = gap(late)
        return x

    assert scores("mouth", pair(mouth(0), mouth(0)))["MTM"] == 0
    assert scores("mouth", pair(mouth(0.1), mouth(0)))["MTM"] == pytest.approx(100, abs=1e3 / 30)  # to a frame
    still = np.zeros((90, 4, 3))
    assert np.isnan(scores("mouth", pair(still, mouth(0)))["MTM"])


def test_codetalkers_lip_error_is_torchmetrics():
    pytest.importorskip("torchmetrics", reason="torchmetrics is in the test extra")
    import torch
    from torchmetrics.functional.multimodal import lip_vertex_error

    for seed in range(5):
        a, b = clip(seed, frames=7 + seed), clip(seed + 100, frames=9)
        theirs = lip_vertex_error(torch.tensor(a), torch.tensor(b), mouth_map=LIPS.tolist())
        assert scores("codetalker", pair(a, b))["LVE"] == pytest.approx(float(theirs), rel=1e-6)


def test_the_release_reads_coordinates_of_the_left_ear_and_says_so():
    predicted, truth = clip(0), clip(1)
    row = scores("jambatalk-release", pair(predicted, truth, full_truth=np.repeat(truth, 2, axis=0)))
    columns = [*range(94, 114), *range(146, 178), *range(183, 192)]
    flat, doubled = predicted.reshape(6, -1).astype(float), np.repeat(truth, 2, axis=0)[:6].reshape(6, -1).astype(float)
    assert row["LVE"] == pytest.approx(np.linalg.norm(flat[:, columns] - doubled[:, columns], axis=1).mean())
    others = np.setdiff1d(np.arange(192), columns)
    deviation = [np.square(x[:, others]).sum(1).std() for x in (doubled, flat)]
    assert row["FDD"] == pytest.approx(deviation[0] - deviation[1])
    assert "left ear" in PROTOCOLS["jambatalk-release"].warning


def test_clips_are_cut_to_the_shorter_and_metres_are_metres():
    truth = clip(0, frames=8)
    assert scores("facediffuser", pair(truth[:5], truth))["MVE"] == 0
    assert scores("facediffuser", pair(truth + 0.001, truth))["MVE"] == pytest.approx(np.sqrt(3), rel=1e-4)


def test_only_the_speakers_own_style_counts_where_the_protocol_says_so():
    truth = clip(0)
    own = pair(truth, truth, subject="a", condition="a")
    other = pair(truth + 0.01, truth, subject="a", condition="b")
    assert scores("codetalker", own, other)["LVE"] == 0
    assert scores("diffspeaker", own, other)["LVE"] > 0
    with pytest.raises(ProtocolError, match="no clip to score in the style of its own speaker"):
        scores("codetalker", other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicted": np.zeros((3, 5, 3))}, r"predicted \(3, 5, 3\) and true \(3, 4, 3\) vertices do not agree"),
        ({"predicted": np.zeros((0, 4, 3))}, "no frame to compare"),
        ({"predicted": np.full((3, 4, 3), np.nan)}, "NaN or Inf in the predicted vertices"),
        ({"template": np.zeros((5, 3))}, r"template \(5, 3\) do not agree"),
        ({"regions": {}}, "no region 'lips': give --regions"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(options, message):
    good = {"predicted": np.zeros((3, 4, 3)), "truth": np.zeros((3, 4, 3))}
    with pytest.raises(ProtocolError, match=message):
        scores("jambatalk", pair(**{**good, **options}))


def test_no_clip_is_no_score():
    with pytest.raises(ProtocolError, match="no clip to score"):
        scores("jambatalk")


def test_every_protocol_says_vertices_formula_pooling_and_units():
    for protocol in PROTOCOLS.values():
        text = describe(protocol)
        assert f"{protocol.name} (version {protocol.version})" in text
        for measure in protocol.measures:
            assert measure.unit in text and measure.formula in text
            assert measure.pooling in ("frames", "clips") and "mean over" in measure.formula
    assert protocols.__doc__.count("||") > 4
