"""Property tests of the CPU ops: whatever the shapes, dtypes, strides, lengths and optional arguments, no crash and no
wrong number; whatever is wrong with a call, an error that names the argument.

2,000 cases in all of scan and convolution and 2,000 of attention, the same ones in every run (``derandomize``); `make
check` runs most of them.
"""

import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jambatalk_kernels import (
    KVCache,
    causal_conv1d,
    causal_conv1d_step,
    native_library,
    rope_attention,
    rope_attention_step,
    selective_scan,
    selective_scan_step,
)

LOADED, _WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "time fastest", "strided", "offset", "reversed axes", "expanded")


def cases(count):
    """The same `count` examples in every run, with no memory of earlier ones."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def native():
    import _jambatalk_native

    before = _jambatalk_native.cpu_isa()
    yield _jambatalk_native
    _jambatalk_native.set_cpu_isa(before)


# ---- what a case is made of -----------------------------------------------------------------------------------------


def lay_out(tensor, how):
    """The same numbers in other places, NaN between them."""
    if how == "expanded" and tensor.dim() == 3:
        return tensor[:1].expand(tensor.shape)
    if how == "time fastest" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if how == "offset":
        nan = torch.full_like(tensor, torch.nan)
        return torch.cat([nan, tensor, nan], -1).narrow(-1, tensor.shape[-1], tensor.shape[-1])
    if how == "reversed axes":
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    return tensor


@st.composite
def tensors(draw, shapes, positive_delta=False):
    """One tensor for every shape; dtypes and layouts drawn for each on its own, or one dtype for all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    common = draw(st.sampled_from((None, *DTYPES)))
    named = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "A":
            values = -torch.exp(values * 0.5)
        if name == "delta":
            values = values * 0.5 - 1
        if positive_delta and name in ("delta", "delta_bias"):  # otherwise states grow without bound
            values = values.abs()
        named[name] = lay_out(
            values.to(common or draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS[:5] + LAYOUTS))
        )
    return named


@st.composite
def packing(draw, length):
    """-> cu_seqlens (or None) and the number of sequences. Any int32 is allowed: what is out of range is clamped."""
    if not draw(st.booleans()):
        return None
    inside = st.integers(0, length)
    anything = st.integers(-(2**31), 2**31 - 1)
    bounds = draw(
        st.one_of(
            st.lists(inside, min_size=0, max_size=6).map(lambda inner: [0, *sorted(inner), length]),
            st.lists(st.one_of(inside, anything), min_size=2, max_size=6),
        )
    )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return lay_out(cu_seqlens.repeat_interleave(2), "contiguous")[::2] if draw(st.booleans()) else cu_seqlens


LENGTHS = st.one_of(st.integers(0, 10), st.sampled_from((31, 32, 33, 64, 65, 130)))
CHANNELS = st.one_of(st.integers(0, 20), st.sampled_from((31, 32, 33, 64, 80, 130)))


@st.composite
def scan_cases(draw):
    length, channels = draw(LENGTHS), draw(CHANNELS)
    states = draw(st.one_of(st.integers(1, 20), st.sampled_from((32, 33, 48))))
    cu_seqlens = draw(packing(length))
    batch = 1 if cu_seqlens is not None else draw(st.integers(0, 3))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    positions = (batch, length, channels)
    shapes = {
        "u": positions,
        "delta": positions,
        "A": (channels, states),
        "B": (batch, length, states),
        "C": (batch, length, states),
    }
    optional = {
        "D": (channels,),
        "z": positions,
        "delta_bias": (channels,),
        "initial_state": (sequences, channels, states),
    }
    shapes |= {name: shape for name, shape in optional.items() if draw(st.booleans())}
    softplus = draw(st.booleans())
    return draw(tensors(shapes, not softplus)), {"delta_softplus": softplus, "cu_seqlens": cu_seqlens}


@st.composite
def conv_cases(draw):
    length, channels, width = draw(LENGTHS), draw(CHANNELS), draw(st.one_of(st.integers(1, 16), st.just(4)))
    cu_seqlens = draw(packing(length))
    batch = 1 if cu_seqlens is not None else draw(st.integers(0, 3))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shapes = {"x": (batch, length, channels), "weight": (channels, width)}
    optional = {"bias": (channels,), "initial_state": (sequences, width - 1, channels)}
    shapes |= {name: shape for name, shape in optional.items() if draw(st.booleans())}
    return draw(tensors(shapes)), {"activation": draw(st.sampled_from((None, "silu"))), "cu_seqlens": cu_seqlens}


# ---- never a wrong number -------------------------------------------------------------------------------------------


def results(op, named, options, backend, weights=None):
    """-> y, final state, gradients of all tensors; and the weights of the outputs that the gradients are for."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    outputs = op(**leaves, **options, return_final_state=True, backend=backend)
    if weights is None:
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outputs]
    used = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=True)]
    # A final state that no input reaches (length 0, no initial state) has no gradient to give.
    reached = [(output, weight) for output, weight in zip(outputs, used, strict=True) if output.requires_grad]
    differentiable, weighted = zip(*reached, strict=True)
    grads = torch.autograd.grad(differentiable, list(leaves.values()), weighted, materialize_grads=True)
    return {"y": outputs[0].detach(), "final_state": outputs[1].detach(), **dict(zip(leaves, grads, strict=True))}, used


def distance(got, want):
    return (got.double() - want).abs().max().item() if want.numel() else 0.0


def assert_right(op, named, options):
    """At most twice the error of the reference in the same dtypes, plus rounding: of the result once, and of the sums
    64 times, in units of the largest number."""
    ours, weights = results(op, named, options, "cpu")
    peer, _ = results(op, named, options, "reference", weights)
    exact, _ = results(op, {k: v.double() for k, v in named.items()}, options, "reference", weights)
    compute = torch.float64 if ours["y"].dtype == torch.float64 else torch.float32
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape and got.dtype == peer[name].dtype, name
        scale = want.abs().max().item() if want.numel() else 0.0
        rounding = (torch.finfo(got.dtype).eps + 64 * torch.finfo(compute).eps) * (scale + 1e-3)
        assert distance(got, want) <= 2 * distance(peer[name], want) + rounding, (name, named[name].dtype)


def scan_is_right(native, isa, case):
    native.set_cpu_isa(isa)
    assert_right(selective_scan, *case)


def conv_is_right(native, isa, case):
    native.set_cpu_isa(isa)
    assert_right(causal_conv1d, *case)


ISAS = st.sampled_from(("avx512", "avx2", "plain", "wide"))


def on_this_machine(native, isa):
    return isa if isa in native.supported_cpu_isas() else "wide"


@cases(60)
@given(case=scan_cases(), isa=ISAS)
def test_any_scan_is_right(native, isa, case):
    scan_is_right(native, on_this_machine(native, isa), case)


@cases(80)
@given(case=conv_cases(), isa=ISAS)
def test_any_convolution_is_right(native, isa, case):
    conv_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(540)
@given(case=scan_cases(), isa=ISAS)
def test_many_scans_are_right(native, isa, case):
    scan_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(620)
@given(case=conv_cases(), isa=ISAS)
def test_many_convolutions_are_right(native, isa, case):
    conv_is_right(native, on_this_machine(native, isa), case)


@st.composite
def step_cases(draw):
    batch, channels = draw(st.integers(0, 3)), draw(CHANNELS)
    states = draw(st.one_of(st.integers(1, 20), st.sampled_from((32, 48))))
    row = (batch, channels)
    shapes = {"state": (batch, channels, states), "u": row, "delta": row, "A": (channels, states)}
    shapes |= {"B": (batch, states), "C": (batch, states)}
    optional = {"D": (channels,), "z": row, "delta_bias": (channels,)}
    shapes |= {name: shape for name, shape in optional.items() if draw(st.booleans())}
    return draw(tensors(shapes)), {"delta_softplus": draw(st.booleans())}


@st.composite
def conv_step_cases(draw):
    batch, channels, width = draw(st.integers(0, 3)), draw(CHANNELS), draw(st.integers(1, 16))
    shapes = {"state": (batch, width - 1, channels), "x": (batch, channels), "weight": (channels, width)}
    if draw(st.booleans()):
        shapes["bias"] = (channels,)
    return draw(tensors(shapes)), {"activation": draw(st.sampled_from((None, "silu")))}


def assert_step_is_right(op, case):
    named, options = case
    outcomes = []
    for backend, convert in (("cpu", torch.Tensor.clone), ("reference", torch.Tensor.clone), ("reference", None)):
        arguments = {k: v.double() if convert is None else v for k, v in named.items()}
        # An expanded tensor is no place to write to.
        arguments["state"] = lay_out(arguments["state"].clone(), "reversed axes")
        outcomes.append((op(**arguments, **options, backend=backend), arguments["state"]))
    ours, peer, exact = outcomes
    compute = torch.float64 if ours[0].dtype == torch.float64 else torch.float32
    for got, theirs, want in zip(ours, peer, exact, strict=True):
        assert got.dtype == theirs.dtype and got.shape == want.shape
        scale = want.abs().max().item() if want.numel() else 0.0
        rounding = (torch.finfo(got.dtype).eps + 64 * torch.finfo(compute).eps) * (scale + 1e-3)
        assert distance(got, want) <= 2 * distance(theirs, want) + rounding


@cases(100)
@given(case=step_cases(), isa=ISAS)
def test_any_scan_step_is_right(native, isa, case):
    native.set_cpu_isa(on_this_machine(native, isa))
    assert_step_is_right(selective_scan_step, case)


@cases(100)
@given(case=conv_step_cases(), isa=ISAS)
def test_any_convolution_step_is_right(native, isa, case):
    native.set_cpu_isa(on_this_machine(native, isa))
    assert_step_is_right(causal_conv1d_step, case)


# ---- attention ------------------------------------------------------------------------------------------------------


@st.composite
def attention_cases(draw, step=False):
    """-> q, k, v, cos and sin by name, options, and a cache or None."""
    cu_seqlens = None
    length = 1 if step else draw(LENGTHS)
    if not step:
        cu_seqlens = draw(packing(length))
    batch = 1 if cu_seqlens is not None else draw(st.integers(0, 3))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 5), st.just(8)))
    head_dim = 2 * draw(st.one_of(st.integers(1, 12), st.sampled_from((16, 32, 64, 128))))
    half = head_dim // 2
    tables = ((batch, length, 1, half), (batch, length, kv_heads, half))
    if not step:
        tables = ((length, half), (length, kv_heads, half), *tables)
    shapes = {
        "q": (batch, length, kv_heads * group, head_dim),
        "k": (batch, length, kv_heads, head_dim),
        "v": (batch, length, kv_heads, head_dim),
        "cos": (table := draw(st.sampled_from(tables))),
        "sin": table,
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    named = {}
    for name, shape in shapes.items():
        own = dtype if name in "qkv" else draw(st.sampled_from(DTYPES))
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(own)
        named[name] = lay_out(values, draw(st.sampled_from(LAYOUTS)))
    window = draw(st.one_of(st.none(), st.integers(1, 12), st.sampled_from((40, 64, 1000))))
    options = {"window": window, "interleaved": draw(st.booleans())}
    options["scale"] = draw(st.one_of(st.none(), st.floats(0.01, 2)))
    cache = None
    if step or (cu_seqlens is None and draw(st.booleans())):
        most = draw(st.sampled_from((0, 5, 70, 300)))
        capacity = window if window is not None and draw(st.booleans()) else max(1, most + length, window or 0)
        if window is not None and capacity >= window:
            most *= 3  # gone round
        own = draw(st.sampled_from((dtype, *DTYPES)))
        cache = KVCache.empty(batch, capacity, kv_heads, head_dim, dtype=own)
        for held in (cache.k, cache.v):
            held.copy_(torch.randn(held.shape, generator=generator))
        cache.position.copy_(torch.randint(0, most + 1, (batch,), generator=generator))
        layout = draw(st.sampled_from(LAYOUTS[:5]))
        cache.k, cache.v = lay_out(cache.k, layout), lay_out(cache.v, layout)
    elif not step:
        options["cu_seqlens"] = cu_seqlens
        if window is None:
            options["causal"] = draw(st.booleans())
    if step:  # one position less an axis
        named = {name: tensor.squeeze(1) for name, tensor in named.items()}
        if named["cos"].shape[1] == 1 and draw(st.booleans()):
            named |= {name: named[name].squeeze(1) for name in ("cos", "sin")}
        if named["cos"].dim() == 3 and named["cos"].shape[1] != kv_heads:
            named |= {name: named[name].squeeze(1) for name in ("cos", "sin")}
    return named, options, cache


def rounding_units(named, options, cache):
    """What one unit of relative rounding may come to in each result. Weights follow scores, which are sums as large as
    scale |q| |k|; their gradients are differences of numbers as large as |grad y| |v|, whatever is left of them."""
    q, k, v, cos, sin = (t.double() for t in named.values())
    if q.numel() == 0:
        return dict.fromkeys(("y", *named), 0.0)
    earlier_k, earlier_v = (k[:0], v[:0]) if cache is None else (cache.k.double(), cache.v.double())
    turn = (cos.square() + sin.square()).sqrt().max().item()
    values = torch.cat([v.flatten(0, -2), earlier_v.flatten(0, -2)]).norm(dim=-1).max().item()
    keys = torch.cat([k.flatten(0, -2) * turn, earlier_k.flatten(0, -2)]).norm(dim=-1).max().item()
    queries, head_dim = turn * q.norm(dim=-1).max().item(), q.shape[-1]
    scale = options["scale"] or head_dim**-0.5
    score = scale * queries * keys
    slope = scale * head_dim**0.5 * values * (1 + score)  # the gradient of y is about 1 in each feature
    table = 2 * queries * keys / turn
    through = {"q": keys * turn, "k": queries * turn, "v": head_dim**0.5 * score / slope, "cos": table, "sin": table}
    return {"y": score * values, **{name: slope * unit for name, unit in through.items()}}


def attention_rounding(got, want, q, unit):
    """Of the result once; of the sums 64 times; and of rotated keys, y and, in the reference, queries, which are of q's
    dtype, four times."""
    scale = want.abs().max().item() if want.numel() else 0.0
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(got.dtype).eps * scale + 64 * torch.finfo(compute).eps * (scale + unit)
    return rounding + (4 * torch.finfo(q.dtype).eps * unit if q.dtype.itemsize == 2 else 0)


def attention_results(named, options, cache, backend, weight=None):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    cache = None if cache is None else KVCache(cache.k.clone(), cache.v.clone(), cache.position.clone())
    y = rope_attention(**leaves, **options, cache=cache, backend=backend)
    if weight is None:
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), weight.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, weight, cache


def doubled(cache):
    return None if cache is None else KVCache(cache.k.double(), cache.v.double(), cache.position)


def attention_is_right(native, isa, case):
    native.set_cpu_isa(isa)
    named, options, cache = case
    ours, weight, our_cache = attention_results(named, options, cache, "cpu")
    peer, _, peer_cache = attention_results(named, options, cache, "reference", weight)
    wide = {name: tensor.double() for name, tensor in named.items()}
    exact, _, _ = attention_results(wide, options, doubled(cache), "reference", weight)
    units = rounding_units(named, options, cache)
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape and got.dtype == peer[name].dtype, name
        rounding = attention_rounding(got, want, named["q"], units[name])
        assert distance(got, want) <= 2 * distance(peer[name], want) + rounding, name
    if cache is not None:
        assert torch.equal(our_cache.position, peer_cache.position)
        assert torch.equal(our_cache.v, peer_cache.v)
        assert (
            distance(our_cache.k, peer_cache.k.double())
            <= torch.finfo(our_cache.k.dtype).eps
            * 2
            * (peer_cache.k.double().abs().max().item() if cache.k.numel() else 0.0)
            + torch.finfo(named["k"].dtype).eps * 8
        )


def attention_step_is_right(native, isa, case):
    native.set_cpu_isa(isa)
    named, options, cache = case
    outcomes = []
    for backend, wide in (("cpu", False), ("reference", False), ("reference", True)):
        own = KVCache(cache.k.clone(), cache.v.clone(), cache.position.clone())
        inputs = {name: tensor.double() for name, tensor in named.items()} if wide else named
        outcomes.append(rope_attention_step(**inputs, cache=doubled(own) if wide else own, **options, backend=backend))
    ours, peer, exact = outcomes
    assert ours.shape == exact.shape and ours.dtype == peer.dtype
    rounding = attention_rounding(ours, exact, named["q"], rounding_units(named, options, cache)["y"])
    assert distance(ours, exact) <= 2 * distance(peer, exact) + rounding


@cases(60)
@given(case=attention_cases(), isa=ISAS)
def test_any_attention_is_right(native, isa, case):
    attention_is_right(native, on_this_machine(native, isa), case)


@cases(60)
@given(case=attention_cases(step=True), isa=ISAS)
def test_any_attention_step_is_right(native, isa, case):
    attention_step_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(1400)
@given(case=attention_cases(), isa=ISAS)
def test_many_attentions_are_right(native, isa, case):
    attention_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(480)
@given(case=attention_cases(step=True), isa=ISAS)
def test_many_attention_steps_are_right(native, isa, case):
    attention_step_is_right(native, on_this_machine(native, isa), case)


# ---- always an error that names the argument ------------------------------------------------------------------------

NOT_A_TENSOR = {"a number": 3, "text": "u", "a list": [1.0, 2.0], "a dtype": torch.float32}
MISFITS = ("integers", "booleans", "complex", "meta", "one axis less", "one axis more", "longer")


def spoil(tensor, how):
    if how == "nothing":
        return None
    if how in NOT_A_TENSOR:
        return NOT_A_TENSOR[how]
    if how == "integers":
        return tensor.int()
    if how == "booleans":
        return tensor != 0
    if how == "complex":
        return tensor.to(torch.complex64)
    if how == "meta":
        return tensor.to("meta")
    if how == "one axis less":
        return tensor[0]
    if how == "one axis more":
        return tensor.unsqueeze(0)
    axis = 0 if tensor.dim() < 3 else 2
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


OPS = {
    selective_scan: {
        "u": (2, 5, 3), "delta": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4), "D": (3,), "z": (2, 5, 3),
        "delta_bias": (3,), "initial_state": (2, 3, 4),
    },
    selective_scan_step: {
        "state": (2, 3, 4), "u": (2, 3), "delta": (2, 3), "A": (3, 4), "B": (2, 4), "C": (2, 4), "D": (3,),
        "z": (2, 3), "delta_bias": (3,),
    },
    causal_conv1d: {"x": (2, 5, 3), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)},
    causal_conv1d_step: {"state": (2, 3, 3), "x": (2, 3), "weight": (3, 4), "bias": (3,)},
}  # fmt: skip
OPTIONAL = ("D", "z", "delta_bias", "bias", "initial_state")
# Which argument is blamed when these do not fit the others is a matter of the order of the checks.
SHAPED_BY_OTHERS = ("u", "x", "A", "weight", "state")


@st.composite
def wrong_calls(draw):
    op = draw(st.sampled_from(list(OPS)))
    named = {name: torch.randn(shape, dtype=draw(st.sampled_from(DTYPES))) for name, shape in OPS[op].items()}
    for name in OPTIONAL:
        if name in named and draw(st.booleans()):
            del named[name]
    victim = draw(st.sampled_from(list(named)))
    ways = [*NOT_A_TENSOR, *MISFITS, *(() if victim in OPTIONAL else ("nothing",))]
    how = draw(st.sampled_from(ways))
    named[victim] = spoil(named[victim], how)
    gradient = draw(st.booleans())
    for tensor in named.values():
        if gradient and isinstance(tensor, torch.Tensor) and tensor.dtype in DTYPES and tensor.device.type == "cpu":
            tensor.requires_grad_()
    return op, named, victim, how


@pytest.mark.filterwarnings("ignore:.*running on backend 'reference'")  # steps with gradients
@cases(500)
@given(call=wrong_calls())
def test_a_wrong_call_is_an_error_that_names_the_argument(call):
    op, named, victim, how = call
    with pytest.raises((TypeError, ValueError)) as caught:
        op(**named)
    said = re.match(r"(\w+): (\w+): expected ", str(caught.value))
    assert said and said[1] == op.__name__ and said[2] in OPS[op], str(caught.value)
    if victim not in SHAPED_BY_OTHERS or how in NOT_A_TENSOR or how in ("nothing", "integers", "booleans", "complex"):
        assert said[2] == victim, str(caught.value)


# ---- memory ---------------------------------------------------------------------------------------------------------


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("states", [1, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward_is_at_most_twice_the_inputs(states, dtype):
    shapes = {"u": (2, 600, 64), "delta": (2, 600, 64), "z": (2, 600, 64), "A": (64, states), "B": (2, 600, states)}
    named = {k: torch.randn(shape, dtype=dtype).requires_grad_() for k, shape in shapes.items()}
    named["C"] = named["B"].detach().clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        selective_scan(**named, delta_softplus=True)
        assert saved and bytes_of(saved) <= 2 * bytes_of(named.values())
        saved.clear()
        x, weight = named["u"], torch.randn(64, 4, dtype=dtype)
        causal_conv1d(x, weight, activation="silu")
        assert saved and bytes_of(saved) <= 2 * bytes_of((x, weight))
