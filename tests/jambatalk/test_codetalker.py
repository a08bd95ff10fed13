"""CodeTalker: the quantiser and its losses by hand, what is frozen when, and a loop that is its own parallel pass."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_baselines import tiny_config
from test_training import make_corpus, options
from torch import nn

from jambatalk.baselines.codetalker import (
    ClipTransformer,
    CodeTalker,
    CodeTalkerConfig,
    mean_square,
    straight_through,
)
from jambatalk.config import ConfigError
from jambatalk.data.vocaset import Corpus
from jambatalk.training import Trainer

ENCODER = dict(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, layers=1, pos_conv_kernel=4, pos_conv_groups=2)
TINY = dict(
    vertices=5, d_model=8, heads=2, hidden=12, layers=2, period=3, subjects=["ann", "bob"], encoder=ENCODER,
    codes=16, code_size=3, components=2, prior_width=12, prior_heads=2, prior_hidden=16, prior_layers=2,
)  # fmt: skip


def make(**overrides):
    torch.manual_seed(0)
    model = CodeTalker(CodeTalkerConfig(**{**TINY, **overrides})).eval()
    nn.init.normal_(model.codebook)
    nn.init.normal_(model.head.weight, std=1e-3 if model.config.motion_rank is None else 0.3)
    return model


@pytest.fixture
def corpus(tmp_path):
    return Corpus(make_corpus(tmp_path / "corpus"))


def by_hand():
    """Two codes, (0, 0) and (3, 4), and two latents: (1, 1) is nearer to the first, (2, 3) to the second."""
    model = make(codes=2, code_size=2, components=1)
    model.codebook.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    latents = torch.tensor([[[[1.0, 1.0]], [[2.0, 3.0]], [[9.0, 9.0]]]], requires_grad=True)  # the last is padding
    lesson = SimpleNamespace(
        batch=SimpleNamespace(valid=torch.tensor([[True, True, False]])), counts=torch.tensor([2.0]), across=None
    )
    return model, latents, lesson


def test_the_nearest_code_by_hand():
    model, latents, _ = by_hand()
    numbers, codes = model.quantise(latents)
    assert numbers.tolist() == [[[0], [1], [1]]]
    assert codes.tolist() == [[[[0.0, 0.0]], [[3.0, 4.0]], [[3.0, 4.0]]]]
    many, points = torch.randn(40, 3, dtype=torch.float64), torch.randn(500, 3, dtype=torch.float64)
    model.codebook.data = many.float()
    nearest = torch.cdist(points, many).argmin(-1)
    assert torch.equal(model.quantise(points)[0], nearest)


def test_the_gradient_goes_straight_through_to_the_latents():
    model, latents, _ = by_hand()
    _, codes = model.quantise(latents)
    passed = straight_through(latents, codes)
    assert torch.equal(passed, codes)  # small whole numbers: nothing is rounded
    weights = torch.tensor([[[[1.0, -2.0]], [[0.5, 3.0]], [[0.0, 7.0]]]])
    (passed * weights).sum().backward()
    assert torch.equal(latents.grad, weights)
    assert model.codebook.grad is None


def test_the_losses_of_the_codes_by_hand():
    """Squares: 1 + 1 of the first frame, 1 + 1 of the second; each frame's mean over C = 2 is 1."""
    model, latents, lesson = by_hand()
    numbers, codes = model.quantise(latents)
    codebook = mean_square(codes - latents.detach(), lesson)
    assert codebook.item() == 1.0
    codebook.backward()
    # d/dc of (1/2 frames) (1/2 numbers) sum (c - z)^2: (c - z) / 2
    assert model.codebook.grad.tolist() == [[-0.5, -0.5], [0.5, 0.5]] and latents.grad is None
    mean_square(latents - codes.detach(), lesson).backward()
    assert latents.grad.tolist() == [[[[0.5, 0.5]], [[-0.5, -0.5]], [[0.0, 0.0]]]]
    assert model._perplexity(numbers, lesson).item() == pytest.approx(2.0), "both codes, equally often"
    lesson.batch.valid[0, 1] = False
    assert model._perplexity(numbers, lesson).item() == pytest.approx(1.0), "one code alone"


def test_the_codes_begin_as_latents_of_the_first_batch(corpus, tmp_path):
    trainer = Trainer(tiny_config("codetalker", codes=5), options(warmup=1000), corpus, tmp_path / "run", device="cpu")
    batch, model = trainer.draw(0), trainer.model
    with torch.no_grad():
        latents = model.latents(batch.motion, batch.valid.sum(1))[batch.valid].flatten(0, 1)
    assert not model.codebook.any()
    trainer.losses(batch)
    # 1e-6: the batch is the same, so only the rounding of its products may differ
    assert ((model.codebook[:, None] - latents).abs().amax(-1).amin(-1) < 1e-6).all()
    before = model.codebook.clone()
    trainer.losses(trainer.draw(1))
    assert torch.equal(model.codebook, before), "only once"


def test_a_stage_trains_its_own_weights_and_no_others(corpus, tmp_path):
    o = options(steps=6, warmup=2, ema=0.5)
    trainer = Trainer(tiny_config("codetalker", prior_share=0.5), o, corpus, tmp_path / "run", device="cpu")
    assert trainer.stage_starts == [0, 3]
    model, rates = trainer.model, []

    def changed():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        rates.append(trainer.learning_rate(trainer.step))
        values = trainer.train_step()
        return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}, values

    prior = {"prior_encoder", "latent", "codebook", "prior_decoder", "head"}
    speech = {"encoder", "audio_projection", "motion_in", "style", "layers", "code_out"}
    for step in range(6):
        if step == 3:
            stale = trainer.average.module.codebook.clone()
            assert not torch.equal(stale, model.codebook), "the average lags behind"
        moved, values = changed()
        assert moved == (prior if step < 3 else speech)
        assert {"vertex", "perplexity"} <= set(values) and 1 <= values["perplexity"] <= model.config.codes
        assert ("codebook" in values and "commitment" in values) == (step < 3) and ("features" in values) == (step >= 3)
        if step == 3:
            assert torch.equal(trainer.average.module.codebook, model.codebook), "stage 2 has the codes that it learns"
    assert rates[:3] == rates[3:], "the schedule begins anew"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"motion_rank": 4}])
def test_generation_is_the_parallel_pass_on_what_it_was_fed_with(changes):
    model = make(**changes).double()
    features, style = torch.randn(2, 11, 8, dtype=torch.float64), torch.tensor([0, 2])
    made, _ = model.generate(features, style)
    codes, history = model.rollout(features, style)
    numbers = model.quantise(codes)[0]
    assert len(numbers.unique()) > 4, "codes that say nothing would prove nothing"
    assert torch.equal(model.quantise(model.predict(features, history, style))[0], numbers)
    torch.testing.assert_close(model.decode(features, history, style), made)
    still = model.quantise(model.predict(features, torch.zeros_like(history), style))[0]
    assert not torch.equal(still, numbers), "what is fed back matters"
    for t in (1, 5):  # each frame is fed with the last motion of the clip so far
        torch.testing.assert_close(model.generate(features[:, :t], style)[0][:, -1], history[:, t])
    assert torch.equal(model.generate(features, style)[0], made), "nothing is drawn"
    assert model.generate(features[:, :0], style)[0].shape == (2, 0, model.config.motion_size)


@torch.no_grad()
def test_a_clip_transformer_does_not_see_the_padding():
    torch.manual_seed(0)
    part = ClipTransformer(3, 8, 2, 12, 2, period=4).double().eval()
    x, lengths = torch.randn(3, 9, 3, dtype=torch.float64), torch.tensor([9, 5, 1])
    together = part(x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row, :length], part(x[row : row + 1, :length])[0])
    x[1, 4] += 1
    moved = (part(x, lengths) - together).abs().amax(-1)
    assert (moved[1, :5] > 1e-4).all() and moved[0].max() == 0, "every frame of a clip sees every other"


def test_the_codes_of_a_clip_are_learnt(corpus, tmp_path):
    """Stage 1 alone takes the error of a clip's motion below 5 % of a still face's, with more codes than one."""
    o = options(steps=200, batch=1, overfit_one_batch=True, learning_rate=3e-3, phone_weight=0.0, closure_weight=1.0)
    config = tiny_config("codetalker", prior_share=0.999)
    trainer = Trainer(config, o, corpus, tmp_path / "run", device="cpu")
    values = [trainer.train_step() for _ in range(150)]
    assert values[-1]["vertex"] < 0.05 * values[0]["vertex"] and math.isfinite(values[-1]["gradient"])
    assert values[-1]["perplexity"] > 2


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(heads=3), "heads must divide d_model"),
        (dict(prior_heads=5), "prior_heads must divide prior_width"),
        (dict(codes=0), "codes must be a positive"),
        (dict(period=None), "period must be a positive"),
        (dict(prior_share=1.0), "prior_share must lie between 0 and 1"),
    ],
)
def test_a_configuration_that_cannot_be(change, text):
    with pytest.raises(ConfigError, match=text):
        make(**change)
