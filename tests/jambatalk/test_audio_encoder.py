"""The encoder: what a frame may depend on, alignment in time, padding, chunks, and pretrained weights."""

import copy
from fractions import Fraction

import pytest
import torch

from jambatalk.audio_encoder import AudioEncoder, EncoderError, stretch, wav2vec2_architecture, wav2vec2_config
from jambatalk.config import AudioEncoderConfig
from jambatalk_kernels.dropout import Dropout

SIZES = dict(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, pos_conv_groups=2, layers=2)
BASE = dict(SIZES, pos_conv_kernel=6)
LARGE = dict(SIZES, conv_bias=True, conv_norm="layer", pre_norm=True, pos_conv_kernel=6)
WINDOWED = dict(
    SIZES,
    context="windowed",
    conv_bias=True,
    conv_norm="layer",
    pre_norm=True,
    pos_conv_kernel=5,
    attention_back=4,
    attention_ahead=1,
    input_gain=3.0,
    freeze_front_end=False,
)


def make(fps=30, **options):
    torch.manual_seed(0)
    encoder = AudioEncoder(AudioEncoderConfig(**options), fps).eval()
    with torch.no_grad():  # away from the small initial values, so that everything has an effect that can be seen
        for name, parameter in encoder.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4 if "layers" in name else 1)
    return encoder


def noise(*shape):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [BASE, LARGE, WINDOWED], ids=["base", "large", "windowed"])
@pytest.mark.parametrize("fps", [30, 25, Fraction(30000, 1001)])
@pytest.mark.parametrize("samples", [300, 5000, 16123])
def test_frames_are_the_rounded_duration(options, fps, samples):
    frames = round(Fraction(samples, 16000) * Fraction(fps))
    out = make(fps, **options)(noise(1, samples))
    assert out.shape == (1, frames, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("options", [BASE, LARGE, WINDOWED], ids=["base", "large", "windowed"])
def test_a_clip_does_not_depend_on_its_padding_or_its_neighbours(options):
    encoder = make(**options)
    sizes = [16000, 7013, 400, 12000]
    batch = noise(4, 16000)  # what lies beyond a clip's end is loud
    together = encoder(batch, torch.tensor(sizes))
    for row, size in enumerate(sizes):
        alone = encoder(batch[row : row + 1, :size])
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=2e-5)
        assert (together[row, alone.shape[1] :] == 0).all()


@pytest.mark.parametrize("fps", [30, 25])
def test_a_windowed_frame_depends_on_nothing_beyond_the_lookahead(fps):
    encoder = make(fps, **WINDOWED)
    ahead = encoder.config.lookahead_samples(Fraction(fps))
    samples = noise(1, 24000)
    before = encoder(samples)
    for frame in (0, 5, 10, 11, 12):
        limit = Fraction(frame * 16000, fps) + ahead
        loud = samples.clone()
        loud[:, int(limit) + 1 :] += 1.0
        after = encoder(loud)
        assert torch.equal(after[:, : frame + 1], before[:, : frame + 1])
        assert not torch.allclose(after, before)  # and what lies beyond the limit does reach later frames


def test_the_lookahead_is_no_larger_than_it_must_be():
    encoder = make(30, **WINDOWED)
    ahead = encoder.config.lookahead_samples(Fraction(30))
    samples = noise(1, 24000)
    before = encoder(samples)
    reached = []
    for frame in (12, 13, 14):  # one of the three phases of the 5 : 3 grid looks furthest
        loud = samples.clone()
        loud[:, int(Fraction(frame * 16000, 30) + ahead)] += 50.0
        reached.append(not torch.equal(encoder(loud)[:, frame], before[:, frame]))
    assert any(reached)


def test_a_windowed_frame_depends_on_bounded_audio_before_it():
    encoder = make(30, **WINDOWED)
    samples = noise(1, 40000)
    frame = 70
    first = int(Fraction((frame - encoder.config.frames_back) * 16000, 30)) - 720
    changed = samples.clone()
    changed[:, :first] = 0.5
    torch.testing.assert_close(encoder(changed)[:, frame:], encoder(samples)[:, frame:], rtol=0, atol=0)
    assert not torch.allclose(encoder(changed)[:, :20], encoder(samples)[:, :20])


def test_windowed_features_are_aligned_in_time():
    """A click is seen by the frame at its moment, at every phase of the grid: the front end alone, no transformer."""
    encoder = make(30, **WINDOWED)
    for frame in (6, 7, 8, 30):
        click = torch.zeros(24000)
        at = round(frame * 16000 / 30)
        click[at - 20 : at + 20] = 1.0
        silent, seen = (encoder.resampled([(clip, 0, 45)])[0] for clip in (torch.zeros(24000), click))
        change = (seen - silent).norm(dim=-1)
        centre = (change * torch.arange(45)).sum() / change.sum()
        assert abs(centre.item() - frame) < 0.5
        assert change[[t for t in range(45) if abs(t - frame) > 1]].max() == 0


@pytest.mark.parametrize("fps", [30, 25])
def test_windowed_chunks_equal_the_whole(fps, monkeypatch):
    monkeypatch.setattr("jambatalk.audio_encoder.CHUNK_FRAMES", 7)
    monkeypatch.setattr("jambatalk.audio_encoder.CONVOLVED_FRAMES", 4)
    encoder = make(fps, **WINDOWED)
    samples = noise(2, 30011)
    lengths = torch.tensor([30011, 21000])
    with torch.enable_grad():
        whole = encoder(samples, lengths)  # with gradients: never in chunks
    with torch.no_grad():
        chunked = encoder(samples, lengths)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    pieces = [piece for _, piece in encoder.chunks(samples[0], whole.shape[1], 10)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:1], rtol=1e-4, atol=1e-5)


def test_windowed_chunks_see_only_a_bounded_piece(monkeypatch):
    encoder = make(30, **WINDOWED)
    seen = []
    convolve = encoder.convolve
    monkeypatch.setattr(encoder, "convolve", lambda x: (seen.append(x.shape[1]), convolve(x))[1])
    list(encoder.chunks(noise(1, 53334)[0], 100, 20))
    assert len(seen) == 5
    assert max(seen) <= (20 + encoder.config.frames_ahead) * 16000 / 30 + 1200
    assert sum(seen) <= 53334 + 5 * 1200  # what the chunk before has seen is not convolved again


def test_full_context_sees_everything():
    encoder = make(**BASE)
    samples = noise(1, 16000)
    changed = samples.clone()
    changed[:, -200:] += 0.5
    assert (encoder(changed) - encoder(samples)).abs().amax(-1).min() > 0


def test_stretch_pins_both_ends():
    x = torch.arange(5.0)[None, :, None]
    torch.testing.assert_close(stretch(x, 3)[0, :, 0], torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(stretch(x, 1)[0, :, 0], torch.tensor([0.0]))


def test_silence_is_finite():
    for options in (BASE, LARGE, WINDOWED):
        assert make(**options)(torch.zeros(1, 8000)).isfinite().all()


def test_the_front_end_is_frozen_in_paper_mode_and_trained_in_the_demo():
    for options, trained in ((BASE, False), (WINDOWED, True)):
        encoder = make(**options).train()
        encoder(noise(1, 4000)).square().sum().backward()
        front = list(encoder.feature_extractor.parameters())
        assert all((p.grad is not None) == trained for p in front)
        assert all(p.grad is not None for p in encoder.layers.parameters())


@pytest.mark.parametrize("samples", [400, 401, 4999, 8000, 8161])
def test_convolutions_with_gradients_are_those_without(samples):
    # 8 channels would not do: in some frame they are so alike that the norm makes their rounding the whole error.
    encoder = make(**{**WINDOWED, "conv_dim": (32,) * 7})
    x = noise(2, samples).requires_grad_()
    y = encoder.convolve(x)
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), [x, *encoder.feature_extractor.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(encoder.convolve(x), y, rtol=1e-5, atol=1e-5)

    def layer_by_layer(encoder, x):
        y = x[:, None]
        for layer in encoder.feature_extractor.conv_layers:
            y = layer(y)
        return torch.autograd.grad((y.mT * weight.to(x)).sum(), [x, *encoder.feature_extractor.parameters()])

    exact = layer_by_layer(copy.deepcopy(encoder).double(), x.detach().double().requires_grad_())

    def error(gradients):  # over all of them: one alone may have as few as 32 numbers
        return sum(((mine - truth).norm() / truth.norm()) ** 2 for mine, truth in zip(gradients, exact, strict=True))

    assert error(gradients) <= 4 * error(layer_by_layer(encoder, x))  # twice, in the root


@pytest.mark.parametrize("options", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("old_names", [False, True])
def test_a_pretrained_checkpoint_loads_from_a_folder(options, old_names, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Wav2Vec2ForCTC

    config = AudioEncoderConfig(**options)
    torch.manual_seed(3)
    Wav2Vec2ForCTC(wav2vec2_config(config)).save_pretrained(tmp_path)
    if old_names:  # as checkpoints of older torch spell weight norm
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        renamed = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): value
            for name, value in tensors.items()
        }
        assert any("weight_g" in name for name in renamed)
        save_file(renamed, path, metadata={"format": "pt"})
    assert AudioEncoderConfig(**wav2vec2_architecture(tmp_path)) == config
    encoder = make(**options)
    before = encoder(noise(1, 4000))
    encoder.load_wav2vec2(tmp_path)
    reference = Wav2Vec2ForCTC.from_pretrained(tmp_path).wav2vec2.encoder.pos_conv_embed.conv.weight
    torch.testing.assert_close(encoder.pos_conv_embed.conv.weight, reference)
    assert not torch.allclose(encoder(noise(1, 4000)), before)


def test_a_checkpoint_that_does_not_fit_is_one_clear_line(tmp_path):
    from transformers import BertConfig, Wav2Vec2Model

    with pytest.raises(EncoderError, match="nowhere"):
        make(**BASE).load_wav2vec2(tmp_path / "nowhere")
    Wav2Vec2Model(wav2vec2_config(AudioEncoderConfig(**BASE))).save_pretrained(tmp_path / "w")
    with pytest.raises(EncoderError, match="layers is 2, not 1"):
        make(**dict(BASE, layers=1)).load_wav2vec2(tmp_path / "w")
    (tmp_path / "w" / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot be loaded") as caught:
        make(**BASE).load_wav2vec2(tmp_path / "w")
    assert "\n" not in str(caught.value)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(EncoderError, match="bert"):
        make(**BASE).load_wav2vec2(tmp_path / "bert")


def test_an_encoders_dropouts_are_ours():
    kinds = {type(part) for part in make(**WINDOWED).modules()}
    assert Dropout in kinds and torch.nn.Dropout not in kinds
