"""FaceFormer (Fan et al., CVPR 2022, arXiv 2112.05329): an autoregressive transformer decoder with periodic biases.

    e_0 = style;   e_t = W_m motion_{t-1} + b_m + style                          frame t's token
    x   = e + periodic position
    x   = LN(x + self-attention(x));  x = LN(x + cross-attention(x, audio));  x = LN(x + W_2 relu(W_1 x))
    motion_t = W_out x_t + b_out                                                 (W_out and b_out start at zero)

Followed: the periodic positional encoding; in self-attention, causal, a bias of -slope_h floor((i - j) / period) on the
score of frame i for frame j, with ALiBi's slopes 2^(-8 (h + 1) / heads) for h = 0, 1, ...; in cross-attention the
alignment mask; layer norm after each residual; the style embedding added to every token; training on the decoder's own
rollout over the whole clip, with the gradient through all of it, on the mean squared error of the vertices alone; Adam.
Widths of the `vocaset` and `biwi` presets are the authors'.

The alignment mask lets frame t see the one audio feature of frame t. A softmax over one key is 1, so the query and the
key do not matter, and what remains of cross-attention is W_o (W_v audio_t + b_v) + b_o: that is what is computed, and
there are no other weights.

Changed, so that methods differ by nothing but the method:

- The audio encoder is ours. It resamples to the frame rate before its transformer for every data set; FaceFormer leaves
  two features a frame on BIWI.
- The loop keeps keys and values instead of running the prefix anew for every frame: the same numbers, but for dropout,
  which is drawn once for a frame and not again in every later step. W_m (W_out x + b_out) is one d x d matrix on x,
  so the loop never touches vertices.
- There is no limit of 600 frames.
- A last style, "unknown", is trained with probability 0.1, for identities outside of the training set; FaceFormer
  averages nothing and speaks in every training style instead (`jambatalk.evaluate --subject all`).
- `demo`: JambaTalk's width, motion in the shared basis of rank 64, and the vertex error with the weights of that preset
  (lips count more), for all methods. What teaches the encoder alike (phones, augmentation) is also shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from jambatalk.config import ConfigError, TalkingFaceConfig, presets
from jambatalk.talking_face import WholeClip, periodic_encoding
from jambatalk_kernels.linear import Linear, linear

if TYPE_CHECKING:
    from jambatalk.training import Lesson


@dataclass
class FaceFormerConfig(TalkingFaceConfig):
    model: str = "faceformer"
    d_model: int = 64
    heads: int = 4
    hidden: int = 128  # of the feed-forward layers
    layers: int = 1
    period: int = 30
    dropout: float = 0.1  # on the tokens, on attention's weights and output, and twice in the feed-forward layers
    velocity_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("heads", "hidden", "layers", "period")
        if self.d_model % self.heads:
            raise ConfigError(f"heads must divide d_model, got {self.heads} and {self.d_model}")


FaceFormerConfig.PRESETS = presets(biwi=dict(d_model=128, hidden=256), demo=dict(d_model=128, hidden=256))


class FaceFormer(WholeClip):
    """The paper's decoder on our encoder."""

    config_class = FaceFormerConfig
    config: FaceFormerConfig
    positions: Tensor  # (period, d)

    def __init__(self, config: FaceFormerConfig):
        super().__init__(config)
        d = config.d_model
        self.motion_in = Linear(config.motion_size, d)
        self.style = nn.Embedding(len(config.subjects) + 1, d)  # the last row: "unknown"
        self.layers = nn.ModuleList(
            BiasedLayer(d, config.heads, config.hidden, config.period, config.dropout) for _ in range(config.layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = Linear(d, config.motion_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("positions", periodic_encoding(config.period, d), persistent=False)

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """The error of the motion that the decoder makes of its own."""
        batch = lesson.batch
        with lesson.autocast():
            features = self.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
            motion = self.head(self.rollout(features, batch.style))
        return lesson.motion_losses(motion) | lesson.phone_loss(features)

    def decode(self, features: Tensor, history: Tensor, style: Tensor | str | int | None = None) -> Tensor:
        """All frames in parallel, given what each is fed with: features (batch, frames, d), history (batch, frames,
        motion_size), the motion of the frame before each (history[:, 0] is not read) -> motion."""
        tokens = torch.cat([torch.zeros_like(features[:, :1]), self.motion_in(history[:, 1:])], dim=1)
        x = self.dropout(self._unfed(features, style) + tokens)
        for layer in self.layers:
            x = layer(x, features)
        return self.head(x)

    def rollout(self, features: Tensor, style: Tensor | str | int | None = None) -> Tensor:
        """Frame by frame, each fed with the motion of the one before; the gradient goes through the feedback.
        features (batch, frames, d) -> hidden (batch, frames, d)."""
        feedback = self.motion_in.weight @ self.head.weight
        feedback_bias = self.motion_in.weight @ self.head.bias + self.motion_in.bias
        # unbind: indexing would make the backward pass fill a tensor of the whole clip for every frame.
        inputs = self._unfed(features, style).unbind(1)
        layers = [cast(BiasedLayer, layer) for layer in self.layers]
        heard = [layer.listen(features).unbind(1) for layer in layers]
        frames = torch.arange(features.shape[1], device=features.device)
        # Of the last frame; that of an earlier frame is the end of it.
        biases = [layer.bias(frames[-1:], frames) for layer in layers]
        caches: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        hidden: list[Tensor] = []
        for t, x in enumerate(inputs):
            x = self.dropout(x + linear(hidden[-1], feedback, feedback_bias) if hidden else x)
            for i, layer in enumerate(layers):
                x, caches[i] = layer.step(x, heard[i][t], biases[i][..., -t - 1 :], caches[i])
            hidden.append(x)
        return torch.stack(hidden, dim=1) if hidden else features.new_zeros(features.shape)

    def _unfed(self, features: Tensor, style: Tensor | str | int | None) -> Tensor:
        """Style and periodic position of every frame, (batch, frames, d)."""
        index = torch.arange(features.shape[1], device=features.device) % self.config.period
        return self.style_vector(style, len(features))[:, None] + self.positions[index]

    def move(self, features: Tensor, style: Tensor | str | int | None, lengths: Tensor | None) -> Tensor:
        return self.rollout(features, style)


class BiasedLayer(nn.Module):
    """A transformer decoder layer with FaceFormer's biases and its alignment mask (see the top of this file)."""

    slopes: Tensor  # (heads,)

    def __init__(self, d: int, heads: int, hidden: int, period: int, dropout: float):
        super().__init__()
        self.heads, self.period = heads, period
        self.qkv = Linear(d, 3 * d)
        self.out = Linear(d, d)
        self.audio_value = Linear(d, d)
        self.audio_out = Linear(d, d)
        self.mlp_in = Linear(d, hidden)
        self.mlp_out = Linear(hidden, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.drop = nn.Dropout(dropout)
        slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
        self.register_buffer("slopes", slopes, persistent=False)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Frame numbers (q,) and (k,) -> (heads, q, k), what is added to the scores; -inf ahead."""
        distance = queries[:, None] - keys
        bias = -self.slopes[:, None, None] * torch.div(distance, self.period, rounding_mode="floor")
        return bias.masked_fill(distance < 0, -torch.inf)

    def listen(self, audio: Tensor) -> Tensor:
        """What cross-attention adds to each frame: (batch, frames, d) -> the same shape."""
        return self.drop(self.audio_out(self.audio_value(audio)))

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        """x, audio (batch, frames, d) -> (batch, frames, d), all frames in parallel."""
        frames = torch.arange(x.shape[1], device=x.device)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self._rest(x, self._attend(q, k, v, self.bias(frames, frames)).transpose(1, 2), self.listen(audio))

    def step(
        self, x: Tensor, heard: Tensor, bias: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One frame: x (batch, d), heard (batch, d) from `listen`, bias (heads, 1, frames so far), cache: keys and
        values (batch, heads, frames before, head_dim) -> (batch, d) and the cache with this frame in it."""
        q, k, v = (part.unflatten(-1, (self.heads, 1, -1)) for part in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        return self._rest(x, self._attend(q, k, v, bias)[:, :, 0], heard), (k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        return self.drop(scores.softmax(-1)).to(v.dtype) @ v

    def _rest(self, x: Tensor, attended: Tensor, heard: Tensor) -> Tensor:
        """attended (..., heads, head_dim)."""
        x = self.norms[0](x + self.drop(self.out(attended.flatten(-2))))
        x = self.norms[1](x + heard)
        return self.norms[2](x + self.drop(self.mlp_out(self.drop(relu(self.mlp_in(x))))))
