"""FaceFormer computes what its paper says: a tiny case worked out by hand, torch's own decoder layer, and itself."""

import math

import pytest
import torch
from torch import nn

from jambatalk.baselines.faceformer import BiasedLayer, FaceFormer, FaceFormerConfig
from jambatalk.config import ConfigError
from jambatalk.training import shift

ENCODER = dict(conv_dim=[8] * 7, hidden=16, heads=2, ffn=24, layers=1, pos_conv_kernel=4, pos_conv_groups=2)


def make(**overrides):
    values = dict(vertices=5, d_model=8, heads=2, hidden=12, period=3, subjects=["ann", "bob"], encoder=ENCODER)
    torch.manual_seed(0)
    model = FaceFormer(FaceFormerConfig(**{**values, **overrides})).eval()
    for parameter in model.head.parameters():  # a head that is not zero: feedback must matter
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_two_frames_worked_out_by_hand():
    """d = 2, one head, period 1. Layer norm of two numbers, with e for its epsilon, is (r, -r) with
    r = h / sqrt(h^2 + e), h half their difference; e = 3 keeps r from being a sign."""
    model = make(vertices=1, d_model=2, heads=1, hidden=1, period=1, subjects=[]).double()
    layer = model.layers[0]

    def put(linear, weight, bias):
        linear.weight.copy_(torch.tensor(weight))
        linear.bias.copy_(torch.tensor(bias))

    model.style.weight.copy_(torch.tensor([[3.0, 0.0]]))
    put(model.motion_in, [[2.0, 0, 0], [0, 1.0, 0]], [0.0, 1.0])
    put(model.head, [[1.0, 0], [0, 1.0], [1.0, 1.0]], [0.0, 0.0, 1.0])
    put(layer.qkv, [[0.0, 0], [0, 0], [0, 0], [0, 0], [1, 0], [0, 1]], [0.0] * 6)  # q = k = 0, v = x
    put(layer.out, [[1.0, 0], [0, 1]], [0.0, 0])
    put(layer.audio_value, [[0.0, 1], [1, 0]], [0.0, 1])  # swaps, then adds one to the second
    put(layer.audio_out, [[1.0, 0], [0, 2]], [0.0, 0])
    put(layer.mlp_in, [[0.0, 3]], [1.0])
    put(layer.mlp_out, [[1.0], [0]], [0.0, 0])
    for norm, weight, bias in zip(layer.norms, ([2.0, 1], [1, 1], [1, 4]), ([0.0, 1], [0, 0], [0.5, 0]), strict=True):
        put(norm, weight, bias)
        norm.eps = 3.0
    audio = torch.tensor([[[5.0, 0.0], [1.0, -2.0]]], dtype=torch.float64)

    def r(h):
        return h / math.sqrt(h * h + 3)

    # Frame 0: token (3, 0) + position (sin 0, cos 0) = (3, 1). It sees itself: (6, 2).
    a = (2 * r(2.0), 1 - r(2.0))
    a = (a[0] + 0, a[1] + 2 * (5 + 1))  # audio (5, 0): swapped (0, 5), (0, 6), (0, 12)
    b = r((a[0] - a[1]) / 2)
    c = (b + max(0, 3 * -b + 1), -b)
    d = r((c[0] - c[1]) / 2)
    first = (d + 0.5, -4 * d)
    motion_0 = (first[0], first[1], first[0] + first[1] + 1)
    # Frame 1: token W_m motion_0 + b_m + style; frame 0 is one period away, so its score is -1/256 (one head).
    x = (2 * motion_0[0] + 3, motion_0[1] + 1 + 0 + 1)
    weight = math.exp(-1 / 256) / (1 + math.exp(-1 / 256))
    y = (x[0] + weight * 3 + (1 - weight) * x[0], x[1] + weight * 1 + (1 - weight) * x[1])
    h = r((y[0] - y[1]) / 2)
    a = (2 * h - 2, 1 - h + 2 * (1 + 1))  # audio (1, -2): swapped (-2, 1), (-2, 2), (-2, 4)
    b = r((a[0] - a[1]) / 2)
    c = (b + max(0, 3 * -b + 1), -b)
    d = r((c[0] - c[1]) / 2)
    second = (d + 0.5, -4 * d)
    motion_1 = (second[0], second[1], second[0] + second[1] + 1)

    expected = torch.tensor([[motion_0, motion_1]], dtype=torch.float64)
    made, _ = model.generate(audio, torch.tensor([0]))
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(model.decode(audio, shift(expected), torch.tensor([0])), expected)


def test_the_periodic_bias_by_hand():
    layer = BiasedLayer(8, 4, 8, period=2, dropout=0.0)
    frames = torch.arange(5)
    steps = torch.tensor([[0, 9, 9, 9, 9], [0, 0, 9, 9, 9], [1, 0, 0, 9, 9], [1, 1, 0, 0, 9], [2, 1, 1, 0, 0]])
    for head, slope in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):
        expected = torch.where(steps == 9, -torch.inf, -slope * steps)
        assert torch.equal(layer.bias(frames, frames)[head], expected)


@torch.no_grad()
def test_a_layer_is_torchs_decoder_layer_with_the_papers_masks():
    torch.manual_seed(0)
    ours, frames = BiasedLayer(8, 2, 12, period=3, dropout=0.0), 10
    theirs = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True).eval()
    for pair in (
        (theirs.self_attn.out_proj, ours.out), (theirs.multihead_attn.out_proj, ours.audio_out),
        (theirs.linear1, ours.mlp_in), (theirs.linear2, ours.mlp_out),
        (theirs.norm1, ours.norms[0]), (theirs.norm2, ours.norms[1]), (theirs.norm3, ours.norms[2]),
    ):  # fmt: skip
        pair[0].load_state_dict(pair[1].state_dict())
    theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)
    theirs.self_attn.in_proj_bias.copy_(nn.init.normal_(ours.qkv.bias))
    theirs.multihead_attn.in_proj_weight[16:] = ours.audio_value.weight
    theirs.multihead_attn.in_proj_bias[16:] = nn.init.normal_(ours.audio_value.bias)
    ours, theirs = ours.double(), theirs.double()
    x, audio = torch.randn(2, 2, frames, 8, dtype=torch.float64)
    bias = ours.bias(torch.arange(frames), torch.arange(frames)).repeat(2, 1, 1)
    alignment = ~torch.eye(frames, dtype=torch.bool)
    expected = theirs(x, audio, tgt_mask=bias, memory_mask=alignment)
    torch.testing.assert_close(ours(x, audio), expected)


@pytest.mark.parametrize("options", [{}, {"motion_rank": 4}, {"layers": 3}])
def test_generation_is_the_parallel_pass_on_its_own_output(options):
    model = make(**options).double()
    features, style = torch.randn(2, 11, 8, dtype=torch.float64), torch.tensor([0, 2])
    made, _ = model.generate(features, style)
    again = model.decode(features, shift(made), style)
    torch.testing.assert_close(made, again)
    still = model.decode(features, torch.zeros_like(made), style)
    assert not torch.allclose(still, made, atol=1e-2), "what is fed back matters"
    assert model.generate(features[:, :0], style)[0].shape == (2, 0, model.config.motion_size)


def test_the_gradient_goes_through_the_feedback():
    model = make()
    features = torch.randn(1, 6, 8, requires_grad=True)
    motion = model.head(model.rollout(features, torch.tensor([1])))
    motion[:, 5].square().sum().backward()
    assert (features.grad[0].norm(dim=-1) > 0).all(), "every earlier frame's sound has a part in the last frame"
    assert model.motion_in.weight.grad.norm() > 0


@pytest.mark.parametrize(
    "change, text", [(dict(heads=3), "heads must divide d_model"), (dict(period=None), "period must be a positive")]
)
def test_a_configuration_that_cannot_be(change, text):
    with pytest.raises(ConfigError, match=text):
        make(**change)
