"""FaceDiffuser (Stan, Haque and Yumak, MIG 2023, arXiv 2309.11306): diffusion over motion with a recurrent decoder.

    x_t    = sqrt(a_t) motion + sqrt(1 - a_t) noise            t = 1 ... T, a_t falls from 1 to 0
    hidden = GRU([audio, W_x x_t + b_x + step(t)]) * style     two layers, forward in time
    motion = W_out hidden + b_out                              the clean motion itself, not the noise
                                                               (W_out and b_out start at zero)

Followed: the network says what the motion is without the noise; the error of that, on the vertices alone, is the loss;
t is drawn evenly for each clip; the noised motion, embedded, is concatenated with the audio, goes through a GRU of two
layers with dropout between them, is multiplied by the style embedding, and a last layer makes the motion. T = 500, the
cosine schedule. Speech starts from noise and goes through the steps back, each drawing from the posterior of the step
before given the motion that the network now says. Width of the GRU: 256 for VOCASET and 512 for BIWI, as the authors
have it.

Decided here, where the paper is silent: step(t) is a sinusoidal encoding of t through two layers with a SiLU between
them; the noise is as large as the motion (`noise`), so that both are seen; `style` starts at one.

Changed, so that methods differ by nothing but the method:

- The audio encoder is ours and learns; theirs is HuBERT, of which two layers are frozen. Its features come at the frame
  rate, where FaceDiffuser folds two into each frame.
- A last style, "unknown", as in `faceformer.py`; the `demo` preset's basis, vertex weights and width, as there.
- `demo` speaks in 50 of the 500 steps, evenly spaced, with the posterior of those; the full 500 take ten times as long.
- The noise comes from a generator of its own, seeded with the model's `seed` for each clip: the same clip gives the
  same motion whatever was spoken before or beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from jambatalk.config import ConfigError, TalkingFaceConfig, presets
from jambatalk.talking_face import WholeClip
from jambatalk_kernels.linear import Linear

if TYPE_CHECKING:
    from jambatalk.training import Lesson

STEP_WIDTH = 64  # of the sinusoidal encoding of t
COSINE_OFFSET = 0.008  # Nichol and Dhariwal, arXiv 2102.09672, equation 17
LARGEST_BETA = 0.999


@dataclass
class FaceDiffuserConfig(TalkingFaceConfig):
    model: str = "facediffuser"
    d_model: int = 256  # of the audio and of the embedded noised motion
    hidden: int = 256  # of the GRU
    layers: int = 2
    diffusion_steps: int = 500
    sampling_steps: int | None = None  # None: all
    noise: float = 1e-3  # standard deviation of the noise, in the units of motion (metres; of a basis: its units)
    dropout: float = 0.3  # between the layers of the GRU
    velocity_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("hidden", "layers", "diffusion_steps")
        self.require_whole("sampling_steps", optional=True)
        if self.sampling_steps is not None and self.sampling_steps > self.diffusion_steps:
            raise ConfigError(
                f"sampling_steps must be at most diffusion_steps, got {self.sampling_steps} and {self.diffusion_steps}"
            )
        if not self.noise > 0:
            raise ConfigError(f"noise must be positive, got {self.noise}")


FaceDiffuserConfig.PRESETS = presets(
    biwi=dict(hidden=512), demo=dict(d_model=128, hidden=256, sampling_steps=50, noise=1.0)
)


class FaceDiffuser(WholeClip):
    """The paper's decoder on our encoder."""

    config_class = FaceDiffuserConfig
    config: FaceDiffuserConfig
    signal: Tensor  # (diffusion_steps + 1,)

    def __init__(self, config: FaceDiffuserConfig):
        super().__init__(config)
        d = config.d_model
        self.motion_in = Linear(config.motion_size, d)
        self.step_in = Linear(STEP_WIDTH, d)
        self.step_out = Linear(d, d)
        between = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(2 * d, config.hidden, config.layers, batch_first=True, dropout=between)
        self.style = nn.Embedding(len(config.subjects) + 1, config.hidden)  # the last row: "unknown"
        self.head = Linear(config.hidden, config.motion_size)
        nn.init.normal_(self.style.weight, mean=1.0, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("signal", cosine_schedule(config.diffusion_steps), persistent=False)

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """The error of the motion that the decoder sees through the noise."""
        batch, steps = lesson.batch, self.config.diffusion_steps
        t = torch.randint(1, steps + 1, (len(batch.motion),), device=batch.motion.device)
        share = self.signal[t][:, None, None].to(batch.motion.dtype)
        noise = self.config.noise * torch.randn_like(batch.motion)
        noised = share.sqrt() * batch.motion + (1 - share).sqrt() * noise
        with lesson.autocast():
            features = self.encode(batch.samples, batch.lengths, frames=batch.motion.shape[1])
            motion = self.head(self.denoise(features, noised, t, batch.style))
        return lesson.motion_losses(motion) | lesson.phone_loss(features)

    def denoise(self, features: Tensor, noised: Tensor, t: Tensor, style: Tensor | str | int | None) -> Tensor:
        """features (batch, frames, d), noised motion (batch, frames, motion_size) of step t (batch,) -> hidden (batch,
        frames, hidden), from which `head` makes the motion. A frame does not depend on later ones, nor on padding."""
        step = self.step_out(silu(self.step_in(step_encoding(t).to(features.dtype))))
        seen = self.motion_in(noised / self.config.noise) + step[:, None]
        hidden, _ = self.gru(torch.cat([features, seen.to(features.dtype)], dim=-1))
        return hidden * self.style_vector(style, len(features))[:, None]

    def move(self, features: Tensor, style: Tensor | str | int | None, lengths: Tensor | None) -> Tensor:
        batch, frames = features.shape[:2]
        if not batch or not frames:
            return features.new_zeros(batch, frames, self.config.hidden)
        counts = [frames] * batch if lengths is None else lengths.tolist()
        generators = [torch.Generator().manual_seed(self.seed) for _ in counts]

        def noise() -> Tensor:  # of each clip what it would get alone
            out = torch.zeros(batch, frames, self.config.motion_size)
            for row, count, generator in zip(out, counts, generators, strict=True):
                row[:count] = torch.randn(count, self.config.motion_size, generator=generator)
            return self.config.noise * out.to(features)

        x, times = noise(), self.sampled_steps()
        for t, before in zip(times, [*times[1:], 0], strict=True):
            hidden = self.denoise(features, x, torch.full((batch,), t, device=features.device), style)
            if before:
                clean, noised, spread = posterior(float(self.signal[t]), float(self.signal[before]))
                x = clean * self.head(hidden) + noised * x + spread * noise()
        return hidden

    def sampled_steps(self) -> list[int]:
        """The steps that speech goes through, from T down, evenly spaced."""
        steps, count = self.config.diffusion_steps, self.config.sampling_steps or self.config.diffusion_steps
        return [steps - (i * steps) // count for i in range(count)]


def cosine_schedule(steps: int) -> Tensor:
    """(steps + 1,) float64: a_t, the share of the signal in the variance at t = 0 ... steps (arXiv 2102.09672)."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    share = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    kept = (share[1:] / share[:-1]).clamp_min(1 - LARGEST_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)])


def posterior(signal: float, before: float) -> tuple[float, float, float]:
    """What the sample of an earlier step is made of: factors of the clean motion, of the noised one, and of new noise.
    signal, before: a_t of this step and of the earlier one."""
    kept = signal / before
    left = (1 - before) / (1 - signal)
    return math.sqrt(before) * (1 - kept) / (1 - signal), math.sqrt(kept) * left, math.sqrt(left * (1 - kept))


def step_encoding(t: Tensor) -> Tensor:
    """(batch,) steps -> (batch, STEP_WIDTH) float64: sines and cosines of t at frequencies 1 ... 1/10000."""
    half = STEP_WIDTH // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float64, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angle = t[:, None] * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
