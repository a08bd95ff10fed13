"""Speech to features at the frame rate: Wav2Vec 2.0, composed of the parts that `transformers` has.

samples -> convolutions (50 Hz) -> resampling to the frame rate -> projection -> positional convolution -> transformer.

Two ways to lay it over time, `AudioEncoderConfig.context`:

`full` (the paper's; what pretrained checkpoints expect): samples normalised over the clip, features stretched linearly
over the frames, every frame sees the whole clip.

`windowed`: a frame depends on a bounded piece of audio. Feature k of the convolutions is centred on sample 320 k (the
audio is padded in front by half a receptive field), frame t is the moment t / fps, and lies between two features at an
exact rational position: a fixed grid, 5 : 3 for 30 frames/s. Attention sees `attention_back` frames back and
`attention_ahead` frames ahead; nothing is normalised over the clip. So a clip can be encoded in chunks, with the same
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import interpolate, pad

from jambatalk.config import SAMPLING_RATE, AudioEncoderConfig
from jambatalk.packing import Packing
from jambatalk.windowed_attention import Window, implementation
from jambatalk_kernels.dropout import Dropout
from jambatalk_kernels.linear import adopt, linear_into
from jambatalk_kernels.norms import layer_norm_gelu

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config

# windowed, without gradients: longer clips are encoded this many frames at a time, and convolved in smaller pieces: the
# first layers are 100 times as long as the last, and memory that is fresh or far takes longer than their arithmetic
CHUNK_FRAMES, CONVOLVED_FRAMES = 600, 200


Value = TypeVar("Value")


class EncoderError(ValueError):
    """A Wav2Vec 2.0 checkpoint that cannot be used: one clear line."""


class AudioEncoder(nn.Module):
    """samples (batch, n) 16 kHz -> (batch, frames, hidden)."""

    def __init__(self, config: AudioEncoderConfig, fps: Fraction | int):
        super().__init__()
        # Imported here: transformers takes seconds, and nothing but a model needs it.
        from transformers.models.wav2vec2 import modeling_wav2vec2 as parts

        self.config = config
        self.fps = Fraction(fps)
        hf = wav2vec2_config(config)
        self.feature_extractor = parts.Wav2Vec2FeatureEncoder(hf)
        self.feature_projection = parts.Wav2Vec2FeatureProjection(hf)
        encoder = (parts.Wav2Vec2EncoderStableLayerNorm if config.pre_norm else parts.Wav2Vec2Encoder)(hf)
        self.pos_conv_embed = encoder.pos_conv_embed
        self.layer_norm = encoder.layer_norm
        self.layers = encoder.layers
        self.dropout = nn.Dropout(config.dropout)
        adopt(self)
        for part in self.modules():
            if type(part) is nn.Dropout:
                part.__class__ = Dropout
        self.apply(_initialise)
        if config.freeze_front_end:
            self.feature_extractor.requires_grad_(False)

    # The stages

    def convolve(self, samples: Tensor) -> Tensor:
        """(batch, n) -> (batch, features, conv_dim[-1]) at 50 Hz; n at least the receptive field."""
        # Layer by layer, not feature_extractor(): that asks for the gradient of the samples, which nobody uses.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_front_end):
            layers: list[Any] = list(self.feature_extractor.conv_layers)  # of three classes of transformers
            each = self.config.conv_norm == "layer"
            # As products, features last: a CPU's conv1d takes longer, and backward through it between layer norms
            # copies and transposes more than it computes. The group norm, after the first layer, wants them first.
            products = samples.device.type == "cpu" or (torch.is_grad_enabled() and each)
            first = (0 if each else 1) if products else len(layers)
            x = samples[:, None]
            for layer in layers[:first]:
                x = layer(x)
            x = x.transpose(1, 2)
            for layer in layers[first:]:
                if each:
                    x, norm = strided_products(x, layer.conv, bias=False), layer.layer_norm
                    x = layer_norm_gelu(x, norm.weight, norm.bias, norm.eps, shift=layer.conv.bias)
                else:
                    x = layer.activation(strided_products(x, layer.conv))
        return x

    def contextualise(self, features: Tensor, packing: Packing | None = None, valid: Tensor | None = None) -> Tensor:
        """Projection, positional convolution, transformer: (batch, frames, conv_dim[-1]) -> (batch, frames, hidden).

        packing: windowed, of the clips that lie one behind the other in a batch of one.
        valid: full, (batch, frames) bool: padding is zeroed, so that the positional convolution sees there what it sees
        beyond the end of a clip, and no frame attends to it. None: all are.
        """
        x = self.feature_projection(features)
        x = x[0] if isinstance(x, tuple) else x  # older releases of transformers return the tensor alone
        mask: Tensor | Window | None = None
        if packing is not None:
            mask = Window.of(packing, self.config.heads, self.config.attention_back, self.config.attention_ahead)
            x = x + self._positional(x, packing)
        else:
            if valid is not None:
                x = x.masked_fill(~valid[..., None], 0)
                # A clip of no frames sees itself: a query that sees nothing would be NaN.
                hidden = ~valid & valid.any(1, keepdim=True)
                mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
                mask = mask.masked_fill(hidden, torch.finfo(x.dtype).min)[:, None, None]
            x = x + self.pos_conv_embed(x)
        if not self.config.pre_norm:
            x = self.layer_norm(x)
        x = self.dropout(x)
        for layer in self.layers:
            if self.training and self.config.layer_drop and torch.rand(()) < self.config.layer_drop:
                continue
            x = layer(x, attention_mask=mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.layer_norm(x) if self.config.pre_norm else x

    def _positional(self, x: Tensor, packing: Packing) -> Tensor:
        """The positional convolution of packed clips: between two of them lies as much silence as it sees."""
        gap = self.config.pos_conv_kernel // 2
        place = torch.arange(x.shape[1], device=x.device) + gap * packing.clips
        apart = x.new_zeros(x.shape[1] + gap * packing.shape[0], x.shape[2]).index_copy(0, place, x.squeeze(0))
        return self.pos_conv_embed(apart[None]).squeeze(0).index_select(0, place)[None]

    # Whole clips

    def forward(self, samples: Tensor, lengths: Tensor | None = None, frames: int | None = None) -> Tensor:
        """Encode a batch of clips.

        samples: (batch, n) float at 16 kHz. lengths: (batch,) samples of each clip; what lies beyond does not count.
        frames: the longest clip's number of frames; by default, and for the others in any case, round(duration * fps).

        Returns (batch, frames, hidden); zero beyond each clip's own frames. A clip's result does not depend on the
        padding or on the other clips.
        """
        batch, n = samples.shape
        sizes = [n] * batch if lengths is None else lengths.tolist()
        counts = [round(Fraction(size, SAMPLING_RATE) * self.fps) for size in sizes]
        total = max(counts, default=0) if frames is None else frames
        if frames is not None:  # a caller may have rounded an exact duration that n samples cannot tell
            longest = max(sizes)
            pairs = zip(sizes, counts, strict=True)
            counts = [frames if size == longest else min(count, frames) for size, count in pairs]
        if total < 1 or not batch:
            return samples.new_zeros(batch, max(total, 0), self.config.hidden)
        if self.config.context == "full":
            return self._full(samples, sizes, counts, total)
        return self._windowed(samples, sizes, counts, total)

    def _full(self, samples: Tensor, sizes: list[int], counts: list[int], total: int) -> Tensor:
        rows = []
        # One by one: the front end may normalise over the clip.
        for row, size, count in zip(samples, sizes, counts, strict=True):
            clip = row[:size]
            clip = (clip - clip.mean()) / torch.sqrt(clip.var(correction=0) + 1e-7)
            # Less than one feature's audio is completed with silence.
            features = self.convolve(pad(clip, (0, max(0, self.config.receptive_field - size)))[None])
            stretched = stretch(features, count) if count else features[:, :0]
            rows.append(pad(stretched, (0, 0, 0, total - count)))
        features = torch.cat(rows)
        valid = _first(counts, total, samples.device)
        padded = not all(count == total for count in counts)
        if not padded:
            return self.contextualise(features)
        return self.contextualise(features, valid=valid).masked_fill(~valid[..., None], 0)

    def _windowed(self, samples: Tensor, sizes: list[int], counts: list[int], total: int) -> Tensor:
        clips = [row[:size] for row, size in zip(samples, sizes, strict=True)]
        if not torch.is_grad_enabled():
            rows = samples.new_zeros(len(clips), total, self.config.hidden)
            for row, clip, count in zip(rows, clips, counts, strict=True):
                for start, x in self.chunks(clip, count):
                    row[start : start + x.shape[1]] = x[0]
            return rows
        packing = Packing.of(_first(counts, total, samples.device))
        pieces = [(clip, 0, count) for clip, count in zip(clips, counts, strict=True) if count]
        return packing.unpack(self.contextualise(self.resampled(pieces), packing))

    def chunks(self, samples: Tensor, frames: int, size: int = CHUNK_FRAMES) -> Iterator[tuple[int, Tensor]]:
        """windowed: encode a clip (n,) `size` frames at a time, each time with exactly the audio that those frames
        depend on. Yields (first frame, (1, at most size, hidden)) in order; memory does not grow with the clip."""
        convolved, done = None, 0  # the chunk before through the convolutions, up to frame `done`
        for start in range(0, frames, size):
            stop = min(start + size, frames)
            first = max(0, start - self.config.frames_back)
            last = min(frames, stop + self.config.frames_ahead)
            steps = range(done, last, CONVOLVED_FRAMES)
            fresh = [self.resampled([(samples, at, min(at + CONVOLVED_FRAMES, last))]) for at in steps]
            kept: list[Tensor] = [] if convolved is None else [convolved[:, convolved.shape[1] - (done - first) :]]
            convolved, done = torch.cat([*kept, *fresh], 1), last
            packing = Packing.of(torch.ones(convolved.shape[:2], dtype=torch.bool, device=samples.device))
            yield start, self.contextualise(convolved, packing)[:, start - first : stop - first]

    def resampled(self, pieces: list[tuple[Tensor, int, int]]) -> Tensor:
        """windowed: the convolutions' features at some frames of some clips, each between its two neighbours at 50 Hz.

        pieces: samples (n,) of a clip, first frame, last frame + 1; samples beyond both ends of a clip count as zero.
        Returns (1, frames of all pieces, conv_dim[-1]).
        """
        step, hop, field = self.config.feature_position(1, self.fps), self.config.hop, self.config.receptive_field
        audio, places, shares, offset = [], [], [], 0
        for samples, first, last in pieces:
            position = torch.arange(first, last) * step.numerator
            before = position // step.denominator
            k0, count = int(before[0]), int(before[-1] - before[0]) + 2
            places.append(before - k0 + offset)
            shares.append((position % step.denominator).to(samples.dtype) / step.denominator)
            begin, size = k0 * hop - field // 2, (count - 1) * hop + field
            size += -size % hop  # the features of the next piece are in step
            have = samples[max(begin, 0) : begin + size]
            front = max(0, -begin)
            audio.append(pad(have, (front, size - front - len(have))))
            offset += size // hop
        features = self.convolve(torch.cat(audio)[None] * self.config.input_gain).squeeze(0)
        place = torch.cat(places).to(features.device)
        share = torch.cat(shares)[:, None].to(features)
        return torch.lerp(features.index_select(0, place), features.index_select(0, place + 1), share)[None]

    # Pretrained weights

    def load_wav2vec2(self, source: str | Path) -> None:
        """Take the weights of a Wav2Vec 2.0 checkpoint: a local folder or a hub id such as facebook/wav2vec2-base-960h.

        Raises EncoderError where there is none or its architecture is another than the config's
        (`wav2vec2_architecture` reads the config off a checkpoint).
        """
        from transformers import Wav2Vec2Model

        found = wav2vec2_architecture(source)
        wrong = [
            f"{name} is {value}, not {getattr(self.config, name)}"
            for name, value in found.items()
            if name not in ("dropout", "attention_dropout", "activation_dropout", "layer_drop")
            and getattr(self.config, name) != value
        ]
        if wrong:
            raise EncoderError(f"{source}: its architecture is not the encoder's: {'; '.join(wrong)}")
        try:
            loaded: Any = Wav2Vec2Model.from_pretrained(
                source, use_safetensors=_has_safetensors(source), output_loading_info=True
            )
            model, report = loaded  # a pair, with output_loading_info
        except Exception as error:  # whatever transformers and the hub raise, it is this checkpoint that cannot be had
            raise EncoderError(f"{source}: cannot be loaded: {str(error).splitlines()[0]}") from error
        missing = sorted(_own_names(dict.fromkeys(report["missing_keys"])))
        if missing:  # transformers only warns, and leaves them random
            raise EncoderError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
        self.load_state_dict(_own_names(model.state_dict()))


def wav2vec2_config(config: AudioEncoderConfig) -> Wav2Vec2Config:
    """The same architecture in transformers' words."""
    from transformers import Wav2Vec2Config

    hf = Wav2Vec2Config(
        conv_dim=config.conv_dim,
        conv_kernel=config.conv_kernel,
        conv_stride=config.conv_stride,
        conv_bias=config.conv_bias,
        feat_extract_norm=config.conv_norm,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        do_stable_layer_norm=config.pre_norm,
        num_conv_pos_embeddings=config.pos_conv_kernel,
        num_conv_pos_embedding_groups=config.pos_conv_groups,
        hidden_dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        feat_proj_dropout=0.0,
        layerdrop=config.layer_drop,
        layer_norm_eps=config.layer_norm_eps,
    )
    # The modules are built without the model class that would choose it.
    hf._attn_implementation = "sdpa" if config.context == "full" else implementation()
    return hf


def wav2vec2_architecture(source: str | Path) -> dict[str, Any]:
    """The fields of AudioEncoderConfig that a Wav2Vec 2.0 checkpoint (local folder or hub id) fixes."""
    from transformers import AutoConfig

    try:
        hf = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise EncoderError(f"{source}: no Wav2Vec 2.0 checkpoint there: {str(error).splitlines()[0]}") from error
    if hf.model_type != "wav2vec2":
        raise EncoderError(f"{source}: it is a {hf.model_type} checkpoint, not wav2vec2")
    return dict(
        conv_dim=list(hf.conv_dim),
        conv_kernel=list(hf.conv_kernel),
        conv_stride=list(hf.conv_stride),
        conv_bias=hf.conv_bias,
        conv_norm=hf.feat_extract_norm,
        hidden=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        ffn=hf.intermediate_size,
        pre_norm=hf.do_stable_layer_norm,
        pos_conv_kernel=hf.num_conv_pos_embeddings,
        pos_conv_groups=hf.num_conv_pos_embedding_groups,
        dropout=hf.hidden_dropout,
        attention_dropout=hf.attention_dropout,
        activation_dropout=hf.activation_dropout,
        layer_drop=hf.layerdrop,
        layer_norm_eps=hf.layer_norm_eps,
    )


def strided_products(x: Tensor, conv: nn.Conv1d, bias: bool = True) -> Tensor:
    """`conv` on (batch, length, channels) -> (batch, features, filters), as one matrix product for each `stride` taps
    of the kernel: x is cut into blocks of `stride` positions, and nothing is gathered or transposed. float32: forward
    as fast as conv1d, backward 3 times faster or more (the demo's front end on AVX-512). bias: False leaves it out."""
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    weight, shift = conv.weight.permute(2, 1, 0).reshape(kernel * x.shape[-1], -1), conv.bias if bias else None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, shift = x.to(dtype), weight.to(dtype), None if shift is None else shift.to(dtype)
    return _StridedProducts.apply(x.contiguous(), weight, shift, kernel, stride)


class _StridedProducts(torch.autograd.Function):
    """weight (kernel * channels, filters). Its own gradient, since that of a slice is made of zeros and copies: on the
    demo's front end they took a fifth of a training step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = kernel, stride
        y: Tensor | None = None
        for part, rows in _parts(x, weight, kernel, stride):
            y = linear_into(y, part, rows.T, bias if y is None else None, add=y is not None)
        assert y is not None  # a kernel has a tap
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x, weight), (kernel, stride) = ctx.saved_tensors, ctx.sizes
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            dx[:, dy.shape[1] * stride if kernel >= stride else 0 :] = 0  # what the first part does not reach
            for number, (part, rows) in enumerate(_parts(dx, weight, kernel, stride)):
                linear_into(part, dy, rows, add=number > 0)
        if ctx.needs_input_grad[1]:
            total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            sums = total.split(stride * x.shape[-1])
            for (part, _), rows in zip(_parts(x, weight, kernel, stride), sums, strict=True):
                for clip, gradient in zip(part, dy, strict=True):
                    linear_into(rows, clip.T, gradient.T, add=True)
            dweight = total.to(weight.dtype)
        dbias = None
        if ctx.needs_input_grad[2]:  # sums as a product: three times as fast
            rows = dy.flatten(0, 1)
            dbias = (rows.new_ones(1, len(rows)) @ rows)[0]
        return dx, dweight, dbias, None, None


def _parts(x: Tensor, weight: Tensor, kernel: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For every `stride` taps of the kernel: what they see of x (batch, length, channels), a view (batch, features,
    taps * channels), and their rows of the weight."""
    batch, length, channels = x.shape
    features = (length - kernel) // stride + 1
    for number, rows in enumerate(weight.split(stride * channels)):
        size, strides = (batch, features, len(rows)), (x.stride(0), stride * channels, 1)
        yield x.as_strided(size, strides, x.storage_offset() + number * stride * channels), rows


def stretch(features: Tensor, frames: int) -> Tensor:
    """(batch, features, d) -> (batch, frames, d), linear, the first and the last pinned to the first and the last."""
    return interpolate(features.transpose(1, 2), size=frames, mode="linear", align_corners=True).transpose(1, 2)


def _first(counts: list[int], total: int, device: torch.device) -> Tensor:
    return torch.arange(total, device=device) < torch.tensor(counts, device=device)[:, None]


def _has_safetensors(source: str | Path) -> bool | None:
    """True forbids transformers to unpickle. For a hub id transformers decides (old checkpoints have only a pickle,
    which it opens with weights_only)."""
    return True if list(Path(source).glob("*.safetensors")) else None


def _own_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """The names of a Wav2Vec2Model's tensors -> ours. Old releases of torch spell the weight norm of the positional
    convolution weight_g and weight_v."""
    out = {}
    for name, value in state.items():
        name = name.removeprefix("wav2vec2.").removeprefix("encoder.")
        if name.startswith(("feature_extractor.", "feature_projection.", "pos_conv_embed.", "layer_norm.", "layers.")):
            name = name.replace("conv.weight_g", "conv.parametrizations.weight.original0")
            name = name.replace("conv.weight_v", "conv.parametrizations.weight.original1")
            out[name] = value
    return out


def _initialise(module: nn.Module) -> None:
    """As Wav2Vec 2.0: linear N(0, 0.02), convolutions Kaiming."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d) and not nn.utils.parametrize.is_parametrized(module):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            bound = (module.groups / (module.in_channels * module.kernel_size[0])) ** 0.5
            nn.init.uniform_(module.bias, -bound, bound)
