"""Attention in blocks against the same attention over all frames with a mask; packed clips against each by itself."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jambatalk.packing import Packing
from jambatalk.windowed_attention import BLOCK, Window, attend

CLIPS = [
    [1],
    [BLOCK],
    [BLOCK + 1],
    [5, 40, 1, 33],
    [100, 0, 7],
]


def packing(lengths):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Packing.of(valid)


def visible(lengths, back, ahead):
    clip = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(clip))
    offset = index - index[:, None]
    return (clip == clip[:, None]) & (offset <= ahead) & (offset >= -back)


@pytest.mark.parametrize("lengths", CLIPS)
@pytest.mark.parametrize("back, ahead", [(0, 0), (3, 2), (30, 1), (2 * BLOCK + 5, BLOCK + 3)])
def test_it_is_attention_with_a_mask_and_so_are_its_gradients(lengths, back, ahead):
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(1, n, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v, visible(lengths, back, ahead), scale=0.3).transpose(1, 2)
    y, _ = attend(torch.nn.Identity(), q, k, v, Window.of(packing(lengths), 3, back, ahead), scaling=0.3)
    weight = torch.randn_like(y)
    # Scores and weights are float32.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((y * weight).sum(), (q, k, v))
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-6)


def test_dropout_leaves_out_weights_and_so_does_its_gradient():
    """The output is linear in v: its gradient and its value see the same weights."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 70, 4, dtype=torch.float64) for _ in range(2))
    v = torch.eye(70, dtype=torch.float64).expand(1, 2, 70, 70).clone().requires_grad_()
    window = Window.of(packing([50, 20]), 2, 9, 2)
    with torch.random.fork_rng():
        y, _ = attend(torch.nn.Identity(), q, k, v, window, scaling=1.0, dropout=0.25)
    weights = y[0].transpose(0, 1)  # (heads, query, key)
    torch.manual_seed(1)
    whole, _ = attend(torch.nn.Identity(), q, k, v, window, scaling=1.0)
    whole = whole[0].transpose(0, 1)
    seen = visible([50, 20], 9, 2).expand_as(whole)
    assert not weights[~seen].any()
    dropped = weights[seen] == 0
    assert 0.2 < dropped.double().mean() < 0.3  # of 1300: sigma is 0.012
    torch.testing.assert_close(weights[weights != 0], whole[weights != 0] / 0.75, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(weights.sum(), v)  # every column of dv: how much of each key was used
    torch.testing.assert_close(gradient[0, :, :, 0], weights.detach().sum(1), rtol=1e-5, atol=1e-6)


def test_half_precision_scores_are_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = attend(torch.nn.Identity(), q, k, v, Window.of(packing([40]), 2, 8, 8), scaling=0.25)
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float(), visible([40], 8, 8), scale=0.25)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact.transpose(1, 2), rtol=2**-6, atol=2**-6)


def test_packing_is_undone():
    valid = torch.arange(4) < torch.tensor([3, 0, 4])[:, None]
    x = torch.randn(3, 4, 2)
    packed = Packing.of(valid)
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] and packed.clips.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert packed.pack(x).shape == (1, 7, 2)
    assert torch.equal(packed.unpack(packed.pack(x)), x * valid[..., None])
