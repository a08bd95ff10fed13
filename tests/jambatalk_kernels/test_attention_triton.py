"""The Triton attention kernels against the definition, in the interpreter or, with a card, on it."""

import itertools
import math

import gpu_code
import pytest
import torch
from accuracy import assert_accurate, rms_ratio
from hypothesis import given, settings
from hypothesis import strategies as st

from jambatalk_kernels.attention import heuristics, reference
from jambatalk_kernels.attention.op import rope_attention
from jambatalk_kernels.gpu import Device

triton = pytest.importorskip("triton", reason="triton is not installed")

from jambatalk_kernels.attention import triton as kernels  # noqa: E402
from jambatalk_kernels.attention import triton_step  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(gpu_code.missing_tools() is not None, reason=str(gpu_code.missing_tools()))

NO_CACHE = (None, None, None)
HALF_BAR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def elsewhere(t):
    """The same numbers with the last dimension first in memory, every other one of a wider tensor."""
    wide = torch.full((*t.movedim(-1, 0).shape, 2), torch.nan, device=t.device)
    wide[..., 1] = t.movedim(-1, 0)
    return wide[..., 1].movedim(0, -1)


def table_shape(kind, batch, length, kv_heads, half):
    return {
        "positions": (length, half),
        "heads": (length, kv_heads, half),
        "sequences": (batch, length, 1, half),
        "all": (batch, length, kv_heads, half),
    }[kind]


def make(batch, length, heads, kv_heads, head_dim, dtype=torch.float32, table="positions"):
    """Tables that are no rotation at all: nothing may assume a norm."""
    q = normal(batch, length, heads, head_dim, seed=1, dtype=dtype)
    k, v = (normal(batch, length, kv_heads, head_dim, seed=s, dtype=dtype) for s in (2, 3))
    shape = table_shape(table, batch, length, kv_heads, head_dim // 2)
    cos, sin = (normal(*shape, seed=s, dtype=torch.float32) for s in (4, 5))
    return q, k, v, cos, sin


def options(causal=True, window=None, scale=None, interleaved=False, cu_seqlens=None, head_dim=None):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    return causal, window, head_dim**-0.5 if scale is None else scale, interleaved, cu_seqlens


def inside(cu_seqlens, length):
    position = torch.arange(length, device=cu_seqlens.device)
    return (position >= cu_seqlens[0]) & (position < cu_seqlens.max())


CASES = [  # (batch, length, heads, kv_heads, head_dim), table, options
    ((2, 11, 4, 2, 6), "positions", dict()),
    ((1, 37, 3, 1, 16), "heads", dict(interleaved=True)),
    ((2, 40, 2, 2, 20), "all", dict(causal=False)),
    ((2, 33, 2, 1, 16), "sequences", dict(window=5)),
    ((1, 70, 4, 1, 16), "positions", dict(window=33, interleaved=True)),
    ((1, 41, 2, 1, 8), "positions", dict(cu_seqlens=[0, 5, 5, 30, 41])),
    ((1, 41, 2, 2, 8), "heads", dict(cu_seqlens=[3, 9, 40], window=4)),
    ((1, 41, 2, 1, 8), "positions", dict(cu_seqlens=[0, 17, 41], causal=False, interleaved=True)),
    ((1, 17, 2, 1, 16), "positions", dict(window=100, scale=0.7)),
    ((1, 1, 8, 1, 64), "positions", dict()),
]
FEW, MANY = Device((8, 0), 1), Device((8, 9), 10_000)  # large tiles, small tiles


@pytest.mark.parametrize("device", [FEW, MANY], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("shape, table, choice", CASES, ids=str)
def test_forward(shape, table, choice, device, monkeypatch):
    monkeypatch.setattr(kernels, "device_of", lambda _: device)
    inputs = make(*shape, table=table)
    masks = options(**choice, head_dim=shape[-1])
    y, softmax = kernels.attention_forward(*inputs, *masks, *NO_CACHE, True)
    exact = reference.rope_attention(*(t.double() for t in inputs), *masks, None)
    assert_accurate(y, exact, reference.rope_attention(*inputs, *masks, None), 1e-5)
    assert y.is_contiguous() and y.dtype == inputs[0].dtype
    # What the weights were divided by, with and without the shift; 0 and 1 where nothing is seen.
    assert softmax.shape == (2, shape[0], shape[2], shape[1])
    want = naive_logsumexp(*inputs[:2], *inputs[3:], *masks)
    got = (softmax[0] - softmax[1].log2()) * math.log(2)
    torch.testing.assert_close(got, want.where(want > -torch.inf, 0.0), rtol=2e-5, atol=2e-5)
    assert (softmax[1] <= 1 + 1e-6).all()


def naive_logsumexp(q, k, cos, sin, causal, window, scale, interleaved, cu_seqlens):
    q, k, cos, sin = (t.double() for t in (q, k, cos, sin))
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    q, k = reference.rotate_grouped(q, k, cos, sin, interleaved)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    seen = (j <= i) if causal else torch.ones_like(i == j)
    if window is not None:
        seen &= j > i - window
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.long(), i.flatten(), right=True)
        seen &= (sequence[:, None] == sequence[None]) & inside(cu_seqlens, len(i))
    return scores.masked_fill(~seen, -torch.inf).logsumexp(-1).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 4, 2, 32), (1, 5, 2, 1, 256), (2, 65, 4, 2, 200)], ids=str)
def test_forward_in_half_precision(shape, dtype, monkeypatch):
    """The last on a card whose tiles are so wide that queries are rotated in a launch of their own."""
    hopper = Device((9, 0), 1)
    monkeypatch.setattr(kernels, "device_of", lambda _: hopper)
    batch, length, heads, kv_heads, head_dim = shape
    sizes = length, 0, heads // kv_heads, batch * kv_heads, head_dim, 2, hopper
    assert heuristics.forward_plan(*sizes).rotate_queries_on_load == (head_dim != 200)
    inputs = make(*shape, dtype=dtype)
    masks = options(head_dim=shape[-1])
    y, empty = kernels.attention_forward(*inputs, *masks, *NO_CACHE, False)
    exact = reference.rope_attention(*(t.double() for t in inputs), *masks, None)
    assert y.dtype == dtype and empty.shape == (0,)
    assert_accurate(y, exact, reference.rope_attention(*inputs, *masks, None), HALF_BAR[dtype])


@pytest.mark.parametrize("device", [FEW, MANY], ids=["large tiles", "small tiles"])
def test_forward_takes_any_strides(device, monkeypatch):
    monkeypatch.setattr(kernels, "device_of", lambda _: device)
    inputs = make(2, 20, 4, 2, 12, table="all")
    masks = options(head_dim=12, window=9)
    y, _ = kernels.attention_forward(*inputs, *masks, *NO_CACHE, True)

    moved, _ = kernels.attention_forward(*(elsewhere(t) for t in inputs), *masks, *NO_CACHE, True)
    assert rms_ratio(moved, y) < 1e-6
    q, k, v, cos, sin = inputs
    expanded = (q, k[:1].expand_as(k), v[:, :, :1].expand_as(v), cos, sin)
    y, _ = kernels.attention_forward(*expanded, *masks, *NO_CACHE, True)
    copied, _ = kernels.attention_forward(*(t.contiguous() for t in expanded), *masks, *NO_CACHE, True)
    assert torch.equal(y, copied)


def test_packing_clamps_its_bounds():
    """As bounds are read on the device, bad ones must not lead out of the sequence; they become a running maximum."""
    inputs = make(1, 20, 2, 1, 8)
    bad, good = [-3, 7, 5, 99], [0, 7, 7, 20]
    got, want = (
        kernels.attention_forward(*inputs, *options(cu_seqlens=c, head_dim=8), *NO_CACHE, True)[0] for c in (bad, good)
    )
    assert torch.equal(got, want)


def test_forward_of_nothing_and_refusals():
    for shape in ((0, 3, 2, 1, 8), (2, 0, 2, 1, 8)):
        inputs = make(*shape)
        y, softmax = kernels.attention_forward(*inputs, *options(head_dim=8), *NO_CACHE, True)
        assert y.shape == shape[:2] + (2, 8) and softmax.numel() == 0
    with pytest.raises(TypeError, match="float64"):
        kernels.attention_forward(*make(1, 3, 2, 1, 8, dtype=torch.float64), *options(head_dim=8), *NO_CACHE, True)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        kernels.attention_forward(*make(1, 3, 2, 1, 258), *options(head_dim=8), *NO_CACHE, True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_what_is_not_finite_stays_with_those_who_see_it():
    q, k, v, cos, sin = make(1, 40, 2, 1, 8)
    k[0, 20] = torch.nan
    y, _ = kernels.attention_forward(q, k, v, cos, sin, *options(head_dim=8, window=6), *NO_CACHE, True)
    seen = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    seen[20:26] = True
    assert y[0, seen].isnan().all() and y[0, ~seen].isfinite().all()


# ---- backward -------------------------------------------------------------------------------------------------------

NAMES = ("q", "k", "v", "cos", "sin")


def reference_gradients(inputs, grad_y, masks, wide):
    inputs = [(t.double() if wide else t).detach().clone().requires_grad_() for t in inputs]
    y = reference.rope_attention(*inputs, *masks, None)
    return torch.autograd.grad(y, inputs, grad_y.to(y.dtype))


def triton_gradients(inputs, grad_y, masks):
    y, softmax = kernels.attention_forward(*inputs, *masks, *NO_CACHE, True)
    return kernels.attention_backward(grad_y, *inputs, y, softmax, *masks, *NO_CACHE)


def assert_gradients(inputs, grad_y, masks, bar):
    got = triton_gradients(inputs, grad_y, masks)
    exact, peer = (reference_gradients(inputs, grad_y, masks, wide) for wide in (True, False))
    for name, mine, want, theirs, like in zip(NAMES, got, exact, peer, inputs, strict=True):
        assert mine.dtype == like.dtype and mine.shape == like.shape
        assert_accurate(mine, want, theirs, bar, name)
    return got


# Large and small tiles in turn; the other half of the pairs would make the fast tests slow.
@pytest.mark.parametrize(
    "shape, table, choice, device",
    [
        pytest.param(*case, device, marks=[] if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, case in enumerate(CASES[:-1])
        for j, device in enumerate((FEW, MANY))
    ],
    ids=str,
)
def test_backward(shape, table, choice, device, monkeypatch):
    monkeypatch.setattr(kernels, "device_of", lambda _: device)
    inputs = make(*shape, table=table)
    masks = options(**choice, head_dim=shape[-1])
    grad_y = normal(*shape[:3], shape[4], seed=6, dtype=torch.float32)
    assert_gradients(inputs, grad_y, masks, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 4, 2, 32), (1, 5, 2, 1, 256)], ids=str)
def test_backward_in_half_precision(shape, dtype):
    """A true rotation here: larger scores would magnify the rounding of q' and k' beyond the bar, for any kernel."""
    tables = (t.to(DEVICE) for t in reference.rotary_table(torch.arange(shape[1]), shape[-1]))
    inputs = (*make(*shape, dtype=dtype)[:3], *tables)
    masks = options(head_dim=shape[-1])
    assert_gradients(inputs, normal(*inputs[0].shape, seed=6, dtype=dtype), masks, HALF_BAR[dtype])


def test_one_position_moves_nothing_but_its_value():
    """The softmax over one key is 1 whatever q, k, cos and sin are: their gradients are the rounding of 0."""
    inputs = make(1, 1, 8, 1, 64)
    grad_y = normal(1, 1, 8, 64, seed=6, dtype=torch.float32)
    got = dict(zip(NAMES, triton_gradients(inputs, grad_y, options(head_dim=64)), strict=True))
    torch.testing.assert_close(got.pop("v"), grad_y.sum(2, keepdim=True))
    for name, value in got.items():
        assert value.abs().max() < 1e-4, name


@pytest.mark.parametrize(
    "device", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["large tiles", "small tiles"]
)
def test_backward_takes_any_strides(device, monkeypatch):
    monkeypatch.setattr(kernels, "device_of", lambda _: device)
    inputs = make(2, 20, 4, 2, 12, table="all")
    masks = options(head_dim=12, window=9)
    grad_y = normal(2, 20, 4, 1, seed=6, dtype=torch.float32).expand(-1, -1, -1, 12)
    plain = triton_gradients(inputs, grad_y.contiguous(), masks)
    for name, a, b in zip(NAMES, triton_gradients([elsewhere(t) for t in inputs], grad_y, masks), plain, strict=True):
        assert rms_ratio(a, b) < 1e-6, name


def test_backward_repeats_itself_and_does_not_see_other_rows():
    """Equal bytes, run after run; a sequence's gradients do not depend on its neighbours in the pack or the batch."""
    inputs = make(1, 41, 4, 1, 8)
    grad_y = normal(1, 41, 4, 8, seed=6, dtype=torch.float32)
    masks = options(cu_seqlens=[0, 16, 41], head_dim=8)
    first, second = (triton_gradients(inputs, grad_y, masks) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = triton_gradients(
        [t[:, :16] for t in inputs[:3]] + [t[:16] for t in inputs[3:]], grad_y[:, :16], options(head_dim=8)
    )
    for name, a, b in zip(NAMES, alone, first, strict=True):
        b = b[:16] if name in ("cos", "sin") else b[:, :16]
        assert rms_ratio(a, b) < 1e-6, name


def test_backward_of_nothing():
    for shape in ((0, 3, 2, 1, 8), (2, 0, 2, 1, 8)):
        inputs = make(*shape)
        got = triton_gradients(inputs, torch.zeros_like(inputs[0]), options(head_dim=8))
        assert [t.shape for t in got] == [t.shape for t in inputs] and not any(t.any() for t in got)


def rounding_bounds(inputs, grad_y, masks):
    """How far y and the gradients may be from exact ones, number by number, if every operation in float32 is rounded
    (u = 2**-24), sums of n terms lose up to n u of the sum of their magnitudes, and errors are carried on to first
    order. The exact values go in as float64; the algorithm is the one that the kernels' docstring has."""
    u = 2.0**-24
    q, k, v, cos, sin = (t.double() for t in inputs)
    causal, window, scale, interleaved, _ = masks
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    cos, sin = (t[:, None] if t.dim() == 2 else t for t in (cos, sin))
    k, v, cos, sin = (t.repeat_interleave(group, -2) if t.shape[-2] > 1 else t for t in (k, v, cos, sin))

    def pairs(x):
        return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)

    def turned(x, by_size=False):
        c, s, sign = (cos.abs(), sin.abs(), 1) if by_size else (cos, sin, -1)
        a, b = pairs(x.abs() if by_size else x)
        return torch.cat([a * c + sign * b * s, a * s + b * c], -1)

    qr, kr, q_size, k_size = turned(q), turned(k), turned(q, True), turned(k, True)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= i) | torch.tensor(not causal)
    seen &= j > i - (length if window is None else window)

    def product(a, b):
        return torch.einsum("bihd,bjhd->bhij", a, b)

    scores = scale * product(qr, kr)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    score_error = u * ((head_dim + 4) * scale * product(q_size, k_size) + 3 * (scores.abs() + 1))
    score_error = score_error + 3 * u * scores.abs().amax(-1, keepdim=True)
    weight_error = score_error + (p * score_error).sum(-1, keepdim=True) + (length + 10) * u  # relative

    def mixed(weights, x):
        return torch.einsum("bhij,bjhd->bihd", weights, x)

    bounds = {"y": mixed(p * (weight_error + (length + 2) * u), v.abs())}
    dy = grad_y.double()
    dp = product(dy, v)
    delta_error = (dy.abs() * bounds["y"]).sum(-1) + (head_dim + 2) * u * (dy * mixed(p, v)).abs().sum(-1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    ds_error = ds.abs() * (weight_error + 3 * u)
    ds_error += p * (head_dim * u * product(dy.abs(), v.abs()) + delta_error.transpose(1, 2)[..., None])
    terms = group * length + 3
    dv = mixed((p * (weight_error + terms * u)).transpose(2, 3), dy.abs())
    dk = scale * mixed((ds_error + (terms + 3) * u * ds.abs()).transpose(2, 3), qr.abs())
    dk += scale * mixed(ds.abs().transpose(2, 3), 2 * u * q_size)
    dq = scale * mixed(ds_error + (length + 3) * u * ds.abs(), kr.abs()) + scale * mixed(ds.abs(), 2 * u * k_size)
    sizes = {}
    for name, x, other, weights, error in (("q", q, kr, ds, dq), ("k", k, qr, ds.transpose(2, 3), dk)):
        rotated = scale * mixed(weights, other)
        a, b, da, db = (*pairs(x.abs()), *rotated.abs().chunk(2, -1))
        error_a, error_b = error.chunk(2, -1)
        c, s = cos.abs(), sin.abs()
        error_a, error_b = error_a + 3 * u * da, error_b + 3 * u * db
        back = (c * error_a + s * error_b, c * error_b + s * error_a)
        bounds[name] = torch.stack(back, -1).flatten(-2) if interleaved else torch.cat(back, -1)
        sizes[name] = [
            a * error_a + b * error_b + terms * batch * heads * u * (a * da + b * db),
            a * error_b + b * error_a + terms * batch * heads * u * (a * db + b * da),
        ]
    for name, which in (("cos", 0), ("sin", 1)):
        bounds[name] = (sizes["q"][which] + sizes["k"][which]).sum((0, 2))
    bounds["v"] = dv
    for name in ("k", "v"):
        bounds[name] = bounds[name].unflatten(2, (-1, group)).sum(3)
    return bounds


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 2), st.integers(1, 10),
    st.sampled_from([(True, None), (True, 1), (True, 4), (False, None)]), st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
def test_no_number_is_further_off_than_its_roundings(batch, length, group, kv_heads, half, mask, interleaved, seed):
    """Twice PyTorch's error is no bound for a few numbers, nor where the exact value is 0: in a row that one key
    dominates, <dy, v> - <dy, y> is what two sums of the same terms in different orders leave, and PyTorch may happen to
    sum in the same one. This bound holds for every number."""
    causal, window = mask
    g = torch.Generator().manual_seed(seed)
    q, grad_y = (torch.randn(batch, length, kv_heads * group, 2 * half, generator=g).to(DEVICE) for _ in range(2))
    k, v = (torch.randn(batch, length, kv_heads, 2 * half, generator=g).to(DEVICE) for _ in range(2))
    cos, sin = (torch.randn(length, half, generator=g).to(DEVICE) for _ in range(2))
    inputs, masks = (q, k, v, cos, sin), options(causal, window, None, interleaved, head_dim=2 * half)
    exact_y = reference.rope_attention(*(t.double() for t in inputs), *masks, None)
    exact = dict(zip(("y", *NAMES), (exact_y, *reference_gradients(inputs, grad_y, masks, wide=True)), strict=True))
    y, _ = kernels.attention_forward(*inputs, *masks, *NO_CACHE, True)
    got = dict(zip(("y", *NAMES), (y, *triton_gradients(inputs, grad_y, masks)), strict=True))
    for name, bound in rounding_bounds(inputs, grad_y, masks).items():
        over = (got[name].double() - exact[name]).abs() - bound - 2.0**-24 * exact[name].abs()
        assert over.max() <= 0, (name, over.max())


def test_the_bound_of_roundings_would_notice_tf32():
    """Inputs with 10 bits of mantissa, as the matrix units would take them."""
    inputs, masks = make(1, 12, 2, 1, 16), options(head_dim=16)
    grad_y = normal(1, 12, 2, 16, seed=6, dtype=torch.float32)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in inputs[:3]]
    exact, rough = (reference_gradients((*x, *inputs[3:]), grad_y, masks, wide=True) for x in (inputs[:3], cut))
    bounds = rounding_bounds(inputs, grad_y, masks)
    for name, a, b in zip(NAMES, exact, rough, strict=True):
        assert ((a - b).abs() > bounds[name]).double().mean() > 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_wide_heads(head_dim):
    shape = (1, 70, 2, 1, head_dim)
    inputs = make(*shape)
    masks = options(head_dim=head_dim, interleaved=True)
    y, _ = kernels.attention_forward(*inputs, *masks, *NO_CACHE, False)
    exact = reference.rope_attention(*(t.double() for t in inputs), *masks, None)
    assert_accurate(y, exact, reference.rope_attention(*inputs, *masks, None), 1e-5)
    assert_gradients(inputs, normal(1, 70, 2, head_dim, seed=6, dtype=torch.float32), masks, 1e-5)


# ---- chunks against a cache -----------------------------------------------------------------------------------------

CHUNKED = [  # (batch, length, heads, kv_heads, head_dim), capacity, chunks, table, options
    ((2, 41, 4, 2, 6), 41, (7, 1, 33), "positions", dict()),
    ((1, 41, 2, 1, 16), 60, (20, 21), "heads", dict(interleaved=True)),
    ((1, 70, 4, 1, 8), 9, (5, 30, 1, 34), "all", dict(window=9)),  # a ring, and chunks longer than it
    ((2, 50, 2, 2, 20), 37, (40, 3, 7), "sequences", dict(window=20, interleaved=True, scale=0.4)),
    ((1, 12, 2, 1, 8), 1, (1, 5, 6), "positions", dict(window=1)),
]


def chunk(inputs, start, stop):
    """Positions start to stop of q, k, v, cos and sin."""
    q, k, v, *tables = inputs
    tables = [t[start:stop] if t.dim() == 2 or t.shape[0] == q.shape[1] else t[:, start:stop] for t in tables]
    return [*(t[:, start:stop] for t in (q, k, v)), *tables]


@pytest.mark.parametrize("device", [FEW, MANY], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("shape, capacity, sizes, table, choice", CHUNKED, ids=str)
def test_any_chunks_are_the_whole(shape, capacity, sizes, table, choice, device, monkeypatch):
    monkeypatch.setattr(kernels, "device_of", lambda _: device)
    inputs = make(*shape, table=table)
    exact, peer = (
        rope_attention(*(t.to(dtype) for t in inputs), **choice, backend="reference")
        for dtype in (torch.float64, torch.float32)
    )
    cache = reference.KVCache.empty(shape[0], capacity, *shape[3:], device=DEVICE)
    cache.k[:], cache.v[:] = torch.nan, torch.nan  # what was never written is never read
    parts = []
    for start, size in zip(itertools.accumulate((0, *sizes)), sizes, strict=False):
        part = chunk(inputs, start, start + size)
        parts.append(rope_attention(*part, **choice, cache=cache, backend="triton"))
        assert cache.position.tolist() == [start + size] * shape[0]
    assert_accurate(torch.cat(parts, 1), exact, peer, 1e-5)
    written = reference.KVCache.empty(shape[0], capacity, *shape[3:], device=DEVICE)
    rope_attention(*inputs, **choice, cache=written, backend="reference")
    kept = min(capacity, shape[1])
    at = torch.arange(shape[1] - kept, shape[1]) % capacity
    torch.testing.assert_close(cache.k[:, at], written.k[:, at])
    assert torch.equal(cache.v[:, at], written.v[:, at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window, capacity", [(None, 90), (25, 30)], ids=str)
def test_gradients_of_a_chunk(window, capacity, dtype):
    """Each sequence at its own position; a cache of another dtype, with gaps; what is cached carries no gradient."""
    shape = (3, 34, 4, 2, 16)
    tables = (t.to(DEVICE) for t in reference.rotary_table(torch.arange(34), 16))
    inputs = (*make(*shape, dtype=dtype)[:3], *tables)
    grad_y = normal(*shape[:3], 16, seed=6, dtype=dtype)
    got, exact, peer = {}, {}, {}
    for results, backend, kind in (
        (got, "triton", dtype), (exact, "reference", torch.float64), (peer, "reference", dtype)
    ):  # fmt: skip
        wide = (normal(3, 2, capacity, 32, seed=i).float().transpose(1, 2)[..., ::2] for i in (8, 9))
        cache = reference.KVCache(*wide, torch.tensor([0, 11, 41], device=DEVICE))
        leaves = [t.to(kind if t.dtype == dtype else t.dtype).detach().requires_grad_() for t in inputs]
        if kind == torch.float64:
            leaves = [t.double().detach().requires_grad_() for t in leaves]
        y = rope_attention(*leaves, window=window, cache=cache, backend=backend)
        assert cache.position.tolist() == [34, 45, 75] and not cache.k.requires_grad
        after = cache.clone()
        cache.k.zero_(), cache.v.zero_(), cache.position.zero_()  # it goes on changing before the backward pass
        results["y"] = y.detach()
        results.update(zip(NAMES, torch.autograd.grad(y, leaves, grad_y.to(y.dtype)), strict=True))
        results["cache"] = after
    caches = [results.pop("cache") for results in (got, exact, peer)]
    for name, value in got.items():
        bar = 1e-5 if dtype == torch.float32 else HALF_BAR[dtype]
        assert_accurate(value, exact[name].to(torch.float64), peer[name], bar, name)
    torch.testing.assert_close(caches[0].k, caches[2].k)
    assert torch.equal(caches[0].v, caches[2].v)


def test_a_wild_position_reads_nothing_out_of_range():
    """The number of cached positions is a value on the device, which nobody reads: it counts as at least 0."""
    inputs = make(1, 5, 2, 1, 8)
    for wild, tame in ((-7, 0), (2**62, 2**62)):
        results = []
        for position in (wild, tame):
            cache = reference.KVCache.empty(1, 9, 1, 8, device=DEVICE)
            cache.position += position
            y, _ = kernels.attention_forward(
                *inputs, *options(window=6, head_dim=8), cache.k, cache.v, cache.position, False
            )
            kernels.attention_append(*inputs[1:], cache.k, cache.v, cache.position, False)
            step = [t[:, 0] for t in inputs[:3]] + [t[:1] for t in inputs[3:]]
            one = triton_step.attention_step(*step, cache.k, cache.v, cache.position, 6, 1.0, False)
            results.append((y, cache.k, cache.v, one))
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


def test_positions_outside_of_every_sequence_give_zeros():
    inputs = make(1, 41, 2, 1, 8)
    for causal, bounds in ((True, [3, 9, 30]), (False, [3, 9, 30]), (True, [7]), (False, [40, 41]), (True, [0, 0])):
        masks = options(causal=causal, cu_seqlens=bounds, head_dim=8)
        y, softmax = kernels.attention_forward(*inputs, *masks, *NO_CACHE, True)
        assert not softmax[0, 0, 0][~inside(masks[-1], 41)].any()
        results = (y, *triton_gradients(inputs, torch.ones_like(y), masks))
        for name, value in zip(("y", *NAMES), results, strict=True):
            value = value if name in ("cos", "sin") else value[0]
            assert not value[~inside(masks[-1], 41)].any(), name
            assert value.isfinite().all(), name


# ---- step -----------------------------------------------------------------------------------------------------------

STEPS = [  # (batch, heads, kv_heads, head_dim), capacity, table, options; 13 steps, so that rings wrap around
    ((2, 4, 2, 6), 13, "positions", dict()),
    ((1, 2, 2, 16), 20, "heads", dict(interleaved=True)),
    ((2, 3, 1, 20), 4, "heads", dict(window=4)),
    ((1, 2, 2, 8), 7, "positions", dict(window=3, scale=0.3)),
    ((1, 4, 1, 8), 200, "positions", dict(window=9)),  # split
    ((1, 2, 2, 8), 200, "positions", dict(interleaved=True)),
]


def step_table(kind, batch, kv_heads, half):
    return (batch, half) if kind == "positions" else (batch, kv_heads, half)


@pytest.mark.parametrize("start", [0, 195], ids="from {}".format)
@pytest.mark.parametrize("shape, capacity, table, choice", STEPS, ids=str)
def test_steps(shape, capacity, table, choice, start):
    batch, heads, kv_heads, head_dim = shape
    window, scale, interleaved = (options(**choice, head_dim=head_dim)[i] for i in (1, 2, 3))
    if start and capacity == 200:
        assert heuristics.step_plan(200, batch * kv_heads, head_dim, 4, FEW._replace(multiprocessors=108)).splits > 1
    caches = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        cache = reference.KVCache.empty(batch, capacity, kv_heads, head_dim, dtype=dtype, device=DEVICE)
        cache.k.copy_(normal(*cache.k.shape, seed=8))
        cache.v.copy_(normal(*cache.v.shape, seed=9))
        cache.position += start - torch.arange(batch, device=DEVICE) * (start > 0)  # each sequence at its own
        caches.append(cache)
    mine, exact_cache, peer_cache = caches
    for t in range(13 if start == 0 else 5):
        q = normal(batch, heads, head_dim, seed=3 * t, dtype=torch.float32)
        k, v = (normal(batch, kv_heads, head_dim, seed=3 * t + i, dtype=torch.float32) for i in (1, 2))
        cos, sin = (normal(*step_table(table, batch, kv_heads, head_dim // 2), seed=i).float() for i in (t, t + 99))
        before = mine.position.clone()
        y = triton_step.attention_step(
            q, k, v, cos, sin, mine.k, mine.v, mine.position, window, scale, interleaved
        )  # fmt: skip
        assert torch.equal(mine.position, before)
        mine.position += 1
        exact, peer = (
            reference.rope_attention_step(
                *(x.to(c.k.dtype) for x in (q, k, v, cos, sin)), c, window, scale, interleaved
            )
            for c in (exact_cache, peer_cache)
        )
        assert_accurate(y, exact, peer, 1e-5)
    torch.testing.assert_close(mine.k, peer_cache.k)
    assert torch.equal(mine.v, peer_cache.v)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1)], ids="{}".format)
def test_step_in_half_precision_with_any_strides(heads, kv_heads):
    k, v = (normal(1, kv_heads, 90, 40, seed=i, dtype=torch.bfloat16).transpose(1, 2)[..., ::2] for i in (1, 2))
    cache, exact_cache, peer_cache = (
        reference.KVCache(*(x.to(dtype, copy=True) for x in (k, v)), torch.tensor([70], device=DEVICE))
        for dtype in (torch.bfloat16, torch.float64, torch.bfloat16)
    )
    cache.k, cache.v = k, v  # changed in place through the strides
    inputs = [normal(1, n, 20, seed=i, dtype=torch.bfloat16) for i, n in ((3, heads), (4, kv_heads), (5, kv_heads))]
    inputs += [normal(1, 10, seed=i, dtype=torch.float32) for i in (6, 7)]
    y = triton_step.attention_step(*inputs, k, v, cache.position, None, 20**-0.5, False)
    exact, peer = (
        reference.rope_attention_step(*(x.double() if wide else x for x in inputs), c, None, 20**-0.5, False)
        for wide, c in ((True, exact_cache), (False, peer_cache))
    )
    assert y.dtype == torch.bfloat16
    assert_accurate(y, exact, peer, 5e-3)
    torch.testing.assert_close(k, peer_cache.k)
    assert torch.equal(v, peer_cache.v)


def test_step_of_nothing():
    cache = reference.KVCache.empty(0, 4, 1, 8, device=DEVICE)
    empty = torch.zeros(0, 1, 8, device=DEVICE)
    table = torch.zeros(0, 4, device=DEVICE)
    y = triton_step.attention_step(
        empty, empty, empty, table, table, cache.k, cache.v, cache.position, None, 1.0, False
    )  # fmt: skip
    assert y.shape == (0, 1, 8)


def test_step_plan_covers_the_cache():
    for capability, capacity, groups, head_dim, itemsize in itertools.product(
        CAPABILITIES, (1, 5, 64, 65, 600, 100_000), (1, 8, 10_000), HEAD_DIMS, (2, 4)
    ):
        plan = heuristics.step_plan(capacity, groups, head_dim, itemsize, Device(capability, 100))
        assert plan.slots * (plan.splits - 1) < capacity <= plan.slots * plan.splits and plan.slots % plan.block_n == 0
        assert powers_of_two(plan.block_n) and 1 <= plan.splits <= 32
        assert plan.block_n * heuristics.padded_head_dim(head_dim) * itemsize <= 16384 or plan.block_n == 16
    assert heuristics.step_plan(600, 8, 64, 2, Device((9, 0), 132)).splits == 10
    assert heuristics.step_plan(600, 1000, 64, 2, Device((9, 0), 132)).splits == 1


# ---- tiles ----------------------------------------------------------------------------------------------------------

CAPABILITIES = {(8, 0): 80, (8, 6): 86, (8, 9): 89, (9, 0): 90, (10, 0): 100, (12, 0): 120}
LENGTHS = (1, 7, 97, 600, 4096, 100_000)
HEAD_DIMS = (2, 16, 20, 64, 80, 128, 256)


def powers_of_two(*sizes):
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_forward_tiles_fit_every_gpu(capability):
    device = Device(capability, 100)
    limit = gpu_code.SHARED_LIMIT[CAPABILITIES[capability]]
    for length, head_dim, itemsize in itertools.product(LENGTHS, HEAD_DIMS, (2, 4)):
        for (group, groups), capacity in itertools.product(((1, 1), (1, 64), (3, 2), (8, 1)), (0, 5, 600)):
            tile, keys_on_load, queries_on_load = heuristics.forward_plan(
                length, capacity, group, groups, head_dim, itemsize, device
            )
            width = heuristics.padded_head_dim(head_dim)
            assert powers_of_two(tile.block_m, tile.block_n, width)
            assert itemsize * width * (tile.block_m + 2 * tile.block_n * tile.num_stages) <= limit
            assert tile.block_m * (width + tile.block_n) <= 128 * 32 * tile.num_warps * 1.5
            assert keys_on_load == (-(-length * group // tile.block_m) <= 2 and capacity == 0)
            assert queries_on_load == (tile.block_m * width <= 128 * 128)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_backward_tiles_fit_every_gpu(capability):
    device = Device(capability, 100)
    limit = gpu_code.SHARED_LIMIT[CAPABILITIES[capability]]
    for length, head_dim, itemsize in itertools.product(LENGTHS, HEAD_DIMS, (2, 4)):
        for (group, groups), capacity in itertools.product(((1, 1), (1, 64), (3, 2), (8, 1)), (0, 5, 600)):
            plan = heuristics.backward_plan(length, capacity, group, groups, head_dim, itemsize, device)
            width = heuristics.padded_head_dim(head_dim)
            for tile, held, passing in (
                (plan.queries, plan.queries.block_m, plan.queries.block_n),
                (plan.keys, plan.keys.block_n, plan.keys.block_m),
            ):
                assert powers_of_two(tile.block_m, tile.block_n)
                shared = 2 * width * (held + passing * tile.num_stages) + tile.block_m * tile.block_n
                assert itemsize * shared <= limit, (head_dim, itemsize, tile)
            # dk and dv are held at once; what does not fit registers is kept in local memory, slowly.
            assert 2 * plan.keys.block_n * width <= 128 * 32 * plan.keys.num_warps
            assert group % plan.splits == 0
            programs = -(-length // plan.keys.block_n) * groups
            assert plan.splits == 1 or programs * plan.splits <= 100 * group
    assert heuristics.backward_plan(600, 0, 8, 1, 64, 2, device).splits > 1
    assert heuristics.backward_plan(4096, 0, 8, 64, 64, 2, device).splits == 1


# ---- machine code ---------------------------------------------------------------------------------------------------

MATRIX = r"HMMA|.*GMMA|UTC\w*MMA"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_products_run_on_matrix_units_and_spill_nothing(capability):
    codes = gpu_code.compile_triton("jambatalk_kernels.attention.ahead_of_time", capability)
    assert {name.split()[0] for name in codes} == {
        "rotate_kernel", "packing_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel",
        "turn_back_kernel", "append_kernel", "step_kernel", "combine_kernel",
    }  # fmt: skip
    for name, code in codes.items():
        assert code.shared_bytes <= gpu_code.SHARED_LIMIT[capability], name
        assert code.registers <= 255, name
        matrix = code.count(MATRIX)
        if "float32" in name:
            assert matrix == 0, name  # IEEE
            assert code.stack_bytes <= 32 and all(loop.local_memory == 0 for loop in code.innermost_loops()), name
            continue
        # Some values may be put aside around the loops, none inside of one that counts. (With a window of 1 no key's
        # tile is seen whole by every query, so the loop with the masks is the only one, and runs once.)
        assert code.stack_bytes <= 96, name
        loops = [code.hot_loop(MATRIX)] if matrix else code.innermost_loops()
        assert "window': 1}" in name or all(loop.local_memory == 0 for loop in loops), name
        if "forward" in name or "gradient" in name:
            assert matrix > 0, name
        if "forward" in name and "2048" in name and capability != 100:
            assert code.hot_loop(MATRIX).count(r"LDGSTS.*\.128") >= 4, name
            assert code.count(r".*GMMA") > 0 or capability != 90, name
