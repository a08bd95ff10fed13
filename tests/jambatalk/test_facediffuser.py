"""FaceDiffuser computes what its paper says: a tiny case and the schedule by hand, and sampling that repeats."""

import math

import pytest
import torch
from torch import nn

from jambatalk.baselines.facediffuser import FaceDiffuser, FaceDiffuserConfig, cosine_schedule, posterior, step_encoding
from jambatalk.config import ConfigError

ENCODER = dict(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, layers=1, pos_conv_kernel=4, pos_conv_groups=2)


def make(**overrides):
    values = dict(vertices=2, d_model=8, hidden=12, noise=1.0, diffusion_steps=10, subjects=["ann", "bob"],
                  encoder=ENCODER)  # fmt: skip
    torch.manual_seed(0)
    model = FaceDiffuser(FaceDiffuserConfig(**{**values, **overrides})).eval()
    nn.init.normal_(model.head.weight, std=0.3)
    nn.init.normal_(model.style.weight)
    return model


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gru(x, h, weights):
    """One number in, one number kept: the gates r, z, n, each with (input weight, state weight, bias)."""
    (ri, rh, rb), (zi, zh, zb), (ni, nh, nb) = weights
    r = sigmoid(sum(w * v for w, v in zip(ri, x, strict=True)) + rh * h + rb)
    z = sigmoid(sum(w * v for w, v in zip(zi, x, strict=True)) + zh * h + zb)
    n = math.tanh(sum(w * v for w, v in zip(ni, x, strict=True)) + r * nh * h + nb)
    return (1 - z) * n + z * h


@torch.no_grad()
def test_two_frames_worked_out_by_hand():
    """One number for the audio, one for the noised motion, one in each layer of the GRU."""
    model = make(vertices=1, d_model=1, hidden=1, noise=0.5, subjects=["ann"]).double()
    for parameter in model.parameters():
        parameter.zero_()
    model.motion_in.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    model.motion_in.bias.fill_(0.25)
    model.step_in.weight[0, 0], model.step_in.weight[0, 32] = 1.0, 2.0  # sin t and cos t
    model.step_out.weight.fill_(3.0)
    model.step_out.bias.fill_(-1.0)
    first = [((0.5, -1.0), 0.3, 0.1), ((1.0, 0.2), -0.4, 0.0), ((-0.7, 0.6), 0.8, 0.2)]
    second = [((0.9,), 0.1, -0.2), ((-0.5,), 0.6, 0.3), ((1.1,), -0.3, 0.0)]
    for layer, weights in enumerate((first, second)):
        getattr(model.gru, f"weight_ih_l{layer}").copy_(torch.tensor([w[0] for w in weights]))
        getattr(model.gru, f"weight_hh_l{layer}").copy_(torch.tensor([[w[1]] for w in weights]))
        getattr(model.gru, f"bias_ih_l{layer}").copy_(torch.tensor([w[2] for w in weights]))
    model.style.weight.copy_(torch.tensor([[-2.0], [5.0]]))
    model.head.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
    model.head.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))

    t = 3
    step = math.sin(t) + 2 * math.cos(t)
    step = 3 * step * sigmoid(step) - 1
    noised = [(0.5, 0.25, -1.0), (0.0, 0.75, 0.5)]  # twice as much in units of the noise
    seen = [1 * 2 * a - 2 * 2 * b + 0.5 * 2 * c + 0.25 + step for a, b, c in noised]
    h1 = h2 = 0.0
    expected = []
    for audio, x in zip((1.0, -0.5), seen, strict=True):
        h1 = gru((audio, x), h1, first)
        h2 = gru((h1,), h2, second)
        expected.append([-2 * h2, 2 * -2 * h2 + 0.5, 2 * h2 + 1])
    features, noised = (torch.tensor([x], dtype=torch.float64) for x in ([[1.0], [-0.5]], noised))
    hidden = model.denoise(features, noised, torch.tensor([t]), torch.tensor([0]))
    expected = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(model.head(hidden), expected)


def test_the_schedule_and_the_posterior_by_hand():
    a = cosine_schedule(2)
    first = (math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    torch.testing.assert_close(a, torch.tensor([1, first, first * 0.001], dtype=torch.float64))  # beta at most 0.999
    long = cosine_schedule(500)
    assert (long.diff() < 0).all() and long[-1] < 1e-6 and abs(float(long[250]) - 0.5) < 0.02
    clean, noised, spread = posterior(float(a[2]), float(a[1]))
    beta = 0.999
    assert clean == pytest.approx(math.sqrt(first) * beta / (1 - float(a[2])))
    assert noised == pytest.approx(math.sqrt(0.001) * (1 - first) / (1 - float(a[2])))
    assert spread**2 == pytest.approx(beta * (1 - first) / (1 - float(a[2])))
    # With x_t made of motion and noise, the earlier step has the variance that the schedule gives it.
    assert (noised**2) * (1 - float(a[2])) + spread**2 == pytest.approx(1 - first)
    assert clean + noised * math.sqrt(float(a[2])) == pytest.approx(math.sqrt(first))
    assert step_encoding(torch.tensor([3]))[0, [0, 32]].tolist() == pytest.approx([math.sin(3), math.cos(3)])


@torch.no_grad()
@pytest.mark.parametrize("sampling, times", [(None, list(range(10, 0, -1))), (4, [10, 8, 5, 3])])
def test_generation_is_denoising_of_its_own_samples(sampling, times):
    """The chain by hand, each step fed with what the one before left."""
    model = make(sampling_steps=sampling).double()
    features, style = torch.randn(1, 7, 8, dtype=torch.float64), torch.tensor([1])
    assert model.sampled_steps() == times
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, generator=generator)[None].double()
    for t, before in zip(times, [*times[1:], 0], strict=True):
        motion = model.head(model.denoise(features, x, torch.tensor([t]), style))
        a, earlier = model.signal[t].item(), model.signal[before].item()
        if before:
            kept = a / earlier
            mean = (earlier**0.5 * (1 - kept) * motion + kept**0.5 * (1 - earlier) * x) / (1 - a)
            noise = torch.randn(7, 6, generator=generator)[None]
            x = mean + ((1 - earlier) / (1 - a) * (1 - kept)) ** 0.5 * noise
    made, _ = model.generate(features, style)
    torch.testing.assert_close(made, motion)


def test_the_same_seed_is_the_same_motion():
    model = make()
    features = torch.randn(1, 7, 8)
    first = model.generate(features)[0]
    torch.manual_seed(1)
    assert torch.equal(model.generate(features)[0], first)
    model.seed = 1
    assert not torch.allclose(model.generate(features)[0], first, atol=1e-3)
    assert model.generate(features[:, :0])[0].shape == (1, 0, 6)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(sampling_steps=11), "sampling_steps must be at most diffusion_steps, got 11 and 10"),
        (dict(noise=0), "noise must be positive"),
        (dict(diffusion_steps=0), "diffusion_steps must be a positive"),
    ],
)
def test_a_configuration_that_cannot_be(change, text):
    with pytest.raises(ConfigError, match=text):
        make(**change)
