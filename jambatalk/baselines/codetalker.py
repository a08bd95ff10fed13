"""CodeTalker (Xing et al., CVPR 2023, arXiv 2301.02379): a codebook of motion, then a decoder that speaks in its codes.

Stage 1, an autoencoder of motion alone. Each frame becomes H components of C numbers, and each of those the nearest of
the N codes:

    z = E(motion);   q_h = the code nearest to z_h;   motion' = D(q)
    loss = |motion' - motion| + |sg(z) - q|^2 + 0.25 |z - sg(q)|^2           (sg: no gradient; q passes D's on to z)

Stage 2, with E, D and the codes frozen. An autoregressive decoder reads the motion so far and the sound:

    token_t = W_m motion_{t-1} + b_m + style + periodic position             (motion_{-1} = 0)
    z'      = W layers(token, audio) + b;   q' = the codes nearest to z';   motion' = D(q')
    loss    = |motion' - motion|^2 + |z' - sg(q)|^2                          (q: the codes of the true motion)

Followed: the two stages and their losses; the sizes of the `vocaset` and `biwi` presets, and a temporal unit of one
frame; E and D of a linear layer, a convolution over five frames and transformer layers that see the whole clip; one
codebook for all components, learnt by its gradient; layers of stage 2 with FaceFormer's biases and alignment mask;
teacher forcing. To generate a frame the codes so far are decoded as a clip that ends there, and its last motion is fed
back; when all codes are there they are decoded once more, and that is the result. A clip of T frames so costs D T^2 / 2
frames: that is the method, and no cache can help, since D looks ahead.

Changed, so that methods differ by nothing but the method:

- The audio encoder, the learned "unknown" style and what teaches the encoder (phones, augmentation) are ours.
- Both stages are one run: the first `prior_share` of its steps is stage 1 (the authors train 200 epochs, then 100). The
  learning rate's schedule and the average of the weights begin anew with stage 2.
- The error of the motion is the squared vertex error that all methods here minimise, in stage 1 too, in place of L1.
  The authors add it to the errors of the codes as it is, in metres: next to nothing, so that latents stay with their
  codes in stage 1 and it is these that teach in stage 2. Ours is in square millimetres and would drown the others: it
  has a small `motion_weight`. The features have a `feature_weight`, beside the error of the phones.
- Motion enters in units of its basis or, without one, in millimetres.
- With the noise on what is fed back that the run adds for all methods (`history_noise`), teacher forcing is not exact.
- Layer norm stands after the convolution where the authors normalise each channel over time, which needs the whole clip
  (and two frames) for every frame. Positions are periodic in E and D also; there is no limit of 600 frames.
- The codes begin as latents of the first batch. Begun near zero, as usual, few of them ever win: the latents grow, the
  codes follow at Adam's pace, and the first to arrive take all. On four synthetic identities (`demo`, batches of 4, 100
  steps) that left a perplexity of 17 and 4.9 mm^2 of error; so it is 100 and 2.5. Codes that die later stay dead.
- `demo` is as wide as JambaTalk.

`perplexity`, which the log has for every step, is how many codes are in use: exp of the entropy of the batch's codes,
1 when the codebook has collapsed, N at most.

A run that goes on with more steps than it was started with has a longer stage 1, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from jambatalk.baselines.faceformer import BiasedLayer
from jambatalk.config import ConfigError, TalkingFaceConfig, presets
from jambatalk.talking_face import WholeClip, periodic_encoding, shift
from jambatalk_kernels.linear import Linear

if TYPE_CHECKING:
    from jambatalk.training import Lesson

COMMITMENT = 0.25  # beta


@dataclass
class CodeTalkerConfig(TalkingFaceConfig):
    model: str = "codetalker"
    d_model: int = 1024
    heads: int = 4
    hidden: int = 2048  # of the feed-forward layers
    layers: int = 6
    period: int = 30
    dropout: float = 0.1  # of stage 2
    velocity_weight: float = 0.0
    feature_weight: float = 100.0  # of |z' - q|^2
    motion_weight: float = 0.01  # of the motion's error, in both stages
    codes: int = 256  # N
    code_size: int = 64  # C
    components: int = 16  # H
    prior_width: int = 1024  # of E and D, as the next three
    prior_heads: int = 8
    prior_hidden: int = 1536
    prior_layers: int = 6
    prior_share: float = 2 / 3  # of the run's steps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("heads", "hidden", "layers", "period", "codes", "code_size", "components")
        self.require_whole("prior_width", "prior_heads", "prior_hidden", "prior_layers")
        for heads, width in (("heads", "d_model"), ("prior_heads", "prior_width")):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(f"{heads} must divide {width}, got {getattr(self, heads)} and {getattr(self, width)}")
        if not isinstance(self.prior_share, (int, float)) or not 0 < self.prior_share < 1:
            raise ConfigError(f"prior_share must lie between 0 and 1, got {self.prior_share!r}")


CodeTalkerConfig.PRESETS = presets(
    biwi=dict(layers=12, code_size=128, components=8),
    demo=dict(
        d_model=128, hidden=256, layers=2, code_size=16, components=8,
        prior_width=128, prior_heads=4, prior_hidden=256, prior_layers=2,
    ),
)  # fmt: skip


class CodeTalker(WholeClip):
    """Both stages on our encoder. `head` is D's last layer."""

    config_class = CodeTalkerConfig
    config: CodeTalkerConfig
    positions: Tensor  # (period, d)

    def __init__(self, config: CodeTalkerConfig):
        super().__init__(config)
        c, d, latent = config, config.d_model, config.components * config.code_size
        sizes = (c.prior_width, c.prior_heads, c.prior_hidden, c.prior_layers, c.period)
        self.prior_encoder = ClipTransformer(c.motion_size, *sizes)
        self.latent = Linear(c.prior_width, latent)
        self.codebook = nn.Parameter(torch.zeros(c.codes, c.code_size))  # see _begin_codes
        self.prior_decoder = ClipTransformer(latent, *sizes)
        self.head = Linear(c.prior_width, c.motion_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

        self.motion_in = Linear(c.motion_size, d)
        self.style = nn.Embedding(len(c.subjects) + 1, d)  # the last row: "unknown"
        self.layers = nn.ModuleList(BiasedLayer(d, c.heads, c.hidden, c.period, c.dropout) for _ in range(c.layers))
        self.dropout = nn.Dropout(c.dropout)
        self.code_out = Linear(d, latent)
        self.register_buffer("positions", periodic_encoding(c.period, d), persistent=False)
        self.units = 1.0 if c.motion_rank else 1000.0

    # Stage 1: motion to codes and back

    def latents(self, motion: Tensor, lengths: Tensor | None = None) -> Tensor:
        """E: motion (batch, frames, motion_size) -> (batch, frames, H, C)."""
        return self._components(self.latent(self.prior_encoder(motion * self.units, lengths)))

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (..., C) -> the number of the nearest code of each (...), and that code (..., C)."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.detach().to(self.codebook.dtype)  # not the autocast's
            # |z - c|^2 without |z|^2, which is the same for all codes
            distance = self.codebook.detach().square().sum(-1) - 2 * latents @ self.codebook.detach().T
            numbers = distance.argmin(-1)
        return numbers, self.codebook[numbers]

    def unfold(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """D without its last layer: codes (batch, frames, H, C) -> hidden (batch, frames, prior_width)."""
        return self.prior_decoder(codes.flatten(-2), lengths)

    def _components(self, latents: Tensor) -> Tensor:
        return latents.unflatten(-1, (self.config.components, self.config.code_size))

    # Training

    @property
    def stages(self) -> tuple[float, ...]:
        return 0.0, self.config.prior_share

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """See the top of this file, and `perplexity`."""
        first = lesson.batch.stage == 0
        for part in (self.prior_encoder, self.latent, self.prior_decoder, self.head):
            part.requires_grad_(first)
        self.codebook.requires_grad_(first)
        return self._prior_losses(lesson) if first else self._speech_losses(lesson)

    def _prior_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        batch = lesson.batch
        lengths = batch.valid.sum(1)
        with lesson.autocast():
            latents = self.latents(batch.motion, lengths)
            self._begin_codes(latents, lesson)
            numbers, codes = self.quantise(latents)
            motion = self.head(self.unfold(straight_through(latents, codes), lengths))
        return self._motion_losses(motion, lesson) | {
            "codebook": mean_square(codes - latents.detach(), lesson),
            "commitment": COMMITMENT * mean_square(latents - codes.detach(), lesson),
            "perplexity": self._perplexity(numbers, lesson),
        }

    @torch.no_grad()
    def _begin_codes(self, latents: Tensor, lesson: Lesson) -> None:
        """The first batch of a run gives the codes their place."""
        if not self.codebook.any():
            some = latents[lesson.batch.valid].flatten(0, 1).float()
            codes = some[torch.randint(len(some), (self.config.codes,), device=some.device)]
            self.codebook.copy_(codes if lesson.across is None else lesson.across(codes))

    def _speech_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        batch = lesson.batch
        lengths = batch.valid.sum(1)
        with lesson.autocast():
            with torch.no_grad():
                _, truth = self.quantise(self.latents(batch.motion, lengths))
            features = self.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
            history = shift(batch.motion) if batch.noise is None else shift(batch.motion) + batch.noise
            latents = self.predict(features, history, batch.style)
            numbers, codes = self.quantise(latents)
            motion = self.head(self.unfold(straight_through(latents, codes), lengths))
        losses = self._motion_losses(motion, lesson) | lesson.phone_loss(features)
        return losses | {
            "features": self.config.feature_weight * mean_square(latents - truth, lesson),
            "perplexity": self._perplexity(numbers, lesson),
        }

    def _motion_losses(self, motion: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        return {name: self.config.motion_weight * error for name, error in lesson.motion_losses(motion).items()}

    def _perplexity(self, numbers: Tensor, lesson: Lesson) -> Tensor:
        used = torch.bincount(numbers[lesson.batch.valid].flatten(), minlength=self.config.codes).float()
        share = used if lesson.across is None else lesson.across(used)
        share = share / share.sum().clamp_min(1e-9)
        return torch.special.entr(share).sum().exp()

    # Stage 2: speech to codes

    def predict(self, features: Tensor, history: Tensor, style: Tensor | str | int | None = None) -> Tensor:
        """All frames in parallel, given what each is fed with: features (batch, frames, d), history (batch, frames,
        motion_size), the motion of the frame before each -> latents z' (batch, frames, H, C)."""
        index = torch.arange(features.shape[1], device=features.device) % self.config.period
        x = self._token(history, self.style_vector(style, len(features))[:, None], self.positions[index])
        for layer in self.layers:
            x = layer(x, features)
        return self._components(self.code_out(x))

    def decode(
        self, features: Tensor, history: Tensor, style: Tensor | str | int | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """As `predict`, but -> motion (batch, frames, motion_size) of the codes nearest to z'."""
        return self.head(self.unfold(self.quantise(self.predict(features, history, style))[1], lengths))

    @torch.no_grad()
    def rollout(self, features: Tensor, style: Tensor | str | int | None = None) -> tuple[Tensor, Tensor]:
        """Frame by frame: features (batch, frames, d) -> the codes (batch, frames, H, C), and what each frame was fed
        with (batch, frames, motion_size)."""
        speaker = self.style_vector(style, len(features))
        layers = [cast(BiasedLayer, layer) for layer in self.layers]
        heard = [layer.listen(features) for layer in layers]
        frames = torch.arange(features.shape[1], device=features.device)
        # Of the last frame; that of an earlier frame is the end of it.
        biases = [layer.bias(frames[-1:], frames) for layer in layers]
        caches: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        codes = features.new_zeros(*features.shape[:2], self.config.components, self.config.code_size)
        history = features.new_zeros(*features.shape[:2], self.config.motion_size)
        for t in range(features.shape[1]):
            if t:
                history[:, t] = self.head(self.unfold(codes[:, :t])[:, -1])
            x = self._token(history[:, t], speaker, self.positions[t % self.config.period])
            for i, layer in enumerate(layers):
                x, caches[i] = layer.step(x, heard[i][:, t], biases[i][..., -t - 1 :], caches[i])
            codes[:, t] = self.quantise(self._components(self.code_out(x)))[1]
        return codes, history

    def _token(self, history: Tensor, speaker: Tensor, position: Tensor) -> Tensor:
        return self.dropout(self.motion_in(history * self.units) + speaker + position)

    def move(self, features: Tensor, style: Tensor | str | int | None, lengths: Tensor | None) -> Tensor:
        if not features.shape[1]:
            return features.new_zeros(len(features), 0, self.config.prior_width)
        return self.unfold(self.rollout(features, style)[0], lengths)


class ClipTransformer(nn.Module):
    """A linear layer, a convolution over five frames and transformer layers that see the whole clip: E and D."""

    positions: Tensor  # (period, width)

    def __init__(self, inputs: int, width: int, heads: int, hidden: int, layers: int, period: int):
        super().__init__()
        self.enter = Linear(inputs, width)
        self.conv = nn.Conv1d(width, width, 5, padding=2, padding_mode="replicate")
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.register_buffer("positions", periodic_encoding(period, width), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (batch, frames, inputs) -> (batch, frames, width). lengths: (batch,) frames of each clip, at least one;
        what comes beyond does not matter."""
        x = leaky_relu(self.enter(x), 0.2)
        frames = torch.arange(x.shape[1], device=x.device)
        beyond = None
        if lengths is not None:
            beyond = frames >= lengths[:, None]
            last = torch.minimum(frames, lengths[:, None] - 1)  # the convolution pads with a clip's last frame
            x = x.gather(1, last[..., None].expand_as(x))
        x = leaky_relu(self.conv(x.transpose(1, 2)).transpose(1, 2), 0.2)
        x = self.norm(x) + self.positions[frames % len(self.positions)]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=beyond)
        return x


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The codes, whose gradient goes to the latents as it is."""
    return latents + (codes - latents).detach()


def mean_square(error: Tensor, lesson: Lesson) -> Tensor:
    """error (batch, frames, H, C) -> mean of its squares over the valid frames of all processes, scalar."""
    total = error.float().square().mean((-1, -2))[lesson.batch.valid].sum()
    return total / lesson.counts[0].clamp_min(1e-9)
