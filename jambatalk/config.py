"""Everything that defines a model except its weights, as plain data that round-trips through JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

ARRANGEMENTS = {  # M: Mamba + MLP; E: Mamba + mixture of experts; T: attention + MLP (paper, Fig. 3)
    "moe-moe": "EMETEME",
    "m-moe": "MEMTEME",
    "m-m": "MEMTMEM",
    "moe-m": "EMETMEM",
}

MODELS = {  # name in configurations and on command lines -> module:class
    "jambatalk": "jambatalk.model:JambaTalk",
    "faceformer": "jambatalk.baselines.faceformer:FaceFormer",
    "codetalker": "jambatalk.baselines.codetalker:CodeTalker",
    "facediffuser": "jambatalk.baselines.facediffuser:FaceDiffuser",
}

SAMPLING_RATE = 16000  # Hz, of every audio encoder here


class ConfigError(ValueError):
    """A configuration that cannot be: one clear line."""


@dataclass
class AudioEncoderConfig:
    """A Wav2Vec 2.0 encoder and how it is laid over time. The defaults are facebook/wav2vec2-base-960h."""

    # "full": the paper's. Per-clip normalisation, features stretched linearly so that the first and the last fall on
    # the first and the last frame, attention over the whole clip. What pretrained checkpoints expect.
    # "windowed": fixed gain, features resampled on a fixed grid, bounded attention: a frame depends on a bounded piece
    # of audio.
    context: str = "full"
    freeze_front_end: bool = True  # the convolutions keep their weights (paper)
    attention_back: int = 0  # windowed: frames seen back, per layer
    attention_ahead: int = 0  # windowed: frames seen ahead, per layer
    input_gain: float = 1.0  # windowed: the samples are multiplied by this

    conv_dim: list[int] = field(default_factory=lambda: [512] * 7)
    conv_kernel: list[int] = field(default_factory=lambda: [10, 3, 3, 3, 3, 2, 2])
    conv_stride: list[int] = field(default_factory=lambda: [5, 2, 2, 2, 2, 2, 2])
    conv_bias: bool = False
    conv_norm: str = "group"  # over the whole clip, after the first convolution; "layer": per feature, after each
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    pre_norm: bool = False  # normalise before attention and MLP instead of after ("stable" layer norm)
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    dropout: float = 0.1  # of attention's output and the MLP's
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    layer_drop: float = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            setattr(self, name, list(getattr(self, name)))
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise ConfigError("encoder.conv_dim, conv_kernel and conv_stride must be equally long")
        if self.conv_norm not in ("group", "layer"):
            raise ConfigError(f"encoder.conv_norm must be 'group' or 'layer', got {self.conv_norm!r}")
        if self.hidden % self.heads or self.hidden % self.pos_conv_groups:
            raise ConfigError(
                f"encoder.heads and pos_conv_groups must divide hidden ({self.hidden}), "
                f"got {self.heads} and {self.pos_conv_groups}"
            )
        if self.context not in ("full", "windowed"):
            raise ConfigError(f"encoder.context must be 'full' or 'windowed', got {self.context!r}")
        if self.context == "windowed":
            if self.conv_norm != "layer":
                raise ConfigError("encoder.context 'windowed' needs conv_norm 'layer' (group norm sees the whole clip)")
            if self.pos_conv_kernel % 2 == 0:
                raise ConfigError("encoder.context 'windowed' needs an odd pos_conv_kernel")
            if self.attention_back < 0 or self.attention_ahead < 0:
                raise ConfigError("encoder.attention_back and attention_ahead must not be negative")

    @property
    def hop(self) -> int:
        """Samples from one feature of the convolutions to the next (320 for Wav2Vec 2.0)."""
        hop = 1
        for stride in self.conv_stride:
            hop *= stride
        return hop

    @property
    def receptive_field(self) -> int:
        """Samples that one feature of the convolutions sees (400 for Wav2Vec 2.0)."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    @property
    def frames_back(self) -> int:
        """windowed: how many frames back the transformer's whole receptive field reaches."""
        return self.pos_conv_kernel // 2 + self.layers * self.attention_back

    @property
    def frames_ahead(self) -> int:
        """windowed: how many frames ahead the transformer's whole receptive field reaches."""
        return self.pos_conv_kernel // 2 + self.layers * self.attention_ahead

    def feature_position(self, frame: int, fps: Fraction) -> Fraction:
        """windowed: where, counted in features of the convolutions, frame number `frame` lies. Feature k is centred on
        sample k * hop; frame t is the moment t / fps."""
        return Fraction(frame) * SAMPLING_RATE / (Fraction(fps) * self.hop)

    def lookahead_samples(self, fps: Fraction) -> Fraction:
        """windowed: a frame at time t depends on no sample after t plus this, exact."""
        fps = Fraction(fps)
        period = self.feature_position(1, fps).denominator  # the grid repeats after so many frames
        worst = Fraction(0)
        for frame in range(period):
            position = self.feature_position(frame + self.frames_ahead, fps)
            last = -((-position.numerator) // position.denominator)  # the feature at or after it
            last_sample = last * self.hop - self.receptive_field // 2 + self.receptive_field - 1
            worst = max(worst, last_sample - Fraction(frame) * SAMPLING_RATE / fps)
        return worst

    def lookahead_ms(self, fps: Fraction) -> float | None:
        """Milliseconds of audio after a frame's moment that the frame depends on; None: the whole clip."""
        return None if self.context == "full" else float(self.lookahead_samples(fps) * 1000 / SAMPLING_RATE)


@dataclass
class TalkingFaceConfig:
    """What every model here has in common (`talking_face.TalkingFace`): the face, the audio encoder, the losses."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # of each model, from `presets`

    model: str = ""  # which model this configures: a key of MODELS
    preset: str = "vocaset"
    vertices: int = 5023
    fps: int | str = 30  # frames per second; a ratio such as "30000/1001" where it is not whole
    d_model: int = 512
    motion_rank: int | None = None  # None: motion is 3 * vertices displacements; else coefficients of so many shapes
    period: int | None = 30  # frames, of the periodic positional encoding; None: none
    dropout: float = 0.0
    subjects: list[str] = field(default_factory=list)  # training identities, in the order of the style embedding
    encoder: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    vertex_weight: float = 1.0  # of the losses, as the next three (see losses.py)
    velocity_weight: float = 1.0
    lip_weight: float = 1.0
    opening_weight: float = 0.0
    unknown_style_probability: float = 0.1  # in training, how often a clip's identity is replaced by "unknown"

    def __post_init__(self) -> None:
        if self.model != type(self).model:
            raise ConfigError(f"model must be {type(self).model!r}, got {self.model!r}")
        if not isinstance(self.encoder, AudioEncoderConfig):
            self.encoder = _build(AudioEncoderConfig, self.encoder, "encoder.")
        self.require_whole("vertices", "d_model")
        self.require_whole("period", "motion_rank", optional=True)
        if self.motion_rank is not None and self.motion_rank > 3 * self.vertices:
            raise ConfigError(f"motion_rank must be at most 3 * vertices, got {self.motion_rank}")
        try:
            positive = self.frame_rate > 0
        except (TypeError, ValueError, ZeroDivisionError):
            positive = False
        if not positive:
            raise ConfigError(f"fps must be a positive number or a ratio such as '30000/1001', got {self.fps!r}")
        if len(set(self.subjects)) != len(self.subjects):
            raise ConfigError("subjects must not repeat")
        self.subjects = list(self.subjects)

    def require_whole(self, *names: str, optional: bool = False) -> None:
        """Raises ConfigError where one of these is no positive whole number (or None, where that is allowed)."""
        for name in names:
            value = getattr(self, name)
            if optional and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number{' or null' * optional}, got {value!r}")

    @property
    def frame_rate(self) -> Fraction:
        """fps, exact."""
        return Fraction(self.fps)

    @property
    def motion_size(self) -> int:
        """Numbers per frame of motion: 3 * vertices, or the rank of the basis."""
        return 3 * self.vertices if self.motion_rank is None else self.motion_rank

    @property
    def lookahead_ms(self) -> float | None:
        """How far ahead of a frame the audio is that the frame depends on; None: the whole clip."""
        return self.encoder.lookahead_ms(self.frame_rate)

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many 16 kHz samples: its duration times fps, rounded, exactly."""
        return round(Fraction(samples, SAMPLING_RATE) * self.frame_rate)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ConfigError for an unknown key or a value that cannot be."""
        return _build(cls, values, "")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """`vocaset`, `biwi` or `demo`, with some values replaced."""
        if name not in cls.PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(cls.PRESETS)}, got {name!r}")
        return cls.from_dict({"preset": name, **cls.PRESETS[name], **overrides})


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'} must be an object, got {type(values).__name__}")
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ConfigError(
            f"unknown configuration key{'s' * (len(unknown) > 1)}: " + ", ".join(prefix + key for key in unknown)
        )
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"bad configuration: {error}") from error


SHARED_PRESETS: dict[str, dict[str, Any]] = {
    "vocaset": dict(),
    "biwi": dict(vertices=23370, fps=25, period=25),
    "demo": dict(
        vertices=5085,
        motion_rank=64,
        lip_weight=10.0,
        opening_weight=1.0,
        encoder=dict(
            context="windowed",
            freeze_front_end=False,
            attention_back=30,
            attention_ahead=1,
            input_gain=10.0,
            conv_dim=[48, 64, 96, 128, 128, 128, 192],
            conv_bias=True,
            conv_norm="layer",
            hidden=256,
            layers=4,
            heads=4,
            ffn=768,
            pre_norm=True,
            pos_conv_kernel=9,
            pos_conv_groups=4,
            activation_dropout=0.0,
        ),
    ),
}


def presets(**own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The presets of one model: what the face and the encoder are for all, and this model's `own` values by preset."""
    return {name: {**values, **own.get(name, {})} for name, values in SHARED_PRESETS.items()}


@dataclass
class JambaTalkConfig(TalkingFaceConfig):
    model: str = "jambatalk"
    heads: int = 8
    kv_heads: int = 1
    hidden: int = 1024  # of the gated MLP and of each expert
    experts: int = 4
    top_k: int = 2
    arrangement: str = "moe-moe"
    states: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: ceil(d_model / 16)
    attention_window: int | None = None  # frames; None: all of them
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    router_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arrangement not in ARRANGEMENTS:
            raise ConfigError(f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {self.arrangement!r}")
        self.require_whole("heads", "kv_heads", "hidden", "experts", "top_k", "states", "conv_width", "expand")
        self.require_whole("dt_rank", "attention_window", optional=True)
        if self.d_model % self.heads or self.d_model // self.heads % 2:
            raise ConfigError(f"heads must divide d_model into even parts, got {self.heads} and {self.d_model}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k must be at most experts, got {self.top_k} and {self.experts}")

    @property
    def layers(self) -> str:
        """One letter per decoder layer: M, E or T."""
        return ARRANGEMENTS[self.arrangement]

    @property
    def time_step_rank(self) -> int:
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank


JambaTalkConfig.PRESETS = presets(demo=dict(d_model=128, heads=4, hidden=256, attention_window=300))
