"""causal_conv1d and causal_conv1d_step: the definition, the C++ backend against it, and the contract of every op."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import causal_conv1d, causal_conv1d_step, native_library

LOADED, _WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)
NAMES = ("x", "weight", "bias", "initial_state")


def inputs(batch, length, channels, width, dtype=torch.float64, seed=0, sequences=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch if sequences is None else sequences, width - 1, channels),
    }
    return {k: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}


def outputs_and_gradients(named, backend, dtype=None, cu_seqlens=None, activation="silu"):
    named = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    y, final = causal_conv1d(
        **named, activation=activation, return_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    grads = torch.autograd.grad([y, final], list(named.values()), weights, materialize_grads=True)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(named, grads, strict=False))}


def test_reference_is_torchs_conv1d():
    named = inputs(2, 9, 5, 4)
    y, final = causal_conv1d(**named, activation="silu", return_final_state=True, backend="reference")
    padded = torch.cat([named["initial_state"], named["x"]], 1)
    want = F.conv1d(padded.transpose(1, 2), named["weight"].unsqueeze(1), named["bias"], groups=5).transpose(1, 2)
    torch.testing.assert_close(y, F.silu(want))
    assert torch.equal(final, padded[:, -3:])


@pytest.mark.parametrize("width", range(1, 17))
def test_native_is_the_reference_in_float64(width, isa):
    for shape in ((2, 7, 17), (1, 150, 40), (1, 1, 5)):
        for activation in (None, "silu"):
            named = inputs(*shape, width)
            want, got = (outputs_and_gradients(named, b, activation=activation) for b in ("reference", "cpu"))
            for name in want:
                assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype
                assert rms_ratio(got[name], want[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(dtype, isa):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract."""
    named = {k: v.to(dtype).double() for k, v in inputs(2, 300, 40, 4).items()}
    exact = outputs_and_gradients(named, "reference")
    peer = outputs_and_gradients(named, "reference", dtype)
    ours = outputs_and_gradients(named, "cpu", dtype)
    for name, want in exact.items():
        assert_accurate(ours[name], want, peer[name], 1e-6 if dtype == torch.float32 else 5e-3, name)


@pytest.mark.parametrize("dtype, tiny", [(torch.float32, 1e-36), (torch.float64, 1e-304)], ids=["float32", "float64"])
def test_silu_of_extremes(dtype, tiny, isa):
    """The activation alone: width 1, weight 1. tiny: silu(x) where e^-x leaves the dtype; from there on y is anything
    between that and zero, while PyTorch's silu(-inf) is NaN. Subnormal numbers count as zero."""
    limits = torch.finfo(dtype)
    sizes = [0, 0.3 * limits.tiny, 1e-30, 1e-3, 0.5, 1, 5, 17, 20, 60, 87, 88.5, 89, 104, 700, 709, 711, 1e4, 1e30]
    finite = torch.tensor([*sizes, 0.9 * limits.max], dtype=dtype)
    finite = torch.cat([finite, -finite])
    x = torch.cat([finite, torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=dtype)])
    channels = x.numel()
    leaf = x.expand(1, 8, channels).clone().requires_grad_()
    y = causal_conv1d(leaf, torch.ones(channels, 1, dtype=dtype), activation="silu", backend="cpu")
    (gradient,) = torch.autograd.grad(y[..., : finite.numel()].sum(), leaf)
    exact = finite.double().requires_grad_()
    want = F.silu(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    for row, slopes in zip(y[0].detach().double(), gradient[0].double(), strict=True):
        got, (positive, nan, negative) = row[: finite.numel()], row[finite.numel() :]
        # e^-x is good to 1.5 units in the last place; a sum, a quotient and a product follow.
        assert ((got - want).abs() <= 3 * limits.eps * want.abs() + tiny).all()
        # The slope multiplies x with 1 - sigmoid(x), which cancels until it is 0, from x = -log(eps / 2) on.
        assert ((slopes[: finite.numel()] - slope).abs() <= 2 * -math.log(limits.eps / 2) * limits.eps).all()
        assert positive == torch.inf and nan.isnan() and -tiny <= negative <= 0


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_optional_arguments(without):
    named = {k: v.requires_grad_() for k, v in inputs(2, 6, 3, 4).items() if k not in without}
    results = []
    for backend in ("reference", "cpu"):
        y = causal_conv1d(**named, activation="swish", backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(named.values()))])
    for want, got in zip(*results, strict=False):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(backend, packed):
    cu = torch.tensor([0, 1, 1, 6], dtype=torch.int32) if packed else None
    named = inputs(1 if packed else 2, 6, 3, 4, sequences=3 if packed else None)

    def call(*tensors):
        return causal_conv1d(
            **dict(zip(NAMES, tensors, strict=False)),
            activation="silu",
            return_final_state=True,
            cu_seqlens=cu,
            backend=backend,
        )

    assert torch.autograd.gradcheck(call, tuple(v.requires_grad_() for v in named.values()))


def test_double_backward_is_refused_clearly():
    named = {k: v.requires_grad_() for k, v in inputs(1, 5, 2, 3).items()}
    (dx,) = torch.autograd.grad(causal_conv1d(**named, backend="cpu").sum(), named["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d: .*no second derivative.*reference"):
        torch.autograd.grad(dx.sum(), named["weight"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cut", [0, 1, 2, 127, 128, 129, 140])
def test_two_halves_are_the_whole(backend, cut):
    named = inputs(2, 140, 5, 4)
    whole, end = causal_conv1d(**named, return_final_state=True, backend=backend)
    halves, state = [], named["initial_state"]
    for part in (named["x"][:, :cut], named["x"][:, cut:]):
        y, state = causal_conv1d(
            part, named["weight"], named["bias"], initial_state=state, return_final_state=True, backend=backend
        )
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole)
    assert torch.equal(state, end)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_packed_sequences_are_separate_ones(backend, width):
    bounds = [0, 0, 3, 140, 140, 141, 200]
    cu = torch.tensor(bounds, dtype=torch.int32)
    named = inputs(1, 200, 18, width, sequences=6)
    packed = outputs_and_gradients(named, backend, cu_seqlens=cu)
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        y, final = causal_conv1d(
            named["x"][:, begin:end], named["weight"], named["bias"], activation="silu",
            initial_state=named["initial_state"][s : s + 1], return_final_state=True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(packed["y"][:, begin:end], y)
        assert torch.equal(packed["final"][s : s + 1], final)
    want = outputs_and_gradients(named, "reference", cu_seqlens=cu)
    for name in want:
        assert rms_ratio(packed[name], want[name]) < 1e-13, name


@pytest.mark.parametrize("bounds", [[3, 7], [-5, 99], [0, 8, 4, 6], [4, 2, 0]], ids=str)
def test_wild_cu_seqlens_are_clamped(bounds, monkeypatch):
    cu = torch.tensor(bounds, dtype=torch.int32)
    named = inputs(1, 10, 4, 3, sequences=len(bounds) - 1)
    want, got = (outputs_and_gradients(named, backend, cu_seqlens=cu) for backend in ("reference", "cpu"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens"):
        causal_conv1d(**named, cu_seqlens=cu)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("width", [1, 2, 4, 16])
def test_steps_are_the_convolution(backend, width):
    named = inputs(2, 20, 21, width)
    y, final = causal_conv1d(**named, activation="silu", return_final_state=True, backend=backend)
    state = named["initial_state"].clone()
    for t in range(20):
        got = causal_conv1d_step(
            state, named["x"][:, t], named["weight"], named["bias"], activation="silu", backend=backend
        )
        torch.testing.assert_close(got, y[:, t])
    assert torch.equal(state, final)


def test_step_changes_its_state_in_place_and_says_so():
    named = inputs(1, 1, 4, 3, torch.float32)
    state = named["initial_state"]
    before, version = state.clone(), state._version
    causal_conv1d_step(state, named["x"][:, 0], named["weight"], backend="cpu")
    assert torch.equal(state[:, 0], before[:, 1]) and torch.equal(state[:, 1], named["x"][:, 0])
    assert state._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["time fastest", "strided", "slice"])
def test_any_strides_give_the_same_bytes(how, dtype, isa):
    named = inputs(2, 70, 19, 4, dtype)
    want = outputs_and_gradients(named, "cpu")

    def lay_out(t):
        nan = torch.full_like(t, torch.nan)
        if how == "time fastest":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t
        if how == "slice" and t.dim() == 3:
            return torch.cat([nan, t, nan], 2)[..., t.shape[2] : 2 * t.shape[2]]
        return torch.stack([t, nan], -1)[..., 0]

    leaves = {k: lay_out(v).requires_grad_() for k, v in named.items()}
    assert not leaves["x"].is_contiguous()
    y, final = causal_conv1d(**leaves, activation="silu", return_final_state=True, backend="cpu")
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    grads = torch.autograd.grad([y, final], list(leaves.values()), [lay_out(weights[0]), weights[1]])
    for (name, a), b in zip(want.items(), [y, final, *grads], strict=False):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (2, 0, 3, 1)], ids=str)
def test_nothing_to_do(backend, shape):
    named = {k: v.requires_grad_() for k, v in inputs(*shape).items()}
    y, final = causal_conv1d(**named, return_final_state=True, backend=backend)
    assert y.shape == shape[:3] and final.shape == (shape[0], shape[3] - 1, shape[2])
    if shape[1] == 0:
        assert torch.equal(final, named["initial_state"])
    (y.sum() + final.sum()).backward()


def test_outputs_are_written_whole(monkeypatch):
    named = inputs(2, 140, 19, 5, torch.float32)
    want = outputs_and_gradients(named, "cpu")
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")
    got = outputs_and_gradients(named, "cpu")
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(5, 3)}, ValueError, r"x: expected shape \(batch, length, channels\), got \(5, 3\)"),
        ({"x": torch.zeros(2, 5, 3).long()}, TypeError, "x: expected a float dtype"),
        ({"weight": torch.zeros(3, 17)}, ValueError, "weight: expected a width from 1 to 16, got 17"),
        ({"weight": torch.zeros(3, 0)}, ValueError, "weight: expected a width from 1 to 16, got 0"),
        ({"weight": torch.zeros(4, 3)}, ValueError, r"weight: .*channels=3"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: .*got \(3,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias: .*channels=3"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"initial_state": torch.zeros(2, 4, 3)}, ValueError, r"initial_state: .*width - 1=3"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens: expected dtype torch.int32"),
        ({"activation": "relu"}, ValueError, "activation: expected None or 'silu', got 'relu'"),
        ({"activation": ["silu"]}, ValueError, r"activation: expected None or 'silu', got \['silu'\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**{**inputs(2, 5, 3, 4, torch.float32), **change})


def test_the_same_bytes_with_any_number_of_threads():
    named = inputs(2, 300, 200, 4, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(named, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


def test_compiles_without_a_graph_break():
    named = {k: v.requires_grad_() for k, v in inputs(2, 10, 5, 4).items()}

    def call(**tensors):
        y, final = causal_conv1d(**tensors, activation="silu", return_final_state=True)
        return y * 2, final

    torch._dynamo.reset()
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y, final = run(**named)
        results.append([y, final, *torch.autograd.grad(y.sum() + final.sum(), list(named.values()))])
    for want, got in zip(*results, strict=False):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_opcheck():
    tensors = list(inputs(1, 6, 3, 4, torch.float32, sequences=2).values())
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    ops = torch.ops.jambatalk
    torch.library.opcheck(ops.causal_conv1d.default, (*tensors, cu, True))
    torch.library.opcheck(ops.causal_conv1d.default, (*tensors[:2], None, None, None, False))
    y, final = ops.causal_conv1d(*tensors, cu, True)
    torch.library.opcheck(ops.causal_conv1d_backward.default, (y, final, *tensors, cu, True))
    torch.library.opcheck(ops.causal_conv1d_backward.default, (y, None, *tensors[:2], None, None, None, False))
    torch.library.opcheck(ops.causal_conv1d_step.default, (final[:1].clone(), tensors[0][:, 0], *tensors[1:3], True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed, isa):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    batch, length, channels, width = draw(1, 4), draw(0, 300), draw(1, 70), draw(1, 17)
    cu, sequences = None, None
    if seed % 2:
        batch, sequences = 1, draw(1, 6)
        inner = torch.randint(0, length + 1, (sequences - 1,), generator=g).sort().values.tolist()
        cu = torch.tensor([0, *inner, length], dtype=torch.int32)
    named = inputs(batch, length, channels, width, seed=seed, sequences=sequences)
    want, got = (outputs_and_gradients(named, backend, cu_seqlens=cu) for backend in ("reference", "cpu"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=name)
