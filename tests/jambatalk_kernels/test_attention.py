"""Rotary attention against a naive definition: masks, windows, packing, caches, gradients, memory."""

from itertools import pairwise

import pytest
import torch

from jambatalk_kernels import mean_pool_heads, native_library, use_backend
from jambatalk_kernels.attention import reference
from jambatalk_kernels.attention.op import KVCache, rope_attention, rope_attention_step
from jambatalk_kernels.attention.reference import rotary_table


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request):
    """Every test runs on both."""
    if request.param == "cpu" and not native_library()[0]:
        pytest.skip(f"no native library: {native_library()[1]}")
    with use_backend(request.param):
        yield request.param


def make(batch=2, length=11, heads=4, kv_heads=2, head_dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads, head_dim, generator=generator, dtype=dtype)
    k, v = (torch.randn(batch, length, kv_heads, head_dim, generator=generator, dtype=dtype) for _ in range(2))
    cos, sin = rotary_table(torch.arange(length), head_dim, dtype=dtype)
    return q, k, v, cos, sin


def naive(q, k, v, cos, sin, causal=True, window=None, scale=None, interleaved=False):
    """One score at a time, no tricks."""
    batch, length, heads, head_dim = q.shape
    half = head_dim // 2

    def turn(x, t, head):
        c, s = (table[t] if table.dim() == 2 else table[t, head] for table in (cos, sin))
        out = torch.empty_like(x)
        for f in range(half):
            i, j = (2 * f, 2 * f + 1) if interleaved else (f, f + half)
            out[i], out[j] = x[i] * c[f] - x[j] * s[f], x[i] * s[f] + x[j] * c[f]
        return out

    y = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(length):
                seen = [j for j in range(length) if (j <= i or not causal) and (window is None or j > i - window)]
                scores = torch.stack([turn(q[b, i, h], i, g) @ turn(k[b, j, g], j, g) for j in seen])
                p = (scores * (head_dim**-0.5 if scale is None else scale)).softmax(0)
                y[b, i, h] = p @ v[b, seen, g]
    return y


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=False),
        dict(window=1),
        dict(window=3),
        dict(window=50),
        dict(interleaved=True),
        dict(scale=0.7),
        dict(window=4, interleaved=True),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_naive_definition(options, kv_heads, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 4)  # several blocks in a short clip
    arguments = make(kv_heads=kv_heads, batch=1)
    torch.testing.assert_close(rope_attention(*arguments, **options), naive(*arguments, **options))


def test_angles_per_head():
    q, k, v, cos, sin = make(batch=1, length=7)
    angle = torch.randn(7, 2, 3, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    torch.testing.assert_close(rope_attention(q, k, v, cos, sin, window=3), naive(q, k, v, cos, sin, window=3))


def test_only_the_distance_matters():
    q, k, v, _, _ = make()
    near = rope_attention(q, k, v, *rotary_table(torch.arange(11), 6, dtype=torch.float64))
    far = rope_attention(q, k, v, *rotary_table(torch.arange(11) + 10_000_000, 6, dtype=torch.float64))
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [dict(), dict(window=3), dict(causal=False), dict(cu_seqlens=True, window=2)])
def test_gradients_tables_included(options, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    inputs = [t.requires_grad_() for t in make(batch=1, length=5, heads=2, kv_heads=1, head_dim=4)]
    if "cu_seqlens" in options:
        options = options | dict(cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    assert torch.autograd.gradcheck(lambda *a: rope_attention(*a, **options), inputs)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_see_each_other(window, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 4)
    q, k, v, cos, sin = make(batch=1, length=13)
    bounds = [0, 5, 5, 12, 13]  # one of them is empty
    packed = rope_attention(q, k, v, cos, sin, window=window, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for a, b in pairwise(bounds):
        if a < b:
            alone = rope_attention(*(t[:, a:b] for t in (q, k, v)), cos[a:b], sin[a:b], window=window)
            torch.testing.assert_close(packed[:, a:b], alone)


@pytest.mark.parametrize("window, capacity", [(None, 11), (None, 20), (3, 3), (3, 4), (5, 5), (1, 1), (40, 40)])
@pytest.mark.parametrize("splits", [[11], [4, 7], [1] * 11, [3, 1, 5, 2], [9, 2]])
def test_cached_chunks_and_steps_equal_the_whole(window, capacity, splits, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 2)
    q, k, v, cos, sin = make()
    whole = rope_attention(q, k, v, cos, sin, window=window)
    chunked, stepped = (KVCache.empty(2, capacity, 2, 6, dtype=torch.float64) for _ in range(2))
    start = 0
    for size in splits:
        part = slice(start, start + size)
        y = rope_attention(q[:, part], k[:, part], v[:, part], cos[part], sin[part], window=window, cache=chunked)
        torch.testing.assert_close(y, whole[:, part])
        start += size
    for t in range(11):
        y = rope_attention_step(
            q[:, t], k[:, t], v[:, t], cos[t].expand(2, -1), sin[t].expand(2, -1), stepped, window=window
        )
        torch.testing.assert_close(y, whole[:, t])
    assert chunked.position.tolist() == stepped.position.tolist() == [11, 11]
    torch.testing.assert_close(chunked.k, stepped.k)


def test_sequences_at_different_positions_share_a_cache():
    q, k, v, cos, sin = make()
    whole = rope_attention(q, k, v, cos, sin, window=4)
    cache = KVCache.empty(2, 4, 2, 6, dtype=torch.float64)
    for row, history in ((0, 6), (1, 2)):  # sequence 0 is six positions in, sequence 1 two
        alone = KVCache.empty(1, 4, 2, 6, dtype=torch.float64)
        rope_attention(
            *(t[row : row + 1, :history] for t in (q, k, v)), cos[:history], sin[:history], window=4, cache=alone
        )
        cache.k[row], cache.v[row], cache.position[row] = alone.k[0], alone.v[0], alone.position[0]
    rows = torch.stack([torch.arange(6, 9), torch.arange(2, 5)])
    pick = [torch.stack([t[0, rows[0]], t[1, rows[1]]]) for t in (q, k, v)]
    y = rope_attention(*pick, cos[rows][:, :, None], sin[rows][:, :, None], window=4, cache=cache)
    torch.testing.assert_close(y, torch.stack([whole[0, rows[0]], whole[1, rows[1]]]))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_window_never_builds_more_than_a_block_of_scores(monkeypatch):
    sizes = []
    attend = reference.attend

    def spy(q, k, v, mask, scale, causal=False):
        sizes.append(q.shape[1] * k.shape[1])
        return attend(q, k, v, mask, scale, causal)

    monkeypatch.setattr(reference, "attend", spy)
    rope_attention(*make(batch=1, length=3000, head_dim=2, dtype=torch.float32), window=100)
    assert max(sizes) <= reference.QUERY_BLOCK * (reference.QUERY_BLOCK + 100)


def test_positions_outside_of_every_sequence_give_zeros_and_take_no_gradient():
    for causal in (True, False):
        inputs = [t.requires_grad_() for t in make(batch=1, length=9)]
        y = rope_attention(*inputs, causal=causal, cu_seqlens=torch.tensor([2, 6, 7], dtype=torch.int32))
        outside = [0, 1, 7, 8]
        assert (y[:, outside] == 0).all() and (y[:, 2:7] != 0).all()
        for grad in torch.autograd.grad(y.square().sum() + y.sum(), inputs):
            rows = grad if grad.dim() == 2 else grad[0]
            assert (rows[outside] == 0).all() and rows.isfinite().all()


def test_bounds_of_sequences_are_clamped():
    inputs = make(batch=1, length=9)
    wild, tame = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([-3, 7, 5, 99], [0, 7, 7, 9]))
    got = rope_attention(*inputs, cu_seqlens=wild)
    torch.testing.assert_close(got, rope_attention(*inputs, cu_seqlens=tame), rtol=0, atol=0)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
def test_empty(batch, length):
    inputs = [t.requires_grad_() for t in make(batch=batch, length=length)]
    y = rope_attention(*inputs)
    assert y.shape == inputs[0].shape
    for grad, t in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert grad.shape == t.shape and (grad == 0).all()


def test_an_empty_batch_steps():
    q, k, v, cos, sin = (t[:0] for t in make(length=1))
    cache = KVCache.empty(0, 3, 2, 6)
    assert rope_attention_step(q[:, 0], k[:, 0], v[:, 0], cos, sin, cache).shape == (0, 4, 6)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(q=torch.zeros(2, 11, 4, 5)), (ValueError, TypeError), "k|head_dim"),
        (dict(q=torch.zeros(2, 11, 3, 6)), ValueError, "divide"),
        (dict(q=torch.zeros(2, 11, 4, 6).long()), TypeError, "q must"),
        (dict(k=torch.zeros(2, 11, 2, 6).half()), TypeError, "k must"),
        (dict(v=torch.zeros(2, 11, 1, 6)), ValueError, "v must"),
        (dict(cos=torch.zeros(10, 3)), ValueError, "cos"),
        (dict(sin=torch.zeros(11, 4, 3)), ValueError, "sin"),
        (dict(window=0), ValueError, "window"),
        (dict(window=2.0), TypeError, "window"),
        (dict(window=2, causal=False), ValueError, "window"),
        (dict(cu_seqlens=torch.tensor([0, 11], dtype=torch.int32)), ValueError, "batch 1"),
        (dict(cache=3), TypeError, "cache"),
        (dict(cache=KVCache.empty(2, 10, 2, 6)), ValueError, "too small"),
        (dict(cache=KVCache.empty(2, 5, 2, 6), window=6), ValueError, "too small"),
        (dict(cache=KVCache.empty(1, 11, 2, 6)), ValueError, "cache.k"),
        (dict(backend="cuda"), RuntimeError, "rope_attention"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = dict(zip(("q", "k", "v", "cos", "sin"), make(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=text):
        rope_attention(**(arguments | change))


# ---- multi-head checkpoints -----------------------------------------------------------------------------------------


def test_pooling_to_the_same_number_of_heads_changes_nothing():
    weight = torch.randn(8 * 4, 20)
    pooled = mean_pool_heads(weight, 8, 8)
    assert torch.equal(pooled, weight) and pooled.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pooling_takes_the_mean_of_the_heads_that_share(kv_heads):
    weight, bias = torch.randn(8 * 6, 20, dtype=torch.float64), torch.randn(8 * 6, dtype=torch.bfloat16)
    heads = weight.view(8, 6, 20)
    group = 8 // kv_heads
    for g, pooled in enumerate(mean_pool_heads(weight, 8, kv_heads).view(kv_heads, 6, 20)):
        torch.testing.assert_close(pooled, sum(heads[g * group + i] for i in range(group)) / group)
    pooled = mean_pool_heads(bias, 8, kv_heads)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, bias.view(kv_heads, group, 6).float().mean(1).bfloat16().flatten())


def test_equal_heads_pool_to_the_same_attention():
    """A multi-head layer whose heads agree within each group, and its pooled form."""
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    q = torch.randn(2, 9, 8, 6, dtype=torch.float64)
    cos, sin = rotary_table(torch.arange(9), 6, dtype=torch.float64)
    k_proj, v_proj = (torch.randn(2, 6, 20, dtype=torch.float64).repeat_interleave(4, 0).flatten(0, 1) for _ in "kv")

    def attend(heads, *weights):
        return rope_attention(q, *((x @ w.T).view(2, 9, heads, 6) for w in weights), cos, sin)

    pooled = (mean_pool_heads(w, 8, 2) for w in (k_proj, v_proj))
    torch.testing.assert_close(attend(2, *pooled), attend(8, k_proj, v_proj))


@pytest.mark.parametrize(
    "weight, heads, kv_heads, error, text",
    [
        (torch.zeros(12, 3), 4, 3, ValueError, "kv_heads must divide the 4 heads, got 3"),
        (torch.zeros(10, 3), 4, 2, ValueError, "weight must be"),
        (torch.zeros(()), 1, 1, ValueError, "weight must be"),
        (torch.zeros(12, 3), 4, 0, ValueError, "kv_heads must be at least 1"),
        (torch.zeros(12, 3), 4.0, 2, TypeError, "heads must be an int"),
        (torch.zeros(12, 3).int(), 4, 2, TypeError, "weight must be a float tensor"),
        ([1.0], 1, 1, TypeError, "weight must be a float tensor, got list"),
    ],
)
def test_pooling_refuses_in_words(weight, heads, kv_heads, error, text):
    with pytest.raises(error, match=text):
        mean_pool_heads(weight, heads, kv_heads)
