"""The whole model: feedback, style, generation, animation."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from jambatalk.config import JambaTalkConfig
from jambatalk.model import JambaTalk
from jambatalk.talking_face import periodic_encoding
from jambatalk_kernels import rollout

ENCODER = dict(
    context="windowed",
    conv_dim=[8] * 7,
    conv_bias=True,
    conv_norm="layer",
    pre_norm=True,
    hidden=16,
    heads=2,
    ffn=24,
    layers=1,
    pos_conv_kernel=3,
    pos_conv_groups=2,
    attention_back=4,
    attention_ahead=1,
    freeze_front_end=False,
)
FULL = dict(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, layers=1, pos_conv_kernel=4, pos_conv_groups=2)
SMALL = dict(
    vertices=6, d_model=16, heads=4, hidden=12, states=4, attention_window=5, period=4, subjects=["ann", "bob"]
)


def make(encoder=ENCODER, **options):
    torch.manual_seed(0)
    model = JambaTalk(JambaTalkConfig(encoder=encoder, **(SMALL | options)))
    with torch.no_grad():  # a head that is not zero: feedback must matter
        nn.init.normal_(model.head.weight, std=0.3)
        nn.init.normal_(model.head.bias, std=0.3)
        nn.init.normal_(model.motion_in.weight, std=0.5)
        nn.init.normal_(model.style.weight, std=0.5)
    templates = torch.randn(2, 6, 3)
    model.set_head(templates, [[0, 1, 2], [3, 4, 5]], {"lips": np.array([1, 2])}, 0.01)
    return model.eval()


def features_of(model, batch=2, frames=9):
    return torch.randn(batch, frames, model.config.d_model, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [None, 5])
def test_generation_is_teacher_forcing_on_its_own_output(rank):
    model = make(motion_rank=rank)
    features, style = features_of(model), torch.tensor([0, 1])
    motion, state = model.generate(features, style)
    history = torch.cat([torch.zeros_like(motion[:, :1]), motion[:, :-1]], 1)
    forced, _ = model.decode(features, history, style)
    torch.testing.assert_close(motion, forced, rtol=1e-4, atol=1e-4)
    silent, _ = model.decode(features, torch.zeros_like(history), style)
    torch.testing.assert_close(silent[:, 0], forced[:, 0])
    assert (silent[:, 1:] - forced[:, 1:]).abs().amax(-1).min() > 1e-3  # feedback matters in every later frame
    assert state.position.tolist() == [9, 9]


@pytest.mark.parametrize("arrangement", ["moe-moe", "m-moe", "m-m", "moe-m"])
@pytest.mark.parametrize("window", [None, 3])
def test_generation_at_any_split(arrangement, window):
    model = make(arrangement=arrangement, attention_window=window).double()
    features = features_of(model).double()
    whole, _ = model.generate(features, "bob")
    for splits in ([1] * 9, [4, 5], [8, 1]):
        state, pieces, start = None, [], 0
        for size in splits:
            piece, state = model.generate(features[:, start : start + size], "bob", state)
            pieces.append(piece)
            start += size
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arrangement", ["moe-moe", "m-moe", "m-m", "moe-m"])
def test_generation_is_the_parallel_pass_over_its_own_motion_after_600_frames(arrangement):
    model = make(arrangement=arrangement, attention_window=50)
    features = torch.randn(2, 600, 16)
    motion, _ = model.generate(features, "bob")
    history = torch.nn.functional.pad(motion[:, :-1], (0, 0, 1, 0))
    forced, _ = model.decode(features, history, "bob")
    assert (motion - forced).norm() <= 1e-5 * forced.norm()
    unfed, _ = model.decode(features, torch.zeros_like(history), "bob")
    assert (motion - unfed)[:, -100:].norm() > 1e-2 * motion[:, -100:].norm()  # what is fed back matters to the end


def test_generation_of_clips_of_different_length():
    model = make()
    features = features_of(model)
    together, _ = model.generate(features, None, lengths=torch.tensor([9, 4]))
    alone, _ = model.generate(features[1:, :4], None)
    torch.testing.assert_close(together[1, :4], alone[0], rtol=1e-4, atol=1e-5)


def test_a_new_model_is_a_still_face():
    torch.manual_seed(0)
    model = JambaTalk(JambaTalkConfig(encoder=ENCODER, **SMALL)).eval()
    assert (model.generate(features_of(model))[0] == 0).all()


def test_style_matters_and_has_every_spelling():
    model = make()
    features = features_of(model)
    by_id, _ = model.generate(features, torch.tensor([1, 1]))
    for same in (torch.tensor([1]), 1, "bob", model.style.weight[1].expand(2, -1)):
        torch.testing.assert_close(model.generate(features, same)[0], by_id)
    unknown, _ = model.generate(features, None)
    torch.testing.assert_close(model.generate(features, torch.tensor([2, 2]))[0], unknown)
    mean, _ = model.generate(features, "mean")
    torch.testing.assert_close(mean, model.generate(features, model.style.weight[:2].mean(0).expand(2, -1))[0])
    for other in (unknown, mean, model.generate(features, "ann")[0]):
        assert (other - by_id).abs().max() > 1e-3
    with pytest.raises(ValueError, match="carol.*ann, bob"):
        model.generate(features, "carol")


def test_periodic_encoding():
    encoding = periodic_encoding(4, 6)
    assert encoding.shape == (4, 6)
    torch.testing.assert_close(encoding[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    model = make()
    x = model.inputs(torch.zeros(1, 9, 16), "ann")
    torch.testing.assert_close(x[:, :4], x[:, 4:8])
    later = model.inputs(torch.zeros(1, 5, 16), "ann", position=torch.tensor([3]))
    torch.testing.assert_close(later[0, 0], x[0, 3])
    bare = make(period=None).inputs(torch.zeros(1, 9, 16), "ann")
    assert (bare == bare[:, :1]).all() and not (x == x[:, :1]).all()


def test_padding_of_a_batch_changes_nothing():
    model = make()
    samples, sizes = 0.1 * torch.randn(2, 8000), [8000, 5000]
    features = model.encode(samples, torch.tensor(sizes))
    history = torch.randn(2, 15, 18)
    motion, _ = model.decode(features, history, torch.tensor([0, 1]))
    frames = round(5000 / 16000 * 30)
    alone, _ = model.decode(model.encode(samples[1:, :5000]), history[1:, :frames], torch.tensor([1]))
    torch.testing.assert_close(motion[1, :frames], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", [ENCODER, FULL], ids=["windowed", "full"])
@pytest.mark.parametrize("rank", [None, 5])
def test_animate_equals_encode_and_generate(encoder, rank, monkeypatch):
    monkeypatch.setattr("jambatalk.talking_face.CHUNK_FRAMES", 7)
    model = make(encoder, motion_rank=rank)
    samples = 0.1 * torch.randn(16123)
    shares = []
    animation = model.animate(samples.numpy(), subject="bob", progress=shares.append)
    with torch.no_grad():
        motion, _ = model.generate(model.encode(samples[None]), "bob")
    displacement = motion if rank is None else motion @ model.motion_basis.T
    expected = model.templates[1] + displacement[0].view(-1, 6, 3)
    assert animation.vertices.shape == (30, 6, 3) and animation.vertices.dtype == np.float32
    np.testing.assert_allclose(animation.vertices, expected.numpy(), rtol=1e-3, atol=2e-4)
    assert animation.fps == 30 and animation.subject == "bob" and animation.opening_scale == pytest.approx(0.01)
    assert animation.regions["lips"].tolist() == [1, 2] and animation.faces.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert {"read", "encode", "decode", "vertices", "write"} <= set(animation.seconds)
    assert min(animation.seconds[stage] for stage in ("read", "encode", "decode")) > 0
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 5


def test_animate_subjects_rates_and_refusals():
    from jambatalk.audio import AudioError

    model = make()
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    unknown = model.animate(samples)
    np.testing.assert_allclose(unknown.template, model.templates.mean(0).numpy())
    assert unknown.subject == "unknown"
    np.testing.assert_array_equal(model.animate(samples, subject=0).template, model.templates[0].numpy())
    np.testing.assert_array_equal(model.animate(samples, subject="1").template, model.templates[1].numpy())
    assert model.animate(samples, fps="30000/1001").frames == round(Fraction(1, 2) * Fraction(30000, 1001))
    assert model.animate(np.repeat(samples, 3), sampling_rate=48000).frames == 15
    with pytest.raises(ValueError, match="carol"):
        model.animate(samples, subject="carol")
    with pytest.raises(ValueError, match="number of identities"):
        model.animate(samples, subject=7)
    with pytest.raises(AudioError, match="too short"):
        model.animate(samples[:100])


def test_animate_is_deterministic_and_leaves_the_mode_alone():
    model = make(dropout=0.5).train()
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    first, second = model.animate(samples), model.animate(samples)
    assert (first.coefficients == second.coefficients).all()
    assert model.training


def test_animate_with_a_program_and_with_bfloat16_weights():
    model = make()
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    exact = model.animate(samples)
    assert (model.animate(samples, program=model.program()).coefficients == exact.coefficients).all()
    model.weights_dtype = torch.bfloat16
    half = model.animate(samples)
    features = model.encode(torch.from_numpy(samples)[None]).detach()
    hidden, _ = rollout(model.program(), model.inputs(features, None).detach(), weights_dtype=torch.bfloat16)
    rounded = hidden if model.motion_basis is None else model.head(hidden)
    np.testing.assert_allclose(half.coefficients, rounded[0].detach().numpy(), rtol=1e-5, atol=1e-5)
    assert not np.allclose(half.coefficients, exact.coefficients, rtol=1e-5, atol=1e-5)


def test_state_and_result_per_frame_do_not_grow():
    model = make()
    _, short = model.generate(features_of(model, frames=6))
    _, long = model.generate(features_of(model, frames=600))
    assert [t.shape for t in short.tensors()] == [t.shape for t in long.tensors()]


@pytest.mark.slow
def test_cost_per_frame_does_not_grow():
    """6000 frames in ten stretches: the later ones take no longer than the earlier ones."""
    import time

    torch.manual_seed(0)
    model = JambaTalk(JambaTalkConfig.from_preset("demo")).eval()
    program, state, seconds = model.program(), None, []
    model.roll(torch.randn(1, 30, 128), None, program=program)
    for _ in range(10):
        features = torch.randn(1, 600, 128)
        start = time.process_time()  # of this process: the loop runs on one thread, and the machine may be busy
        _, state = model.roll(features, None, state, program=program)
        seconds.append(time.process_time() - start)
    assert min(seconds[5:]) <= 1.1 * min(seconds[:5]), seconds
