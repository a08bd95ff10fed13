"""JambaTalk: speech in, a moving face out.

x_t      = audio_t + W_m motion_{t-1} + style + periodic position_t         (motion_{-1} = 0)
hidden   = decoder(x)                                                       (causal)
motion_t = W_out hidden_t + b_out                                           (W_out and b_out start at zero)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jambatalk.config import JambaTalkConfig
from jambatalk.decoder import Decoder, DecoderState
from jambatalk.losses import balance_loss
from jambatalk.talking_face import BUNDLED, CheckpointError, TalkingFace, periodic_encoding
from jambatalk_kernels import Routing, rollout
from jambatalk_kernels.linear import Linear, linear
from jambatalk_kernels.rollout.program import Program

if TYPE_CHECKING:
    from jambatalk.training import Lesson

__all__ = ["BUNDLED", "CheckpointError", "JambaTalk"]


class JambaTalk(TalkingFace):
    """The whole model. `encode`, `decode` and `generate` are its parts; `animate` is what most people want."""

    config_class = JambaTalkConfig
    config: JambaTalkConfig
    positions: Tensor | None  # (period, d)

    def __init__(self, config: JambaTalkConfig):
        super().__init__(config)
        d, motion = config.d_model, config.motion_size
        self.weights_dtype: torch.dtype | None = None  # that the loop rounds its matrices to and keeps them in
        self.motion_in = Linear(motion, d)
        self.style = nn.Embedding(len(config.subjects) + 1, d)  # the last row: "unknown"
        self.decoder = Decoder(config)
        self.head = Linear(d, motion)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.style.weight, std=0.02)
        positions = None if config.period is None else periodic_encoding(config.period, d)
        self.register_buffer("positions", positions, persistent=False)

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """Position and velocity of the motion, the balance of the router, and the phones where they are taught."""
        batch = lesson.batch
        with lesson.autocast():
            features = self.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
            history = lesson.history(features.detach().float())
            motion, routings = self.decode(features, history, batch.style, batch.valid)
        losses = lesson.motion_losses(motion)
        if routings:
            losses["router"] = self.config.router_loss_weight * balance_loss(routings, lesson.across)
        return losses | lesson.phone_loss(features)

    def decode(
        self, features: Tensor, history: Tensor, style: Tensor | str | int | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Teacher-forced, all frames in parallel.

        features: (batch, frames, d) from `encode`. history: (batch, frames, motion_size), the motion of the frame
        before each; history[:, 0] belongs to the frame before the first and is zero (W_m's bias counts all the same).
        style: see `style_vector`. valid: (batch, frames) bool, to keep padding out of the routings.

        Returns motion (batch, frames, motion_size) and the routing of each mixture-of-experts layer, for
        `jambatalk_kernels.load_balancing_loss`.
        """
        x = self.inputs(features, style) + linear(history, self.motion_in.weight)
        hidden, routings, _ = self.decoder(x, valid)
        return self.head(hidden), routings

    def inputs(self, features: Tensor, style: Tensor | str | int | None, position: Tensor | None = None) -> Tensor:
        """All that a frame's input has except the fed-back motion; W_m's bias included. position: (batch,) frames that
        went before."""
        batch, frames = features.shape[:2]
        x = features + self.style_vector(style, batch)[:, None] + self.motion_in.bias
        if self.positions is not None:
            index = torch.arange(frames, device=features.device)
            index = index if position is None else position[:, None] + index
            x = x + self.positions[index % len(self.positions)].to(x.dtype)
        return x

    @torch.no_grad()
    def roll(
        self,
        features: Tensor,
        style: Tensor | str | int | None,
        state: DecoderState | None = None,
        lengths: Tensor | None = None,
        program: Program | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Autoregressive: each frame is fed with the motion of the one before. Continues from `state`.

        Feedback is folded: W_m (W_out h + b_out) is one d x d matrix on the hidden vector, so the loop never touches
        the motion. lengths: the hidden vectors beyond are zero. With `self.weights_dtype` torch.bfloat16 a frame reads
        half the bytes; arithmetic stays in float32.
        """
        position = None if state is None else state.position
        inputs = self.inputs(features, style, position)
        program = self.program() if program is None else program
        return rollout(program, inputs, state, lengths=lengths, weights_dtype=self.weights_dtype)

    @torch.no_grad()
    def program(self) -> Program:
        """The decoder with its folded feedback, as data for `jambatalk_kernels.rollout`."""
        weight = self.motion_in.weight
        return self.decoder.program(linear(weight, self.head.weight.T), weight @ self.head.bias)
