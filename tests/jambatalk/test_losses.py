"""The loss is a vertex error whatever the motion is written in, and padding does not count."""

import torch

from jambatalk.losses import MotionLoss, motion_metric


def test_vertices_and_coefficients_give_the_same_error():
    torch.manual_seed(0)
    vertices, rank = 9, 4
    basis = torch.linalg.qr(torch.randn(3 * vertices, rank, dtype=torch.float64))[0].float()
    lips = torch.tensor([1, 5])
    full = MotionLoss(motion_metric(vertices, lips=lips, lip_weight=3.0))
    small = MotionLoss(motion_metric(vertices, basis=basis, lips=lips, lip_weight=3.0))
    a, b = torch.randn(2, 2, 6, rank) * 1e-3
    valid = torch.ones(2, 6, dtype=torch.bool)
    for left, right in zip(full(a @ basis.T, b @ basis.T, valid), small(a, b, valid), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=0)
    error = ((a - b) @ basis.T).view(2, 6, vertices, 3)
    weights = torch.ones(vertices)
    weights[lips] = 3
    expected = 1e6 * (error.square().sum(-1) * weights).mean()
    torch.testing.assert_close(full(a @ basis.T, b @ basis.T, valid)[0], expected)


def test_the_opening_term_is_the_distance_of_the_pairs():
    basis = torch.eye(6)  # two vertices, every motion
    pairs = (torch.tensor([0]), torch.tensor([1]))
    metric = motion_metric(2, basis=basis, pairs=pairs, opening_weight=2.0)
    apart = torch.tensor([[[0.0, 1e-3, 0, 0, -1e-3, 0]]])
    together = torch.tensor([[[0.0, 1e-3, 0, 0, 1e-3, 0]]])
    loss = MotionLoss(metric)
    valid = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros_like(apart)
    torch.testing.assert_close(loss(together, zero, valid)[0], torch.tensor(1.0))
    torch.testing.assert_close(loss(apart, zero, valid)[0], torch.tensor(1.0 + 2.0 * 4.0))


def test_padding_does_not_count():
    torch.manual_seed(0)
    loss = MotionLoss(motion_metric(3))
    predicted, target = torch.randn(2, 2, 5, 9)
    valid = torch.ones(2, 5, dtype=torch.bool)
    padded = [torch.cat([x, torch.full((2, 3, 9), 100.0) * torch.rand(2, 3, 9)], dim=1) for x in (predicted, target)]
    longer = torch.cat([valid, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    for a, b in zip(loss(predicted, target, valid), loss(*padded, longer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_one_frame_has_no_velocity():
    loss = MotionLoss(motion_metric(3))
    assert loss(torch.ones(1, 1, 9), torch.zeros(1, 1, 9), torch.ones(1, 1, dtype=torch.bool))[1] == 0


def test_emphasis_weighs_frames():
    loss = MotionLoss(motion_metric(3))
    predicted, target = torch.zeros(1, 2, 9), torch.ones(1, 2, 9)
    valid = torch.ones(1, 2, dtype=torch.bool)
    plain = loss(predicted, target, valid)
    weighed = loss(predicted, target, valid, torch.tensor([[1.0, 6.0]]))
    torch.testing.assert_close(weighed[0], 3.5 * plain[0])
    assert weighed[1] == plain[1]
