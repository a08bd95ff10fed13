"""Property tests of moe_route and moe_mlp on the CPU: whatever the shapes, dtypes, strides, routings and logits, no
crash and no wrong number; whatever is wrong with a call, an error that names the argument.

2,000 cases in all, the same ones in every run; `make check` runs most of them. Built from the parts of
test_properties.py.
"""

import math
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import DTYPES, ISAS, LAYOUTS, cases, distance, lay_out, on_this_machine

from jambatalk_kernels import Routing, moe_mlp, moe_route, native_library

LOADED, _WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)

ACTIVATIONS = ("swiglu", "gelu", "relu")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0)


@pytest.fixture
def native():
    import _jambatalk_native

    before = _jambatalk_native.cpu_isa()
    yield _jambatalk_native
    _jambatalk_native.set_cpu_isa(before)


@st.composite
def route_cases(draw):
    """-> logits, top_k, renormalize. Some logits are special numbers, some rows nothing but one of them."""
    tokens = draw(st.one_of(st.integers(0, 12), st.sampled_from((33, 150))))
    experts = draw(st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 64, 255, 256))))
    top_k = draw(st.one_of(st.integers(1, min(experts, 16)), st.just(experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from((0.1, 1, 30))
    )
    if draw(st.booleans()):
        logits = logits.round()  # ties
    for _ in range(draw(st.integers(0, 3)) if tokens else 0):
        row, value = draw(st.integers(0, tokens - 1)), draw(st.sampled_from(SPECIAL))
        if draw(st.booleans()):
            logits[row] = value
        else:
            logits[row, draw(st.integers(0, experts - 1))] = value
    logits = lay_out(logits.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))
    return logits, top_k, draw(st.booleans())


def has_softmax(logits):
    """Rows without NaN and +infinity, and with anything else than -infinity."""
    top = logits.double().max(-1).values if logits.shape[0] else logits.double().sum(-1)
    return top.isfinite()  # max gives NaN where there is one


def route_is_right(native, isa, case):
    native.set_cpu_isa(isa)
    logits, top_k, renormalize = case
    tokens, experts = logits.shape
    leaf, other, exact = logits.detach().requires_grad_(), logits.detach().requires_grad_(), logits.double()
    ours = moe_route(leaf, top_k, renormalize=renormalize, backend="cpu")
    theirs = moe_route(other, top_k, renormalize=renormalize, backend="reference")
    true = moe_route(exact, top_k, renormalize=renormalize, backend="reference")
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    # Indices: in range, the rows of every expert in the order of the assignments, whatever the logits.
    flat = ours.experts.flatten()
    assert ((flat >= 0) & (flat < experts)).all()
    assert torch.equal(ours.order, flat.argsort(stable=True).int())
    assert torch.equal(ours.offsets.diff(), flat.bincount(minlength=experts).int()) and ours.offsets[0] == 0
    assert all(len(set(row)) == top_k for row in ours.experts.tolist())
    # Rows without a softmax: NaN, and the first experts.
    sound = has_softmax(logits)
    assert (ours.experts[~sound] == torch.arange(top_k)).all()
    assert ours.probabilities[~sound].isnan().all() and ours.weights[~sound].isnan().all()
    # The others: as exact as PyTorch's softmax, the largest first, ties to the lowest.
    eps = torch.finfo(ours.weights.dtype).eps
    got, want = ours.probabilities[sound], true.probabilities[sound]
    assert distance(got, want) <= 2 * distance(theirs.probabilities[sound], want) + 4 * eps
    chosen = ours.experts[sound].long()
    ranked = got.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(chosen, ranked)
    picked = got.gather(1, chosen)
    if renormalize:
        picked = picked / picked.sum(-1, keepdim=True)
    torch.testing.assert_close(ours.weights[sound], picked, rtol=(4 + top_k) * eps, atol=0)  # a sum of top_k terms
    if not sound.all():
        return
    torch.testing.assert_close(ours.probability_sums, ours.probabilities.sum(0), rtol=256 * eps, atol=256 * eps)
    if not torch.equal(ours.experts, theirs.experts):
        return  # numbers that are equal but for rounding: another choice is another function
    outputs = ("weights", "probabilities", "probability_sums")
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(getattr(ours, name).shape, generator=generator).to(ours.weights.dtype) for name in outputs]
    grads = [
        torch.autograd.grad([getattr(routing, name) for name in outputs], x, incoming)[0]
        for routing, x in ((ours, leaf), (theirs, other))
    ]
    # Both are sums of `experts` terms, each as large as an incoming gradient at most, and rounded once.
    scale = max((g.abs().max().item() for g in incoming if g.numel()), default=0.0) * (1 + renormalize * top_k)
    rounding = (8 + experts) * eps * scale + torch.finfo(logits.dtype).eps * scale
    if renormalize:
        rounding = rounding / max(picked_share(theirs), eps)
    assert distance(grads[0], grads[1].double()) <= rounding


def picked_share(routing):
    """The least sum of the chosen probabilities, by which renormalised gradients are divided."""
    picked = routing.probabilities.detach().gather(1, routing.experts.long())
    return picked.sum(-1).min().item() if picked.numel() else 1.0


@st.composite
def mlp_cases(draw):
    """-> the inputs of moe_mlp, the logits and top_k that route them, the activation."""
    size = st.one_of(st.integers(0, 20), st.sampled_from((31, 32, 33, 64, 97)))
    tokens = draw(st.one_of(st.integers(0, 18), st.sampled_from((33, 80))))
    d, hidden, d_out = draw(size), draw(size), draw(size)
    experts = draw(st.one_of(st.integers(1, 9), st.sampled_from((33, 256))))
    if experts > 9:
        d, hidden, d_out = min(d, 20), min(hidden, 20), min(d_out, 20)
    if draw(st.integers(0, 9)) == 0:
        d = 270  # more than one block of terms
    top_k = draw(st.one_of(st.integers(1, min(experts, 16)), st.just(min(experts, 16)), st.just(1)))
    activation = draw(st.sampled_from(ACTIVATIONS))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*sizes):
        values = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
        return lay_out(values, draw(st.sampled_from(LAYOUTS)))

    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        logits[:, experts // 2 :] -= 20  # half of the experts get nothing
    rows = 2 * hidden if activation == "swiglu" else hidden
    return (normal(tokens, d), normal(experts, rows, d), normal(experts, d_out, hidden)), logits, top_k, activation


def error_of_pytorch(theirs, want):
    """Nothing is allowed for where PyTorch itself gives NaN for a finite result: seen of a product over no numbers in
    bfloat16, on a processor with AMX."""
    error = distance(theirs, want)
    return 0.0 if math.isnan(error) and want.isfinite().all() else error


def mlp_is_right(native, isa, case):
    """At most twice the error of PyTorch in the same dtype, plus a few roundings of the largest number (PyTorch may be
    exact by luck); the same bytes with and without gradients unless so few assignments that they go another way."""
    native.set_cpu_isa(isa)
    inputs, logits, top_k, activation = case
    dtype = inputs[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    routing = moe_route(logits.to(compute), top_k, backend="reference")
    outcomes = []
    for backend, to in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(to).requires_grad_() for t in inputs]
        weights = routing.weights.to(torch.promote_types(to, torch.float32)).requires_grad_()
        y = moe_mlp(leaves[0], routing._replace(weights=weights), *leaves[1:], activation=activation, backend=backend)
        assert y.dtype == to and y.shape == (inputs[0].shape[0], inputs[2].shape[1])
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
        wanted = [*leaves, weights]
        grads = torch.autograd.grad(y, wanted, grad.to(to), materialize_grads=True)
        outcomes.append(dict(zip(("y", "dx", "dw_in", "dw_out", "dweights"), (y.detach(), *grads), strict=True)))
    ours, theirs, exact = outcomes
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape, name
        largest = want.abs().max().item() if want.numel() else 0.0
        rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(compute).eps) * (largest + 1e-3)
        assert distance(got, want) <= 2 * error_of_pytorch(theirs[name], want) + rounding, name
    with torch.no_grad():
        y = moe_mlp(inputs[0], routing, *inputs[1:], activation=activation, backend="cpu")
    if routing.order.numel() > 16:
        assert torch.equal(y, ours["y"])
    else:
        largest = exact["y"].abs().max().item() if y.numel() else 0.0
        rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(compute).eps) * (largest + 1e-3)
        assert distance(y, exact["y"]) <= 2 * error_of_pytorch(theirs["y"], exact["y"]) + rounding


@cases(60)
@given(case=route_cases(), isa=ISAS)
def test_any_routing_is_right(native, isa, case):
    route_is_right(native, on_this_machine(native, isa), case)


@cases(60)
@given(case=mlp_cases(), isa=ISAS)
def test_any_mlp_is_right(native, isa, case):
    mlp_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(740)
@given(case=route_cases(), isa=ISAS)
def test_many_routings_are_right(native, isa, case):
    route_is_right(native, on_this_machine(native, isa), case)


@pytest.mark.slow
@cases(840)
@given(case=mlp_cases(), isa=ISAS)
def test_many_mlps_are_right(native, isa, case):
    mlp_is_right(native, on_this_machine(native, isa), case)


# ---- always an error that names the argument ------------------------------------------------------------------------

NOT_A_TENSOR = {"a number": 3, "text": "x", "a list": [1.0, 2.0], "nothing": None}
MISFITS = ("integers", "booleans", "complex", "one axis less", "one axis more")
INDICES = ("experts", "order", "offsets")


def spoil(tensor, how):
    if how in NOT_A_TENSOR:
        return NOT_A_TENSOR[how]
    if how == "one axis less":
        return tensor[0]
    if how == "one axis more":
        return tensor[None]
    if how == "longer":
        return torch.cat([tensor, tensor[:1]])
    return tensor.to({"integers": torch.int64, "booleans": torch.bool, "complex": torch.complex64}[how])


@st.composite
def wrong_calls(draw):
    """-> a call and the argument that it must be refused for."""
    dtype = draw(st.sampled_from(DTYPES))
    logits, x, w_in, w_out = (torch.randn(size).to(dtype) for size in ((5, 4), (5, 6), (4, 14, 6), (4, 6, 7)))
    victim = draw(st.sampled_from(("logits", "top_k", "renormalize", "x", "w_in", "w_out", "activation", "routing")))
    how = draw(st.sampled_from((*NOT_A_TENSOR, *MISFITS)))
    if victim == "logits":
        return lambda: moe_route(spoil(logits, how), 2), "moe_route", victim
    if victim == "top_k":
        top_k = draw(st.sampled_from((0, -1, 5, 2.0, True, "2", None, torch.tensor(2))))
        return lambda: moe_route(logits, top_k), "moe_route", victim
    if victim == "renormalize":
        flag = draw(st.sampled_from((0, 1, None, "yes", torch.tensor(True))))
        return lambda: moe_route(logits, 2, renormalize=flag), "moe_route", victim
    routing = moe_route(logits, 2)
    options = {"activation": "swiglu"}
    if victim == "activation":
        options["activation"] = draw(st.sampled_from(("tanh", "", None, 3, "SwiGLU")))
    elif victim == "routing":
        if draw(st.booleans()):
            routing = draw(st.sampled_from((None, 3, "routing", tuple(routing), routing._asdict())))
        else:
            field = draw(st.sampled_from(("weights", "probabilities", *INDICES)))
            # Routing's indices are integers: what spoils them is another width, or none.
            ways = ("longer", "booleans", "complex", "one axis less", "one axis more", *NOT_A_TENSOR)
            bad = spoil(getattr(routing, field), draw(st.sampled_from(ways)))
            routing = routing._replace(**{field: bad})
    else:
        how = draw(st.sampled_from((*NOT_A_TENSOR, *MISFITS, "longer")))
        named = {"x": x, "w_in": w_in, "w_out": w_out}
        x, w_in, w_out = (spoil(value, how) if name == victim else value for name, value in named.items())
        if victim == "x" and how == "longer":
            victim = "routing"  # it is one token short then
    gradient = draw(st.booleans())
    for tensor in (x, w_in, w_out):
        if gradient and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    return lambda: moe_mlp(x, routing, w_in, w_out, **options), "moe_mlp", victim


@cases(300)
@given(call=wrong_calls())
def test_a_wrong_call_is_an_error_that_names_the_argument(call):
    run, op, victim = call
    with pytest.raises((TypeError, ValueError)) as caught:
        run()
    said = re.match(r"(\w+): (\w+)(?:\.\w+)?: expected ", str(caught.value))
    assert said and said[1] == op, str(caught.value)
    assert said[2] == victim, str(caught.value)


def test_a_routing_of_other_indices_is_refused():
    """Integers of another width are no int32."""
    logits, x, w_in, w_out = (torch.randn(size) for size in ((5, 4), (5, 6), (4, 14, 6), (4, 6, 7)))
    routing = moe_route(logits, 2)
    for field in INDICES:
        wrong = Routing(**(routing._asdict() | {field: getattr(routing, field).long()}))
        with pytest.raises(TypeError, match=rf"moe_mlp: routing.{field}: expected an int32 tensor"):
            moe_mlp(x, wrong, w_in, w_out)
