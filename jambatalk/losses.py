"""Losses on motion, in square millimetres, equal for motion given as vertices and as basis coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MM2 = 1e6  # square metres -> square millimetres


def motion_metric(
    vertices: int,
    *,
    basis: Tensor | None = None,
    lips: Tensor | None = None,
    lip_weight: float = 1.0,
    pairs: tuple[Tensor, Tensor] | None = None,
    opening_weight: float = 0.0,
) -> Tensor:
    """The quadratic form of a weighted mean squared vertex error.

    error^2 = 1/V sum_v w_v |d_v|^2 + opening_weight / P sum_p |d_upper(p) - d_lower(p)|^2, in mm^2 for d in metres, and
    w_v = lip_weight on `lips` and 1 elsewhere. The second term is the error of the inner lips' opening: a mouth that
    must close is a small difference of two large displacements, which the first term hardly sees.

    Returns (3V,) weights of each coordinate where there is no basis and no pair term, else the matrix (r, r) of the
    form in the coefficients of `basis` (3V, r).
    """
    weights = torch.ones(vertices, dtype=torch.float64)
    if lips is not None:
        weights[lips.long()] = lip_weight
    weights = (weights / vertices * MM2).repeat_interleave(3)
    if basis is None:
        return weights.float()
    basis = basis.double()
    metric = basis.T @ (weights[:, None] * basis)
    if pairs is not None and opening_weight:
        upper, lower = (basis.view(vertices, 3, -1)[index.long()].flatten(0, 1) for index in pairs)
        difference = upper - lower
        metric += difference.T @ difference * (opening_weight * MM2 / len(pairs[0]))
    return metric.float()


class MotionLoss(nn.Module):
    """Mean squared error of positions and of velocities (differences of neighbouring frames) under `motion_metric`."""

    def __init__(self, metric: Tensor, vertex_weight: float = 1.0, velocity_weight: float = 1.0):
        super().__init__()
        self.register_buffer("metric", metric, persistent=False)
        self.vertex_weight, self.velocity_weight = vertex_weight, velocity_weight

    def _square(self, error: Tensor) -> Tensor:
        if self.metric.dim() == 1:
            return (error.square() * self.metric).sum(-1)
        return ((error @ self.metric) * error).sum(-1)

    def forward(
        self, predicted: Tensor, target: Tensor, valid: Tensor, emphasis: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """predicted, target (batch, frames, d); valid (batch, frames) bool -> position and velocity loss, scalars.

        Each is a mean over the valid frames, so that padding does not count. emphasis: (batch, frames), factors on the
        position loss of each frame.
        """
        error = predicted.float() - target.float()
        position = self._square(error)
        if emphasis is not None:
            position = position * emphasis
        position = position[valid].mean()
        both = valid[:, 1:] & valid[:, :-1]
        velocity = self._square(error[:, 1:] - error[:, :-1])[both]
        velocity = velocity.mean() if velocity.numel() else position.new_zeros(())
        return self.vertex_weight * position, self.velocity_weight * velocity
