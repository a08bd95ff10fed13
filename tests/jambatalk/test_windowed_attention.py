"""Attention in blocks against the same attention over all frames with a mask; packed clips against each by itself."""

import pytest
import torch
from accuracy import ORACLE, assert_accurate, rms_ratio
from torch.nn.functional import scaled_dot_product_attention

from jambatalk.packing import Packing
from jambatalk.windowed_attention import BLOCK, Window, attend

BARS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # the contract's (DESIGN 3.2)
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


def results(function, tensors, weight):
    """y (1, n, heads, d) and the gradients of q, k and v, each (1, heads, n, d)."""
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, weight.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", CLIPS)
@pytest.mark.parametrize("back, ahead", [(0, 0), (3, 2), (30, 1), (2 * BLOCK + 5, BLOCK + 3)])
def test_it_is_attention_with_a_mask_and_so_are_its_gradients(lengths, back, ahead, dtype):
    """float64: but for rounding. Else by the rule of accuracy: at most twice the error of PyTorch's attention."""
    torch.manual_seed(0)
    n = sum(lengths)
    tensors = [torch.randn(1, n, 3, 8).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    weight = torch.randn(1, n, 3, 8).to(dtype)
    window, seen = Window.of(packing(lengths), 3, back, ahead), visible(lengths, back, ahead)

    def ours(q, k, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return attend(torch.nn.Identity(), q, k, v, window, scaling=0.3)[0]

    def pytorchs(q, k, v):
        return scaled_dot_product_attention(q, k, v, seen, scale=0.3).transpose(1, 2)

    got, peer = results(ours, tensors, weight), results(pytorchs, tensors, weight)
    exact = results(pytorchs, [x.detach().double().requires_grad_() for x in tensors], weight)
    for name, mine, truth, theirs in zip(("y", "dq", "dk", "dv"), got, exact, peer, strict=True):
        assert mine.dtype == dtype
        if name in ("dq", "dk") and seen.sum() == n:  # each sees itself alone: no score matters
            assert not mine.any()
        elif dtype == torch.float64:
            assert rms_ratio(mine, truth) <= ORACLE, name
        else:
            assert_accurate(mine, truth, theirs, BARS[dtype], name)


def test_dropout_leaves_out_weights_and_so_does_its_gradient():
    """The output is linear in v: its gradient and its value see the same weights."""
    torch.manual_seed(0)
    p, eps = 0.25, torch.finfo(torch.float64).eps
    q, k = (torch.randn(1, 2, 70, 4, dtype=torch.float64) for _ in range(2))
    v = torch.eye(70, dtype=torch.float64).expand(1, 2, 70, 70).clone().requires_grad_()
    window = Window.of(packing([50, 20]), 2, 9, 2)
    y, _ = attend(torch.nn.Identity(), q, k, v, window, scaling=1.0, dropout=p)
    weights = y[0].transpose(0, 1)  # (heads, query, key)
    whole, _ = attend(torch.nn.Identity(), q, k, v, window, scaling=1.0)
    whole = whole[0].transpose(0, 1)
    seen = visible([50, 20], 9, 2).expand_as(whole)
    assert not weights[~seen].any()
    dropped = (weights[seen] == 0).double()
    # Four standard deviations of a share of so many: one seed in 16000 would miss it.
    assert abs(dropped.mean() - p) < 4 * (p * (1 - p) / len(dropped)) ** 0.5
    # Three roundings: of 1 / (1 - p), of the product with it, of the quotient here.
    kept = weights != 0
    torch.testing.assert_close(weights[kept], whole[kept] / (1 - p), rtol=1.5 * eps, atol=0)
    (gradient,) = torch.autograd.grad(weights.sum(), v)  # every column of dv: how much of each key was used
    # Sums of the same positive numbers, at most 12 queries that see a key, in two orders: 11 roundings each.
    torch.testing.assert_close(gradient[0, :, :, 0], weights.detach().sum(1), rtol=11 * eps, atol=0)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_of_all_weights_leaves_nothing(p):
    x = torch.ones(1, 2, 9, 4)
    y, _ = attend(torch.nn.Identity(), x, x, x, Window.of(packing([9]), 2, 3, 1), scaling=1.0, dropout=p)
    assert bool(y.any()) == (p < 1)


def test_packing_is_undone():
    valid = torch.arange(4) < torch.tensor([3, 0, 4])[:, None]
    x = torch.randn(3, 4, 2)
    packed = Packing.of(valid)
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] and packed.clips.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert packed.pack(x).shape == (1, 7, 2)
    assert torch.equal(packed.unpack(packed.pack(x)), x * valid[..., None])
