"""Losses on motion, in square millimetres, equal for motion given as vertices and as basis coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jambatalk_kernels import Routing

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

    metric: Tensor

    def __init__(self, metric: Tensor, vertex_weight: float = 1.0, velocity_weight: float = 1.0):
        super().__init__()
        self.register_buffer("metric", metric, persistent=False)
        self.vertex_weight, self.velocity_weight = vertex_weight, velocity_weight

    def _square(self, error: Tensor) -> Tensor:
        if self.metric.dim() == 1:
            return (error.square() * self.metric).sum(-1)
        return ((error @ self.metric) * error).sum(-1)

    def forward(
        self,
        predicted: Tensor,
        target: Tensor,
        valid: Tensor,
        emphasis: Tensor | None = None,
        counts: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """predicted, target (batch, frames, d); valid (batch, frames) bool -> position and velocity loss, scalars.

        Each is a mean over the valid frames, so that padding does not count. emphasis: (batch, frames), factors on the
        position loss of each frame. counts: frames and pairs of neighbours (`count`) to divide the sums by, where they
        are not those of this batch alone.
        """
        frames, pairs = self.count(valid) if counts is None else counts
        error = torch.where(valid[..., None], predicted.float() - target.float(), 0)
        position = self._square(error)
        if emphasis is not None:
            position = position * emphasis
        both = valid[:, 1:] & valid[:, :-1]
        velocity = torch.where(both, self._square(error[:, 1:] - error[:, :-1]), 0)
        return (
            self.vertex_weight * position.sum() / frames.clamp_min(1e-9),
            self.velocity_weight * velocity.sum() / pairs.clamp_min(1e-9),
        )

    @staticmethod
    def count(valid: Tensor) -> tuple[Tensor, Tensor]:
        """valid (batch, frames) bool -> its frames and its pairs of neighbouring frames, scalars."""
        return valid.sum().float(), (valid[:, 1:] & valid[:, :-1]).sum().float()


def balance_loss(routings: Sequence[Routing], across: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`jambatalk_kernels.load_balancing_loss` of tokens that several processes share: experts * sum_e f_e P_e.

    across: the mean of a tensor over the processes; None: there is one. f_e, picks per token, is of all processes, and
    so is the number of tokens in P_e; the mean over the processes of the result and of its gradient is then the loss of
    all tokens together.
    """
    across = across or (lambda x: x)
    probabilities = torch.stack([routing.probability_sums for routing in routings]).sum(0)
    picks = torch.stack([routing.offsets for routing in routings]).sum(0).diff().to(probabilities.dtype)
    tokens = across(picks.new_tensor(sum(routing.weights.shape[0] for routing in routings))).clamp_min(1e-9)
    return len(probabilities) * (across(picks) / tokens * probabilities).sum() / tokens
