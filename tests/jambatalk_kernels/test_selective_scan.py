"""selective_scan and selective_scan_step: the definition, the C++ backend against it, and the contract of every op."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, rms_ratio

from jambatalk_kernels import native_library, selective_scan, selective_scan_step, use_backend
from jambatalk_kernels.selective_scan.reference import scan_reference

LOADED, _WHY = native_library()
pytestmark = pytest.mark.skipif(
    not LOADED and os.environ.get("JAMBATALK_BUILD") == "none", reason="built with JAMBATALK_BUILD=none"
)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def inputs(batch, length, channels, states, dtype=torch.float64, seed=0, sequences=None):
    """Numbers like a trained layer's: decays between 0.05 and 1, delta around 0.3."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    named = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) * 0.5 - 1,
        "A": -torch.exp(normal(channels, states) * 0.5),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) * 0.1,
        "initial_state": normal(batch if sequences is None else sequences, channels, states),
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def outputs_and_gradients(named, backend, dtype=None, cu_seqlens=None, seed=1):
    """y, final state and the gradient of every input, all with random weights on the outputs."""
    named = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    y, final = selective_scan(
        **named, delta_softplus=True, return_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    grads = torch.autograd.grad([y, final], list(named.values()), weights, allow_unused=True)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(named, grads, strict=False))}


# ---- the definition -------------------------------------------------------------------------------------------------


def test_reference_is_the_formula():
    named = inputs(1, 4, 2, 3)
    y, final = selective_scan(**named, delta_softplus=True, return_final_state=True, backend="reference")
    at = {k: v.tolist() for k, v in named.items()}
    for c in range(2):
        h = at["initial_state"][0][c]
        for t in range(4):
            delta = math.log1p(math.exp(at["delta"][0][t][c] + at["delta_bias"][c]))
            u, z = at["u"][0][t][c], at["z"][0][t][c]
            h = [math.exp(delta * a) * s + delta * u * b for a, s, b in zip(at["A"][c], h, at["B"][0][t], strict=False)]
            want = sum(s * cc for s, cc in zip(h, at["C"][0][t], strict=False)) + at["D"][c] * u
            assert y[0, t, c].item() == pytest.approx(want * z / (1 + math.exp(-z)), rel=1e-12)
        assert final[0, c].tolist() == pytest.approx(h, rel=1e-12)


def test_how_far_the_exact_hold_is_from_the_simplified_one():
    """B-hat = (exp(delta A) - 1) / A is delta (1 + delta A / 2 + ...): apart by half of delta |A| to first order."""
    named = inputs(1, 32, 4, 3)
    named["A"] = named["A"].clone()
    named["A"][0, 0] = 0.0  # the limit there is delta itself
    named["A"].requires_grad_()
    apart = []
    for delta in (0.1, 0.01, 0.001):
        args = [named["u"], torch.full_like(named["u"], delta), named["A"], named["B"], named["C"]]
        simple, _ = scan_reference(*args)
        exact, _ = scan_reference(*args, exact_hold=True)
        apart.append(rms_ratio(simple.detach(), exact.detach()))
        assert torch.isfinite(torch.autograd.grad(exact.sum(), named["A"])[0]).all()
    typical = named["A"].detach().abs().mean().item() / 2
    for delta, distance in zip((0.1, 0.01, 0.001), apart, strict=False):
        assert 0.3 * typical * delta < distance < 3 * typical * delta, (delta, distance)
    # One step is exact in closed form: from h = 0, h_1 = (exp(delta A) - 1) / A B u.
    one = scan_reference(*[t[:, :1] if t.dim() == 3 else t for t in args], exact_hold=True)[1]
    A = named["A"].detach()[1:]
    want = torch.expm1(0.001 * A) / A * named["B"][0, 0] * named["u"][0, 0, 1:, None]
    torch.testing.assert_close(one.detach()[0, 1:], want)


# ---- the C++ backend against it -------------------------------------------------------------------------------------

SHAPES = [
    (2, 5, 3, 4),
    (1, 70, 17, 16),  # more than one chunk, one channel more than a vector
    (2, 130, 40, 5),
    (1, 1, 64, 17),
    (3, 64, 16, 1),
    (1, 300, 33, 80),  # a chunk longer than 64
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_is_the_reference_in_float64(shape, isa):
    named = inputs(*shape)
    want, got = (outputs_and_gradients(named, backend) for backend in ("reference", "cpu"))
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        assert rms_ratio(got[name], want[name]) < 1e-13, name


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state", "all"])
def test_every_argument_is_optional(without):
    named = inputs(2, 9, 5, 4)
    left_out = ("D", "z", "delta_bias", "initial_state") if without == "all" else (without,)
    named = {k: v.requires_grad_() for k, v in named.items() if k not in left_out}
    results = []
    for backend in ("reference", "cpu"):
        for softplus in (False, True):
            y = selective_scan(**named, delta_softplus=softplus, backend=backend)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(named.values()))])
    for want, got in zip(results[:2], results[2:], strict=False):
        for a, b in zip(want, got, strict=False):
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_rule(dtype, isa):
    """At most twice the error of PyTorch at the same precision, and the absolute bars of the contract."""
    named = {k: v.to(dtype).double() for k, v in inputs(2, 300, 40, 16).items()}  # the same numbers for everyone
    exact = outputs_and_gradients(named, "reference")
    peer = outputs_and_gradients(named, "reference", dtype)
    ours = outputs_and_gradients(named, "cpu", dtype)
    again = outputs_and_gradients({k: v.to(dtype) for k, v in named.items()}, "cpu")
    bar = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}[dtype]
    for name, want in exact.items():
        assert ours[name].dtype == (torch.float32 if name == "final" else dtype)
        assert_accurate(ours[name], want, peer[name], bar, name)
        assert torch.equal(ours[name], again[name])


def test_mixed_dtypes():
    named = inputs(1, 20, 6, 4)
    half, single = torch.bfloat16, torch.float32
    dtypes = (half, single, single, torch.float16, half, single, half)
    mixed = {k: v.to(d) for (k, v), d in zip(named.items(), dtypes + (torch.float64, torch.float32), strict=False)}
    want, got = (outputs_and_gradients(mixed, backend) for backend in ("reference", "cpu"))
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert rms_ratio(got[name], want[name]) < 5e-3, name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    named = {k: v.requires_grad_() for k, v in inputs(2, 4, 3, 2).items()}

    def call(*tensors):
        return selective_scan(
            **dict(zip(NAMES, tensors, strict=False)), delta_softplus=True, return_final_state=True, backend=backend
        )

    assert torch.autograd.gradcheck(call, tuple(named.values()))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_packed(backend):
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    named = {k: v.requires_grad_() for k, v in inputs(1, 5, 2, 2, sequences=3).items()}

    def call(*tensors):
        return selective_scan(
            **dict(zip(NAMES, tensors, strict=False)), return_final_state=True, cu_seqlens=cu, backend=backend
        )

    assert torch.autograd.gradcheck(call, tuple(named.values()))


def test_double_backward_is_refused_clearly():
    named = {k: v.requires_grad_() for k, v in inputs(1, 3, 2, 2).items()}
    y = selective_scan(**named, backend="cpu")
    (du,) = torch.autograd.grad(y.sum(), named["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: .*no second derivative.*reference"):
        torch.autograd.grad(du.sum(), named["A"])
    y = selective_scan(**named, backend="reference")
    (du,) = torch.autograd.grad(y.sum(), named["u"], create_graph=True)
    assert torch.autograd.grad(du.sum(), named["A"])[0].abs().sum() > 0


# ---- states and packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cut", [0, 1, 37, 64, 65, 128, 150])
def test_two_halves_are_the_whole(backend, cut):
    named = inputs(2, 150, 5, 4)
    whole, end = selective_scan(**named, return_final_state=True, backend=backend)
    halves, state = [], named["initial_state"]
    for part in (slice(None, cut), slice(cut, None)):
        rest = {k: v[:, part] if v.dim() == 3 else v for k, v in named.items() if k != "initial_state"}
        y, state = selective_scan(**rest, initial_state=state, return_final_state=True, backend=backend)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_sequences_are_separate_ones(backend):
    bounds = [0, 0, 3, 70, 70, 71, 200]
    cu = torch.tensor(bounds, dtype=torch.int32)
    named = inputs(1, 200, 18, 5, sequences=6)
    packed = outputs_and_gradients(named, backend, cu_seqlens=cu)
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = {k: v[:, begin:end] if k in ("u", "delta", "B", "C", "z") else v for k, v in named.items()}
        alone["initial_state"] = named["initial_state"][s : s + 1]
        y, final = selective_scan(**alone, delta_softplus=True, return_final_state=True, backend=backend)
        torch.testing.assert_close(packed["y"][:, begin:end], y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(packed["final"][s : s + 1], final, rtol=1e-12, atol=1e-12)
    want = outputs_and_gradients(named, "reference", cu_seqlens=cu)
    for name in want:
        assert rms_ratio(packed[name], want[name]) < 1e-13, name


@pytest.mark.parametrize("bounds", [[3, 7], [-5, 99], [0, 8, 4, 6], [4, 2, 0]], ids=str)
def test_wild_cu_seqlens_are_clamped(bounds, monkeypatch):
    cu = torch.tensor(bounds, dtype=torch.int32)
    named = inputs(1, 10, 4, 3, sequences=len(bounds) - 1)
    want, got = (outputs_and_gradients(named, backend, cu_seqlens=cu) for backend in ("reference", "cpu"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)
    if bounds[0] > 0:
        assert (got["y"][:, : bounds[0]] == 0).all()
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens"):
        selective_scan(**named, cu_seqlens=cu)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("states", [1, 16, 19])
def test_steps_are_the_scan(backend, states):
    named = inputs(2, 6, 21, states)
    y, final = selective_scan(**named, delta_softplus=True, return_final_state=True, backend=backend)
    state = named.pop("initial_state").clone()
    for t in range(6):
        row = {k: v[:, t] if v.dim() == 3 else v for k, v in named.items()}
        got = selective_scan_step(state, **row, delta_softplus=True, backend=backend)
        torch.testing.assert_close(got, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_of_every_isa_and_layout(isa, dtype):
    named = inputs(2, 1, 21, 16, torch.float32)
    start = named.pop("initial_state").to(dtype)
    row = {k: v[:, 0] if v.dim() == 3 else v for k, v in named.items()}
    want_state = start.clone()
    want = selective_scan_step(want_state, **row, backend="reference")
    for layout in (start.clone(), start.transpose(1, 2).contiguous().transpose(1, 2)):
        got = selective_scan_step(layout, **row, backend="cpu")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layout, want_state)


def test_step_changes_its_state_in_place_and_says_so():
    named = inputs(1, 1, 4, 3, torch.float32)
    state = named.pop("initial_state")
    row = {k: v[:, 0] if v.dim() == 3 else v for k, v in named.items()}
    before, pointer, version = state.clone(), state.data_ptr(), state._version
    selective_scan_step(state, **row, backend="cpu")
    assert state.data_ptr() == pointer and not torch.equal(state, before)
    assert state._version > version  # autograd would notice that a saved state was overwritten


def test_step_with_gradients_runs_on_the_reference_and_warns():
    named = inputs(1, 1, 4, 3)
    state = named.pop("initial_state")
    row = {k: v[:, 0] if v.dim() == 3 else v for k, v in named.items()}
    row["u"].requires_grad_()
    from jambatalk_kernels import backends

    backends._warned.clear()
    with pytest.warns(RuntimeWarning, match="selective_scan_step.*gradients"):
        y = selective_scan_step(state, **row)
    assert torch.autograd.grad(y.sum(), row["u"])[0].abs().sum() > 0
    with torch.no_grad(), use_backend("cpu"):
        selective_scan_step(state.detach(), **row)


# ---- layouts, edges, errors -----------------------------------------------------------------------------------------


def _relayout(tensor, how):
    if tensor.dim() != 3:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0] if how == "strided" else tensor
    if how == "time fastest":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if how == "slice":  # rows of a wider matrix, as in_proj gives them
        return torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], 2)[
            ..., tensor.shape[2] : 2 * tensor.shape[2]
        ]
    if how == "batch inside":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    raise ValueError(how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["time fastest", "strided", "slice", "batch inside"])
def test_any_strides_give_the_same_bytes(how, dtype, isa):
    named = inputs(2, 70, 19, 5, dtype)
    want = outputs_and_gradients(named, "cpu")
    results = []
    laid_out = {k: _relayout(v, how) for k, v in named.items()}
    assert not laid_out["u"].is_contiguous()
    leaves = {k: v.requires_grad_() for k, v in laid_out.items()}
    y, final = selective_scan(**leaves, delta_softplus=True, return_final_state=True, backend="cpu")
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    weights[0] = _relayout(weights[0], how)
    results = [y, final, *torch.autograd.grad([y, final], list(leaves.values()), weights)]
    for (name, a), b in zip(want.items(), results, strict=False):
        assert torch.equal(a, b), name


def test_expanded_inputs():
    named = inputs(1, 12, 4, 3)
    expanded = {k: v.expand(3, *v.shape[1:]) if v.dim() == 3 else v for k, v in named.items()}
    y = selective_scan(**expanded, backend="cpu")
    torch.testing.assert_close(y, selective_scan(**named, backend="cpu").expand_as(y), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4), (0, 0, 3, 1)], ids=str)
def test_nothing_to_do(backend, shape):
    named = {k: v.requires_grad_() for k, v in inputs(*shape).items()}
    y, final = selective_scan(**named, return_final_state=True, backend=backend)
    assert y.shape == shape[:3] and final.shape == (shape[0], shape[2], shape[3])
    if shape[1] == 0:
        assert torch.equal(final, named["initial_state"])
    grads = torch.autograd.grad(y.sum() + final.sum(), [named["initial_state"], named["A"]], allow_unused=True)
    if shape[0] and shape[1] == 0:
        assert (grads[0] == 1).all()


def test_outputs_are_written_whole(monkeypatch):
    """With JAMBATALK_KERNELS_CHECK=1 new memory is full of NaN: whatever is not written shows."""
    named = inputs(2, 70, 19, 5, torch.float32)
    want = outputs_and_gradients(named, "cpu")
    monkeypatch.setenv("JAMBATALK_KERNELS_CHECK", "1")
    got = outputs_and_gradients(named, "cpu")
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_extreme_numbers(isa):
    """Decays that vanish, softplus far out on both sides, overflow to infinity and NaN where PyTorch has them."""
    values = [-1e4, -200.0, -30.0, -1.0, 0.0, 1.0, 19.9, 20.1, 60.0, 88.0, 300.0]
    for dtype in (torch.float32, torch.float64):
        delta = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
        ones = torch.ones_like(delta)
        A = torch.tensor([[-1.0, -1e3, 0.0]], dtype=dtype).repeat(len(values), 1)
        BC = torch.ones(1, 1, 3, dtype=dtype)
        start = torch.ones(1, len(values), 3, dtype=dtype)
        results = [
            selective_scan(
                ones, delta, A, BC, BC, z=delta, delta_softplus=True, initial_state=start, return_final_state=True,
                backend=backend,
            )
            for backend in ("reference", "cpu")
        ]  # fmt: skip
        for want, got in zip(*results, strict=False):
            torch.testing.assert_close(got, want, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-30)
        grow = selective_scan(ones, delta.clamp(min=0), -A, BC, BC, initial_state=start, backend="cpu")
        want = selective_scan(ones, delta.clamp(min=0), -A, BC, BC, initial_state=start, backend="reference")
        torch.testing.assert_close(grow, want, rtol=5e-5 if dtype == torch.float32 else 1e-12, atol=0)
        for poisoned in ("u", "delta", "B"):
            args = {"u": ones.clone(), "delta": ones.clone(), "B": BC.clone()}
            args[poisoned][..., 0] = torch.nan
            y = selective_scan(A=A, C=BC, **args, delta_softplus=True, backend="cpu")
            assert y[0, 0, 0].isnan()


def _bad(**changes):
    named = inputs(2, 5, 3, 4, torch.float32)
    named.update(changes)
    return named


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"u": 3}, TypeError, "u: expected a tensor, got int"),
        ({"u": torch.zeros(2, 5)}, ValueError, r"u: expected shape \(batch, length, channels\), got \(2, 5\)"),
        ({"delta": torch.zeros(2, 5, 1)}, ValueError, r"delta: .*channels=3.*got \(2, 5, 1\)"),
        ({"delta": torch.zeros(2, 5, 3, dtype=torch.int32)}, TypeError, "delta: expected a float dtype.*int32"),
        ({"A": torch.zeros(4, 3)}, ValueError, r"A: .*channels=3, states.*got \(4, 3\)"),
        ({"A": torch.zeros(3, 0)}, ValueError, "A: expected at least one state"),
        ({"B": torch.zeros(2, 4, 4)}, ValueError, r"B: .*length=5.*got \(2, 4, 4\)"),
        ({"C": torch.zeros(1, 5, 4)}, ValueError, r"C: .*batch=2"),
        ({"C": None}, TypeError, "C: expected a tensor, got NoneType"),
        ({"D": torch.zeros(1)}, ValueError, r"D: .*channels=3"),
        ({"z": torch.zeros(2, 5, 3, dtype=torch.bool)}, TypeError, "z: expected a float dtype"),
        ({"z": torch.zeros(2, 5, 3, device="meta")}, ValueError, "z: expected device cpu, got meta"),
        ({"delta_bias": torch.zeros(3, 1)}, ValueError, r"delta_bias: .*got \(3, 1\)"),
        ({"initial_state": torch.zeros(1, 3, 4)}, ValueError, r"initial_state: .*batch=2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens: expected dtype torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "batch 1, got batch 2"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: .*list"),
        ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, ValueError, "cu_seqlens: .*one sequence or more"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="selective_scan: .*" + message):
        selective_scan(**_bad(**change))


def test_step_errors_name_the_argument():
    row = {k: v[:, 0] if v.dim() == 3 else v for k, v in _bad().items() if k != "initial_state"}
    with pytest.raises(ValueError, match=r"selective_scan_step: state: .*channels=3, states=4.*got \(2, 4, 3\)"):
        selective_scan_step(torch.zeros(2, 4, 3), **row)
    with pytest.raises(ValueError, match=r"selective_scan_step: delta: "):
        selective_scan_step(torch.zeros(2, 3, 4), **{**row, "delta": torch.zeros(2, 4)})


def test_the_op_itself_refuses_wrong_shapes():
    """Called past the Python checks, the native op raises; it does not read wild memory."""
    u, A, BC = torch.zeros(1, 4, 3), torch.zeros(3, 2), torch.zeros(1, 4, 2)
    op = torch.ops.jambatalk.selective_scan
    for bad in (
        (u, u[:, :2], A, BC, BC),
        (u, u, A[:2], BC, BC),
        (u, u, A, BC[..., :1], BC),
        (u[0], u, A, BC, BC),
        (u.int(), u, A, BC, BC),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(*bad, None, None, None, None, None, False, False)


# ---- the rest of the contract ---------------------------------------------------------------------------------------


def test_the_same_bytes_with_any_number_of_threads():
    named = inputs(2, 200, 80, 16, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(named, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize("states", [1, 16, 256])
def test_memory_saved_for_backward_does_not_grow_with_states(states):
    named = inputs(1, 2048, 16, states, torch.float32)
    *_, saved = torch.ops.jambatalk.selective_scan(
        *(named[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")), None, True, True
    )
    assert saved.numel() <= named["u"].numel()


@pytest.mark.parametrize("length", [0, 1, 32, 33, 65])
def test_memory_saved_for_backward_is_small_for_short_sequences_too(length):
    """A chunk that starts from the initial state saves none of its own."""
    named = inputs(8, length, 32, 16, torch.float32)
    *_, saved = torch.ops.jambatalk.selective_scan(
        *(named[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")), None, True, True
    )
    assert saved.shape[1] == max(length - 1, 0) // 32
    assert saved.numel() <= named["u"].numel()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(delta_softplus="yes"), "delta_softplus: expected a bool, got str"),
        (dict(u=torch.zeros(2, 3, 5).to_sparse()), "u: expected a dense tensor, got a torch.sparse_coo one"),
    ],
)
def test_what_only_the_checks_in_words_can_see(change, message):
    named = inputs(2, 3, 5, 4, torch.float32)
    with pytest.raises(TypeError, match=f"selective_scan: {message}"):
        selective_scan(**named | change)


def test_compiles_without_a_graph_break():
    named = {k: v.requires_grad_() for k, v in inputs(2, 10, 5, 4).items()}

    def call(**tensors):
        y, final = selective_scan(**tensors, delta_softplus=True, return_final_state=True)
        return y * 2, final

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (call, compiled):
        y, final = run(**named)
        results.append([y, final, *torch.autograd.grad(y.sum() + final.sum(), list(named.values()))])
    for want, got in zip(*results, strict=False):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_steps_compile_without_a_graph_break():
    named = inputs(2, 1, 5, 4)
    start = named.pop("initial_state")
    row = {k: v[:, 0] if v.dim() == 3 else v for k, v in named.items()}

    def call(state):
        return selective_scan_step(state, **row) + 1

    torch._dynamo.reset()
    states = [start.clone(), start.clone()]
    want = call(states[0])
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(states[1])
    assert torch.equal(got, want) and torch.equal(*states) and not torch.equal(states[0], start)


def test_opcheck():
    named = inputs(1, 6, 3, 4, torch.float32, sequences=2)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    tensors = [named[k] for k in NAMES]
    ops = torch.ops.jambatalk
    torch.library.opcheck(ops.selective_scan.default, (*tensors, cu, True, True))
    torch.library.opcheck(ops.selective_scan.default, (*tensors[:5], None, None, None, None, None, False, False))
    y, final, saved = ops.selective_scan(*tensors, cu, True, True)
    torch.library.opcheck(ops.selective_scan_backward.default, (y, None, *tensors, cu, saved, True))
    torch.library.opcheck(
        ops.selective_scan_backward.default, (None, final[:1], *tensors[:5], None, None, None, None, None, saved, True)
    )
    row = [t[:, 0] if t.dim() == 3 else t for t in tensors[:8]]
    torch.library.opcheck(ops.selective_scan_step.default, (final[:1].clone(), *row, True))


def test_meta_tensors_have_shapes():
    named = {k: v.to("meta") for k, v in inputs(2, 5, 3, 4, torch.bfloat16).items()}
    y, final = selective_scan(**named, return_final_state=True)
    assert y.shape == (2, 5, 3) and y.dtype == torch.bfloat16
    assert final.shape == (2, 3, 4) and final.dtype == torch.float32


def test_autocast_leaves_dtypes_alone():
    named = inputs(1, 5, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**named)
    assert torch.equal(y, selective_scan(**named))


@pytest.mark.slow
def test_long_sequences_stay_accurate():
    """20,000 positions with slow decays: rounding does not pile up."""
    named = {k: v.float().double() for k, v in inputs(1, 20_000, 8, 16).items()}
    named["A"] = named["A"] * 1e-3
    exact = selective_scan(**named, delta_softplus=True, backend="cpu")
    y = selective_scan(**{k: v.float() for k, v in named.items()}, delta_softplus=True, backend="cpu")
    assert rms_ratio(y, exact) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed, isa):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    batch, length, channels, states = draw(1, 4), draw(1, 200), draw(1, 70), draw(1, 40)
    cu, sequences = None, None
    if seed % 2:
        batch, sequences = 1, draw(1, 6)
        inner = torch.randint(0, length + 1, (sequences - 1,), generator=g).sort().values.tolist()
        cu = torch.tensor([0, *inner, length], dtype=torch.int32)
    named = inputs(batch, length, channels, states, seed=seed, sequences=sequences)
    want, got = (outputs_and_gradients(named, backend, cu_seqlens=cu) for backend in ("reference", "cpu"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=name)


def test_softplus_threshold_is_torchs():
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64).reshape(1, 1, -1)
    zero = torch.zeros(x.shape[-1], 1, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    # With A = 0, B = C = u = 1 the output is softplus(delta) itself.
    y = selective_scan(torch.ones_like(x), x, zero, one, one, delta_softplus=True, backend="cpu")
    torch.testing.assert_close(y, F.softplus(x), rtol=1e-14, atol=0)
